//! Attention on a CUDA device: dense, and of the chunks that a [`BlockMask`] marks. Operands are bf16, sums f32, on `mma.sync`.
//!
//! Query side (`forward.cu`; backward `rows.cu`): a block owns rows (token, head of the group) of one kv head and walks the keys, ascending,
//! with its sums in registers. Key side (`keys.cu`): a block owns keys and walks the rows that attend them. Two passes of backward compute the
//! scores twice, and nothing is added atomically: the same operands give the same bits.

mod mask;
pub mod plain;
mod router;

pub use mask::BlockMask;
pub(super) use router::routes_stream;
pub use router::{Keys, Routing, Summary, entmax_routing, summary, summary_backward};

use super::Dims;
use crate::device::cuda::{Arg, CudaBuffer, CudaData, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::number::Compute;

static FORWARD: Source =
    Source { name: "attention_forward", text: concat!(include_str!("tiles.cu"), include_str!("forward.cu")) };
static ROWS: Source =
    Source { name: "attention_rows", text: concat!(include_str!("tiles.cu"), include_str!("rows.cu")) };
static KEY_SIDE: Source = Source { name: "attention_keys", text: include_str!("keys.cu") };

/// Keys of a block of them, in shared memory at a time.
const KEYS: usize = 64;
/// Blocks of keys and values in shared memory at most: warps run ahead of each other by as many.
const SLOTS: usize = 12;

/// Head widths that the kernels are compiled for.
pub const WIDTHS: [usize; 3] = [32, 64, 128];
/// Chunk sizes that the kernels are compiled for.
pub const CHUNKS: [usize; 4] = [16, 32, 64, 128];

/// How the query side is cut.
struct Cut {
    /// Warps of a block, and slabs of 16 rows a warp.
    warps: usize,
    slabs: usize,
    /// Keys whose scores exist at a time.
    scores: usize,
}

impl Cut {
    /// Two slabs a warp where every row attends every key, so that a fragment serves both. One slab and more warps for lists: a
    /// slab's tokens then skip what they do not attend, and other warps fill the time. All of it within the registers of a thread.
    fn forward(d: usize, chunk: Option<usize>) -> Self {
        let (warps, slabs, scores) = match (d, chunk) {
            (128, None) => (8, 2, 32),
            (_, None) => (8, 2, 64),
            (128, Some(16)) => (12, 1, 16),
            (128, Some(32)) => (12, 1, 32),
            (128, Some(_)) => (12, 1, 64),
            (_, Some(64 | 128)) => (16, 1, 64),
            (_, Some(_)) => (12, 1, 64),
        };
        Cut { warps, slabs, scores }
    }

    /// Backward keeps the scores of a row and their gradients: one slab a warp.
    fn backward(d: usize, chunk: Option<usize>) -> Self {
        let (warps, scores) = match (d, chunk) {
            (128, _) => (8, 64),
            (_, Some(16 | 32)) => (8, 64),
            (_, _) => (12, 64),
        };
        Cut { warps, slabs: 1, scores }
    }

    fn rows(&self) -> usize {
        self.warps * self.slabs * 16
    }

    /// Tokens of a block.
    fn tokens(&self, group: usize) -> usize {
        self.warps * self.slabs * (16 / group)
    }
}

/// The query side of forward or backward.
fn query_unit(source: &'static Source, cut: &Cut, d: usize, chunk: Option<usize>) -> Unit {
    let numbers = [
        ("D", d),
        ("WARPS", cut.warps),
        ("SLABS", cut.slabs),
        ("SUB", cut.scores),
        ("LISTED", usize::from(chunk.is_some())),
        ("CHUNK", chunk.unwrap_or(KEYS)),
    ];
    Unit::new(source, numbers.map(|(name, value)| (name, value.to_string())))
}

fn key_unit(d: usize, chunk: Option<usize>) -> Unit {
    // rows whose scores exist at a time, within the registers of a thread
    let scores = match (d, chunk) {
        (128, Some(64) | None) => 32,
        (128, _) => 16,
        _ => 64,
    };
    let numbers =
        [("D", d), ("SUB", scores), ("LISTED", usize::from(chunk.is_some())), ("CHUNK", chunk.unwrap_or(KEYS))];
    Unit::new(&KEY_SIDE, numbers.map(|(name, value)| (name, value.to_string())))
}

/// Everything that these ops compile.
pub fn units() -> Vec<Unit> {
    let chunks = || CHUNKS.into_iter().map(Some).chain([None]);
    let kernels = |(d, chunk)| {
        let forward = query_unit(&FORWARD, &Cut::forward(d, chunk), d, chunk);
        [forward, query_unit(&ROWS, &Cut::backward(d, chunk), d, chunk), key_unit(d, chunk)]
    };
    let shapes = WIDTHS.into_iter().flat_map(|d| chunks().map(move |chunk| (d, chunk)));
    shapes.flat_map(kernels).chain(mask::units()).chain(plain::units()).chain(router::units()).collect()
}

/// Whether the streaming kernels take these operands: rounded to bf16, of widths and chunks that they are compiled for. Everything else
/// goes through [`plain`].
pub(super) fn streams(compute: Compute, x: &CudaData, dims: Dims, chunk: Option<usize>) -> bool {
    Kind::of_operands(compute, x.dtype()) == Kind::Bf16
        && WIDTHS.contains(&dims.d)
        && (1..=16).contains(&dims.group())
        && chunk.is_none_or(|chunk| CHUNKS.contains(&chunk))
}

/// Queries, keys and values: bf16, `[b, t, heads, d]`, the heads of a token side by side. Tokens may lie further apart than that, so
/// that one product makes all three.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// `[b, t, h, d]`, its first element, and elements from token to token.
    pub q: (&'a CudaBuffer, usize, usize),
    /// `[b, t, g, d]`.
    pub k: (&'a CudaBuffer, usize, usize),
    /// `[b, t, g, d]`, tokens as far apart as in k.
    pub v: (&'a CudaBuffer, usize, usize),
}

impl<'a> Operands<'a> {
    /// Three buffers without gaps.
    pub fn separate(dims: Dims, q: &'a CudaBuffer, k: &'a CudaBuffer, v: &'a CudaBuffer) -> Self {
        let (wide, narrow) = (dims.h * dims.d, dims.g * dims.d);
        Operands { q: (q, 0, wide), k: (k, 0, narrow), v: (v, 0, narrow) }
    }

    fn check(&self, op: &'static str, dims: Dims) -> Result<()> {
        let Dims { b, t, h, g, d } = dims;
        ensure!(WIDTHS.contains(&d), op, "head width {d}: kernels for {WIDTHS:?} exist on cuda");
        ensure!(
            g > 0 && h % g == 0 && (1..=16).contains(&dims.group()),
            op,
            "{h} query heads, {g} kv heads: 1 to 16 a kv head"
        );
        ensure!(self.k.2 == self.v.2, op, "keys and values lie {} and {} apart", self.k.2, self.v.2);
        for (name, (buffer, first, stride), heads) in [("q", self.q, h), ("k", self.k, g), ("v", self.v, g)] {
            let last = first + (b * t).saturating_sub(1) * stride + heads * d;
            ensure!(
                buffer.kind() == Kind::Bf16 && last <= buffer.len(),
                op,
                "{name} [{b}, {t}, {heads}, {d}] in {buffer:?}"
            );
            ensure!(
                first.is_multiple_of(8) && stride.is_multiple_of(8),
                op,
                "{name} begins at {first}, {stride} apart: not whole pieces of 16 bytes"
            );
        }
        Ok(())
    }
}

/// o `[b, t, h, d]` in bf16, and lse `[b, t, h]` in f32 (natural logarithm), of causal attention: to every token up to the query's own,
/// or to the chunks of a mask, with the bias of an entry added to its scaled scores.
///
/// # Errors
/// When extents do not fit, or there is no kernel for the head width or the chunk size.
pub fn forward(
    dims: Dims,
    operands: Operands,
    mask: Option<&BlockMask>,
    bias: Option<&CudaBuffer>,
) -> Result<(CudaBuffer, CudaBuffer)> {
    let (op, device) = ("attention", operands.q.0.device());
    operands.check(op, dims)?;
    let Dims { b, t, h, g, d } = dims;
    if let Some(mask) = mask {
        mask.check(op, dims)?;
    }
    if let (Some(mask), Some(bias)) = (mask, bias) {
        ensure!(
            bias.kind() == Kind::F32 && mask.entries() <= bias.len(),
            op,
            "{bias:?} for {} entries",
            mask.entries()
        );
    }
    let chunk = mask.map(BlockMask::chunk_size);
    let cut = Cut::forward(d, chunk);
    let (o, lse) = (device.alloc(op, Kind::Bf16, b * t * h * d)?, device.alloc(op, Kind::F32, b * t * h)?);
    let kernel = device.kernel(&query_unit(&FORWARD, &cut, d, chunk), "attention_forward")?;
    let maps = [operands.k, operands.v].map(|x| device.tensor_map(x, [g * d, t, b], KEYS as u32));
    let [k, v] = maps;
    let (k, v) = (k?, v?);
    let (slots, shared) = ring(dims, cut.rows(), device.properties().shared_per_block as usize);
    let lists =
        [mask.map(BlockMask::cells), mask.map(BlockMask::first), bias].map(|x| x.map_or(Arg::Null, Arg::Buffer));
    let buffers = [Arg::At(operands.q.0, operands.q.1), Arg::Map(&k), Arg::Map(&v), Arg::Buffer(&o), Arg::Buffer(&lse)];
    let sizes = [t, g, dims.group(), operands.q.2, mask.map_or(0, BlockMask::chunks), slots].map(Arg::int);
    let args = [&buffers[..], &lists, &sizes, &[Arg::F32(1.0 / (d as f32).sqrt())]].concat();
    let grid =
        Grid { blocks: [t.div_ceil(cut.tokens(dims.group())), b * g, 1], ..Grid::line(1, cut.warps as u32 * 32) };
    // SAFETY: the kernel's parameters in order, for extents that the checks above have compared with the buffers.
    unsafe { kernel.launch(grid.shared(shared), &args)? };
    Ok((o, lse))
}

fn check_lists(op: &'static str, dims: Dims, mask: Option<&BlockMask>, bias: Option<&CudaBuffer>) -> Result<()> {
    let Some(mask) = mask else {
        ensure!(bias.is_none(), op, "a bias without a mask");
        return Ok(());
    };
    mask.check(op, dims)?;
    if let Some(bias) = bias {
        ensure!(
            bias.kind() == Kind::F32 && mask.entries() <= bias.len(),
            op,
            "{bias:?} for {} entries",
            mask.entries()
        );
    }
    Ok(())
}

/// Gradients, f32.
#[derive(Debug)]
pub struct Gradients {
    /// `[b, t, h, d]`.
    pub dq: CudaBuffer,
    /// `[b, t, g, d]`.
    pub dk: CudaBuffer,
    /// `[b, t, g, d]`.
    pub dv: CudaBuffer,
    /// A number an entry, where there is a mask.
    pub dbias: Option<CudaBuffer>,
}

/// Gradients of [`forward`], from what it returned and the gradient of its output (bf16).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dims: Dims,
    operands: Operands,
    mask: Option<&BlockMask>,
    bias: Option<&CudaBuffer>,
    (o, lse): (&CudaBuffer, &CudaBuffer),
    dout: &CudaBuffer,
) -> Result<Gradients> {
    let (op, device) = ("attention", operands.q.0.device());
    operands.check(op, dims)?;
    check_lists(op, dims, mask, bias)?;
    let Dims { b, t, h, g, d } = dims;
    let (rows, numbers) = (b * t * h, b * t * h * d);
    let kept = [(o, Kind::Bf16, numbers), (dout, Kind::Bf16, numbers), (lse, Kind::F32, rows)];
    ensure!(kept.iter().all(|(x, kind, len)| (x.kind(), x.len()) == (*kind, *len)), op, "{kept:?}");
    let chunk = mask.map(BlockMask::chunk_size);
    let (cut, floats) = (Cut::backward(d, chunk), |len| device.alloc(op, Kind::F32, len));
    let (delta, dq) = (floats(rows)?, floats(numbers)?);
    let (dk, dv) = (floats(b * t * g * d)?, floats(b * t * g * d)?);
    let dbias = mask.map(|m| floats(m.entries())).transpose()?;
    let unit = query_unit(&ROWS, &cut, d, chunk);
    let args = [[o, dout, &delta].map(Arg::Buffer), [Arg::Long(rows as i64), Arg::Null, Arg::Null]].concat();
    // SAFETY: the kernel's parameters in order (four); a warp a row.
    unsafe { device.kernel(&unit, "attention_delta")?.launch(Grid::line(rows.div_ceil(8), 256), &args[..4])? };

    let lists =
        [mask.map(BlockMask::cells), mask.map(BlockMask::first), bias].map(|x| x.map_or(Arg::Null, Arg::Buffer));
    let scale = Arg::F32(1.0 / (d as f32).sqrt());
    let at = |(buffer, first, _): (_, usize, usize)| Arg::At(buffer, first);
    let chunks = mask.map_or(0, BlockMask::chunks);
    let [k, v] = [operands.k, operands.v].map(|x| device.tensor_map(x, [g * d, t, b], KEYS as u32));
    let (k, v) = (k?, v?);
    let (slots, shared) = ring(dims, 2 * cut.rows(), device.properties().shared_per_block as usize);
    let inputs = [at(operands.q), Arg::Map(&k), Arg::Map(&v), Arg::Buffer(dout), Arg::Buffer(lse), Arg::Buffer(&delta)];
    let outputs = [Arg::Buffer(&dq), dbias.as_ref().map_or(Arg::Null, Arg::Buffer)];
    let sizes = [t, g, dims.group(), operands.q.2, chunks, slots].map(Arg::int);
    let grid =
        Grid { blocks: [t.div_ceil(cut.tokens(dims.group())), b * g, 1], ..Grid::line(1, cut.warps as u32 * 32) };
    let args = [&inputs[..], &outputs, &lists, &sizes, &[scale]].concat();
    // SAFETY: the kernel's parameters in order, for extents that the checks above have compared with the buffers.
    unsafe { device.kernel(&unit, "attention_rows")?.launch(grid.shared(shared), &args)? };

    let inputs =
        [at(operands.q), at(operands.k), at(operands.v), Arg::Buffer(dout), Arg::Buffer(lse), Arg::Buffer(&delta)];
    let outputs = [&dk, &dv].map(Arg::Buffer);
    let sizes = [t, g, dims.group(), operands.q.2, operands.k.2, chunks].map(Arg::int);
    let grid = Grid { blocks: [t.div_ceil(KEYS), b * g, 1], ..Grid::line(1, 128) };
    // keys, values, and two batches of rows of q and of the output's gradient
    let shared = 6 * 64 * d.div_ceil(64) * 128;
    let args = [&inputs[..], &outputs, &lists, &sizes, &[scale]].concat();
    // SAFETY: as above.
    unsafe { device.kernel(&key_unit(d, chunk), "attention_keys")?.launch(grid.shared(shared), &args)? };
    Ok(Gradients { dq, dk, dv, dbias })
}

/// How many blocks of keys and values fit beside `rows` rows and the list of visited blocks, and the bytes of it all.
fn ring(dims: Dims, rows: usize, limit: usize) -> (usize, usize) {
    let panels = dims.d.div_ceil(64) * 128;
    let slot = 2 * KEYS * panels;
    let rest = rows * panels + dims.t.div_ceil(KEYS).next_multiple_of(8) * 2;
    // what a kernel declares itself, its barriers, counters and sums of heads, is below 4 KiB
    let slots = SLOTS.min((limit - 4096 - rest) / slot);
    (slots, rest + slots * slot)
}

#[cfg(test)]
mod tests;
