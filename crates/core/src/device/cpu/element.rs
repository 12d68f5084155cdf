//! What the CPU adds to an element type: where its buffers come from, and the register kernels for it.

use super::kernel_bf16::{self, Bf16Kernels};
use super::kernel_f32::Operands;
use super::level::Level;
use super::softmax::{self, SoftmaxKernels};
use super::{Buffer, Pool, Pools};
use crate::number::{Compute, DType, Element, Number};

/// A buffer in host memory, by element type.
#[derive(Debug)]
pub enum CpuData {
    /// 32-bit floats.
    F32(Buffer<f32>),
    /// 64-bit floats.
    F64(Buffer<f64>),
}

impl CpuData {
    /// Element type held.
    pub fn dtype(&self) -> DType {
        match self {
            CpuData::F32(_) => DType::F32,
            CpuData::F64(_) => DType::F64,
        }
    }

    /// A copy on the same device.
    pub(crate) fn copy(&self) -> Self {
        match self {
            CpuData::F32(buffer) => CpuData::F32(buffer.device().copy(buffer)),
            CpuData::F64(buffer) => CpuData::F64(buffer.device().copy(buffer)),
        }
    }
}

/// An element type that the CPU keeps buffers of. Sealed: the free lists are not visible outside, and a buffer checks the layout of
/// its elements when it is compiled.
pub trait CpuElement: Element {
    /// The free list for this type.
    fn pool(pools: &Pools) -> &Pool<Self>;
}

macro_rules! element {
    ($t:ident) => {
        impl CpuElement for $t {
            fn pool(pools: &Pools) -> &Pool<Self> {
                &pools.$t
            }
        }
    };
}

element!(f32);
element!(f64);
element!(u32);

/// A number that the CPU's kernels compute with.
pub trait CpuNumber: Number + CpuElement {
    /// Wraps a buffer.
    fn wrap(buffer: Buffer<Self>) -> CpuData;
    /// The buffer, if it is of this type.
    fn buffer(data: &CpuData) -> Option<&Buffer<Self>>;
    /// The buffer, if it is of this type.
    fn buffer_mut(data: &mut CpuData) -> Option<&mut Buffer<Self>>;
    /// Whether [`CpuNumber::kernel`] has anything for this instruction set.
    fn has_kernel(level: Level) -> bool;
    /// The hand-written register kernels on m rows by n columns of a matrix product, where [`CpuNumber::has_kernel`].
    ///
    /// # Safety
    /// As [`super::kernel_f32::run_f32`].
    unsafe fn kernel(level: Level, m: usize, n: usize, k: usize, operands: Operands<Self>);
    /// Transposes a square in registers. Returns whether this instruction set has it.
    ///
    /// # Safety
    /// As [`super::transpose::transpose_f32`].
    unsafe fn transpose(level: Level, from: *const Self, stride: usize, out: *mut Self, width: usize) -> bool;
    /// The loops of block-wise softmax in registers; `None` if this type or processor has none.
    fn softmax_kernels() -> Option<SoftmaxKernels<Self>>;
    /// What multiplies bf16 operands; `None` if this type or processor has nothing.
    fn bf16_kernels() -> Option<Bf16Kernels<Self>>;
}

macro_rules! number {
    ($t:ty, $variant:ident, $other:ident, $has_kernel:expr, $kernel:path, $transpose:path, $softmax:path, $bf16:path) => {
        impl CpuNumber for $t {
            fn wrap(buffer: Buffer<Self>) -> CpuData {
                CpuData::$variant(buffer)
            }
            fn buffer(data: &CpuData) -> Option<&Buffer<Self>> {
                match data {
                    CpuData::$variant(buffer) => Some(buffer),
                    CpuData::$other(_) => None,
                }
            }
            fn buffer_mut(data: &mut CpuData) -> Option<&mut Buffer<Self>> {
                match data {
                    CpuData::$variant(buffer) => Some(buffer),
                    CpuData::$other(_) => None,
                }
            }
            #[inline(always)]
            fn has_kernel(level: Level) -> bool {
                level != Level::Baseline && $has_kernel
            }
            #[inline(always)]
            unsafe fn kernel(level: Level, m: usize, n: usize, k: usize, operands: Operands<Self>) {
                // SAFETY: the caller's contract is the callee's.
                unsafe { $kernel(level, m, n, k, operands) }
            }
            #[inline(always)]
            unsafe fn transpose(level: Level, from: *const Self, stride: usize, out: *mut Self, width: usize) -> bool {
                // SAFETY: the caller's contract is the callee's.
                unsafe { $transpose(level, from, stride, out, width) }
            }
            fn softmax_kernels() -> Option<SoftmaxKernels<Self>> {
                $softmax()
            }
            fn bf16_kernels() -> Option<Bf16Kernels<Self>> {
                $bf16()
            }
        }
    };
}

/// There is none.
#[inline(always)]
unsafe fn no_kernel<T>(_: Level, _: usize, _: usize, _: usize, _: Operands<T>) {
    unreachable!("this type has no kernel")
}

/// There is none.
#[inline(always)]
unsafe fn no_transpose<T>(_: Level, _: *const T, _: usize, _: *mut T, _: usize) -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use super::{kernel_f32::run_f32, transpose::transpose_f32};

#[cfg(target_arch = "x86_64")]
number!(f32, F32, F64, true, run_f32, transpose_f32, softmax::of_f32, kernel_bf16::of_f32);
#[cfg(not(target_arch = "x86_64"))]
number!(f32, F32, F64, false, no_kernel, no_transpose, softmax::none, kernel_bf16::of_f32);
number!(f64, F64, F32, false, no_kernel, no_transpose, softmax::none, kernel_bf16::none);

impl Compute {
    /// What multiplies rounded operands; `None` where nothing is rounded.
    pub(crate) fn bf16_kernels<T: CpuNumber>(self) -> Option<Bf16Kernels<T>> {
        match self {
            Compute::Full => None,
            Compute::Bf16 => T::bf16_kernels(),
        }
    }
}
