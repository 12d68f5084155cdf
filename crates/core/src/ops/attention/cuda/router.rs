//! Chunk summaries, and routing by alpha-entmax over them, on a CUDA device. No score outlives its block: the support is kept as bits,
//! and a threshold a row.

use super::scored::{SOFTMAX, Scored, beside_scores, scores_fit, unit};
use super::{BlockMask, CHUNKS, Strided, WIDTHS, check_chunk, check_strided, padded};
use crate::device::cuda::{Arg, CudaBuffer, CudaData, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::number::Compute;
use crate::ops::attention::{Center, Dims, Entmax};
use crate::ops::cuda::reduce::sum_axis;
use crate::ops::entmax::check_alpha;

static SUMMARY: Source = Source { name: "attention_summary", text: include_str!("summary.cu") };
pub(super) static ROUTER: Source =
    Source { name: "attention_router", text: concat!(include_str!("scores.cu"), include_str!("router.cu")) };
pub(super) static BACKWARD: Source = Source {
    name: "attention_router_backward",
    text: concat!(
        "#define PLACEBO 0\n",
        include_str!("placebo.cu"),
        include_str!("scores.cu"),
        include_str!("router_backward.cu")
    ),
};
/// The same with a random vector in the place of every head's gradient.
pub(super) static PLACEBO: Source = Source {
    name: "attention_router_placebo",
    text: concat!(
        "#define PLACEBO 1\n",
        include_str!("placebo.cu"),
        include_str!("scores.cu"),
        include_str!("router_backward.cu")
    ),
};

fn summary_unit(d: usize, chunk: usize) -> Unit {
    Unit::new(&SUMMARY, [("HEAD", d.to_string()), ("CHUNK", chunk.to_string())])
}

/// Everything that routing compiles.
pub fn units() -> Vec<Unit> {
    let summaries = WIDTHS.into_iter().flat_map(|d| CHUNKS.into_iter().map(move |chunk| summary_unit(d, chunk)));
    let forms = || WIDTHS.into_iter().flat_map(|d| [((d, d), 1.5), ((d, d), 1.25)]);
    let routers = forms().flat_map(|(d, alpha)| [&ROUTER, &BACKWARD, &PLACEBO].map(|source| unit(source, d, alpha)));
    let soft = WIDTHS.into_iter().map(|d| unit(&BACKWARD, (d, d), SOFTMAX));
    summaries.chain(routers).chain(soft).collect()
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

/// Keys `[b, t, g, d]` in bf16.
pub type Keys<'a> = Strided<'a>;

fn check(op: &'static str, dims: Dims, keys: Keys, qbar: &CudaBuffer, chunk: usize) -> Result<usize> {
    let Dims { b, t, g, d, .. } = dims;
    padded(op, d)?;
    check_chunk(op, chunk)?;
    check_strided(op, "keys", keys, [b, t, g, d])?;
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
    let n = dims.t / chunk;
    super::streams(compute, q, dims, Some(chunk)) && scores_fit(q.device(), dims.d, n, beside_scores(dims, n))
}

/// What routing found.
#[derive(Debug)]
pub struct StreamedRouting {
    /// Who attends what.
    pub mask: BlockMask,
    /// A number an entry, f32, in the order of the mask: w, 0 for the own chunk.
    pub weights: CudaBuffer,
    /// A number an entry, f32.
    pub bias: CudaBuffer,
    /// `[b, t, h]`, f32: the threshold of every row on (alpha - 1) times its scores.
    pub taus: CudaBuffer,
}

pub(super) fn factor(settings: Entmax, d: usize) -> Arg<'static> {
    Arg::F32((settings.gamma / (d as f64).sqrt()) as f32)
}

/// Routes `q [b, t, h, d]` (bf16) over the summaries `kbar [b, n, g, d]` (bf16). `diagonal [g]` (f32) is the own chunk's bias, 0 when `None`.
///
/// # Errors
/// When extents do not fit, or a sequence has more chunks than a block has room for.
pub fn entmax_routing(
    dims: Dims,
    q: Strided,
    kbar: &CudaBuffer,
    diagonal: Option<&CudaBuffer>,
    settings: Entmax,
) -> Result<StreamedRouting> {
    let (op, device) = ("entmax_routing", kbar.device());
    let Dims { b, t, h, g, d } = dims;
    let chunk = settings.chunk_size;
    check_chunk(op, chunk)?;
    check_alpha(op, settings.alpha)?;
    let scored = Scored::new(op, dims, q, (kbar, t / chunk), beside_scores(dims, t / chunk))?;
    if let Some(x) = diagonal {
        ensure!((x.kind(), x.len()) == (Kind::F32, g), op, "diagonal {x:?} for {g} kv heads");
    }
    let cells = scored.cells(chunk)?;
    let taus = device.alloc(op, Kind::F32, b * t * h)?;
    let (_, sizes, rest) = scored.cut();
    let numbers = [factor(settings, d), Arg::F32(settings.alpha as f32)];
    let outputs = [&taus, &cells].map(Arg::Buffer);
    let args = [&scored.operands()[..], &outputs, &sizes, &[Arg::int(chunk)], &rest, &numbers].concat();
    scored.launch((&ROUTER, settings.alpha), "router_solve", &args)?;

    let most = b * g * (0..t).map(|token| token / chunk + 1).sum::<usize>();
    let mask = BlockMask::new(cells, (b, g, t), chunk, most)?;
    let (weights, bias) = (device.alloc(op, Kind::F32, most)?, device.alloc(op, Kind::F32, most)?);
    let outputs = [diagonal.map_or(Arg::Null, Arg::Buffer), Arg::Buffer(&weights), Arg::Buffer(&bias), Arg::Null];
    emit(&scored, (&taus, &mask), outputs, settings)?;
    Ok(StreamedRouting { mask, weights, bias, taus })
}

/// Writes what the outputs name: (own bias), weights, bias, heads.
fn emit(scored: &Scored, (taus, mask): (&CudaBuffer, &BlockMask), outputs: [Arg; 4], settings: Entmax) -> Result<()> {
    let (_, sizes, rest) = scored.cut();
    let lists = [taus, mask.cells(), mask.first()].map(Arg::Buffer);
    let numbers = [factor(settings, scored.dims.d), Arg::F32(settings.alpha as f32), Arg::F32(settings.sigma as f32)];
    let center = Arg::Int(i32::from(settings.center != Center::None));
    let chunk = [Arg::int(settings.chunk_size)];
    let args = [&scored.operands()[..], &lists, &outputs, &sizes, &chunk, &rest, &numbers, &[center]].concat();
    scored.launch((&ROUTER, settings.alpha), "router_emit", &args)
}

/// p of every head of every entry, `[entries, group]` (f32), 0 for the own chunk: what a watcher reads. Routing itself does not need it.
///
/// # Errors
/// As [`entmax_routing`].
pub fn head_weights(
    dims: Dims,
    q: Strided,
    kbar: &CudaBuffer,
    routing: &StreamedRouting,
    settings: Entmax,
) -> Result<CudaBuffer> {
    let op = "entmax_routing";
    routing.mask.check(op, dims)?;
    let n = dims.t / settings.chunk_size;
    let scored = Scored::new(op, dims, q, (kbar, n), beside_scores(dims, n))?;
    let heads = kbar.device().alloc(op, Kind::F32, routing.mask.entries() * dims.group())?;
    let outputs = [Arg::Null, Arg::Null, Arg::Null, Arg::Buffer(&heads)];
    emit(&scored, (&routing.taus, &routing.mask), outputs, settings)?;
    Ok(heads)
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
        // every chunk size: what a lane holds and how far a loop is unrolled depends on it
        let shapes = [
            ([2, 64, 2, 16], 4),
            ([3, 50, 1, 24], 8),
            ([1, 16, 1, 32], 16),
            ([2, 70, 3, 64], 32),
            ([1, 300, 2, 128], 64),
            ([1, 257, 1, 64], 128),
        ];
        assert_eq!(shapes.map(|(_, chunk)| chunk), super::super::CHUNKS);
        for ([b, t, g, d], chunk) in shapes {
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
