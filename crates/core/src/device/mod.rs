//! Devices offer memory and a way to run work, never ops.

pub(crate) mod cpu;
pub mod cuda;

pub use cpu::level::{Level, level};
pub use cpu::{Buffer, CpuData, CpuDevice, multiply_add_probe};
pub(crate) use cpu::{CpuElement, CpuNumber, Shared};

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
