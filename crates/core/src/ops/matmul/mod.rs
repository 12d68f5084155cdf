//! Matrix products. `linear`: y = x w^T with w [out, in], the layout of checkpoints; dx = dy w, dw = dy^T x.
//! `linear_add`: the same on top of a residual stream. `matmul`: a batch of products. Kept for backward: the operands.

mod bf16;
mod cpu;
pub mod cuda;
mod few;
mod format;
#[cfg(test)]
mod tests;

pub(crate) use bf16::Bf16Format;
pub(crate) use cpu::{gemm, pack};
pub(crate) use few::FEW_ROWS;
pub(crate) use format::{Format, FullFormat, padded_stride};

use crate::device::cpu::{MatMut, MatRef};
use crate::device::cuda::Operand;
use crate::device::{Accumulate, CpuDevice, CpuNumber, Gemm};
use crate::dispatch::on_device;
use crate::error::{Error, Result, ensure};
use crate::number::Compute;
use crate::shape::{checked_numel, numel};
use crate::tape::{Grads, Tape, Var};
use crate::tensor::Tensor;

/// `x [.., in]` times the transpose of `w [out, in]`: `[.., out]`, in the tape's [`Compute`], backward included.
///
/// # Errors
/// When x is a scalar, the width is 0, or the widths, element types or devices differ.
pub fn linear(tape: &Tape, x: &Var, w: &Var) -> Result<Var> {
    linear_with(tape, "linear", x, w, None)
}

/// `residual + linear(x, w)` in one pass over the sum, with the bits of two.
///
/// # Errors
/// As [`linear`], and when the residual has another shape than the product.
pub fn linear_add(tape: &Tape, x: &Var, w: &Var, residual: &Var) -> Result<Var> {
    linear_with(tape, "linear_add", x, w, Some(residual))
}

fn linear_with(tape: &Tape, op: &'static str, x: &Var, w: &Var, residual: Option<&Var>) -> Result<Var> {
    let compute = tape.compute();
    let y = linear_forward(op, compute, &x.value, &w.value, residual.map(|r| &r.value))?;
    let (x, w, residual) = (x.clone(), w.clone(), residual.map(Var::id));
    tape.record(op, y, move |dy, grads| {
        linear_backward(op, compute, &dy, &x, &w, grads)?;
        match residual {
            Some(id) => grads.add(id, dy),
            None => Ok(()),
        }
    })
}

/// The value of [`linear`], or of [`linear_add`] where there is a residual.
///
/// # Errors
/// As these.
pub(crate) fn linear_forward(
    op: &'static str,
    compute: Compute,
    x: &Tensor,
    w: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let [out, inner] = w.dims(op)?;
    let (rows, width) = x.rows();
    ensure!(width == inner, op, "x has shape {:?}, w has shape {:?}", x.shape(), w.shape());
    let mut shape = x.shape().to_vec();
    let Some(last) = shape.last_mut() else {
        return Err(Error::invalid(op, format!("x is a scalar, w has shape {:?}", w.shape())));
    };
    *last = out;
    checked_numel(op, &shape)?;
    ensure!(inner > 0, op, "nothing to multiply: x has shape {:?}, w has shape {:?}", x.shape(), w.shape());
    if let Some(residual) = residual {
        let of = residual.shape();
        ensure!(of == shape, op, "the product has shape {shape:?}, the residual {of:?}");
    }
    on_device!(op, [x, w, residual.unwrap_or(x)]; Cpu<T>(cpu, [xs, ws, below]) => {
        let accumulate = if residual.is_some() { Accumulate::Residual(below) } else { Accumulate::Overwrite };
        let (a, b) = (MatRef::rows(xs, inner), MatRef::rows(ws, inner).t());
        let mut y = cpu.alloc::<T>(rows * out);
        gemm(cpu, compute, Gemm::new(rows, out, inner).with(accumulate), a, b, MatMut::rows(&mut y, out));
        Ok(Tensor::from_buffer(&shape, y))
    }, Cuda(_, [xs, ws, below]) => {
        let kind = cuda::operand_kind(compute, xs);
        let (a, b) = (Operand::rows(xs.of_kind(kind)?, inner), Operand::rows(ws.of_kind(kind)?, inner).t());
        let accumulate = if residual.is_some() { Accumulate::Residual(below.full()?) } else { Accumulate::Overwrite };
        let y = cuda::product(op, Gemm::new(rows, out, inner).with(accumulate), a, b)?;
        Ok(Tensor::from_cuda(&shape, y))
    })
}

/// Adds the gradients of [`linear`] to those of x and w.
///
/// # Errors
/// When element types or devices differ, or a device has no memory left.
pub(crate) fn linear_backward(
    op: &'static str,
    compute: Compute,
    dy: &Tensor,
    x: &Var,
    w: &Var,
    grads: &mut Grads,
) -> Result<()> {
    let ([out, inner], (rows, _)) = (w.value.dims(op)?, x.value.rows());
    on_device!(op, [dy, &x.value, &w.value]; Cpu<T>(cpu, [g, xs, ws]) => {
        let (g, xs, ws): (_, _, MatRef<T>) = (MatRef::rows(g, out), MatRef::rows(xs, inner), MatRef::rows(ws, inner));
        add_product(cpu, grads, w, compute, Gemm::new(out, inner, rows), g.t(), xs)?;
        add_product(cpu, grads, x, compute, Gemm::new(rows, inner, out), g, ws)
    }, Cuda(gpu, [g, xs, ws]) => {
        let kind = cuda::operand_kind(compute, xs);
        let g = Operand::rows(g.of_kind(kind)?, out);
        let (own, ws) = (Operand::rows(xs.of_kind(kind)?, inner), Operand::rows(ws.of_kind(kind)?, inner));
        cuda::add_product(op, gpu, grads, w, Gemm::new(out, inner, rows), g.t(), own)?;
        cuda::add_to_input(op, gpu, grads, x, Gemm::new(rows, inner, out), g, ws)
    })
}

/// Adds a [m, k] times b [k, n] to the gradient of a variable of as many numbers: in place where it has been begun, which
/// for three projections of one input saves writing and reading two of their three gradients.
fn add_product<T: CpuNumber>(
    cpu: &CpuDevice,
    grads: &mut Grads,
    var: &Var,
    compute: Compute,
    size: Gemm,
    a: MatRef<T>,
    b: MatRef<T>,
) -> Result<()> {
    let (mut d, add) = grads.begin(var)?;
    let accumulate = if add { Accumulate::Existing } else { Accumulate::Overwrite };
    gemm(cpu, compute, size.with(accumulate), a, b, MatMut::rows(d.cpu_mut("linear")?, size.n));
    grads.add(var.id(), d)
}

/// `a [.., m, k]` times `b [.., k, n]`: `[.., m, n]`, with the same leading axes on both sides.
///
/// # Errors
/// When the inner or leading extents or the element types differ.
pub fn matmul(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let (sa, sb) = (a.value.shape(), b.value.shape());
    let rank = sa.len();
    ensure!(
        rank >= 2 && sb.len() == rank && sa[..rank - 2] == sb[..rank - 2] && sa[rank - 1] == sb[rank - 2],
        "matmul",
        "shapes {sa:?} and {sb:?}"
    );
    let (batch, m, k, n) = (numel(&sa[..rank - 2]), sa[rank - 2], sa[rank - 1], sb[rank - 1]);
    let mut shape = sa.to_vec();
    shape[rank - 1] = n;
    checked_numel("matmul", &shape)?;
    let y = on_device!("matmul", [&a.value, &b.value]; Cpu<T>(cpu, [x, w]) => {
        let operands = |i: usize| (MatRef::rows(&x[i * m * k..], k), MatRef::rows(&w[i * k * n..], n));
        batched::<T>(cpu, &shape, batch, Gemm::new(m, n, k), operands)
    }, Cuda(_, [x, w]) => {
        let (x, w) = (Operand::matrices(x.full()?, m, k), Operand::matrices(w.full()?, k, n));
        Tensor::from_cuda(&shape, cuda::batched("matmul", batch, Gemm::new(m, n, k), x, w)?)
    });
    let (a, b) = (a.clone(), b.clone());
    tape.record("matmul", y, move |dy, grads| {
        on_device!("matmul", [&dy, &a.value, &b.value]; Cpu<T>(cpu, [g, x, w]) => {
            let da = |i: usize| (MatRef::rows(&g[i * m * n..], n), MatRef::rows(&w[i * k * n..], n).t());
            let db = |i: usize| (MatRef::rows(&x[i * m * k..], k).t(), MatRef::rows(&g[i * m * n..], n));
            grads.add(a.id(), batched::<T>(cpu, a.value.shape(), batch, Gemm::new(m, k, n), da))?;
            grads.add(b.id(), batched::<T>(cpu, b.value.shape(), batch, Gemm::new(k, n, m), db))
        }, Cuda(_, [g, x, w]) => {
            let g = Operand::matrices(g.full()?, m, n);
            let (x, w) = (Operand::matrices(x.full()?, m, k), Operand::matrices(w.full()?, k, n));
            let da = cuda::batched("matmul", batch, Gemm::new(m, k, n), g, w.t())?;
            grads.add(a.id(), Tensor::from_cuda(a.value.shape(), da))?;
            let db = cuda::batched("matmul", batch, Gemm::new(k, n, m), x.t(), g)?;
            grads.add(b.id(), Tensor::from_cuda(b.value.shape(), db))
        })
    })
}

fn batched<'a, T: CpuNumber>(
    cpu: &CpuDevice,
    shape: &[usize],
    batch: usize,
    size: Gemm,
    operands: impl Fn(usize) -> (MatRef<'a, T>, MatRef<'a, T>),
) -> Tensor {
    let mut out = cpu.alloc::<T>(batch * size.m * size.n);
    for (i, piece) in out.chunks_mut((size.m * size.n).max(1)).enumerate() {
        let (a, b) = operands(i);
        gemm(cpu, Compute::Full, size.with(Accumulate::Overwrite), a, b, MatMut::rows(piece, size.n));
    }
    Tensor::from_buffer(shape, out)
}
