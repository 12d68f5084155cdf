//! Where the inputs of an op are. The one place that checks device and element type of all of them, and what every op
//! matches: [`Place`] has one variant a device and no op has a wildcard arm, so that a new device fails to compile in
//! every op until that op answers for it.

use crate::device::{CpuData, CpuDevice, CudaData, CudaDevice, Device};
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::tensor::Tensor;

/// The inputs of an op: on one device, of one element type.
pub(crate) enum Place<'a, const N: usize> {
    /// Host memory.
    Cpu(&'a CpuDevice, CpuInputs<'a, N>),
    /// Memory of an NVIDIA GPU.
    Cuda(&'a CudaDevice, [&'a CudaData; N]),
}

/// Inputs in host memory, by element type.
pub(crate) enum CpuInputs<'a, const N: usize> {
    F32([&'a [f32]; N]),
    F64([&'a [f64]; N]),
}

/// Refuses `b` if it does not share device and element type with `a`.
pub(crate) fn same_place(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.device().is(b.device()) && a.dtype() == b.dtype() { Ok(()) } else { Err(mismatch(op, a, b)) }
}

fn mismatch(op: &'static str, a: &Tensor, b: &Tensor) -> Error {
    let one = |x: &Tensor| format!("{:?} {:?} on {}", x.dtype(), x.shape(), x.device());
    Error::invalid(op, format!("inputs differ in device or element type: {} and {}", one(a), one(b)))
}

/// Where these inputs live.
///
/// # Errors
/// When they do not share one device and one element type; names the op and both sides.
pub(crate) fn place<'a, const N: usize>(op: &'static str, inputs: [&'a Tensor; N]) -> Result<Place<'a, N>> {
    const { assert!(N > 0) };
    let first = inputs[0];
    for other in &inputs[1..] {
        same_place(op, first, other)?;
    }
    match (first.device(), first.storage()) {
        (Device::Cpu(cpu), Storage::Cpu(CpuData::F32(_))) => Ok(Place::Cpu(cpu, CpuInputs::F32(slices(op, inputs)?))),
        (Device::Cpu(cpu), Storage::Cpu(CpuData::F64(_))) => Ok(Place::Cpu(cpu, CpuInputs::F64(slices(op, inputs)?))),
        (Device::Cuda(gpu), Storage::Cuda(_)) => Ok(Place::Cuda(gpu, numbers(op, inputs)?)),
        (Device::Cpu(_), Storage::Cuda(_)) | (Device::Cuda(_), Storage::Cpu(_)) => Err(mismatch(op, first, first)),
    }
}

fn slices<'a, T: crate::device::CpuNumber, const N: usize>(
    op: &'static str,
    inputs: [&'a Tensor; N],
) -> Result<[&'a [T]; N]> {
    let mut out = [&[][..]; N];
    for (slice, input) in out.iter_mut().zip(inputs) {
        *slice = match input.storage() {
            Storage::Cpu(data) => T::buffer(data).ok_or_else(|| mismatch(op, inputs[0], input))?,
            Storage::Cuda(_) => return Err(mismatch(op, inputs[0], input)),
        };
    }
    Ok(out)
}

fn numbers<'a, const N: usize>(op: &'static str, inputs: [&'a Tensor; N]) -> Result<[&'a CudaData; N]> {
    let of = |input: &'a Tensor| match input.storage() {
        Storage::Cuda(data) => Ok(data),
        Storage::Cpu(_) => Err(mismatch(op, inputs[0], input)),
    };
    let first = of(inputs[0])?;
    let mut out = [first; N];
    for (data, input) in out.iter_mut().zip(inputs) {
        *data = of(input)?;
    }
    Ok(out)
}

/// Runs the arm of the device that the inputs live on, after checking that all live on one. On the CPU `$T` is the
/// element type and the inputs are slices of it. Every device has an arm of its own; there is no other.
///
/// ```ignore
/// let y = on_device!("scale", [&x.value];
///     Cpu<T>(cpu, [x]) => cpu::scale::<T>(cpu, x),
///     Cuda(gpu, [x]) => cuda::scale(gpu, x)?);
/// ```
macro_rules! on_device {
    ($op:expr, $inputs_of:expr; Cpu<$T:ident>($cpu:pat, $inputs:pat) => $body:expr
     $(, $device:ident($($arg:pat),+) => $other:expr)* $(,)?) => {
        match $crate::dispatch::place($op, $inputs_of)? {
            $crate::dispatch::Place::Cpu($cpu, $crate::dispatch::CpuInputs::F32($inputs)) => {
                #[allow(unused_imports)]
                use $crate::number::Number as _;
                #[allow(dead_code)]
                type $T = f32;
                $body
            }
            $crate::dispatch::Place::Cpu($cpu, $crate::dispatch::CpuInputs::F64($inputs)) => {
                #[allow(unused_imports)]
                use $crate::number::Number as _;
                #[allow(dead_code)]
                type $T = f64;
                $body
            }
            $($crate::dispatch::Place::$device($($arg),+) => $other,)*
        }
    };
}
pub(crate) use on_device;
