//! Where a tensor's numbers live.

use crate::device::CpuData;
use crate::number::DType;

/// A flat buffer on one device, by device first: what a device keeps inside is its own business.
#[derive(Debug)]
pub enum Storage {
    /// Host memory.
    Cpu(CpuData),
}

impl Storage {
    /// Element type held.
    pub fn dtype(&self) -> DType {
        match self {
            Storage::Cpu(data) => data.dtype(),
        }
    }
}
