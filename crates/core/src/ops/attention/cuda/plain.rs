//! Attention and routing with whole rows of scores in memory, in f32 or f64: what runs where operands are not rounded, for the head widths
//! and chunk sizes that the streaming kernels are not compiled for, and in the gradient checks. Memory grows with t^2.

use super::{BlockMask, Gradients};
use crate::device::Gemm;
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::attention::{Dims, Span};
use crate::ops::cuda::{infinity, real, same};
use crate::ops::reduce::cuda::sum_axis;
use crate::shape::checked_numel;

mod indexer;
mod landmark;
mod routing;
pub use indexer::{indexer_kl, indexer_kl_backward};
pub use landmark::{landmark, landmark_backward};
pub use routing::*;

static SOURCE: Source =
    Source { name: "attention_plain", text: concat!(include_str!("placebo.cu"), include_str!("plain.cu")) };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into()), ("INFINITY_OF_R", infinity(number).into())])
}

/// Everything that is compiled here.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Which keys a query sees.
#[derive(Debug, Clone, Copy)]
pub enum Sees<'a> {
    /// A contiguous range.
    Span(Span),
    /// Those up to itself in its chunks, whose scores get a bias an entry where there is one.
    Listed(&'a BlockMask, Option<&'a CudaBuffer>),
    /// Chunks of so many tokens before its own.
    ChunksBefore(usize),
    /// Of the chunks before its own those that are listed.
    ListedBefore(&'a BlockMask),
    /// The tokens of the chunks of so many before its own.
    TokensBefore(usize),
}

impl Sees<'_> {
    /// What the kernel calls it.
    fn args(&self) -> [Arg<'_>; 3] {
        match *self {
            Sees::Span(Span::Causal) => [0, 0, 1].map(Arg::int),
            Sees::Span(Span::Sliding(width)) => [1, width.min(i32::MAX as usize), 1].map(Arg::int),
            Sees::Span(Span::Windows { length, stride }) => [2, length, stride].map(Arg::int),
            Sees::Listed(mask, _) => [3, mask.chunk_size(), 1].map(Arg::int),
            Sees::ChunksBefore(chunk) => [4, chunk, 1].map(Arg::int),
            Sees::ListedBefore(mask) => [5, mask.chunk_size(), 1].map(Arg::int),
            Sees::TokensBefore(chunk) => [6, chunk, 1].map(Arg::int),
        }
    }

    fn lists(&self) -> [Arg<'_>; 3] {
        match *self {
            Sees::Listed(mask, bias) => {
                [Arg::Buffer(mask.cells()), Arg::Buffer(mask.first()), bias.map_or(Arg::Null, Arg::Buffer)]
            }
            Sees::ListedBefore(mask) => [Arg::Buffer(mask.cells()), Arg::Buffer(mask.first()), Arg::Null],
            Sees::Span(_) | Sees::ChunksBefore(_) | Sees::TokensBefore(_) => [Arg::Null; 3],
        }
    }
}

/// A batch of matrices: elements from batch to batch, head to head, repeat to repeat, row to row, column to column.
#[derive(Clone, Copy)]
struct View<'a>(&'a CudaBuffer, [usize; 5]);

/// A product for every batch and head, which overwrites; `div` heads share one of b's, `repeats` products of neighbouring heads add up.
#[derive(Clone, Copy)]
struct Batched {
    gemm: Gemm,
    batch: usize,
    heads: usize,
    div: usize,
    repeats: usize,
}

fn product(op: &'static str, s: Batched, a: View, b: View, c: View, factor: f64) -> Result<()> {
    let (device, kind, Gemm { m, n, k, accumulate }) = (c.0.device(), c.0.kind(), s.gemm);
    same(op, &[a.0, b.0, c.0])?;
    ensure!(s.batch * s.heads <= 65535 && m.div_ceil(32) <= 65535, op, "{} sequences of {m} rows", s.batch);
    ensure!(!accumulate.adds(), op, "these products overwrite");
    let sizes = [m, n, k, s.heads, s.div, s.repeats].map(Arg::int);
    let strides = |v: View| v.1.map(|n| Arg::Long(n as i64));
    let c_strides = [c.1[0], c.1[1], c.1[3]].map(|n| Arg::Long(n as i64));
    let buffers = [a.0, b.0, c.0].map(Arg::Buffer);
    let args = [&buffers[..], &sizes, &[real(kind, factor)], &strides(a), &strides(b), &c_strides].concat();
    let blocks = [n.div_ceil(32), m.div_ceil(32), s.batch * s.heads];
    // SAFETY: the kernel's parameters in order; the callers' strides stay inside their buffers.
    unsafe { device.kernel(&unit(kind), "product")?.launch(Grid { blocks, ..Grid::line(1, 256) }, &args) }
}

/// Strides of `[b, t, heads, d]`, with `of` heads to a step of the head and one to a repeat.
fn tokens(x: &CudaBuffer, t: usize, heads: usize, d: usize, of: usize) -> View<'_> {
    View(x, [t * heads * d, of * d, d, heads * d, 1])
}

/// Strides of `[b, h, t, m]`, likewise.
fn rows(x: &CudaBuffer, h: usize, t: usize, m: usize, of: usize) -> View<'_> {
    View(x, [h * t * m, of * t * m, t * m, m, 1])
}

fn transposed(View(x, [batch, head, repeat, row, column]): View) -> View {
    View(x, [batch, head, repeat, column, row])
}

/// `factor q . k` for `q [b, t, h, d]` and `k [b, m, g, d]`: `[b, h, t, m]`.
fn scores(
    op: &'static str,
    dims: Dims,
    m: usize,
    (q, k): (&CudaBuffer, &CudaBuffer),
    factor: f64,
) -> Result<CudaBuffer> {
    let Dims { b, t, h, g, d } = dims;
    let [all, keys, scores] = [[b, t, h, d], [b, m, g, d], [b, h, t, m]].map(|shape| checked_numel(op, &shape));
    ensure!(q.len() == all? && k.len() == keys?, op, "{q:?} and {k:?} for {dims:?}, {m} keys");
    let out = q.device().alloc(op, q.kind(), scores?)?;
    let size = Batched { gemm: Gemm::new(t, m, d), batch: b, heads: h, div: dims.group(), repeats: 1 };
    product(op, size, tokens(q, t, h, d, 1), transposed(tokens(k, m, g, d, 1)), rows(&out, h, t, m, 1), factor)?;
    Ok(out)
}

/// Scores to probabilities in place.
fn normalize(op: &'static str, dims: Dims, m: usize, scores: &CudaBuffer, sees: Sees, alpha: f64) -> Result<()> {
    let (Dims { b, t, h, .. }, kind) = (dims, scores.kind());
    let count = b * h * t;
    let sizes = [h, dims.group(), t, m].map(Arg::int);
    let head = [Arg::Buffer(scores)];
    let tail = [real(kind, alpha)];
    let args = [&head[..], &sees.lists(), &[Arg::Long(count as i64)], &sizes, &sees.args(), &tail].concat();
    let kernel = scores.device().kernel(&unit(kind), "normalize")?;
    if let Sees::Listed(mask, _) | Sees::ListedBefore(mask) = sees {
        ensure!(mask.extents() == (b, dims.g, t), op, "the mask is for {:?}, the rows are {dims:?}", mask.extents());
    }
    if let Sees::Listed(mask, bias) = sees {
        ensure!(bias.is_none_or(|x| (x.kind(), x.len()) == (kind, mask.entries())), op, "{bias:?} for {mask:?}");
    }
    // SAFETY: the kernel's parameters in order; a warp a row of the scores, whose lists are checked above.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), &args) }
}

fn scale(d: usize) -> f64 {
    1.0 / (d as f64).sqrt()
}

fn probabilities(
    op: &'static str,
    dims: Dims,
    m: usize,
    operands: (&CudaBuffer, &CudaBuffer),
    sees: Sees,
    alpha: f64,
) -> Result<CudaBuffer> {
    let p = scores(op, dims, m, operands, scale(dims.d))?;
    normalize(op, dims, m, &p, sees, alpha)?;
    Ok(p)
}

/// o `[b, t, h, d]` of `q [b, t, h, d]`, `k` and `v [b, m, g, d]`, all of one kind; alpha 1 is softmax.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn forward(dims: Dims, m: usize, [q, k, v]: [&CudaBuffer; 3], sees: Sees, alpha: f64) -> Result<CudaBuffer> {
    let (op, Dims { b, t, h, g, d }) = ("attention", dims);
    let p = probabilities(op, dims, m, (q, k), sees, alpha)?;
    let out = q.device().alloc(op, q.kind(), q.len())?;
    let size = Batched { gemm: Gemm::new(t, d, m), batch: b, heads: h, div: dims.group(), repeats: 1 };
    product(op, size, rows(&p, h, t, m, 1), tokens(v, m, g, d, 1), tokens(&out, t, h, d, 1), 1.0)?;
    Ok(out)
}

/// Gradients of [`forward`]; dbias where the query sees lists with a bias.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dims: Dims,
    m: usize,
    [q, k, v]: [&CudaBuffer; 3],
    sees: Sees,
    alpha: f64,
    dout: &CudaBuffer,
) -> Result<Gradients> {
    let (op, Dims { b, t, h, g, d }, group) = ("attention", dims, dims.group());
    let (device, kind) = (q.device(), q.kind());
    let p = probabilities(op, dims, m, (q, k), sees, alpha)?;
    let [dq, dk, dv] = [q, k, v].map(|x| device.alloc(op, kind, x.len()));
    let (dq, dk, dv) = (dq?, dk?, dv?);
    // a kv head's gradient is the sum over its group
    let keys = Batched { gemm: Gemm::new(m, d, t), batch: b, heads: g, div: 1, repeats: group };
    let into = |x| tokens(x, m, g, d, 1);
    product(op, keys, transposed(rows(&p, h, t, m, group)), tokens(dout, t, h, d, group), into(&dv), 1.0)?;
    let ds = scores(op, dims, m, (dout, v), 1.0)?;
    let args = [Arg::Buffer(&p), Arg::Buffer(&ds), Arg::Long((b * h * t) as i64), Arg::int(m)];
    let args = [&args[..], &[real(kind, alpha), real(kind, scale(d))]].concat();
    let kernel = device.kernel(&unit(kind), "normalize_backward")?;
    // SAFETY: the kernel's parameters in order; a warp a row.
    unsafe { kernel.launch(Grid::line((b * h * t).div_ceil(8), 256), &args)? };
    let size = Batched { gemm: Gemm::new(t, d, m), batch: b, heads: h, div: group, repeats: 1 };
    product(op, size, rows(&ds, h, t, m, 1), tokens(k, m, g, d, 1), tokens(&dq, t, h, d, 1), 1.0)?;
    product(op, keys, transposed(rows(&ds, h, t, m, group)), tokens(q, t, h, d, group), into(&dk), 1.0)?;
    let dbias = match sees {
        Sees::Listed(mask, Some(_)) => {
            let dbias = device.zeros(op, kind, mask.entries())?;
            let all = b * g * t * mask.chunks();
            let buffers = [&ds, mask.cells(), mask.first(), &dbias].map(Arg::Buffer);
            let sizes = [h, group, t, mask.chunk_size()].map(Arg::int);
            let args = [&buffers[..], &[Arg::Long(all as i64)], &sizes, &[real(kind, scale(d))]].concat();
            // SAFETY: the kernel's parameters in order; a thread a query and chunk.
            unsafe { device.kernel(&unit(kind), "bias_backward")?.launch(Grid::over(all, 256), &args)? };
            Some(dbias)
        }
        Sees::Listed(_, None)
        | Sees::Span(_)
        | Sees::ChunksBefore(_)
        | Sees::ListedBefore(_)
        | Sees::TokensBefore(_) => None,
    };
    Ok(Gradients { dq, dk, dv, dbias })
}

/// Summaries `[b, n, g, d]` of the complete chunks of `k [b, t, g, d]`, and the share of every key `[b, n, g, chunk]`.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn summary(dims: Dims, k: &CudaBuffer, qbar: &CudaBuffer, chunk: usize) -> Result<(CudaBuffer, CudaBuffer)> {
    let (op, Dims { b, t, g, d, .. }) = ("chunk_summary", dims);
    same(op, &[k, qbar])?;
    let tokens = checked_numel(op, &[b, t, g, d])?;
    ensure!(
        chunk > 0 && k.len() == tokens && qbar.len() == g * d,
        op,
        "{k:?} and {qbar:?} for {dims:?} in chunks of {chunk}"
    );
    let (device, kind, n) = (k.device(), k.kind(), t / chunk);
    let all = b * n * g;
    let (kbar, weights) = (device.alloc(op, kind, all * d)?, device.alloc(op, kind, all * chunk)?);
    let sizes = [t, g, n, d, chunk].map(Arg::int);
    let buffers = [k, qbar, &kbar, &weights].map(Arg::Buffer);
    let args = [&buffers[..], &[Arg::Long(all as i64)], &sizes, &[real(kind, scale(d))]].concat();
    // SAFETY: the kernel's parameters in order; a warp a chunk and kv head.
    unsafe { device.kernel(&unit(kind), "summarize")?.launch(Grid::line(all.div_ceil(8), 256), &args)? };
    Ok((kbar, weights))
}

/// Adds the gradient of the keys to `dk` and returns that of qbar.
///
/// # Errors
/// As [`summary`].
pub fn summary_backward(
    dims: Dims,
    (k, qbar): (&CudaBuffer, &CudaBuffer),
    chunk: usize,
    (weights, dkbar): (&CudaBuffer, &CudaBuffer),
    dk: &mut CudaBuffer,
) -> Result<CudaBuffer> {
    let (op, Dims { b, t, g, d, .. }) = ("chunk_summary", dims);
    same(op, &[k, qbar, weights, dkbar, dk])?;
    let (device, kind, n) = (k.device(), k.kind(), t / chunk);
    let all = b * n * g;
    ensure!(
        [k.len(), dk.len(), qbar.len(), dkbar.len(), weights.len()]
            == [b * t * g * d, b * t * g * d, g * d, all * d, all * chunk],
        op,
        "{k:?}, {dk:?}, {qbar:?}, {dkbar:?} and {weights:?} for {dims:?}"
    );
    let partial = device.alloc(op, kind, all * d)?;
    let sizes = [t, g, n, d, chunk].map(Arg::int);
    let buffers = [k, qbar, weights, dkbar, dk, &partial].map(Arg::Buffer);
    let args = [&buffers[..], &[Arg::Long(all as i64)], &sizes, &[real(kind, scale(d))]].concat();
    // SAFETY: the kernel's parameters in order; a warp a chunk and kv head.
    unsafe { device.kernel(&unit(kind), "summarize_backward")?.launch(Grid::line(all.div_ceil(8), 256), &args)? };
    sum_axis(&partial, (1, b * n, g * d))
}
