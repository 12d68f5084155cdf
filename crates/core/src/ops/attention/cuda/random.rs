//! Random choices on a CUDA device, the same as on a CPU.

use super::{BlockMask, choice::mask};
use crate::device::cuda::{Arg, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::Result;
use crate::ops::attention::{Dims, Top};
use crate::shape::checked_numel;

static SOURCE: Source = Source { name: "attention_random", text: include_str!("random.cu") };

/// Everything that random choices compile.
pub(super) fn units() -> Vec<Unit> {
    vec![Unit::new(&SOURCE, [])]
}

/// The op `random_routing` for `(batch, kv heads, queries)` = `extents`, whose keys begin with `layer`.
///
/// # Errors
/// When memory runs out.
pub fn random_choice(
    device: &CudaDevice,
    (b, g, t): (usize, usize, usize),
    chunk: usize,
    layer: u64,
    top: Top,
) -> Result<BlockMask> {
    let op = "random_routing";
    let cells = device.zeros(op, Kind::U64, checked_numel(op, &[b, g, t.div_ceil(64), t.div_ceil(chunk)])?)?;
    let each = top.upload(device)?;
    let lists = [Arg::Buffer(&cells), each.as_ref().map_or(Arg::Null, Arg::Buffer), Arg::Long(layer as i64)];
    let sizes = [b, g, t, chunk, top.most().min(t)].map(Arg::int);
    let kernel = device.kernel(&Unit::new(&SOURCE, []), "random_cells")?;
    // SAFETY: the kernel's parameters in order; a warp a query of a kv head, and a cell for each of its chunks.
    unsafe { kernel.launch(Grid::line((g * t).div_ceil(8), 256), &[&lists[..], &sizes].concat())? };
    mask(Dims { b, t, h: g, g, d: 1 }, cells, chunk, top)
}

#[cfg(test)]
mod tests {
    use crate::ops::attention::{Random, Top, random_routing};
    use crate::ops::cuda::testing::cuda;

    #[test]
    fn the_chunks_are_those_of_the_cpu() {
        let Some(gpu) = cuda() else { return };
        let each: Vec<u32> = (0..3 * 333).map(|i| 1 + i % 23).collect();
        for (extents, chunk_size, top) in [
            ((2, 2, 300), 16, Top::All(4)),
            ((1, 1, 300), 20, Top::All(3)),
            ((1, 3, 333), 4, Top::Each(&each)),
            ((1, 1, 1), 64, Top::All(1)),
            ((1, 2, 1100), 8, Top::All(1000)),
        ] {
            let random = Random { seed: 7, layer: 3, chunk_size };
            let of = |device| random_routing(device, extents, 0, random, top).unwrap().to_host().unwrap();
            let (got, want) = (of(&gpu.device()), of(&crate::testing::device()));
            assert_eq!(got.len(), want.len(), "{extents:?}");
            for i in 0..extents.0 * extents.1 * extents.2 {
                let (row, query) = (i / extents.2, i % extents.2);
                let of = |x: &crate::ops::attention::HostRoutes| {
                    x.chunks_of(row / extents.1, row % extents.1, query).to_vec()
                };
                assert_eq!(of(&got), of(&want), "{extents:?}: row {row}, query {query}");
            }
        }
    }
}
