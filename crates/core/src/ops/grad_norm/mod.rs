//! The global norm sqrt(sum of g^2) over all gradients (Pascanu et al. 2013, arXiv 1211.5063). Squares are summed in f64
//! over pieces of fixed length, added in order.

pub mod cuda;

use crate::device::cpu::simd::{self, simd};
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

/// Euclidean norm of all elements of all tensors.
pub fn grad_norm<'a>(grads: impl IntoIterator<Item = &'a Tensor>) -> f64 {
    let square = |g: &Tensor| {
        with_number!(g.dtype(), T => {
            let data = g.data::<T>();
            g.cpu().ordered_sum(data.len(), ELEMENTWISE, |r| squares(&data[r]))
        })
    };
    grads.into_iter().map(square).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{device, normal};

    #[test]
    fn is_the_norm_of_the_concatenation() {
        let d = device();
        let (a, b) = (normal(&d, &[40_000], 1), normal(&d, &[7], 2));
        let want: f64 = a.to_f64().iter().chain(&b.to_f64()).map(|x| x * x).sum();
        assert!((grad_norm([&a, &b]) / want.sqrt() - 1.0).abs() < 1e-13);
        let (a, b) = (a.to_dtype(crate::DType::F32), b.to_dtype(crate::DType::F32));
        assert!((grad_norm([&a, &b]) / want.sqrt() - 1.0).abs() < 1e-6);
    }
}
