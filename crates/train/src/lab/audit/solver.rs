//! The entmax solver on rows that are flat, peaked or tied.

use dash_core::rng::Rng;
use dash_core::{DType, Device, Result as CoreResult, Tape, Tensor, ops};

use super::check::Check;

/// The threshold of sorted 1.5-entmax or sparsemax, in f64: the exact solution in closed form, of x = (alpha-1)(z - max z).
fn sorted_threshold(x: &[f64], alpha: f64) -> f64 {
    let mut x = x.to_vec();
    x.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut squares, mut threshold) = (0.0, 0.0, f64::NAN);
    for (i, v) in x.iter().enumerate() {
        sum += v;
        squares += v * v;
        let r = i as f64 + 1.0;
        let tau = if alpha == 2.0 {
            (sum - 1.0) / r
        } else {
            let mean = sum / r;
            mean - ((1.0 - (squares - r * mean * mean)) / r).max(0.0).sqrt()
        };
        if tau <= *v {
            threshold = tau;
        }
    }
    threshold
}

/// x at the threshold to within this is on the edge: its p is 0 or the square of a rounding, and either side is right.
const EDGE: f64 = 1e-6;

/// Largest |sum p - 1| over rows, and the number of elements on the wrong side of the sorted solution's threshold.
fn solve(device: &Device, dtype: DType, rows: &[Vec<f64>], alpha: f64) -> CoreResult<(f64, usize)> {
    let (mut worst, mut wrong) = (0.0f64, 0);
    for row in rows {
        // the solver sees rounded scores; so does the sorted solution
        let tape = Tape::inference();
        let z = tape.leaf(Tensor::from_vec(device, &[row.len()], row.clone())?.to_dtype(dtype)?);
        let (p, z) = (ops::entmax(&tape, &z, alpha)?.value.to_f64()?, z.value.to_f64()?);
        let top = z.iter().copied().fold(f64::MIN, f64::max);
        let x: Vec<f64> = z.iter().map(|z| (alpha - 1.0) * (z - top)).collect();
        worst = worst.max((p.iter().sum::<f64>() - 1.0).abs());
        if alpha != 1.25 {
            let tau = sorted_threshold(&x, alpha);
            let sides = x.iter().zip(&p).filter(|(x, _)| (*x - tau).abs() > EDGE);
            wrong += sides.filter(|(x, p)| (**p > 0.0) != (**x > tau)).count();
        }
    }
    Ok((worst, wrong))
}

/// Sums of p, and the sides of the threshold.
pub fn against_sorted(device: &Device) -> CoreResult<Vec<Check>> {
    let mut rng = Rng::new(9);
    let mut rows = |n: usize, f: &dyn Fn(f64) -> f64| -> Vec<Vec<f64>> {
        (0..64).map(|_| (0..n).map(|_| f(rng.normal())).collect()).collect()
    };
    let kinds = [
        ("flat (1024, deviation 0.1)", rows(1024, &|x| 0.1 * x)),
        ("normal (257)", rows(257, &|x| 2.0 * x)),
        ("peaked (64, deviation 30)", rows(64, &|x| 30.0 * x)),
        ("tied (100, rounded)", rows(100, &|x| x.round())),
        ("constant (11)", rows(11, &|_| 0.25)),
        ("large (50, shifted by 1000)", rows(50, &|x| x + 1e3)),
    ];
    let mut out = Vec::new();
    for (name, rows) in &kinds {
        for alpha in [1.25, 1.5, 2.0] {
            let (single, wrong) = solve(device, DType::F32, rows, alpha)?;
            let (double, _) = solve(device, DType::F64, rows, alpha)?;
            let check = |what: String, against, error, allowed| Check { what, against, error, allowed };
            out.push(check(format!("entmax {alpha}, {name}: |sum p - 1|, f32"), "1", single, 1e-5));
            out.push(check(format!("entmax {alpha}, {name}: |sum p - 1|, f64"), "1", double, 1e-12));
            if alpha != 1.25 {
                out.push(check(
                    format!("entmax {alpha}, {name}: wrong side of the edge, f32"),
                    "sorted solution",
                    wrong as f64,
                    0.0,
                ));
            }
        }
    }
    Ok(out)
}
