//! Queries and what they choose among, whose scores lie in a block's shared memory: how much room they take, and the launches.

use super::{Strided, check_group, check_strided, padded};
use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::{Error, Result, ensure};
use crate::ops::attention::Dims;

/// Rows of an operand in shared memory.
const TILE: usize = 64;
/// Bytes of shared memory that kernels declare themselves, at most.
const OWN: usize = 1024;

/// The alpha of softmax, whose gradient has kernels of its own.
pub(super) const SOFTMAX: f64 = 1.0;

pub(super) fn unit(source: &'static Source, (head, wide): (usize, usize), alpha: f64) -> Unit {
    let [squares, soft] = [alpha == 1.5, alpha == SOFTMAX].map(usize::from);
    let numbers = [("D", wide), ("HEAD", head), ("SQUARES", squares), ("SOFT", soft)];
    Unit::new(source, numbers.map(|(name, value)| (name, value.to_string())))
}

/// Queries and what they choose among, whose scores lie in shared memory: `n` vectors a kv head, of chunks or of windows.
pub(super) struct Scored<'a> {
    pub op: &'static str,
    pub dims: Dims,
    q: Strided<'a>,
    keys: &'a CudaBuffer,
    pub n: usize,
    wide: usize,
    room: Room,
}

/// Distance of rows of `n` scores: eight banks from row to row, because at a multiple of 32 the rows that a warp touches together meet in one.
fn apart(n: usize) -> usize {
    n.next_multiple_of(32) + 8
}

/// Bytes that entmax routing has beside the scores of so many slabs: of up to eight tokens a row of numbers that backward divides once a token.
/// Forward has a word of every thread there for every 256 scores.
pub(super) fn beside_scores(dims: Dims, n: usize) -> impl Fn(usize) -> usize {
    let tokens = 16 / dims.group().clamp(1, 16);
    move |slabs| (4 * apart(n) * (slabs * tokens).min(8)).max(1024 * n.div_ceil(256))
}

/// How scores lie in a block's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Room {
    /// Slabs of 16 rows, up to four.
    slabs: usize,
    /// Bytes.
    shared: usize,
}

/// `wide` columns of an operand, `n` scores a query and `beside` bytes in at most `most`; `None` where there is no room for one slab.
/// As many rows as a multiprocessor holds, of which registers allow three blocks; of equally many the smaller blocks, which wait for each other less.
fn room(most: usize, wide: usize, n: usize, beside: impl Fn(usize) -> usize) -> Option<Room> {
    // 1 KiB of a block is the driver's
    let (tiles, of_all) = (3 * TILE * wide.div_ceil(64) * 128, most + 1024);
    let rooms = (1..=4).map(|slabs| Room { slabs, shared: tiles + beside(slabs) + slabs * 16 * apart(n) * 4 });
    let rows = |room: &Room| room.slabs * (of_all / (room.shared + 1024)).min(3);
    rooms.rev().filter(|room| room.shared <= most).max_by_key(rows)
}

/// Whether a block has room for `n` scores a query, with `beside` bytes beside them.
pub(in crate::ops::attention) fn scores_fit(
    device: &CudaDevice,
    d: usize,
    n: usize,
    beside: impl Fn(usize) -> usize,
) -> bool {
    let most = device.properties().shared_per_block as usize;
    padded("routing", d).is_ok_and(|wide| room(most - OWN, wide, n, beside).is_some())
}

impl<'a> Scored<'a> {
    /// `beside` are bytes of a block beside the scores.
    pub fn new(
        op: &'static str,
        dims: Dims,
        q: Strided<'a>,
        (keys, n): (&'a CudaBuffer, usize),
        beside: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        let Dims { b, t, h, g, d } = dims;
        let wide = padded(op, d)?;
        check_group(op, dims)?;
        check_strided(op, "q", q, [b, t, h, d])?;
        ensure!((keys.kind(), keys.len()) == (Kind::Bf16, b * n * g * d), op, "{keys:?} for {n} keys of {dims:?}");
        let most = keys.device().properties().shared_per_block as usize - OWN;
        let room = room(most, wide, n, beside).ok_or_else(|| {
            let why = format!(
                "{n} scores a query: on cuda a block has no room for so many; larger chunks or strides make fewer"
            );
            Error::invalid(op, why)
        })?;
        Ok(Scored { op, dims, q, keys, n, wide, room })
    }

    pub fn unit(&self, source: &'static Source, alpha: f64) -> Unit {
        unit(source, (self.dims.d, self.wide), alpha)
    }

    /// q and what it is scored with.
    pub fn operands(&self) -> [Arg<'a>; 2] {
        [Arg::At(self.q.0, self.q.1), Arg::Buffer(self.keys)]
    }

    /// Blocks over all rows, and the sizes `[t, kv heads, group, n]` and `[q stride, width of a row of scores, slabs]`.
    pub fn cut(&self) -> (Grid, [Arg<'static>; 4], [Arg<'static>; 3]) {
        let (Dims { b, t, g, .. }, group) = (self.dims, self.dims.group());
        let grid = Grid { blocks: [t.div_ceil(self.room.slabs * (16 / group)), b * g, 1], ..Grid::line(1, 256) };
        let sizes = [t, g, group, self.n].map(Arg::int);
        (grid.shared(self.room.shared), sizes, [self.q.2, apart(self.n), self.room.slabs].map(Arg::int))
    }

    /// Launches a kernel over the rows of scores.
    pub fn launch(&self, (source, alpha): (&'static Source, f64), name: &'static str, args: &[Arg]) -> Result<()> {
        let kernel = self.keys.device().kernel(&self.unit(source, alpha), name)?;
        // SAFETY: the callers give the kernel's parameters in order; extents were compared with the buffers in `new` and by them.
        unsafe { kernel.launch(self.cut().0, args) }
    }

    /// Where it all lives.
    pub fn device(&self) -> &'a CudaDevice {
        self.keys.device()
    }

    /// Bytes of an operand in shared memory.
    pub fn operand(&self) -> usize {
        TILE * self.wide.div_ceil(64) * 128
    }

    /// Cells without a bit.
    pub fn cells(&self, chunk: usize) -> Result<CudaBuffer> {
        let Dims { b, t, g, .. } = self.dims;
        self.keys.device().zeros(self.op, Kind::U64, b * g * t.div_ceil(64) * t.div_ceil(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_multiprocessor_holds_as_many_rows_as_it_can() {
        // of an H100: 227 KiB a block, of which a kernel may declare one
        let dims = |group| Dims { b: 1, t: 1, h: group, g: 1, d: 16 };
        let room = |wide, n, group| room(227 * 1024 - OWN, wide, n, beside_scores(dims(group), n));
        let of = |wide, n| room(wide, n, 3).map(|room| room.slabs);
        assert_eq!(of(64, 128), Some(4), "three blocks of four slabs");
        assert_eq!(of(64, 512), Some(2), "two of two, not one of four");
        assert_eq!(of(128, 1024), Some(2), "two are all that one block has room for");
        assert_eq!((of(16, 0), of(64, 100_000)), (Some(4), None));
        // 131072 tokens in chunks of 64 are 2048
        for (wide, n, group) in [(16, 1, 1), (32, 77, 2), (64, 128, 3), (64, 2048, 1), (128, 2048, 3), (128, 2048, 16)]
        {
            let found = room(wide, n, group).unwrap();
            assert!(found.shared <= 226 * 1024 && found.shared.is_multiple_of(16), "{found:?}");
            assert!(n <= apart(n) && apart(n) % 32 == 8, "a row begins eight banks behind the one before");
        }
    }
}
