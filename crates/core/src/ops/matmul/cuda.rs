//! Products by cuBLASLt; sums come in f32, or f64 of f64.

use crate::device::cuda::{CudaBuffer, CudaDevice, Kind, Operand};
use crate::device::{Accumulate, Gemm};
use crate::error::{Error, Result};
use crate::ops::cuda::wide;
use crate::tape::{Grads, Var};
use crate::tensor::Tensor;

/// a [m, k] times b [k, n], on top of a residual where there is one: a new matrix `[m, n]`.
///
/// # Errors
/// When kinds or extents do not fit, memory runs out, or the product shall be added to what a new matrix does not have.
pub fn product(op: &'static str, size: Gemm<Accumulate<&CudaBuffer>>, a: Operand, b: Operand) -> Result<CudaBuffer> {
    let Gemm { m, n, k, accumulate } = size;
    let below = match accumulate {
        Accumulate::Overwrite => None,
        Accumulate::Residual(below) => Some(below),
        Accumulate::Existing => return Err(Error::invalid(op, "a new matrix has nothing that is added to")),
    };
    let device = a.buffer.device();
    let mut c = device.alloc(op, wide(a.buffer.kind()), m * n)?;
    if k == 0 {
        match below {
            Some(below) => c.copy_from(below)?,
            None => c.fill_bytes(0)?,
        }
        return Ok(c);
    }
    let accumulate = below.map_or(Accumulate::Overwrite, |x| Accumulate::Residual(Operand::rows(x, n)));
    device.gemm(size.with(accumulate), a, b, Operand::rows(&c, n))?;
    Ok(c)
}

/// Adds a [m, k] times b [k, n] to the gradient of a variable of as many numbers, in place where it has been begun.
///
/// # Errors
/// As [`product`].
pub fn add_product(
    op: &'static str,
    gpu: &CudaDevice,
    grads: &mut Grads,
    var: &Var,
    size: Gemm,
    a: Operand,
    b: Operand,
) -> Result<()> {
    let (mut d, begun) = grads.begin(var)?;
    let size = size.with(Accumulate::existing_if(begun));
    product_into(d.cuda_mut(op, gpu)?.full_mut()?, size, a, b)?;
    grads.add(var.id(), d)
}

/// [`add_product`] for the input of a product: where it was made rounded, for products alone, its gradient is rounded as well, which is what
/// the op that made it reads. One that has been begun is added to in full.
///
/// # Errors
/// As [`product`].
pub fn add_to_input(
    op: &'static str,
    gpu: &CudaDevice,
    grads: &mut Grads,
    x: &Var,
    size: Gemm,
    a: Operand,
    b: Operand,
) -> Result<()> {
    if !x.value.on_cuda(op, gpu)?.is_operand() || grads.get(x).is_some() || size.k == 0 {
        return add_product(op, gpu, grads, x, size, a, b);
    }
    let d = gpu.alloc(op, a.buffer.kind(), size.m * size.n)?;
    gpu.gemm(size.with(Accumulate::Overwrite), a, b, Operand::rows(&d, size.n))?;
    grads.add(x.id(), Tensor::from_cuda(x.value.shape(), d))
}

/// Writes a [m, k] times b [k, n] to `sum [m, n]`, or adds it to what is there.
///
/// # Errors
/// As [`product`].
pub fn product_into(sum: &mut CudaBuffer, size: Gemm, a: Operand, b: Operand) -> Result<()> {
    let adds = size.accumulate.adds();
    if size.k == 0 {
        return if adds { Ok(()) } else { sum.fill_bytes(0) };
    }
    let c = Operand::rows(sum, size.n);
    a.buffer.device().gemm(size.with(Accumulate::existing_if(adds)), a, b, c)
}

/// a [m, k] times b [k, n] for each of a batch, both of one kind: a new `[batch, m, n]`.
///
/// # Errors
/// As [`product`].
pub fn batched(op: &'static str, batch: usize, size: Gemm, a: Operand, b: Operand) -> Result<CudaBuffer> {
    let (Gemm { m, n, k, .. }, device) = (size, a.buffer.device());
    let mut c = device.alloc(op, a.buffer.kind(), batch * m * n)?;
    if k == 0 {
        c.fill_bytes(0)?;
        return Ok(c);
    }
    device.gemm_batched(batch, size.with(Accumulate::Overwrite), a, b, Operand::matrices(&c, m, n))?;
    Ok(c)
}

/// What the products of one call multiply.
pub fn operand_kind(compute: crate::number::Compute, x: &crate::device::CudaData) -> Kind {
    Kind::of_operands(compute, x.dtype())
}
