//! Devices offer memory and a way to run work, never ops.
//!
//! A device is one variant of [`Device`], one of [`crate::Storage`] and one of each other value that lives on devices
//! ([`crate::Ids`], [`crate::ops::attention::Routes`]). Every op matches all of them, without a wildcard: the compiler then
//! names each op that has no answer yet.

pub(crate) mod cpu;
pub mod cuda;
mod gemm;

pub use cpu::level::{Level, level};
pub(crate) use cpu::out_of_memory;
pub use cpu::{Buffer, CpuData, CpuDevice, multiply_add_probe};
pub(crate) use cpu::{CpuElement, CpuNumber, Shared};
pub use cuda::{CudaData, CudaDevice, CudaOptions};
pub use gemm::{Accumulate, Gemm, NoResidual};

use crate::error::Result;

/// Whether this processor multiplies bf16 (AVX512_BF16), which [`crate::Compute::Bf16`] needs to do anything on a CPU.
pub fn cpu_multiplies_bf16() -> bool {
    <f32 as CpuNumber>::bf16_kernels().is_some()
}

/// Where a tensor lives and its ops run.
#[derive(Debug, Clone)]
pub enum Device {
    /// Host memory and a thread pool.
    Cpu(CpuDevice),
    /// One NVIDIA GPU.
    Cuda(CudaDevice),
}

impl Device {
    /// A CPU device with `threads` worker threads (0: one per logical core). Results do not depend on the number.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn cpu(threads: usize) -> Result<Self> {
        Ok(Device::Cpu(CpuDevice::new(threads, false)?))
    }

    /// One NVIDIA GPU.
    ///
    /// # Errors
    /// As [`CudaDevice::new`].
    pub fn cuda(options: CudaOptions) -> Result<Self> {
        Ok(Device::Cuda(CudaDevice::new(options)?))
    }

    /// Opens what the device opens at its first use otherwise, so that a library that is missing is found at once.
    ///
    /// # Errors
    /// When one is missing: what was searched where.
    pub fn prepare(&self) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(gpu) => gpu.prepare(),
        }
    }

    /// Short name for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Cuda(_) => "cuda",
        }
    }

    /// Whether both are the same device, not only of the same kind: memory of one is memory of the other.
    pub fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(a), Device::Cpu(b)) => a.is(b),
            (Device::Cuda(a), Device::Cuda(b)) => a.is(b),
            (Device::Cpu(_), Device::Cuda(_)) | (Device::Cuda(_), Device::Cpu(_)) => false,
        }
    }

    /// Whether it is this CPU.
    pub(crate) fn is_cpu(&self, cpu: &CpuDevice) -> bool {
        match self {
            Device::Cpu(own) => own.is(cpu),
            Device::Cuda(_) => false,
        }
    }

    /// Whether an op may return before its result is there: the host then goes on while the device works.
    pub fn is_asynchronous(&self) -> bool {
        match self {
            Device::Cpu(_) => false,
            Device::Cuda(_) => true,
        }
    }

    /// Waits until everything that was handed to the device has run: for timings.
    ///
    /// # Errors
    /// When something of it failed.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            // a CPU's ops return when they are done
            Device::Cpu(_) => Ok(()),
            Device::Cuda(gpu) => gpu.wait("synchronize"),
        }
    }

    /// Runs `f` where the device's work is handed out: on a CPU, on one of the workers. The many ops of a training step
    /// then start without waking a thread for each.
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match self {
            Device::Cpu(cpu) => cpu.enter(f),
            Device::Cuda(_) => f(),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Device::Cpu(cpu) => write!(f, "{cpu:?}"),
            Device::Cuda(gpu) => write!(f, "{gpu:?}"),
        }
    }
}
