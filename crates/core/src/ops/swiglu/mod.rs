//! The gated feed-forward layer: y = (silu(x G^T) * (x U^T)) D^T, silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv
//! 2002.05202, equation 6), G and U [f, c], D [c, f]. Kept for backward: x, the weights, gate = x G^T and up = x U^T.
//!
//! With h = silu(gate) * up and s = sigmoid(gate): dh = dy D, dup = dh silu(gate), dgate = dh up s (1 + gate (1 - s)),
//! dx = dgate G + dup U, dD = dy^T h, dG = dgate^T x, dU = dup^T x.
//!
//! One op instead of three products and their activation, because h, dh, dgate and dup then never leave the cache.

mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::kernel_f32::NR;
use crate::device::cuda::{CudaBuffer, Kind};
use crate::device::{Accumulate, NoResidual};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ops::matmul::{Bf16Format, FEW_ROWS, FullFormat};
use crate::shape::checked_numel;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Runs `$f(format, ..)` with operands as the precision asks for; `$longest` is the longest row of an operand.
macro_rules! with_format {
    ($compute:expr, $T:ty, $device:expr, $longest:expr, $f:path, $($arg:expr),*) => {
        match $compute.bf16_kernels::<$T>() {
            Some(kernels) => $f(&Bf16Format { kernels, zeros: &$device.zeros::<$T>($longest) }, $($arg),*),
            None => $f(&FullFormat, $($arg),*),
        }
    };
}

/// Numbers that backward of [`swiglu`] takes for `rows` of width c and f features, beside its gradient, what is kept, and the
/// gradients of the weights.
pub fn swiglu_scratch(rows: usize, c: usize, f: usize) -> usize {
    cpu::scratch((rows, c, f))
}

/// The layer on `x [.., c]` with the weights gate `[f, c]`, up `[f, c]` and down `[c, f]`, added to `residual [.., c]` where
/// there is one: `[.., c]`, in the tape's [`crate::Compute`], backward included.
///
/// # Errors
/// When widths, shapes or element types differ, or when x or a weight is empty.
// Above 60 lines: the passes of both devices share what is checked and kept here.
pub fn swiglu(tape: &Tape, x: &Var, [gate, up, down]: [&Var; 3], residual: Option<&Var>) -> Result<Var> {
    let op = "swiglu";
    let (rows, c) = x.value.rows();
    let [f, _] = gate.value.dims(op)?;
    for (name, w, shape) in [("gate", gate, [f, c]), ("up", up, [f, c]), ("down", down, [c, f])] {
        let of = w.value.shape();
        ensure!(of == shape, op, "x has shape {:?}: {name} must be {shape:?}, not {of:?}", x.value.shape());
    }
    if let Some(residual) = residual {
        let (of, like) = (residual.value.shape(), x.value.shape());
        ensure!(of == like, op, "x has shape {like:?}, the residual {of:?}");
    }
    ensure!(
        rows > 0 && c > 0 && f > 0,
        op,
        "nothing to multiply: x has shape {:?}, gate {:?}",
        x.value.shape(),
        gate.value.shape()
    );
    // what is kept has whole panels of features
    checked_numel(op, &[rows, f.next_multiple_of(NR)])?;
    let (size, compute, longest) = ((rows, c, f), tape.compute(), c.max(f).max(cpu::BACKWARD_ROWS));
    let below = residual.map_or(&x.value, |r| &r.value);
    let tensors = [&x.value, &gate.value, &up.value, &down.value, below];
    // a CPU keeps gate and up; a card both side by side, and their weights as it multiplied them
    let (y, kept) = on_device!(op, tensors; Cpu<T>(cpu, [xs, gate, up, down, below]) => {
        let (weights, residual) = ([gate, up, down], residual.map(|_| below));
        // the same bits of y whether the tape records or not; what is kept costs more than y here, and only backward reads it
        let is_few = rows <= FEW_ROWS && compute.bf16_kernels::<T>().is_none();
        let few = match is_few.then(|| cpu::few(cpu, size, xs, weights, residual)) {
            Some(y) if !tape.is_recording() => return Ok(tape.leaf(Tensor::from_buffer(x.value.shape(), y))),
            few => few,
        };
        let (y, gates, ups) = with_format!(compute, T, cpu, longest, cpu::forward, cpu, size, xs, weights, residual);
        let y = few.unwrap_or(y);
        let kept = |b| Tensor::from_buffer(&[cpu::kept(rows, f)], b);
        (Tensor::from_buffer(x.value.shape(), y), [kept(gates), kept(ups)])
    }, Cuda(_, [xs, gate, up, down, below]) => {
        let kind = Kind::of_operands(compute, xs.dtype());
        let weights = [gate.full()?, up.full()?, down.of_kind(kind)?];
        let below = residual.map(|_| below.full()).transpose()?;
        let (y, kept) = cuda::forward(xs.of_kind(kind)?, weights, size, below)?;
        let kept = [Tensor::from_cuda(&[rows, 2 * f], kept.both), Tensor::from_cuda(&[2 * f, c], kept.weights)];
        (Tensor::from_cuda(x.value.shape(), y), kept)
    });
    let (inputs, residual) = ([x, gate, up, down].map(Var::clone), residual.map(Var::id));
    tape.record(op, y, move |dy, grads| {
        let [x, gate, up, down] = &inputs;
        let tensors = [&dy, &x.value, &gate.value, &up.value, &down.value, &kept[0], &kept[1]];
        on_device!(op, tensors; Cpu<T>(cpu, [dy, xs, gates, ups, downs, kept_gate, kept_up]) => {
            let (weights, kept) = ([gates, ups, downs], [kept_gate, kept_up]);
            let d = with_format!(compute, T, cpu, longest, cpu::backward, cpu, size, dy, xs, weights, kept);
            for (var, d) in [x, gate, up, down].into_iter().zip(d) {
                grads.add(var.id(), Tensor::from_buffer(var.value.shape(), d))?;
            }
        }, Cuda(gpu, [dy, xs, _, _, downs, both, weights]) => {
            let kind = Kind::of_operands(compute, xs.dtype());
            let kept = [both.of_kind(kind)?, weights.of_kind(kind)?, downs.of_kind(kind)?];
            let mut d = [grads.begin(gate)?, grads.begin(up)?, grads.begin(down)?];
            let [g, u, w] = d.each_mut().map(|(d, begun)| -> Result<(&mut CudaBuffer, Accumulate<NoResidual>)> {
                Ok((d.cuda_mut(op, gpu)?.full_mut()?, Accumulate::existing_if(*begun)))
            });
            let dx = cuda::backward(dy.of_kind(kind)?, xs.of_kind(kind)?, kept, size, [g?, u?, w?])?;
            grads.add(x.id(), Tensor::from_cuda(x.value.shape(), dx))?;
            for (var, (d, _)) in [gate, up, down].into_iter().zip(d) {
                grads.add(var.id(), d)?;
            }
        });
        match residual {
            Some(id) => grads.add(id, dy),
            None => Ok(()),
        }
    })
}
