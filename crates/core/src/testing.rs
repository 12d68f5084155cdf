//! What the tests of every op and of the model share.

use crate::device::{CpuDevice, Device};
use crate::error::{Error, Result};
use crate::number::DType;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Lengths that are awkward for tiles, chunks and lanes.
pub const ODD_LENGTHS: [usize; 6] = [1, 5, 37, 63, 97, 257];

/// A device of two threads whose fresh memory is NaN, so that an element that no kernel wrote shows.
pub fn device() -> Device {
    Device::Cpu(CpuDevice::new(2, true).expect("the operating system gives two threads"))
}

/// The CPU of a device, for a test of one of its kernels.
#[cfg(test)]
pub(crate) fn cpu(device: &Device) -> &CpuDevice {
    match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(_) => panic!("a test of a CPU kernel"),
    }
}

/// Standard normals in f64.
pub fn normal(device: &Device, shape: &[usize], seed: u64) -> Tensor {
    Tensor::normal(device, shape, DType::F64, 1.0, &mut Rng::new(seed)).expect("the device has memory")
}

/// Largest absolute difference over the largest absolute value of `want` (over 1 if `want` is all zero). NaN counts as
/// infinitely far.
pub fn relative_error(got: &Tensor, want: &[f64]) -> f64 {
    let got = got.to_f64().expect("the device answers");
    assert_eq!(got.len(), want.len(), "number of elements");
    let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0f64, |m, (a, b)| {
        let d = (a - b).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    if scale == 0.0 { worst } else { worst / scale }
}

/// Largest error of a tape's gradient that central differences in f64 leave room for, relative to the gradient's scale: with a
/// step of 1e-5 the truncation error is of order 1e-10, the rounding error of order 1e-16 / 1e-5 = 1e-11 times the size of the
/// sum, so 2e-7 is far above both and far below any wrong term.
pub const GRADIENT_ERROR: f64 = 2e-7;

/// Compares the tape's gradient of <random, f(inputs)> with central differences of <random, g(inputs)> in f64, element by
/// element. `g` is `f`, unless f has a gradient that is not its own by design (stopped, straight-through). Returns for every
/// input the largest error relative to the largest element of its gradient (to 1e-3, if that is smaller).
///
/// # Errors
/// When an op refuses, or an input has no gradient.
pub fn grad_errors(
    inputs: &[Tensor],
    f: impl Fn(&Tape, &[Var]) -> Result<Var>,
    g: impl Fn(&Tape, &[Var]) -> Result<Var>,
) -> Result<Vec<f64>> {
    errors_of(inputs, &f, &g)
}

/// What [`grad_errors`] takes, for one compiled function in place of one for each test.
type Differentiated<'a> = &'a dyn Fn(&Tape, &[Var]) -> Result<Var>;

fn errors_of(inputs: &[Tensor], f: Differentiated, g: Differentiated) -> Result<Vec<f64>> {
    let leaves = |tape: &Tape, xs: &[Tensor]| -> Vec<Var> { xs.iter().map(|x| tape.leaf(x.clone())).collect() };
    let tape = Tape::new();
    let vars = leaves(&tape, inputs);
    let out = f(&tape, &vars)?;
    let seed = normal(out.value.device(), out.value.shape(), 99);
    let weights = seed.to_f64()?;
    let grads = tape.backward_from(&out, seed)?;
    let value = |xs: &[Tensor]| -> Result<f64> {
        let tape = Tape::inference();
        let out = g(&tape, &leaves(&tape, xs))?;
        Ok(out.value.to_f64()?.iter().zip(&weights).map(|(a, b)| a * b).sum())
    };
    let mut errors = Vec::with_capacity(inputs.len());
    for (k, x) in inputs.iter().enumerate() {
        let missing = || Error::invalid("grad_errors", format!("input {k} has no gradient"));
        let got = grads.get(&vars[k]).ok_or_else(missing)?.to_f64()?;
        let step = 1e-5;
        let shifted = |i: usize, by: f64| {
            let mut xs = inputs.to_vec();
            let mut data = x.to_f64()?;
            data[i] += by;
            xs[k] = Tensor::from_vec(x.device(), x.shape(), data)?;
            value(&xs)
        };
        let want = (0..got.len())
            .map(|i| Ok((shifted(i, step)? - shifted(i, -step)?) / (2.0 * step)))
            .collect::<Result<Vec<f64>>>()?;
        let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
        let far = |(g, w): (&f64, &f64)| if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
        errors.push(got.iter().zip(&want).map(far).fold(0.0, f64::max));
    }
    Ok(errors)
}

/// Asserts that [`grad_errors`] stay below [`GRADIENT_ERROR`].
///
/// # Panics
/// When an input has no gradient or an element differs.
pub fn check_grad(inputs: &[Tensor], f: impl Fn(&Tape, &[Var]) -> Result<Var>) {
    check_errors(inputs, &f);
}

fn check_errors(inputs: &[Tensor], f: Differentiated) {
    for (k, error) in errors_of(inputs, f, f).unwrap().into_iter().enumerate() {
        assert!(error <= GRADIENT_ERROR, "input {k}: the tape is off central differences by {error:e} of their scale");
    }
}

/// Rounded to f32 and then to bf16.
#[cfg(test)]
pub(crate) fn bf16(x: f64) -> f64 {
    f32::from_bits((crate::device::cpu::kernel_bf16::pair(x as f32, 0.0) & 0xffff) << 16) as f64
}

/// Attention, output and gradients of q, k and v, with loops in f64: `round` is applied to every operand of every product, and
/// query i of a kv head sees those of the keys j <= i for which `sees([batch, kv head, i, j])`.
#[cfg(test)]
pub(crate) fn attention_of_operands(
    inputs: &[Vec<f64>],
    [b, t, h, d]: [usize; 4],
    g: usize,
    sees: impl Fn([usize; 4]) -> bool,
    round: fn(f64) -> f64,
) -> Vec<Vec<f64>> {
    let [q, k, v, dout] = inputs else { panic!("q, k, v and the seed") };
    let scale = 1.0 / (d as f64).sqrt();
    let mut out = vec![vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]];
    for (batch, head, i) in (0..b * h * t).map(|n| (n / (h * t), n / t % h, n % t)) {
        let query = ((batch * t + i) * h + head) * d;
        let key = |j: usize| ((batch * t + j) * g + head / (h / g)) * d;
        let dot = |x: &[f64], at: usize, y: &[f64], to: usize| -> f64 {
            (0..d).map(|c| round(x[at + c]) * round(y[to + c])).sum()
        };
        let keys: Vec<usize> = (0..=i).filter(|&j| sees([batch, head / (h / g), i, j])).collect();
        let z: Vec<f64> = keys.iter().map(|&j| scale * dot(q, query, k, key(j))).collect();
        let top = z.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = z.iter().map(|z| (z - top).exp()).sum();
        let p: Vec<f64> = z.iter().map(|z| (z - top).exp() / total).collect();
        for c in 0..d {
            out[0][query + c] = keys.iter().zip(&p).map(|(&j, &p)| round(p) * round(v[key(j) + c])).sum();
        }
        let delta: f64 = (0..d).map(|c| out[0][query + c] * dout[query + c]).sum();
        for (&j, &p) in keys.iter().zip(&p) {
            let ds = round(scale * p * (dot(dout, query, v, key(j)) - delta));
            for c in 0..d {
                out[1][query + c] += ds * round(k[key(j) + c]);
                out[2][key(j) + c] += ds * round(q[query + c]);
                out[3][key(j) + c] += round(p) * round(dout[query + c]);
            }
        }
    }
    out
}
