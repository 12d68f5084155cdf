//! Tensors as bytes, little-endian.
#![cfg(any(feature = "mpi", test))]

use dash_core::communicator::Incoming;
use dash_core::{DType, Device, Result, Tensor};

/// Bytes and the process that they go to.
pub type Sent = Vec<(usize, Vec<u8>)>;
/// Number of bytes and the process that they come from.
pub type Coming = Vec<(usize, usize)>;

/// The numbers of a tensor.
///
/// # Errors
/// When the device fails.
pub fn of(x: &Tensor) -> Result<Vec<u8>> {
    Ok(match x.dtype() {
        DType::F32 => x.to_vec::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F64 => x.to_vec::<f64>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// Bytes of a tensor that is about to come.
pub fn length(coming: &Incoming) -> usize {
    let size = match coming.dtype {
        DType::F32 => size_of::<f32>(),
        DType::F64 => size_of::<f64>(),
    };
    size * coming.shape.iter().product::<usize>()
}

/// The tensor of such bytes.
///
/// # Errors
/// When the device has no memory left, or the bytes do not fill it.
pub fn tensor(device: &Device, coming: &Incoming, bytes: &[u8]) -> Result<Tensor> {
    match coming.dtype {
        DType::F32 => {
            let (numbers, _) = bytes.as_chunks();
            Tensor::from_vec(device, &coming.shape, numbers.iter().map(|b| f32::from_le_bytes(*b)).collect())
        }
        DType::F64 => {
            let (numbers, _) = bytes.as_chunks();
            Tensor::from_vec(device, &coming.shape, numbers.iter().map(|b| f64::from_le_bytes(*b)).collect())
        }
    }
}
