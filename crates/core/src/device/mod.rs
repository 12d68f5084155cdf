//! Devices offer memory and a way to run work, never ops.

mod cpu;
pub mod cuda;
mod element;
pub mod kernel;
pub mod simd;
pub mod softmax;
pub mod tile;
pub mod words;

pub use cpu::{Buffer, CpuDevice, Pool, Pools, Shared};
pub use element::{CpuData, CpuElement, CpuNumber};

/// Where a tensor lives and its ops run.
#[derive(Debug, Clone)]
pub enum Device {
    /// Host memory and a thread pool.
    Cpu(CpuDevice),
}

impl Device {
    /// A CPU device with `threads` worker threads (0: one per logical core). Results do not depend on the number.
    pub fn cpu(threads: usize) -> Self {
        Device::Cpu(CpuDevice::new(threads, false))
    }

    /// Short name for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
        }
    }

    /// Runs `f` where the device's work is handed out: on a CPU, on one of the workers. The many ops of a training step
    /// then start without waking a thread for each.
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match self {
            Device::Cpu(cpu) => cpu.enter(f),
        }
    }

    /// The CPU behind it.
    pub(crate) fn as_cpu(&self) -> &CpuDevice {
        match self {
            Device::Cpu(cpu) => cpu,
        }
    }
}
