//! What the tests of every room and of the model share.

use crate::device::{CpuDevice, Device};
use crate::error::Result;
use crate::rng::Rng;
use crate::storage::DType;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Lengths that are awkward for tiles, chunks and lanes.
pub const ODD_LENGTHS: [usize; 6] = [1, 5, 37, 63, 97, 257];

/// A device of two threads whose fresh memory is NaN, so that an element that no kernel wrote shows.
pub fn device() -> Device {
    Device::Cpu(CpuDevice::new(2, true))
}

/// Standard normals in f64.
pub fn normal(device: &Device, shape: &[usize], seed: u64) -> Tensor {
    Tensor::normal(device, shape, DType::F64, 1.0, &mut Rng::new(seed))
}

/// Largest absolute difference over the largest absolute value of `want` (over 1 if `want` is all zero). NaN counts as
/// infinitely far.
pub fn relative_error(got: &Tensor, want: &[f64]) -> f64 {
    let got = got.to_f64();
    assert_eq!(got.len(), want.len(), "number of elements");
    let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0f64, |m, (a, b)| {
        let d = (a - b).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    if scale == 0.0 { worst } else { worst / scale }
}

/// Compares the tape's gradient of <random, f(inputs)> with central differences in f64, element by element.
///
/// The step is 1e-5: its truncation error is of order 1e-10, its rounding error of order 1e-16 / 1e-5 = 1e-11 times the
/// size of the sum, so 2e-7 of the gradient's scale is far above both and far below any wrong term.
///
/// # Panics
/// When an input has no gradient or an element differs.
pub fn check_grad(inputs: &[Tensor], f: impl Fn(&Tape, &[Var]) -> Result<Var>) {
    let run = |xs: &[Tensor]| {
        let tape = Tape::new();
        let vars: Vec<Var> = xs.iter().map(|x| tape.leaf(x.clone())).collect();
        let out = f(&tape, &vars).unwrap();
        (tape, vars, out)
    };
    let (tape, vars, out) = run(inputs);
    let seed = normal(out.value.device(), out.value.shape(), 99);
    let weights = seed.to_f64();
    let grads = tape.backward_from(&out, seed).unwrap();
    let value = |xs: &[Tensor]| -> f64 { run(xs).2.value.to_f64().iter().zip(&weights).map(|(a, b)| a * b).sum() };
    for (k, x) in inputs.iter().enumerate() {
        let got = grads.get(&vars[k]).unwrap_or_else(|| panic!("no gradient for input {k}")).to_f64();
        assert_eq!(got.len(), x.numel(), "gradient of input {k}");
        let step = 1e-5;
        let shifted = |i: usize, by: f64| {
            let mut xs = inputs.to_vec();
            let mut data = x.to_f64();
            data[i] += by;
            xs[k] = Tensor::from_vec(x.device(), x.shape(), data).unwrap();
            value(&xs)
        };
        let want: Vec<f64> = (0..got.len()).map(|i| (shifted(i, step) - shifted(i, -step)) / (2.0 * step)).collect();
        let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() <= 2e-7 * scale, "input {k}[{i}]: tape {g}, central difference {w}, scale {scale}");
        }
    }
}
