//! Where a tensor's numbers live.

use crate::device::{CpuData, CudaData};
use crate::number::DType;

/// A flat buffer on one device, by device first: what a device keeps inside is its own business.
///
/// Another device is another variant here and in [`crate::Device`], in `dispatch::Place` and in the memory of [`crate::Ids`] and
/// [`crate::ops::attention::Routes`]. No match over them has a wildcard arm, so the compiler names every op that has no answer.
#[derive(Debug)]
pub enum Storage {
    /// Host memory.
    Cpu(CpuData),
    /// Memory of an NVIDIA GPU.
    Cuda(CudaData),
}

impl Storage {
    /// Element type held.
    pub fn dtype(&self) -> DType {
        match self {
            Storage::Cpu(data) => data.dtype(),
            Storage::Cuda(data) => data.dtype(),
        }
    }
}
