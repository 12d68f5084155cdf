//! Chunk summaries, and routing by alpha-entmax over them, on a CUDA device. No score outlives its block: the support is kept as bits,
//! and a threshold a row.

use super::{BlockMask, CHUNKS, WIDTHS};
use crate::device::cuda::{Arg, CudaBuffer, CudaData, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::number::Compute;
use crate::ops::attention::{Center, Dims, Entmax};
use crate::ops::cuda::reduce::sum_axis;

static SUMMARY: Source = Source { name: "attention_summary", text: include_str!("summary.cu") };
static ROUTER: Source = Source { name: "attention_router", text: include_str!("router.cu") };

/// Chunks whose scores one block has room for: 16 rows of them, beside operands, in the shared memory of a Hopper.
const MOST: usize = 2880;

fn summary_unit(d: usize, chunk: usize) -> Unit {
    Unit::new(&SUMMARY, [("D", d.to_string()), ("CHUNK", chunk.to_string())])
}

fn router_unit(d: usize, alpha: f64) -> Unit {
    Unit::new(&ROUTER, [("D", d.to_string()), ("SQUARES", u8::from(alpha == 1.5).to_string())])
}

/// Everything that routing compiles.
pub fn units() -> Vec<Unit> {
    let summaries = WIDTHS.into_iter().flat_map(|d| CHUNKS.into_iter().map(move |chunk| summary_unit(d, chunk)));
    let routers = WIDTHS.into_iter().flat_map(|d| [1.5, 1.25].map(|alpha| router_unit(d, alpha)));
    summaries.chain(routers).collect()
}

/// Summaries of the complete chunks.
#[derive(Debug)]
pub struct Summary {
    /// `[b, n, g, d]`, f32.
    pub kbar: CudaBuffer,
    /// The same in bf16, an operand.
    pub operand: CudaBuffer,
    /// `[b, n, g, chunk]`, f32: the share of every key, kept for backward.
    pub weights: CudaBuffer,
}

/// Keys `[b, t, g, d]` in bf16: the buffer, its first element, and elements from token to token.
pub type Keys<'a> = (&'a CudaBuffer, usize, usize);

fn check(op: &'static str, dims: Dims, keys: Keys, qbar: &CudaBuffer, chunk: usize) -> Result<usize> {
    let Dims { b, t, g, d, .. } = dims;
    ensure!(WIDTHS.contains(&d), op, "head width {d}: kernels for {WIDTHS:?} exist on cuda");
    ensure!(CHUNKS.contains(&chunk), op, "chunks of {chunk}: kernels for {CHUNKS:?} exist on cuda");
    let last = keys.1 + (b * t).saturating_sub(1) * keys.2 + g * d;
    ensure!(keys.0.kind() == Kind::Bf16 && last <= keys.0.len(), op, "keys [{b}, {t}, {g}, {d}] in {:?}", keys.0);
    ensure!((qbar.kind(), qbar.len()) == (Kind::F32, g * d), op, "{qbar:?}, keys have {g} heads of width {d}");
    Ok(t / chunk)
}

/// Summaries of the chunks of `keys` with the learned query `qbar [g, d]` (f32).
///
/// # Errors
/// When extents do not fit, or there is no kernel for them.
pub fn summary(dims: Dims, keys: Keys, qbar: &CudaBuffer, chunk: usize) -> Result<Summary> {
    let (op, device) = ("chunk_summary", keys.0.device());
    let n = check(op, dims, keys, qbar, chunk)?;
    let Dims { b, t, g, d, .. } = dims;
    let count = b * n * g;
    let kbar = device.alloc(op, Kind::F32, count * d)?;
    let operand = device.alloc(op, Kind::Bf16, count * d)?;
    let weights = device.alloc(op, Kind::F32, count * chunk)?;
    let buffers = [qbar, &kbar, &operand, &weights].map(Arg::Buffer);
    let sizes = [b, t, g, n, keys.2].map(Arg::int);
    let args = [&[Arg::At(keys.0, keys.1)], &buffers[..], &sizes, &[Arg::F32(1.0 / (d as f32).sqrt())]].concat();
    let kernel = device.kernel(&summary_unit(d, chunk), "summary_forward")?;
    // SAFETY: the kernel's parameters in order; a warp a chunk and kv head.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), &args)? };
    Ok(Summary { kbar, operand, weights })
}

/// Adds the gradient of the keys to `dk [b, t, g, d]` (f32) and returns that of qbar, from the shares that [`summary`] kept and
/// `dkbar [b, n, g, d]` (f32).
///
/// # Errors
/// As [`summary`].
pub fn summary_backward(
    dims: Dims,
    keys: Keys,
    qbar: &CudaBuffer,
    chunk: usize,
    (weights, dkbar): (&CudaBuffer, &CudaBuffer),
    dk: &mut CudaBuffer,
) -> Result<CudaBuffer> {
    let (op, device) = ("chunk_summary", keys.0.device());
    let n = check(op, dims, keys, qbar, chunk)?;
    let Dims { b, t, g, d, .. } = dims;
    let count = b * n * g;
    let fits = |x: &CudaBuffer, len| (x.kind(), x.len()) == (Kind::F32, len);
    let all = fits(dkbar, count * d) && fits(dk, b * t * g * d) && fits(weights, count * chunk);
    ensure!(all, op, "{weights:?}, {dkbar:?} and {dk:?} for {dims:?}");
    let partial = device.alloc(op, Kind::F32, count * d)?;
    let buffers = [qbar, weights, dkbar, dk, &partial].map(Arg::Buffer);
    let sizes = [b, t, g, n, keys.2].map(Arg::int);
    let args = [&[Arg::At(keys.0, keys.1)], &buffers[..], &sizes, &[Arg::F32(1.0 / (d as f32).sqrt())]].concat();
    let kernel = device.kernel(&summary_unit(d, chunk), "summary_backward")?;
    // SAFETY: the kernel's parameters in order; a warp a chunk and kv head.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), &args)? };
    sum_axis(&partial, (1, b * n, g * d))
}

/// Whether the streaming router takes these queries.
pub(in crate::ops::attention) fn routes_stream(compute: Compute, q: &CudaData, dims: Dims, chunk: usize) -> bool {
    super::streams(compute, q, dims, Some(chunk)) && dims.t / chunk <= MOST
}

/// What routing found.
#[derive(Debug)]
pub struct Routing {
    /// Who attends what.
    pub mask: BlockMask,
    /// A number an entry, f32, in the order of the mask: w, 0 for the own chunk.
    pub weights: CudaBuffer,
    /// A number an entry, f32.
    pub bias: CudaBuffer,
    /// `[b, t, h]`, f32: the threshold of every row on (alpha - 1) times its scores.
    pub taus: CudaBuffer,
}

/// Routes `q [b, t, h, d]` (bf16; first element, elements from token to token) over the summaries `kbar [b, n, g, d]` (bf16). `diagonal [g]`
/// (f32) is the own chunk's bias, 0 when `None`.
///
/// # Errors
/// When extents do not fit, or a sequence has more chunks than a block has room for.
pub fn entmax_routing(
    dims: Dims,
    q: (&CudaBuffer, usize, usize),
    kbar: &CudaBuffer,
    diagonal: Option<&CudaBuffer>,
    settings: Entmax,
) -> Result<Routing> {
    let (op, device) = ("entmax_routing", kbar.device());
    let Dims { b, t, h, g, d } = dims;
    let (chunk, group) = (settings.chunk_size, dims.group());
    ensure!(WIDTHS.contains(&d) && (1..=16).contains(&group), op, "no kernel for {dims:?} on cuda");
    ensure!(CHUNKS.contains(&chunk), op, "chunks of {chunk}: kernels for {CHUNKS:?} exist on cuda");
    let (n, chunks) = (t / chunk, t.div_ceil(chunk));
    ensure!(n <= MOST, op, "{n} chunks: a block has room for the scores of {MOST}; larger chunks make fewer");
    let last = q.1 + (b * t).saturating_sub(1) * q.2 + h * d;
    ensure!(q.0.kind() == Kind::Bf16 && last <= q.0.len(), op, "q [{b}, {t}, {h}, {d}] in {:?}", q.0);
    ensure!(
        q.1.is_multiple_of(8) && q.2.is_multiple_of(8),
        op,
        "q begins at {}, {} apart: not whole pieces of 16 bytes",
        q.1,
        q.2
    );
    ensure!((kbar.kind(), kbar.len()) == (Kind::Bf16, b * n * g * d), op, "{kbar:?} for {n} chunks of {dims:?}");
    if let Some(x) = diagonal {
        ensure!((x.kind(), x.len()) == (Kind::F32, g), op, "diagonal {x:?} for {g} kv heads");
    }
    let cells = device.zeros(op, Kind::U64, b * g * t.div_ceil(64) * chunks)?;
    let taus = device.alloc(op, Kind::F32, b * t * h)?;
    let (slabs, width, shared) = room(d, n, device.properties().shared_per_block as usize);
    let grid = Grid { blocks: [t.div_ceil(slabs * (16 / group)), b * g, 1], ..Grid::line(1, 256) }.shared(shared);
    let unit = router_unit(d, settings.alpha);
    let operands = [Arg::At(q.0, q.1), Arg::Buffer(kbar), Arg::Buffer(&taus)];
    let sizes = [t, g, group, n, chunk, q.2, width, slabs].map(Arg::int);
    let numbers = [settings.gamma / (d as f64).sqrt(), settings.alpha].map(|x| Arg::F32(x as f32));
    let args = [&operands[..], &[Arg::Buffer(&cells)], &sizes, &numbers].concat();
    // SAFETY: the kernel's parameters in order, for extents that are compared with the buffers above.
    unsafe { device.kernel(&unit, "router_solve")?.launch(grid, &args)? };

    let most = b * g * (0..t).map(|token| token / chunk + 1).sum::<usize>();
    let mask = BlockMask::new(cells, (b, g, t), chunk, most)?;
    let (weights, bias) = (device.alloc(op, Kind::F32, most)?, device.alloc(op, Kind::F32, most)?);
    let lists = [mask.cells(), mask.first()].map(Arg::Buffer);
    let outputs = [diagonal.map_or(Arg::Null, Arg::Buffer), Arg::Buffer(&weights), Arg::Buffer(&bias)];
    let center = Arg::Int(i32::from(settings.center != Center::None));
    let args = [&operands[..], &lists, &outputs, &sizes, &numbers, &[Arg::F32(settings.sigma as f32), center]].concat();
    // SAFETY: as above; entries are numbered below `most`.
    unsafe { device.kernel(&unit, "router_emit")?.launch(grid, &args)? };
    Ok(Routing { mask, weights, bias, taus })
}

/// Slabs of 16 rows a block, the width of a row of scores, and the bytes of it all: as many slabs, up to four, as fit.
fn room(d: usize, n: usize, limit: usize) -> (usize, usize, usize) {
    let (panels, width) = (d.div_ceil(64) * 128, n.max(1));
    let bytes = |slabs: usize| (slabs * 16 + 64) * panels + slabs * 16 * width * 4;
    let slabs = (1..=4).rev().find(|&slabs| bytes(slabs) <= limit).unwrap_or(1);
    (slabs, width, bytes(slabs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Kind::{Bf16, F32};
    use crate::ops::attention::{RouterGradient, chunk_summary, entmax_routing as on_cpu};
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::tape::Tape;

    #[test]
    fn summaries_and_their_gradients_agree_with_the_cpu() {
        let Some(gpu) = cuda() else { return };
        for ([b, t, g, d], chunk) in
            [([1, 16, 1, 32], 16), ([2, 70, 3, 64], 32), ([1, 300, 2, 128], 64), ([1, 257, 1, 64], 128)]
        {
            let (dims, n) = (Dims { b, t, h: g, g, d }, t / chunk);
            let host = tensors(&[(&[b, t, g, d], Bf16), (&[g * d], F32), (&[b, n, g, d], F32)]);
            let tape = Tape::new();
            let [k, qbar] = [0, 1].map(|i| tape.leaf(host[i].clone()));
            let out = chunk_summary(&tape, &k, &qbar, chunk).unwrap();
            let grads = tape.backward_from(&out, host[2].clone()).unwrap();
            let (gk, gq, gd) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], F32), gpu.tensor(&host[2], F32));
            let keys = (&gk, 0, g * d);
            let got = summary(dims, keys, &gq, chunk).unwrap();
            // a softmax of sums of d products, then sums of a chunk
            let bound = Bound::of(F32, F32, 8 * (d + chunk));
            let name = format!("[{b}, {t}, {g}, {d}] chunk {chunk}");
            compare(&name, &got.kbar, &out.value, bound);
            compare(&name, &got.operand, &out.value, Bound::of(F32, Bf16, 8 * (d + chunk)));
            let mut dk = gpu.cuda().zeros("dk", F32, b * t * g * d).unwrap();
            let dqbar = summary_backward(dims, keys, &gq, chunk, (&got.weights, &gd), &mut dk).unwrap();
            compare(&name, &dk, grads.get(&k).unwrap(), bound);
            compare(&name, &dqbar, grads.get(&qbar).unwrap(), Bound::of(F32, F32, 8 * (d + t)));
        }
    }

    /// Scores of bf16 operands are sums in f32, so a weight may be off by some roundings of its row's largest score; where the CPU in
    /// f64 has a smaller weight than that, the support may differ, elsewhere not.
    #[test]
    fn support_weights_and_bias_agree_with_the_cpu() {
        let Some(gpu) = cuda() else { return };
        let shapes = [
            ([1, 5, 2, 1, 32], 16),
            ([2, 129, 3, 1, 64], 16),
            ([1, 300, 8, 2, 64], 32),
            ([1, 1100, 16, 1, 128], 64),
            ([1, 700, 4, 4, 32], 16),
        ];
        for ([b, t, h, g, d], chunk) in shapes {
            for (alpha, center) in [(1.5, Center::Mean), (1.5, Center::None), (1.25, Center::MeanDetached)] {
                let (dims, n) = (Dims { b, t, h, g, d }, t / chunk);
                let host = tensors(&[(&[b, t, h, d], Bf16), (&[b, n, g, d], Bf16), (&[g], F32)]);
                let settings =
                    Entmax { chunk_size: chunk, alpha, gamma: 0.7, sigma: 2.0, center, gradient: RouterGradient::Full };
                let tape = Tape::inference();
                let [q, kbar, own] = [0, 1, 2].map(|i| tape.leaf(host[i].clone()));
                let want = on_cpu(&tape, &q, &kbar, Some(&own), settings).unwrap();
                let (routes, weights) = (want.routes.to_host().unwrap(), want.weights.to_f64().unwrap());
                let bias = want.bias.value.to_f64().unwrap();
                let (gq, gk, gd) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16), gpu.tensor(&host[2], F32));
                let got = entmax_routing(dims, (&gq, 0, h * d), &gk, Some(&gd), settings).unwrap();
                let name = format!("[{b}, {t}, {h}, {g}, {d}] chunk {chunk} alpha {alpha} {center:?}");
                let (cells, first): (Vec<u64>, Vec<u32>) =
                    (got.mask.cells().download().unwrap(), got.mask.first().download().unwrap());
                let (gw, gb) = (gpu.numbers(&got.weights), gpu.numbers(&got.bias));
                let (tiles, chunks, mut checked) = (t.div_ceil(64), t.div_ceil(chunk), 0);
                for (row, token) in (0..b * g * t).map(|i| (i / t, i % t)) {
                    let listed = routes.chunks_of(row / g, row % g, token);
                    let entries = routes.entries_of(row / g, row % g, token);
                    let small =
                        listed.len() > 1 && weights[entries.clone()][..listed.len() - 1].iter().any(|&w| w < 1e-4);
                    for c in 0..=token / chunk {
                        let cell = (row * tiles + token / 64) * chunks + c;
                        let bit = cells[cell] >> (token % 64) & 1 == 1;
                        let place = listed.binary_search(&(c as u32)).ok();
                        let w = place.map_or(0.0, |p| weights[entries.start + p]);
                        assert!(
                            bit == place.is_some() || w < 1e-4,
                            "{name}: token {token} chunk {c}: bit {bit}, w {w:e}"
                        );
                        if let (true, Some(p)) = (bit, place) {
                            let at = (first[cell] + (cells[cell] & ((1 << (token % 64)) - 1)).count_ones()) as usize;
                            assert!((gw[at] - w).abs() < 1e-4, "{name}: token {token} chunk {c}: w {} for {w}", gw[at]);
                            // log w of a small weight, and with it the mean, is as uncertain as the weight is small
                            if !small {
                                let far = (gb[at] - bias[entries.start + p]).abs();
                                assert!(far < 1e-2, "{name}: token {token} chunk {c}: bias off by {far:e}");
                                checked += 1;
                            }
                        }
                    }
                }
                assert!(checked > 0, "{name}: biases were compared");
            }
        }
    }
}
