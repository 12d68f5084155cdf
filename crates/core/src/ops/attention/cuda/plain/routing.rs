//! What chooses chunks, with whole rows of scores in memory: entmax with its gradient, top-k, windows.

use super::{Batched, Sees, normalize, probabilities, product, rows, scale, scores, tokens, transposed, unit};
use crate::device::Gemm;
use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind};
use crate::error::Result;
use crate::ops::attention::cuda::BlockMask;
use crate::ops::attention::{Center, Dims, Entmax, Pooling, RouterGradient, Span, WindowChoice};
use crate::ops::cuda::real;
use crate::ops::reduce::cuda::sum_axis;

/// Queries of all kv heads, and the launch of a warp for each.
fn for_queries(device: &CudaDevice, kind: Kind, name: &'static str, dims: Dims, args: &[Arg]) -> Result<()> {
    let count = dims.b * dims.g * dims.t;
    let kernel = device.kernel(&unit(kind), name)?;
    // SAFETY: the callers' arguments are the kernel's parameters in order; a warp a query of a kv head.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), args) }
}

fn query_args(dims: Dims, n: usize) -> [Arg<'static>; 5] {
    let sizes = [dims.h, dims.group(), dims.t, n].map(Arg::int);
    [Arg::Long((dims.b * dims.g * dims.t) as i64), sizes[0], sizes[1], sizes[2], sizes[3]]
}

/// The sum over a group's heads of `p [b, h, t, n]` times `share`: `[b, g, t, n]`.
fn mean_of_heads(dims: Dims, n: usize, p: &CudaBuffer, share: f64) -> Result<CudaBuffer> {
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
    let entries = |width: usize| device.alloc(op, kind, mask.entries() * width);
    let (weights, bias, heads) = (entries(1)?, entries(1)?, entries(dims.group())?);
    let inputs = [&p, &w, mask.cells(), mask.first()].map(Arg::Buffer);
    let outputs = [&weights, &bias, &heads].map(Arg::Buffer);
    let tail = [chunk, real(kind, s.sigma), Arg::Int((s.center != Center::None).into())];
    let own = [diagonal.map_or(Arg::Null, Arg::Buffer)];
    let args = [&inputs[..], &own, &outputs, &query_args(dims, n), &tail].concat();
    for_queries(device, kind, "emit", dims, &args)?;
    Ok(PlainRouting { mask, weights, bias, heads })
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
    let (op, device, kind) = ("entmax_routing", operands.0.device(), operands.0.kind());
    let (Dims { b, t, h, g, d }, group) = (dims, dims.group());
    let straight = s.gradient == RouterGradient::StraightThrough;
    let p = routing(dims, n, operands, (s.chunk_size, s.gamma, if straight { 1.0 } else { s.alpha }))?;
    let w = mean_of_heads(dims, n, &p, if straight { 1.0 } else { 1.0 / group as f64 })?;
    let queries = b * g * t;
    let (ds, own) = (device.alloc(op, kind, b * h * t * n)?, device.alloc(op, kind, queries)?);
    let squares = device.alloc(op, Kind::F64, queries)?;
    let fresh = || Ok((device.zeros(op, kind, mask.entries() * group)?, device.alloc(op, Kind::F64, queries)?));
    let seen: Option<(CudaBuffer, CudaBuffer)> = watched.then(fresh).transpose()?;
    let inputs = [&p, &w, mask.cells(), mask.first(), dbias, &ds, &own, &squares].map(Arg::Buffer);
    let both = seen.as_ref().map_or([Arg::Null; 2], |(scores, pairs)| [scores, pairs].map(Arg::Buffer));
    let numbers = [real(kind, s.backward_sigma()), Arg::Int((s.center == Center::Mean).into()), real(kind, s.alpha)];
    let tail = [Arg::int(s.chunk_size), numbers[0], numbers[1], numbers[2], Arg::Int(straight.into())];
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
    (chunk, top): (usize, usize),
    gamma: f64,
) -> Result<BlockMask> {
    let p = routing(dims, n, operands, (chunk, gamma, 1.0))?;
    let w = mean_of_heads(dims, n, &p, 1.0 / dims.group() as f64)?;
    choose(dims, n, &w, chunk, [top, 0, 1])
}

/// `[top, init, local]`.
fn choose(dims: Dims, n: usize, scores: &CudaBuffer, chunk: usize, counts: [usize; 3]) -> Result<BlockMask> {
    let (device, kind) = (scores.device(), scores.kind());
    let cells = empty_cells(device, dims, chunk)?;
    let counts = counts.map(|n| Arg::int(n.min(1 << 30)));
    let args = [&[scores, &cells].map(Arg::Buffer)[..], &query_args(dims, n), &[Arg::int(chunk)], &counts].concat();
    for_queries(device, kind, "choose", dims, &args)?;
    mask_of(dims, chunk, cells)
}

/// The chunks of every query by the scores of `m` overlapping windows.
///
/// # Errors
/// As [`topk`].
pub fn windows(dims: Dims, m: usize, operands: (&CudaBuffer, &CudaBuffer), choice: WindowChoice) -> Result<BlockMask> {
    let (op, device, kind) = ("window_routing", operands.0.device(), operands.0.kind());
    let span = Span::Windows { length: choice.length, stride: choice.stride };
    let p = probabilities(op, dims, m, operands, Sees::Span(span), 1.0)?;
    let sums = mean_of_heads(dims, m, &p, 1.0)?;
    let n = dims.t.div_ceil(choice.chunk_size);
    let all = dims.b * dims.g * dims.t * n;
    let pooled = device.alloc(op, kind, all)?;
    let sizes = [n, m, choice.chunk_size, choice.length, choice.stride].map(Arg::int);
    let overlap = Arg::Int((choice.pooling == Pooling::Overlap).into());
    let args = [&[&sums, &pooled].map(Arg::Buffer)[..], &[Arg::Long(all as i64)], &sizes, &[overlap]].concat();
    // SAFETY: the kernel's parameters in order; a thread a query and chunk.
    unsafe { device.kernel(&unit(kind), "pool_windows")?.launch(Grid::over(all, 256), &args)? };
    choose(dims, n, &pooled, choice.chunk_size, [choice.top, choice.init, choice.local])
}
