//! What chooses chunks, with whole rows of scores in memory: entmax with its gradient, top-k, windows.

use super::{Batched, Sees, normalize, probabilities, product, rows, scale, scores, tokens, transposed, unit};
use crate::device::Gemm;
use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind};
use crate::error::Result;
use crate::ops::attention::cuda::{BlockMask, ListedBias};
use crate::ops::attention::routing::LEAST;
use crate::ops::attention::{Center, Dims, Entmax, Pooling, RouterGradient, Span, Top, WindowChoice};
use crate::ops::cuda::real;
use crate::ops::reduce::cuda::sum_axis;

/// Queries of all kv heads, and the launch of a warp for each.
pub(super) fn for_queries(device: &CudaDevice, kind: Kind, name: &'static str, dims: Dims, args: &[Arg]) -> Result<()> {
    let count = dims.b * dims.g * dims.t;
    let kernel = device.kernel(&unit(kind), name)?;
    // SAFETY: the callers' arguments are the kernel's parameters in order; a warp a query of a kv head.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), args) }
}

pub(super) fn query_args(dims: Dims, n: usize) -> [Arg<'static>; 5] {
    let sizes = [dims.h, dims.group(), dims.t, n].map(Arg::int);
    [Arg::Long((dims.b * dims.g * dims.t) as i64), sizes[0], sizes[1], sizes[2], sizes[3]]
}

/// The sum over a group's heads of `p [b, h, t, n]` times `share`: `[b, g, t, n]`.
pub(super) fn mean_of_heads(dims: Dims, n: usize, p: &CudaBuffer, share: f64) -> Result<CudaBuffer> {
    let (device, kind) = (p.device(), p.kind());
    let w = device.alloc("routing", kind, dims.b * dims.g * dims.t * n)?;
    let args = [&[p, &w].map(Arg::Buffer)[..], &query_args(dims, n), &[real(kind, share)]].concat();
    for_queries(device, kind, "mean_of_heads", dims, &args)?;
    Ok(w)
}

fn mask_of(dims: Dims, chunk: usize, cells: CudaBuffer) -> Result<BlockMask> {
    let most = dims.b * dims.g * (0..dims.t).map(|token| token / chunk + 1).sum::<usize>();
    BlockMask::new(cells, (dims.b, dims.g, dims.t), chunk, most)
}

fn empty_cells(device: &CudaDevice, dims: Dims, chunk: usize) -> Result<CudaBuffer> {
    device.zeros("routing", Kind::U64, dims.b * dims.g * dims.t.div_ceil(64) * dims.t.div_ceil(chunk))
}

/// What [`entmax_routing`] found; numbers an entry are in the order of the mask.
#[derive(Debug)]
pub struct PlainRouting {
    /// Who attends what.
    pub mask: BlockMask,
    /// w, 0 for the own chunk.
    pub weights: CudaBuffer,
    /// A number an entry.
    pub bias: CudaBuffer,
    /// p of every head of the group, 0 for the own chunk: `[entries, group]`.
    pub heads: CudaBuffer,
}

/// `gamma q . kbar / sqrt d` of the chunks before the own one, by entmax, or softmax where alpha is 1: `[b, h, t, n]`.
fn routing(dims: Dims, n: usize, operands: (&CudaBuffer, &CudaBuffer), s: (usize, f64, f64)) -> Result<CudaBuffer> {
    let (chunk, gamma, alpha) = s;
    let p = scores("routing", dims, n, operands, gamma * scale(dims.d))?;
    normalize("routing", dims, n, &p, Sees::ChunksBefore(chunk), alpha)?;
    Ok(p)
}

/// Routes `q [b, t, h, d]` over `kbar [b, n, g, d]`; `diagonal [g]` is the own chunk's bias, 0 when `None`.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn entmax_routing(
    dims: Dims,
    n: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    diagonal: Option<&CudaBuffer>,
    s: Entmax,
) -> Result<PlainRouting> {
    let (op, device, kind) = ("entmax_routing", operands.0.device(), operands.0.kind());
    let p = routing(dims, n, operands, (s.chunk_size, s.gamma, s.alpha))?;
    let w = mean_of_heads(dims, n, &p, 1.0 / dims.group() as f64)?;
    let cells = empty_cells(device, dims, s.chunk_size)?;
    let chunk = Arg::int(s.chunk_size);
    let args = [&[&w, &cells].map(Arg::Buffer)[..], &query_args(dims, n), &[chunk]].concat();
    for_queries(device, kind, "mark_support", dims, &args)?;
    let mask = mask_of(dims, s.chunk_size, cells)?;
    let ListedBias { weights, bias, heads } =
        emit((op, dims, n), (&p, &w), &mask, diagonal, (s.sigma, s.center != Center::None, 0.0))?;
    Ok(PlainRouting { mask, weights, bias, heads: heads.expect("emitted") })
}

/// w, bias and p of the heads of every entry; `(sigma, whether the mean is subtracted, the least w whose logarithm is taken)`.
fn emit(
    (op, dims, n): (&'static str, Dims, usize),
    (p, w): (&CudaBuffer, &CudaBuffer),
    mask: &BlockMask,
    diagonal: Option<&CudaBuffer>,
    (sigma, centered, least): (f64, bool, f64),
) -> Result<ListedBias> {
    let (device, kind) = (p.device(), p.kind());
    let entries = |width: usize| device.alloc(op, kind, mask.entries() * width);
    let (weights, bias, heads) = (entries(1)?, entries(1)?, entries(dims.group())?);
    let inputs = [p, w, mask.cells(), mask.first()].map(Arg::Buffer);
    let outputs = [&weights, &bias, &heads].map(Arg::Buffer);
    let tail = [Arg::int(mask.chunk_size()), real(kind, sigma), Arg::Int(centered.into()), real(kind, least)];
    let own = [diagonal.map_or(Arg::Null, Arg::Buffer)];
    let args = [&inputs[..], &own, &outputs, &query_args(dims, n), &tail].concat();
    for_queries(device, kind, "emit", dims, &args)?;
    Ok(ListedBias { weights, bias, heads: Some(heads) })
}

/// Softmax over the listed chunks before the own one: `[b, h, t, n]`.
fn of_listed(
    dims: Dims,
    n: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    mask: &BlockMask,
    gamma: f64,
) -> Result<CudaBuffer> {
    let p = scores("softmax_bias", dims, n, operands, gamma * scale(dims.d))?;
    normalize("softmax_bias", dims, n, &p, Sees::ListedBefore(mask), 1.0)?;
    Ok(p)
}

/// The bias of the entries of `mask`, whoever chose them: see the op `softmax_bias`.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn softmax_bias(
    dims: Dims,
    n: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    mask: &BlockMask,
    gamma: f64,
) -> Result<ListedBias> {
    let p = of_listed(dims, n, operands, mask, gamma)?;
    let w = mean_of_heads(dims, n, &p, 1.0 / dims.group() as f64)?;
    emit(("softmax_bias", dims, n), (&p, &w), mask, None, (1.0, false, LEAST))
}

/// Its gradients from those of the bias of every entry.
///
/// # Errors
/// As [`softmax_bias`].
pub fn softmax_bias_backward(
    dims: Dims,
    n: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    (mask, dbias): (&BlockMask, &CudaBuffer),
    gamma: f64,
    watched: bool,
) -> Result<RoutedGradients> {
    let p = of_listed(dims, n, operands, mask, gamma)?;
    let w = mean_of_heads(dims, n, &p, 1.0)?;
    let settings = Entmax {
        chunk_size: mask.chunk_size(),
        alpha: 1.0,
        gamma,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::StraightThrough,
    };
    gradients((dims, n), operands, (&p, &w), (mask, dbias), (settings, LEAST * dims.group() as f64), watched)
}

/// Gradients of [`entmax_routing`].
#[derive(Debug)]
pub struct RoutedGradients {
    /// `[b, t, h, d]` and `[b, n, g, d]`; nothing where the gradient is stopped.
    pub operands: Option<(CudaBuffer, CudaBuffer)>,
    /// `[g]`.
    pub diagonal: CudaBuffer,
    /// The sum of squares of the scores' gradients: one f64.
    pub squares: CudaBuffer,
    /// For a watcher: the scores' gradients of every entry `[entries, group]`, and how many chunks have one, an f64.
    pub watched: Option<(CudaBuffer, CudaBuffer)>,
}

/// From the gradient of the bias of every entry.
///
/// # Errors
/// As [`entmax_routing`].
pub fn entmax_backward(
    dims: Dims,
    n: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    mask: &BlockMask,
    dbias: &CudaBuffer,
    s: Entmax,
    watched: bool,
) -> Result<RoutedGradients> {
    let straight = s.gradient == RouterGradient::StraightThrough;
    let p = routing(dims, n, operands, (s.chunk_size, s.gamma, if straight { 1.0 } else { s.alpha }))?;
    let w = mean_of_heads(dims, n, &p, if straight { 1.0 } else { 1.0 / dims.group() as f64 })?;
    gradients((dims, n), operands, (&p, &w), (mask, dbias), (s, 0.0), watched)
}

/// From every head's weights and what they add up to (their mean for entmax), to q and kbar; below `least` w is a constant.
fn gradients(
    (dims, n): (Dims, usize),
    operands: (&CudaBuffer, &CudaBuffer),
    (p, w): (&CudaBuffer, &CudaBuffer),
    (mask, dbias): (&BlockMask, &CudaBuffer),
    (s, least): (Entmax, f64),
    watched: bool,
) -> Result<RoutedGradients> {
    let (op, device, kind) = ("entmax_routing", operands.0.device(), operands.0.kind());
    let (Dims { b, t, h, g, d }, group) = (dims, dims.group());
    let straight = s.gradient == RouterGradient::StraightThrough;
    let queries = b * g * t;
    let (ds, own) = (device.alloc(op, kind, b * h * t * n)?, device.alloc(op, kind, queries)?);
    let squares = device.alloc(op, Kind::F64, queries)?;
    let fresh = || Ok((device.zeros(op, kind, mask.entries() * group)?, device.alloc(op, Kind::F64, queries)?));
    let seen: Option<(CudaBuffer, CudaBuffer)> = watched.then(fresh).transpose()?;
    let inputs = [p, w, mask.cells(), mask.first(), dbias, &ds, &own, &squares].map(Arg::Buffer);
    let both = seen.as_ref().map_or([Arg::Null; 2], |(scores, pairs)| [scores, pairs].map(Arg::Buffer));
    let numbers = [real(kind, s.backward_sigma()), Arg::Int((s.center == Center::Mean).into()), real(kind, s.alpha)];
    let placebo = Arg::Int((s.gradient == RouterGradient::Placebo).into());
    let tail =
        [&[Arg::int(s.chunk_size)], &numbers[..], &[Arg::Int(straight.into()), real(kind, least), placebo]].concat();
    let args = [&inputs[..], &both, &query_args(dims, n), &tail].concat();
    for_queries(device, kind, "route_backward", dims, &args)?;
    let diagonal = sum_axis(&sum_axis(&own, (b * g, t, 1))?, (1, b, g))?;
    let total = |x: &CudaBuffer| sum_axis(x, (1, queries, 1));
    let stopped = s.gradient == RouterGradient::Stopped;
    let operands = if stopped {
        None
    } else {
        let [dq, dk] = [operands.0, operands.1].map(|x| device.alloc(op, kind, x.len()));
        let (dq, dk, factor) = (dq?, dk?, s.gamma * scale(d));
        let size = Batched { gemm: Gemm::new(t, d, n), batch: b, heads: h, div: group, repeats: 1 };
        let kbar = tokens(operands.1, n, g, d, 1);
        product(op, size, rows(&ds, h, t, n, 1), kbar, tokens(&dq, t, h, d, 1), factor)?;
        let size = Batched { gemm: Gemm::new(n, d, t), batch: b, heads: g, div: 1, repeats: group };
        let q = tokens(operands.0, t, h, d, group);
        product(op, size, transposed(rows(&ds, h, t, n, group)), q, tokens(&dk, n, g, d, 1), factor)?;
        Some((dq, dk))
    };
    let zero = || device.zeros(op, Kind::F64, 1);
    let watched = match seen {
        Some((mut scores, _)) if stopped => {
            scores.fill_bytes(0)?;
            Some((scores, zero()?))
        }
        Some((scores, pairs)) => Some((scores, total(&pairs)?)),
        None => None,
    };
    let squares = if stopped { zero()? } else { total(&squares)? };
    Ok(RoutedGradients { operands, diagonal, squares, watched })
}

/// The `top` best chunks, the own one included, by the group mean of softmax probabilities.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn topk(
    dims: Dims,
    n: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    (chunk, top): (usize, Top),
    gamma: f64,
) -> Result<BlockMask> {
    let p = routing(dims, n, operands, (chunk, gamma, 1.0))?;
    let w = mean_of_heads(dims, n, &p, 1.0 / dims.group() as f64)?;
    choose(dims, n, &w, chunk, (top, [0, 1]))
}

/// The chunks that hold most of each query's softmax over the keys `k [b, t, g, d]` of the chunks before its own: see the op `mass_routing`.
///
/// # Errors
/// As [`topk`].
pub fn mass(dims: Dims, operands: (&CudaBuffer, &CudaBuffer), (chunk, top): (usize, Top)) -> Result<BlockMask> {
    let (op, t) = ("mass_routing", dims.t);
    let p = probabilities(op, dims, t, operands, Sees::TokensBefore(chunk), 1.0)?;
    let sums = mean_of_heads(dims, t, &p, 1.0)?;
    // a token is a window of one
    let n = t / chunk;
    let mass = pooled(op, dims, (&sums, t, n), (chunk, 1, 1), true)?;
    choose(dims, n, &mass, chunk, (top, [0, 1]))
}

/// `[init, local]` beside the number of chunks.
fn choose(
    dims: Dims,
    n: usize,
    scores: &CudaBuffer,
    chunk: usize,
    (top, forced): (Top, [usize; 2]),
) -> Result<BlockMask> {
    let (device, kind) = (scores.device(), scores.kind());
    let cells = empty_cells(device, dims, chunk)?;
    let counts = [top.most(), forced[0], forced[1]].map(|n| Arg::int(n.min(1 << 30)));
    let each = top.upload(device)?;
    let each = [each.as_ref().map_or(Arg::Null, Arg::Buffer)];
    let lists = [scores, &cells].map(Arg::Buffer);
    let args = [&lists[..], &query_args(dims, n), &[Arg::int(chunk)], &counts, &each].concat();
    for_queries(device, kind, "choose", dims, &args)?;
    mask_of(dims, chunk, cells)
}

/// The chunks of every query by the scores of `m` overlapping windows.
///
/// # Errors
/// As [`topk`].
pub fn windows(dims: Dims, m: usize, operands: (&CudaBuffer, &CudaBuffer), choice: WindowChoice) -> Result<BlockMask> {
    let op = "window_routing";
    let span = Span::Windows { length: choice.length, stride: choice.stride };
    let p = probabilities(op, dims, m, operands, Sees::Span(span), 1.0)?;
    let sums = mean_of_heads(dims, m, &p, 1.0)?;
    let n = dims.t.div_ceil(choice.chunk_size);
    let sizes = (choice.chunk_size, choice.length, choice.stride);
    let scores = pooled(op, dims, (&sums, m, n), sizes, choice.pooling == Pooling::Overlap)?;
    choose(dims, n, &scores, choice.chunk_size, (Top::All(choice.top), [choice.init, choice.local]))
}

/// The score of each of `n` chunks from those of the `m` windows that touch it; `(chunk, length, stride)` in tokens.
fn pooled(
    op: &'static str,
    dims: Dims,
    (windows, m, n): (&CudaBuffer, usize, usize),
    (chunk, length, stride): (usize, usize, usize),
    overlap: bool,
) -> Result<CudaBuffer> {
    let (device, kind, all) = (windows.device(), windows.kind(), dims.b * dims.g * dims.t * n);
    let pooled = device.alloc(op, kind, all)?;
    let sizes = [n, m, chunk, length, stride].map(Arg::int);
    let buffers = [windows, &pooled].map(Arg::Buffer);
    let args = [&buffers[..], &[Arg::Long(all as i64)], &sizes, &[Arg::Int(overlap.into())]].concat();
    // SAFETY: the kernel's parameters in order; a thread a query and chunk.
    unsafe { device.kernel(&unit(kind), "pool_windows")?.launch(Grid::over(all, 256), &args)? };
    Ok(pooled)
}
