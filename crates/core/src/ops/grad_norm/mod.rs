//! The global norm sqrt(sum of g^2) over all gradients (Pascanu et al. 2013, arXiv 1211.5063). Squares are summed in f64
//! over pieces of fixed length, added in order.

pub mod cuda;

use crate::device::cpu::simd::{self, simd};
use crate::device::cuda::{CudaBuffer, Kind};
use crate::device::{CpuDevice, Device};
use crate::error::{Result, ensure};
use crate::number::with_number;
use crate::tensor::{ELEMENTWISE, Tensor};

simd! {
    /// A run of 256 squares sums in the element type, runs sum in f64: the error stays at that of 256 additions.
    fn squares<T>(x: &[T]) -> f64 {
        let mut sum = 0.0;
        for run in x.chunks(256) {
            sum += simd::dot(run, run).f64();
        }
        sum
    }
}

/// Euclidean norm of all elements of all tensors: an f64 scalar on the device.
///
/// # Errors
/// When a tensor lives on another device.
pub fn grad_norm<'a>(device: &Device, grads: impl IntoIterator<Item = &'a Tensor>) -> Result<Tensor> {
    root_of_sum(device, &[squares_of(device, grads)?])
}

/// Number of the partial sums that [`squares_of`] makes of a tensor of so many elements.
pub fn parts(device: &Device, numel: usize) -> usize {
    match device {
        Device::Cpu(_) => 1,
        Device::Cuda(_) => cuda::parts(numel),
    }
}

/// The sums of squares of pieces of the tensors, in order: f64 on the device, for each tensor as many as [`parts`] says.
///
/// # Errors
/// When a tensor lives on another device.
pub fn squares_of<'a>(device: &Device, grads: impl IntoIterator<Item = &'a Tensor>) -> Result<Tensor> {
    match device {
        Device::Cpu(cpu) => {
            let mut sums = Vec::new();
            for g in grads {
                sums.push(with_number!(g.dtype(), T => {
                    let x = g.on_cpu::<T>("grad_norm", cpu)?;
                    cpu.ordered_sum(x.len(), ELEMENTWISE, |r| squares(&x[r]))
                }));
            }
            Ok(Tensor::from_buffer(&[sums.len()], cpu.copy(&sums)))
        }
        Device::Cuda(gpu) => {
            let on = |g: &'a Tensor| g.on_cuda("grad_norm", gpu)?.full();
            let grads = grads.into_iter().map(on).collect::<Result<Vec<_>>>()?;
            let sums = cuda::squares_of(gpu, &grads)?;
            Ok(Tensor::from_cuda(&[sums.len()], sums))
        }
    }
}

/// The root of the sum of all `sums`, added in order: an f64 scalar on the device. Of what [`squares_of`] makes of some tensors it is their
/// norm, however the tensors, in their order, were divided among its calls.
///
/// # Errors
/// When one lives on another device or is no f64.
pub fn root_of_sum(device: &Device, sums: &[Tensor]) -> Result<Tensor> {
    let op = "grad_norm";
    match device {
        Device::Cpu(cpu) => {
            let mut sum = 0.0;
            for x in sums {
                sum = x.on_cpu::<f64>(op, cpu)?.iter().fold(sum, |sum, x| sum + x);
            }
            Ok(Tensor::from_buffer(&[], cpu.copy(&[sum.sqrt()])))
        }
        Device::Cuda(gpu) => {
            let sums = sums.iter().map(|x| x.on_cuda(op, gpu)?.full()).collect::<Result<Vec<_>>>()?;
            let root = match sums[..] {
                [all] => cuda::root_of_sum(all)?,
                _ => cuda::root_of_sum(&CudaBuffer::concatenation(gpu, Kind::F64, &sums)?)?,
            };
            Ok(Tensor::from_cuda(&[], root))
        }
    }
}

/// What clipping by the global norm multiplies gradients with, `min(1, clip / (norm + 1e-6))` (PyTorch's clip_grad_norm_),
/// or 1 where `clip` is 0: an f64 scalar on the device. NaN where the norm or one of `losses`, scalars, is not finite, so
/// that an optimiser leaves everything as it is without the host having looked.
///
/// # Errors
/// When `norm` is no f64 scalar, a loss is no scalar, or one lives on another device.
pub fn clip_factor(norm: &Tensor, clip: f64, losses: &[Tensor]) -> Result<Tensor> {
    let op = "clip_factor";
    for x in losses.iter().chain([norm]) {
        ensure!(x.numel() == 1, op, "norm and losses are scalars, not {:?}", x.shape());
    }
    match norm.device() {
        Device::Cpu(cpu) => {
            let scalar =
                |x: &Tensor, cpu: &CpuDevice| with_number!(x.dtype(), T => Ok(x.on_cpu::<T>(op, cpu)?[0].f64()));
            let norm = norm.on_cpu::<f64>(op, cpu)?[0];
            let mut finite = norm.is_finite();
            for loss in losses {
                let loss: Result<f64> = scalar(loss, cpu);
                finite &= loss?.is_finite();
            }
            let factor = if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
            Ok(Tensor::from_buffer(&[], cpu.copy(&[if finite { factor } else { f64::NAN }])))
        }
        Device::Cuda(gpu) => {
            let losses = losses.iter().map(|x| x.on_cuda(op, gpu)?.full()).collect::<Result<Vec<_>>>()?;
            Ok(Tensor::from_cuda(&[], cuda::clip_factor(norm.on_cuda(op, gpu)?.full()?, clip, &losses)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::number::DType;
    use crate::testing::{device, normal};

    #[test]
    fn is_the_norm_of_the_concatenation() {
        let d = device();
        let (a, b) = (normal(&d, &[40_000], 1), normal(&d, &[7], 2));
        let norm = |grads: [&Tensor; 2]| grad_norm(&d, grads).unwrap().item().unwrap();
        let want: f64 = a.to_f64().unwrap().iter().chain(&b.to_f64().unwrap()).map(|x| x * x).sum();
        assert!((norm([&a, &b]) / want.sqrt() - 1.0).abs() < 1e-13);
        let (a, b) = (a.to_dtype(DType::F32).unwrap(), b.to_dtype(DType::F32).unwrap());
        assert!((norm([&a, &b]) / want.sqrt() - 1.0).abs() < 1e-6);
        assert_eq!(grad_norm(&d, []).unwrap().item().unwrap(), 0.0);
        assert!(grad_norm(&device(), [&a]).unwrap_err().to_string().contains("an input lives on cpu"));
    }

    #[test]
    fn the_parts_of_the_tensors_may_be_made_apart() {
        let d = device();
        let grads: Vec<Tensor> = (0..5).map(|i| normal(&d, &[1 + 9_000 * i], i as u64)).collect();
        let whole = grad_norm(&d, &grads).unwrap().item().unwrap();
        for cut in 0..=grads.len() {
            let sums = [&grads[..cut], &grads[cut..]].map(|some| squares_of(&d, some).unwrap());
            let counts: Vec<usize> =
                [&grads[..cut], &grads[cut..]].map(|some| some.iter().map(|g| parts(&d, g.numel())).sum()).into();
            assert_eq!(sums.each_ref().map(Tensor::numel).to_vec(), counts);
            assert_eq!(root_of_sum(&d, &sums).unwrap().item().unwrap().to_bits(), whole.to_bits(), "{cut}");
        }
    }

    #[test]
    fn the_factor_clips_and_stops_what_is_not_finite() {
        let d = device();
        let scalar = |x: f64| Tensor::full(&d, &[], DType::F64, x).unwrap();
        let factor = |norm, clip, losses: &[Tensor]| clip_factor(&scalar(norm), clip, losses).unwrap().item().unwrap();
        assert_eq!(factor(4.0, 1.0, &[scalar(2.0)]), 1.0 / (4.0 + 1e-6));
        assert_eq!((factor(0.5, 1.0, &[]), factor(4.0, 0.0, &[])), (1.0, 1.0));
        let single = Tensor::full(&d, &[], DType::F32, f64::INFINITY).unwrap();
        assert!(factor(4.0, 1.0, &[scalar(1.0), single]).is_nan());
        assert!(factor(f64::NAN, 1.0, &[]).is_nan() && factor(f64::INFINITY, 0.0, &[]).is_nan());
    }
}
