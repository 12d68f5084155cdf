//! The bias of a softmax of softmaxes, with whole rows of scores in memory: the op `landmark_bias`.

use super::{Batched, product, rows, scale, scores, tokens, transposed, unit};
use crate::device::Gemm;
use crate::device::cuda::{Arg, CudaBuffer, Grid};
use crate::error::{Result, ensure};
use crate::ops::attention::Dims;
use crate::ops::attention::cuda::BlockMask;
use crate::ops::cuda::elementwise::add_into;

/// Runs one of the two kernels over the scores of every query to keys and summaries, with a number an entry.
fn run(
    name: &'static str,
    dims: Dims,
    (s, r): (&CudaBuffer, &CudaBuffer),
    mask: &BlockMask,
    numbers: &CudaBuffer,
) -> Result<()> {
    let (kind, all) = (s.kind(), dims.b * dims.h * dims.t * mask.chunks());
    ensure!(mask.extents() == (dims.b, dims.g, dims.t), name, "the mask is for {:?}, q is {dims:?}", mask.extents());
    ensure!((numbers.kind(), numbers.len()) == (kind, mask.entries()), name, "{numbers:?} for {mask:?}");
    let buffers = [s, r, mask.cells(), mask.first(), numbers].map(Arg::Buffer);
    let sizes = [dims.t, dims.t / mask.chunk_size(), mask.chunk_size()].map(Arg::int);
    let args = [&buffers[..], &[Arg::Long(all as i64)], &sizes].concat();
    // SAFETY: the kernel's parameters in order; a thread a query and chunk, whose lists are checked above.
    unsafe { s.device().kernel(&unit(kind), name)?.launch(Grid::over(all, 256), &args) }
}

/// Scores to keys and, times gamma, to summaries.
fn both(
    op: &'static str,
    dims: Dims,
    n: usize,
    [q, k, kbar]: [&CudaBuffer; 3],
    gamma: f64,
) -> Result<(CudaBuffer, CudaBuffer)> {
    ensure!(dims.h == dims.g, op, "{} query heads, {} kv heads: every query head has keys of its own", dims.h, dims.g);
    let s = scores(op, dims, dims.t, (q, k), scale(dims.d))?;
    Ok((s, scores(op, dims, n, (q, kbar), gamma * scale(dims.d))?))
}

/// A number an entry of `mask`, for `q` and `k [b, t, h, d]` and `kbar [b, n, h, d]`.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn landmark(dims: Dims, operands: [&CudaBuffer; 3], mask: &BlockMask, gamma: f64) -> Result<CudaBuffer> {
    let op = "landmark_bias";
    let (s, r) = both(op, dims, dims.t / mask.chunk_size(), operands, gamma)?;
    let bias = s.device().alloc(op, s.kind(), mask.entries())?;
    run("landmark", dims, (&s, &r), mask, &bias)?;
    Ok(bias)
}

/// Gradients of q, k and kbar from those of the bias of every entry.
///
/// # Errors
/// As [`landmark`].
pub fn landmark_backward(
    dims: Dims,
    [q, k, kbar]: [&CudaBuffer; 3],
    (mask, dbias): (&BlockMask, &CudaBuffer),
    gamma: f64,
) -> Result<[CudaBuffer; 3]> {
    let (op, Dims { b, t, h, d, .. }, n) = ("landmark_bias", dims, dims.t / mask.chunk_size());
    let (s, r) = both(op, dims, n, [q, k, kbar], gamma)?;
    run("landmark_backward", dims, (&s, &r), mask, dbias)?;
    let (device, kind) = (s.device(), s.kind());
    let [dq, dk, dkbar] = [q, k, kbar].map(|x| device.alloc(op, kind, x.len()));
    let (mut dq, dk, dkbar, by_summaries) = (dq?, dk?, dkbar?, device.alloc(op, kind, q.len())?);
    let size = |m: usize, k: usize| Batched { gemm: Gemm::new(m, d, k), batch: b, heads: h, div: 1, repeats: 1 };
    let all = |x| tokens(x, t, h, d, 1);
    let (ds, dr) = (rows(&s, h, t, t, 1), rows(&r, h, t, n, 1));
    let (near, far) = (scale(d), gamma * scale(d));
    product(op, size(t, t), ds, all(k), all(&dq), near)?;
    product(op, size(t, t), transposed(ds), all(q), all(&dk), near)?;
    if n > 0 {
        product(op, size(t, n), dr, tokens(kbar, n, h, d, 1), all(&by_summaries), far)?;
        product(op, size(n, t), transposed(dr), all(q), tokens(&dkbar, n, h, d, 1), far)?;
        add_into(&mut dq, &by_summaries)?;
    }
    Ok([dq, dk, dkbar])
}
