//! One decoder block in dfdx 0.13, an independent tape, and the same block with ops of ours: a second opinion on gradients and a peer in
//! speed.

use std::time::Instant;

use dash_core::ops::attention::{
    Center, Entmax, RouterGradient, block_attention, chunk_summary, dense_attention, entmax_routing,
};
use dash_core::rng::Rng;
use dash_core::{DType, Device, Result as CoreResult, Tape, Tensor, Var, ops};
pub use dash_peer::Kind;
use dash_peer::{B, C, D, EPS, GAMMA, H, S, SHAPES, T};

use super::timing::spread;

/// Input, the weights as [in, out], and the upstream gradient, in the order of [`SHAPES`].
struct Numbers(Vec<Vec<f32>>);

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

/// [rows, cols] to [cols, rows].
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Gradients by the ops of this project, weights as [in, out], and the seconds that forward + backward took.
fn by_us(numbers: &Numbers, device: &Device, dtype: DType, kind: Kind) -> CoreResult<(Vec<Vec<f64>>, f64)> {
    let tensor = |i: usize| -> CoreResult<Tensor> {
        let (rows, cols) = SHAPES[i];
        let x = match i {
            0 | 10 => Tensor::from_vec(device, &[B, T, C], numbers.0[i].clone()),
            _ if rows == 1 => Tensor::from_vec(device, &[C], numbers.0[i].clone()),
            _ => Tensor::from_vec(device, &[cols, rows], transposed(&numbers.0[i], rows, cols)),
        };
        x?.to_dtype(dtype)
    };
    let values = (0..12).map(tensor).collect::<CoreResult<Vec<Tensor>>>()?;
    let start = Instant::now();
    let t = Tape::new();
    let v: Vec<Var> = values.iter().map(|x| t.leaf(x.clone())).collect();
    let a = ops::rmsnorm(&t, &v[0], &v[1], EPS)?;
    let heads = |w: &Var| ops::reshape(&t, &ops::linear(&t, &a, w)?, &[B, T, H, D]);
    let (q, k, values_) = (heads(&v[2])?, heads(&v[3])?, heads(&v[4])?);
    let o = match kind {
        Kind::Dense => dense_attention(&t, &q, &k, &values_)?,
        Kind::Dash => {
            let settings = Entmax {
                chunk_size: S,
                alpha: 1.5,
                gamma: GAMMA,
                sigma: 1.0,
                center: Center::None,
                gradient: RouterGradient::Full,
            };
            let routing = entmax_routing(&t, &q, &chunk_summary(&t, &k, &v[11], S)?, None, settings)?;
            block_attention(&t, &q, &k, &values_, &routing.routes, Some(&routing.bias))?
        }
    };
    let x = ops::add(&t, &v[0], &ops::linear(&t, &ops::reshape(&t, &o, &[B, T, C])?, &v[5])?)?;
    let m = ops::rmsnorm(&t, &x, &v[6], EPS)?;
    let y = ops::swiglu(&t, &m, [&v[7], &v[8], &v[9]], Some(&x))?;
    let grads = t.backward_from(&y, values[10].clone())?;
    let seconds = start.elapsed().as_secs_f64();
    let gradient = |i: usize| {
        let g = grads.get(&v[i]).expect("every input is reached").to_f64()?;
        let (rows, cols) = SHAPES[i];
        let transposed = || (0..rows * cols).map(|j| g[j % cols * rows + j / cols]).collect();
        CoreResult::Ok(if rows == 1 || i == 0 { g } else { transposed() })
    };
    let inputs = (0..10).chain((kind == Kind::Dash).then_some(11));
    Ok((inputs.map(gradient).collect::<CoreResult<_>>()?, seconds))
}

/// Median seconds of forward + backward: (dfdx, ours).
///
/// # Errors
/// When an op of ours refuses.
pub fn block_speed(device: &Device, steps: usize) -> CoreResult<(f64, f64)> {
    let numbers = Numbers::new();
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..steps + 1 {
        times.0.push(dash_peer::gradients(&numbers.0, Kind::Dense).1);
        times.1.push(by_us(&numbers, device, DType::F32, Kind::Dense)?.1);
    }
    // the first of each warms up
    Ok((spread(times.0.split_off(1)).1, spread(times.1.split_off(1)).1))
}

/// One gradient of the block by three hands.
pub struct Opinion {
    /// Whose gradient.
    pub name: &'static str,
    /// dfdx (f32) against ours in f64, relative to the largest element.
    pub dfdx: f64,
    /// Ours in f32 against ours in f64.
    pub own: f64,
}

const NAMES: [&str; 11] =
    ["x", "norm1", "q_proj", "k_proj", "v_proj", "o_proj", "norm2", "gate_proj", "up_proj", "down_proj", "indexer_q"];

/// What f32 may differ from f64 by: a chain of some six products with inner lengths up to 1024; a wrong term would show in
/// the second digit.
pub const ALLOWED: f64 = 1e-5;

/// Every gradient of the block by dfdx and by us.
///
/// # Errors
/// When an op of ours refuses.
pub fn opinions(device: &Device, kind: Kind) -> CoreResult<Vec<Opinion>> {
    let numbers = Numbers::new();
    let exact = by_us(&numbers, device, DType::F64, kind)?.0;
    let ours = by_us(&numbers, device, DType::F32, kind)?.0;
    let theirs = dash_peer::gradients(&numbers.0, kind).0;
    let error = |got: &[f64], want: &[f64]| {
        let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        got.iter().zip(want).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / scale
    };
    let opinion = |i: usize| {
        let wide: Vec<f64> = theirs[i].iter().map(|&x| x as f64).collect();
        Opinion { name: NAMES[i], dfdx: error(&wide, &exact[i]), own: error(&ours[i], &exact[i]) }
    };
    Ok((0..exact.len()).map(opinion).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dfdx_agrees_on_every_gradient_of_a_block() {
        for (kind, gradients) in [(Kind::Dense, 10), (Kind::Dash, 11)] {
            let all = opinions(&Device::cpu(2).unwrap(), kind).unwrap();
            assert_eq!(all.len(), gradients);
            for o in all {
                assert!(o.dfdx < ALLOWED, "{kind:?} {}: dfdx differs from f64 by {:e}", o.name, o.dfdx);
                assert!(o.own < ALLOWED, "{kind:?} {}: f32 differs from f64 by {:e}", o.name, o.own);
            }
        }
    }
}
