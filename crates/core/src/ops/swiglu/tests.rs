use super::*;
use crate::device::Device;
use crate::number::{Compute, DType};
use crate::ops::{add, linear, mul, sigmoid};
use crate::testing::{bf16, check_grad, device, normal, relative_error};

/// Sizes that cut the work differently: one block; a short last block and a short last panel; several blocks, ranges of
/// features and parts of rows in backward.
const SIZES: [(usize, usize, usize); 5] = [(1, 1, 1), (3, 5, 37), (131, 3, 33), (700, 40, 70), (1300, 6, 461)];

/// x, gate, up, down, residual and a seed, of numbers that f32 holds, the sums of order 1.
fn inputs(d: &Device, (rows, c, f): (usize, usize, usize)) -> Vec<Tensor> {
    let shapes = [[rows, c], [f, c], [f, c], [c, f], [rows, c], [rows, c]];
    let scaled = |(i, shape): (usize, &[usize; 2])| {
        let x = normal(d, shape, i as u64).to_f64().unwrap();
        let scale = if i % 4 == 0 || i == 5 { 1.0 } else { 1.0 / (shape[1] as f64).sqrt() };
        let x: Vec<f32> = x.into_iter().map(|x| (x * scale) as f32).collect();
        Tensor::from_vec(d, shape, x).unwrap().to_dtype(DType::F64).unwrap()
    };
    shapes.iter().enumerate().map(scaled).collect()
}

type Layer = fn(&Tape, &[Var]) -> Result<Var>;

fn fused(t: &Tape, v: &[Var]) -> Result<Var> {
    swiglu(t, &v[0], [&v[1], &v[2], &v[3]], Some(&v[4]))
}

fn of_smaller_rooms(t: &Tape, v: &[Var]) -> Result<Var> {
    let gate = linear(t, &v[0], &v[1])?;
    let h = mul(t, &mul(t, &gate, &sigmoid(t, &gate)?)?, &linear(t, &v[0], &v[2])?)?;
    add(t, &v[4], &linear(t, &h, &v[3])?)
}

/// y and the gradients of x, the weights and the residual, for the last of `inputs` as seed.
fn run(inputs: &[Tensor], dtype: DType, compute: Compute, layer: Layer) -> Vec<Vec<f64>> {
    let t = Tape::new().computing(compute);
    let v: Vec<Var> = inputs[..5].iter().map(|x| t.leaf(x.to_dtype(dtype).unwrap())).collect();
    let y = layer(&t, &v).unwrap();
    let grads = t.backward_from(&y, inputs[5].to_dtype(dtype).unwrap()).unwrap();
    let grads = v.iter().map(|v| grads.get(v).unwrap().to_f64().unwrap());
    std::iter::once(y.value.to_f64().unwrap()).chain(grads).collect()
}

fn error(got: &[f64], want: &[f64]) -> f64 {
    relative_error(&Tensor::from_vec(&device(), &[got.len()], got.to_vec()).unwrap(), want)
}

#[test]
fn grad() {
    let d = device();
    for size in [(3, 5, 37), (1, 1, 1), (131, 3, 33)] {
        check_grad(&inputs(&d, size)[..5], fused);
    }
    check_grad(&inputs(&d, (4, 3, 5))[..4], |t, v| swiglu(t, &v[0], [&v[1], &v[2], &v[3]], None));
    // the residual may be x itself
    check_grad(&inputs(&d, (4, 3, 5))[..4], |t, v| swiglu(t, &v[0], [&v[1], &v[2], &v[3]], Some(&v[0])));
}

#[test]
fn is_its_formula_in_every_cut() {
    let d = device();
    for size in SIZES {
        let x = inputs(&d, size);
        let want = run(&x, DType::F64, Compute::Full, of_smaller_rooms);
        let longest = size.0.max(size.1).max(size.2) as f64;
        for (dtype, epsilon) in [(DType::F64, f64::EPSILON), (DType::F32, f32::EPSILON as f64)] {
            for (i, (got, want)) in run(&x, dtype, Compute::Full, fused).iter().zip(&want).enumerate() {
                // a sum of k terms is off by about sqrt(k) half-ulps, three sums follow one another, and silu and its
                // derivative have a dozen operations more
                let far = error(got, want);
                assert!(far <= (12.0 + 3.0 * longest.sqrt()) * epsilon, "{size:?} {dtype:?}, output {i}: {far:e}");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for compute in [Compute::Full, Compute::Bf16] {
        for size in SIZES {
            let on = |threads| run(&inputs(&Device::cpu(threads).unwrap(), size), DType::F32, compute, fused);
            assert_eq!(on(1), on(4), "{size:?} {compute:?}");
        }
    }
}

/// The formula with loops in f64; `round` is applied to every operand of every product.
fn by_loops(inputs: &[Tensor], (rows, c, f): (usize, usize, usize), round: fn(f64) -> f64) -> Vec<Vec<f64>> {
    let of: Vec<Vec<f64>> = inputs.iter().map(|x| x.to_f64().unwrap()).collect();
    let [x, gate, up, down, residual, dy] = of.as_slice() else { panic!("six") };
    let sum = |n: usize, a: &dyn Fn(usize) -> f64, b: &dyn Fn(usize) -> f64| -> f64 {
        (0..n).map(|i| round(a(i)) * round(b(i))).sum()
    };
    let all = |m: usize, n: usize, at: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..m * n).map(|e| at(e / n, e % n)).collect()
    };
    let g = all(rows, f, &|i, j| sum(c, &|p| x[i * c + p], &|p| gate[j * c + p]));
    let u = all(rows, f, &|i, j| sum(c, &|p| x[i * c + p], &|p| up[j * c + p]));
    let s: Vec<f64> = g.iter().map(|g| 1.0 / (1.0 + (-g).exp())).collect();
    let h = all(1, rows * f, &|_, e| g[e] * s[e] * u[e]);
    let y = all(rows, c, &|i, j| residual[i * c + j] + sum(f, &|p| h[i * f + p], &|p| down[j * f + p]));
    let dh = all(rows, f, &|i, j| sum(c, &|p| dy[i * c + p], &|p| down[p * f + j]));
    let dg = all(1, rows * f, &|_, e| dh[e] * u[e] * s[e] * (1.0 + g[e] * (1.0 - s[e])));
    let du = all(1, rows * f, &|_, e| dh[e] * g[e] * s[e]);
    let dx = all(rows, c, &|i, j| {
        sum(f, &|p| dg[i * f + p], &|p| gate[p * c + j]) + sum(f, &|p| du[i * f + p], &|p| up[p * c + j])
    });
    let dgate = all(f, c, &|i, j| sum(rows, &|p| dg[p * f + i], &|p| x[p * c + j]));
    let dup = all(f, c, &|i, j| sum(rows, &|p| du[p * f + i], &|p| x[p * c + j]));
    let ddown = all(c, f, &|i, j| sum(rows, &|p| dy[p * c + i], &|p| h[p * f + j]));
    vec![y, dx, dgate, dup, ddown, dy.clone()]
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_formula_with_rounded_operands() {
    let d = device();
    for size in SIZES {
        let x = inputs(&d, size);
        let exact = by_loops(&x, size, |x| x);
        let naive = by_loops(&x, size, bf16);
        let ours = run(&x, DType::F32, Compute::Bf16, fused);
        for (i, (got, want)) in ours.iter().zip(&exact).enumerate() {
            let (far, allowed) = (error(got, want), 2.0 * error(&naive[i], want));
            // f32 sums add their own rounding, which shows where the operands round to themselves
            let longest = size.0.max(size.1).max(size.2) as f64;
            let allowed = allowed + 4.0 * longest.sqrt() * f32::EPSILON as f64;
            assert!(far <= allowed, "{size:?}, output {i}: {far:e} against {allowed:e}");
        }
        if size.0 > 1 {
            // the kernels were used (a single row may round well by chance)
            assert_ne!(ours[0], run(&x, DType::F32, Compute::Full, fused)[0], "{size:?}");
        }
    }
}

#[test]
fn large_gates_saturate_without_nan() {
    let (d, t) = (device(), Tape::new());
    let leaf = |shape: &[usize], x: Vec<f32>| t.leaf(Tensor::from_vec(&d, shape, x).unwrap());
    let (x, gate, up, down) = (
        leaf(&[3, 1], vec![-500.0, 0.0, 500.0]),
        leaf(&[1, 1], vec![1.0]),
        leaf(&[1, 1], vec![0.004]),
        leaf(&[1, 1], vec![1.0]),
    );
    let y = swiglu(&t, &x, [&gate, &up, &down], None).unwrap();
    assert_eq!(y.value.to_f64().unwrap(), [0.0, 0.0, 1000.0]);
    let grads = t.backward_from(&y, Tensor::full(&d, &[3, 1], DType::F32, 1.0).unwrap()).unwrap();
    assert!(
        [&x, &gate, &up, &down].iter().all(|v| grads.get(v).unwrap().to_f64().unwrap().iter().all(|g| g.is_finite()))
    );
}

#[test]
fn what_does_not_fit_is_told() {
    let (d, t) = (device(), Tape::new());
    let leaf = |shape: &[usize]| t.leaf(normal(&d, shape, 1));
    let (x, gate, down) = (leaf(&[2, 4]), leaf(&[6, 4]), leaf(&[4, 6]));
    let told = |x: &Var, weights: [&Var; 3], residual| swiglu(&t, x, weights, residual).unwrap_err().to_string();
    assert_eq!(told(&x, [&gate, &down, &down], None), "swiglu: x has shape [2, 4]: up must be [6, 4], not [4, 6]");
    assert_eq!(told(&x, [&gate, &gate, &down], Some(&down)), "swiglu: x has shape [2, 4], the residual [4, 6]");
    assert_eq!(
        told(&leaf(&[0, 4]), [&gate, &gate, &down], None),
        "swiglu: nothing to multiply: x has shape [0, 4], gate [6, 4]"
    );
}

#[test]
fn a_few_rows_are_the_rows_of_many_and_recording_does_not_change_them() {
    let d = device();
    let all = inputs(&d, (9, 33, 70));
    let y = |rows: usize, tape: &Tape| {
        let few = |x: &Tensor, width| {
            let x = x.to_f64().unwrap()[..rows * width].to_vec();
            tape.leaf(Tensor::from_vec(&d, &[rows, width], x).unwrap())
        };
        let [gate, up, down] = [1, 2, 3].map(|i| tape.leaf(all[i].clone()));
        let (x, residual) = (few(&all[0], 33), few(&all[4], 33));
        swiglu(tape, &x, [&gate, &up, &down], Some(&residual)).unwrap().value
    };
    let many = y(9, &Tape::inference()).to_f64().unwrap();
    for rows in 1..=FEW_ROWS {
        let few = y(rows, &Tape::inference());
        assert!(relative_error(&few, &many[..rows * 33]) < 1e-14);
        assert_eq!(few.to_f64().unwrap(), y(rows, &Tape::new()).to_f64().unwrap());
    }
}
