//! Matrix products. `linear`: y = x w^T with w [out, in], the layout of checkpoints; dx = dy w, dw = dy^T x.
//! `linear_add`: the same on top of a residual stream. `matmul`: a batch of products. Kept for backward: the operands.

mod bf16;
mod cpu;
mod format;
#[cfg(test)]
mod tests;

pub(crate) use bf16::Bf16Format;
pub(crate) use cpu::{Accumulate, gemm, pack};
pub(crate) use format::{Format, FullFormat, padded_stride};

use crate::device::CpuNumber;
use crate::device::cpu::{Gemm, MatMut, MatRef};
use crate::error::{Result, ensure};
use crate::number::{Compute, with_number};
use crate::shape::numel;
use crate::tape::{Grads, Tape, Var};
use crate::tensor::{Tensor, same_dtype};

/// `x [.., in]` times the transpose of `w [out, in]`: `[.., out]`, in the tape's [`Compute`], backward included.
///
/// # Errors
/// When the widths or the element types differ.
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
    let [out, inner] = w.value.dims(op)?;
    let (rows, width) = x.value.rows();
    ensure!(width == inner, op, "x has shape {:?}, w has shape {:?}", x.value.shape(), w.value.shape());
    same_dtype(op, &x.value, &w.value)?;
    let mut shape = x.value.shape().to_vec();
    *shape.last_mut().expect("x has a last axis") = out;
    if let Some(residual) = residual {
        let of = residual.value.shape();
        ensure!(of == shape, op, "the product has shape {shape:?}, the residual {of:?}");
        same_dtype(op, &x.value, &residual.value)?;
    }
    let compute = tape.compute();
    let y = with_number!(x.value.dtype(), T => {
        let accumulate = residual.map_or(Accumulate::Overwrite, |r| Accumulate::Residual(r.value.data::<T>()));
        let (a, b) = (MatRef::rows(x.value.data(), inner), MatRef::rows(w.value.data(), inner).t());
        let mut y = x.value.cpu().alloc::<T>(rows * out);
        let size = Gemm::new(rows, out, inner).with(accumulate);
        gemm(x.value.cpu(), compute, size, a, b, MatMut::rows(&mut y, out));
        Tensor::from_buffer(&shape, y)
    });
    let (x, w, residual) = (x.clone(), w.clone(), residual.map(Var::id));
    tape.record(op, y, move |dy, grads| {
        with_number!(dy.dtype(), T => {
            let (g, xs, ws) = (dy.data::<T>(), x.value.data::<T>(), w.value.data::<T>());
            let dw = Gemm::new(out, inner, rows);
            add_product::<T>(grads, &w, compute, dw, MatRef::rows(g, out).t(), MatRef::rows(xs, inner))?;
            let dx = Gemm::new(rows, inner, out);
            add_product::<T>(grads, &x, compute, dx, MatRef::rows(g, out), MatRef::rows(ws, inner))?;
        });
        match residual {
            Some(id) => grads.add(id, dy),
            None => Ok(()),
        }
    })
}

/// Adds a [m, k] times b [k, n] to the gradient of a variable of as many numbers: in place where it has been begun, which
/// for three projections of one input saves writing and reading two of their three gradients.
fn add_product<T: CpuNumber>(
    grads: &mut Grads,
    var: &Var,
    compute: Compute,
    size: Gemm,
    a: MatRef<T>,
    b: MatRef<T>,
) -> Result<()> {
    let (mut d, add) = grads.begin::<T>(var);
    let device = var.value.cpu();
    let accumulate = if add { Accumulate::Existing } else { Accumulate::Overwrite };
    gemm(device, compute, size.with(accumulate), a, b, MatMut::rows(d.data_mut(), size.n));
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
    same_dtype("matmul", &a.value, &b.value)?;
    let (batch, m, k, n) = (numel(&sa[..rank - 2]), sa[rank - 2], sa[rank - 1], sb[rank - 1]);
    let mut shape = sa.to_vec();
    shape[rank - 1] = n;
    let y = with_number!(a.value.dtype(), T => {
        let (x, w) = (a.value.data::<T>(), b.value.data::<T>());
        batched::<T>(&shape, batch, Gemm::new(m, n, k), |i| (MatRef::rows(&x[i * m * k..], k), MatRef::rows(&w[i * k * n..], n)), &a.value)
    });
    let (a, b) = (a.clone(), b.clone());
    tape.record("matmul", y, move |dy, grads| {
        with_number!(dy.dtype(), T => {
            let (g, x, w) = (dy.data::<T>(), a.value.data::<T>(), b.value.data::<T>());
            let da = |i: usize| (MatRef::rows(&g[i * m * n..], n), MatRef::rows(&w[i * k * n..], n).t());
            let db = |i: usize| (MatRef::rows(&x[i * m * k..], k).t(), MatRef::rows(&g[i * m * n..], n));
            grads.add(a.id(), batched::<T>(a.value.shape(), batch, Gemm::new(m, k, n), da, &dy))?;
            grads.add(b.id(), batched::<T>(b.value.shape(), batch, Gemm::new(k, n, m), db, &dy))
        })
    })
}

fn batched<'a, T: CpuNumber>(
    shape: &[usize],
    batch: usize,
    size: Gemm,
    operands: impl Fn(usize) -> (MatRef<'a, T>, MatRef<'a, T>),
    like: &Tensor,
) -> Tensor {
    let mut out = like.cpu().alloc::<T>(batch * size.m * size.n);
    for (i, piece) in out.chunks_mut((size.m * size.n).max(1)).enumerate() {
        let (a, b) = operands(i);
        gemm(like.cpu(), Compute::Full, size.with(Accumulate::Overwrite), a, b, MatMut::rows(piece, size.n));
    }
    Tensor::from_buffer(shape, out)
}
