//! One decoder block in dfdx 0.13, an independent tape: a second opinion on gradients and a peer in speed.
//!
//! Batch 4, 256 tokens, width 256, 4 heads, MLP 704, without rope (dfdx has none); the block is the same with rooms of ours.

use std::time::Instant;

use dash_core::ops::attention::dense_attention;
use dash_core::rng::Rng;
use dash_core::{DType, Device, Result as CoreResult, Tape, Tensor as Ours, Var, ops};
use dfdx::prelude::*;

use crate::bench::spread;

const B: usize = 4;
const T: usize = 256;
const C: usize = 256;
const H: usize = 4;
const D: usize = C / H;
const F: usize = 704;
const EPS: f64 = 1e-6;

/// Input, the weights as [in, out], and the upstream gradient, in the order of [`SHAPES`].
struct Numbers(Vec<Vec<f32>>);

/// x, the first norm, q, k, v, o, the second norm, gate, up, down, and the upstream gradient.
const SHAPES: [(usize, usize); 11] =
    [(B * T, C), (1, C), (C, C), (C, C), (C, C), (C, C), (1, C), (C, F), (C, F), (F, C), (B * T, C)];

impl Numbers {
    fn new() -> Self {
        let mut rng = Rng::new(11);
        let make = |&(rows, cols): &(usize, usize)| {
            let std = if rows == 1 || rows == B * T { 1.0 } else { 1.0 / (rows as f64).sqrt() };
            (0..rows * cols).map(|_| (std * rng.normal()) as f32).collect()
        };
        Numbers(SHAPES.iter().map(make).collect())
    }
}

/// Gradients by dfdx, weights as [in, out], and the seconds that forward + backward took.
fn by_dfdx(numbers: &Numbers) -> (Vec<Vec<f32>>, f64) {
    let dev: Cpu = Default::default();
    let n = |i: usize| numbers.0[i].clone();
    let wide = (Const::<B>, Const::<T>, Const::<C>);
    let x: Tensor<Rank3<B, T, C>, f32, _> = dev.tensor_from_vec(n(0), wide);
    let norm = |i| -> Tensor<Rank1<C>, f32, Cpu> { dev.tensor_from_vec(n(i), (Const::<C>,)) };
    let square = |i| -> Tensor<Rank2<C, C>, f32, Cpu> { dev.tensor_from_vec(n(i), (Const::<C>, Const::<C>)) };
    let (w1, wq, wk, wv, wo, w2) = (norm(1), square(2), square(3), square(4), square(5), norm(6));
    let wg: Tensor<Rank2<C, F>, f32, _> = dev.tensor_from_vec(n(7), (Const::<C>, Const::<F>));
    let wu: Tensor<Rank2<C, F>, f32, _> = dev.tensor_from_vec(n(8), (Const::<C>, Const::<F>));
    let wd: Tensor<Rank2<F, C>, f32, _> = dev.tensor_from_vec(n(9), (Const::<F>, Const::<C>));
    let seed: Tensor<Rank3<B, T, C>, f32, _> = dev.tensor_from_vec(n(10), wide);
    let later: Vec<f32> = (0..T * T).map(|i| if i % T > i / T { -1e9 } else { 0.0 }).collect();
    let mask: Tensor<Rank2<T, T>, f32, _> = dev.tensor_from_vec(later, (Const::<T>, Const::<T>));

    type Traced = Tensor<Rank3<B, T, C>, f32, Cpu, OwnedTape<f32, Cpu>>;
    let rmsnorm = |x: Traced, w: &Tensor<Rank1<C>, f32, Cpu>| -> Traced {
        let mean = x.with_empty_tape().square().mean::<Rank2<B, T>, Axis<2>>();
        let root = (mean + EPS as f32).sqrt().broadcast::<Rank3<B, T, C>, Axis<2>>();
        let weight = w.retaped::<OwnedTape<f32, Cpu>>().broadcast::<Rank3<B, T, C>, Axes2<0, 1>>();
        x / root * weight
    };
    let start = Instant::now();
    let input: Traced = x.leaky_trace();
    let a = rmsnorm(input.with_empty_tape(), &w1);
    let q = a
        .with_empty_tape()
        .matmul(wq.clone())
        .reshape::<Rank4<B, T, H, D>>()
        .permute::<Rank4<B, H, T, D>, Axes4<0, 2, 1, 3>>();
    let k = a.with_empty_tape().matmul(wk.clone()).reshape::<Rank4<B, T, H, D>>();
    let k = k.permute::<Rank4<B, H, D, T>, Axes4<0, 2, 3, 1>>();
    let v = a.matmul(wv.clone()).reshape::<Rank4<B, T, H, D>>().permute::<Rank4<B, H, T, D>, Axes4<0, 2, 1, 3>>();
    let scores = q.matmul(k) * (1.0 / (D as f32).sqrt());
    let p = (scores + mask.broadcast::<Rank4<B, H, T, T>, Axes2<0, 1>>()).softmax::<Axis<3>>();
    let o = p.matmul(v).permute::<Rank4<B, T, H, D>, Axes4<0, 2, 1, 3>>().reshape::<Rank3<B, T, C>>();
    let middle = input + o.matmul(wo.clone());
    let m = rmsnorm(middle.with_empty_tape(), &w2);
    let gate = m.with_empty_tape().matmul(wg.clone());
    let up = m.matmul(wu.clone());
    let gated = gate.with_empty_tape().sigmoid() * gate * up;
    let y = middle + gated.matmul(wd.clone());
    let grads = (y * seed).sum::<Rank0, _>().backward();
    let seconds = start.elapsed().as_secs_f64();
    let squares = [&wq, &wk, &wv, &wo].map(|w| grads.get(w).as_vec());
    let [dq, dk, dv, d_o] = squares;
    let all = vec![
        grads.get(&x).as_vec(),
        grads.get(&w1).as_vec(),
        dq,
        dk,
        dv,
        d_o,
        grads.get(&w2).as_vec(),
        grads.get(&wg).as_vec(),
        grads.get(&wu).as_vec(),
        grads.get(&wd).as_vec(),
    ];
    (all, seconds)
}

/// [rows, cols] to [cols, rows].
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Gradients by the rooms of this project, weights as [in, out], and the seconds that forward + backward took.
fn by_us(numbers: &Numbers, device: &Device, dtype: DType) -> CoreResult<(Vec<Vec<f64>>, f64)> {
    let tensor = |i: usize| -> CoreResult<Ours> {
        let (rows, cols) = SHAPES[i];
        let x = match i {
            0 | 10 => Ours::from_vec(device, &[B, T, C], numbers.0[i].clone()),
            _ if rows == 1 => Ours::from_vec(device, &[C], numbers.0[i].clone()),
            _ => Ours::from_vec(device, &[cols, rows], transposed(&numbers.0[i], rows, cols)),
        };
        Ok(x?.to_dtype(dtype))
    };
    let values = (0..11).map(tensor).collect::<CoreResult<Vec<Ours>>>()?;
    let start = Instant::now();
    let t = Tape::new();
    let v: Vec<Var> = values[..10].iter().map(|x| t.leaf(x.clone())).collect();
    let a = ops::rmsnorm(&t, &v[0], &v[1], EPS)?;
    let heads = |w: &Var| ops::reshape(&t, &ops::linear(&t, &a, w)?, &[B, T, H, D]);
    let o = dense_attention(&t, &heads(&v[2])?, &heads(&v[3])?, &heads(&v[4])?)?;
    let x = ops::add(&t, &v[0], &ops::linear(&t, &ops::reshape(&t, &o, &[B, T, C])?, &v[5])?)?;
    let m = ops::rmsnorm(&t, &x, &v[6], EPS)?;
    let gated = ops::swiglu(&t, &ops::linear(&t, &m, &v[7])?, &ops::linear(&t, &m, &v[8])?)?;
    let y = ops::add(&t, &x, &ops::linear(&t, &gated, &v[9])?)?;
    let grads = t.backward_from(&y, values[10].clone())?;
    let seconds = start.elapsed().as_secs_f64();
    let gradient = |i: usize| {
        let g = grads.get(&v[i]).expect("every input is reached").to_f64();
        let (rows, cols) = SHAPES[i];
        if rows == 1 || i == 0 { g } else { (0..rows * cols).map(|j| g[j % cols * rows + j / cols]).collect() }
    };
    Ok(((0..10).map(gradient).collect(), seconds))
}

/// Median seconds of forward + backward: (dfdx, ours).
///
/// # Errors
/// When an op of ours refuses.
pub fn block_speed(device: &Device, steps: usize) -> CoreResult<(f64, f64)> {
    let numbers = Numbers::new();
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..steps + 1 {
        times.0.push(by_dfdx(&numbers).1);
        times.1.push(by_us(&numbers, device, DType::F32)?.1);
    }
    // the first of each warms up
    Ok((spread(times.0.split_off(1)).1, spread(times.1.split_off(1)).1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 10] =
        ["x", "norm1", "q_proj", "k_proj", "v_proj", "o_proj", "norm2", "gate_proj", "up_proj", "down_proj"];

    #[test]
    fn dfdx_agrees_on_every_gradient_of_a_block() {
        let (numbers, device) = (Numbers::new(), Device::cpu(2));
        let exact = by_us(&numbers, &device, DType::F64).unwrap().0;
        let ours = by_us(&numbers, &device, DType::F32).unwrap().0;
        let theirs = by_dfdx(&numbers).0;
        let error = |got: &[f64], want: &[f64]| {
            let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            got.iter().zip(want).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / scale
        };
        for (i, name) in NAMES.iter().enumerate() {
            let wide: Vec<f64> = theirs[i].iter().map(|&x| x as f64).collect();
            // A chain of six products with inner lengths up to 1024 in f32: a wrong term would show in the second digit.
            let (dfdx, own) = (error(&wide, &exact[i]), error(&ours[i], &exact[i]));
            assert!(dfdx < 1e-5, "{name}: dfdx differs from f64 by {dfdx:e}");
            assert!(own <= 2.0 * dfdx, "{name}: f32 differs from f64 by {own:e}, dfdx by {dfdx:e}");
        }
    }
}
