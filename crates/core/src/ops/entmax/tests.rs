use super::*;
use crate::rng::Rng;
use crate::testing::{check_grad, device, normal};

#[test]
fn grads() {
    for alpha in [1.1, 1.25, 1.5, 1.75, 2.0] {
        check_grad(&[normal(&device(), &[4, 9], 3)], |t, v| entmax(t, &v[0], alpha));
    }
}

/// The threshold by sorting (Peters et al. 2019, algorithm 2): the support of alpha = 1.5.
fn sorted_support(scores: &[f64]) -> Vec<bool> {
    let top = scores.iter().cloned().fold(f64::MIN, f64::max);
    let half: Vec<f64> = scores.iter().map(|s| (s - top) / 2.0).collect();
    let mut x = half.clone();
    x.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut square, mut tau) = (0.0, 0.0, -1.0);
    for (i, v) in x.iter().enumerate() {
        let r = (i + 1) as f64;
        sum += v;
        square += v * v;
        let (mean, variance) = (sum / r, square / r - (sum / r) * (sum / r));
        let candidate = mean - ((1.0 - r * variance) / r).max(0.0).sqrt();
        if candidate <= *v {
            tau = candidate;
        }
    }
    half.iter().map(|&v| v > tau).collect()
}

#[test]
fn f32_rows_sum_to_one_and_have_the_support_of_the_sorted_solution() {
    let mut rng = Rng::new(5);
    for n in [1, 2, 17, 128, 1024, 4096] {
        for std in [0.0, 0.01, 0.1, 1.0, 30.0] {
            for shift in [0.0, 1e3] {
                let scores: Vec<f32> = (0..n).map(|_| (shift + std * rng.normal()) as f32).collect();
                let mut p = scores.clone();
                entmax_row(&mut p, 1.5);
                let sum: f64 = p.iter().map(|&x| x as f64).sum();
                assert!((sum - 1.0).abs() <= 1e-5, "n {n} std {std}: sum {sum}");
                let wide: Vec<f64> = scores.iter().map(|&s| s as f64).collect();
                for (i, on) in sorted_support(&wide).into_iter().enumerate() {
                    // at the very edge f32 and f64 may round to different sides: u below 1e-6, p below 1e-12
                    assert!((p[i] > 0.0) == on || p[i] < 1e-12, "n {n} std {std}: element {i} is {}", p[i]);
                }
            }
        }
    }
}

#[test]
fn every_alpha_converges_from_flat_to_peaked() {
    let mut rng = Rng::new(6);
    for alpha in [1.01, 1.1, 1.25, 1.5, 1.9, 2.0] {
        for std in [0.0, 0.1, 1.0, 100.0] {
            let mut p: Vec<f64> = (0..300).map(|_| std * rng.normal()).collect();
            entmax_row(&mut p, alpha);
            let sum: f64 = p.iter().sum();
            assert!((sum - 1.0).abs() < 1e-12, "alpha {alpha} std {std}: {sum}");
        }
    }
}

#[test]
fn alpha_two_is_sparsemax() {
    let mut p = [1.0, 0.8, -1.0f64];
    entmax_row(&mut p, 2.0);
    assert!((p[0] - 0.6).abs() < 1e-15 && (p[1] - 0.4).abs() < 1e-15 && p[2] == 0.0, "{p:?}");
}

#[test]
fn masked_rows_are_zero() {
    let mut p = [f64::NEG_INFINITY; 3];
    entmax_row(&mut p, 1.5);
    assert_eq!(p, [0.0; 3]);
    let mut p = [f64::NEG_INFINITY, 4.0];
    entmax_row(&mut p, 1.5);
    assert_eq!(p, [0.0, 1.0]);
}

#[test]
fn alpha_outside_is_refused() {
    let t = Tape::new();
    let z = t.leaf(normal(&device(), &[1, 3], 1));
    for alpha in [1.0, 2.5, f64::NAN] {
        assert!(entmax(&t, &z, alpha).unwrap_err().to_string().contains("above 1 (softmax)"));
    }
}
