//! What the CPU adds to an element type: where its buffers come from, and the register kernels for it.

use super::kernel::Block;
use super::simd::Level;
use super::softmax::Steps;
use super::words::Words;
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
}

/// An element type that the CPU keeps buffers of.
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
    /// As [`super::kernel::run_f32`].
    unsafe fn kernel(level: Level, m: usize, n: usize, k: usize, block: Block<Self>);
    /// Transposes a square in registers. Returns whether this instruction set has it.
    ///
    /// # Safety
    /// As [`super::kernel::transpose_f32`].
    unsafe fn transpose(level: Level, from: *const Self, stride: usize, out: *mut Self, width: usize) -> bool;
    /// The loops of block-wise softmax in registers; `None` if this type or processor has none.
    fn steps() -> Option<Steps<Self>>;
    /// What multiplies bf16 operands; `None` if this type or processor has nothing.
    fn words() -> Option<Words<Self>>;
}

macro_rules! number {
    ($t:ty, $variant:ident, $other:ident, $has_kernel:expr, $kernel:path, $transpose:path, $steps:path, $words:path) => {
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
            unsafe fn kernel(level: Level, m: usize, n: usize, k: usize, block: Block<Self>) {
                // SAFETY: the caller's contract is the callee's.
                unsafe { $kernel(level, m, n, k, block) }
            }
            #[inline(always)]
            unsafe fn transpose(level: Level, from: *const Self, stride: usize, out: *mut Self, width: usize) -> bool {
                // SAFETY: the caller's contract is the callee's.
                unsafe { $transpose(level, from, stride, out, width) }
            }
            fn steps() -> Option<Steps<Self>> {
                $steps()
            }
            fn words() -> Option<Words<Self>> {
                $words()
            }
        }
    };
}

/// There is none.
#[inline(always)]
unsafe fn no_kernel<T>(_: Level, _: usize, _: usize, _: usize, _: Block<T>) {
    unreachable!("this type has no kernel")
}

/// There is none.
#[inline(always)]
unsafe fn no_transpose<T>(_: Level, _: *const T, _: usize, _: *mut T, _: usize) -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use super::{kernel::run_f32, kernel::transpose_f32, softmax::f32_steps, words::bf16};
use super::{softmax::none as no_steps, words::none as no_words};

#[cfg(target_arch = "x86_64")]
number!(f32, F32, F64, true, run_f32, transpose_f32, f32_steps, bf16);
#[cfg(not(target_arch = "x86_64"))]
number!(f32, F32, F64, false, no_kernel, no_transpose, no_steps, no_words);
number!(f64, F64, F32, false, no_kernel, no_transpose, no_steps, no_words);

impl Compute {
    /// What multiplies rounded operands; `None` where nothing is rounded.
    pub(crate) fn words<T: CpuNumber>(self) -> Option<Words<T>> {
        match self {
            Compute::Full => None,
            Compute::Bf16 => T::words(),
        }
    }
}
