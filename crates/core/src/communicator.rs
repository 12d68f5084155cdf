//! Tensors on their way between the cards of several processes. Nothing is added here: a sum of what came is an op of whoever received it,
//! in an order of its own choice, so that it does not depend on a library's.

use std::path::PathBuf;

pub use crate::device::cuda::nccl::{NcclId, NcclLibrary};

use crate::device::cuda::{Kind, nccl};
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::number::DType;
use crate::shape::numel;
use crate::tensor::Tensor;

/// A tensor that is about to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// The process that sends it.
    pub from: usize,
    /// Extents.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

/// One process among those that move tensors between their NVIDIA GPUs.
#[derive(Debug)]
pub struct Communicator {
    device: CudaDevice,
    inner: nccl::Communicator,
}

impl Communicator {
    /// The library, `folders` first.
    ///
    /// # Errors
    /// When it is not there: what was searched where.
    pub fn library(folders: &[PathBuf]) -> Result<NcclLibrary> {
        NcclLibrary::open(folders)
    }

    /// Joins `world` processes that have this identity, and waits for them.
    ///
    /// # Errors
    /// When the device is no NVIDIA GPU, or NCCL cannot connect the cards, for example when two processes took one.
    pub fn new(library: NcclLibrary, device: &Device, id: NcclId, place: (usize, usize)) -> Result<Self> {
        match device {
            Device::Cuda(gpu) => {
                Ok(Communicator { device: gpu.clone(), inner: nccl::Communicator::new(library, gpu, id, place)? })
            }
            Device::Cpu(_) => Err(Error::invalid("communicator", "NCCL connects GPUs; the device is a CPU")),
        }
    }

    /// Sends tensors to other processes and receives what they send to this one: between two processes in the order of both lists.
    ///
    /// # Errors
    /// When a tensor lives elsewhere, memory runs out, or NCCL fails.
    pub fn exchange(&mut self, sends: &[(usize, &Tensor)], receives: &[Incoming]) -> Result<Vec<Tensor>> {
        let gpu = self.device.clone();
        let mut sent = Vec::with_capacity(sends.len());
        for (to, x) in sends {
            sent.push((*to, x.on_cuda("exchange", &gpu)?.full()?));
        }
        let coming: Vec<_> = receives.iter().map(|i| (i.from, Kind::of(i.dtype), numel(&i.shape))).collect();
        let got = self.inner.exchange(&sent, &coming)?;
        Ok(receives.iter().zip(got).map(|(i, buffer)| Tensor::from_cuda(&i.shape, buffer)).collect())
    }

    /// Ends it in order: all processes do, after their last exchange.
    ///
    /// # Errors
    /// When an exchange before failed.
    pub fn finish(self) -> Result<()> {
        self.inner.finish()
    }
}
