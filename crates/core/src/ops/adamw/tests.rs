use super::*;
use crate::testing::device;

fn tensor(x: &[f64]) -> Tensor {
    Tensor::from_vec(&device(), &[x.len()], x.to_vec()).unwrap()
}

#[test]
fn the_first_step_moves_by_the_learning_rate_and_the_decay() {
    // m / (1 - b1) = g and sqrt(v / (1 - b2)) = |g|, so the step is lr * sign(g) to the size of eps.
    let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-12, weight_decay: 0.5, step: 1, grad_scale: 0.25 };
    let (mut p, mut m, mut v) = (tensor(&[2.0, -3.0]), tensor(&[0.0, 0.0]), tensor(&[0.0, 0.0]));
    adamw(s, &mut p, &mut m, &mut v, &tensor(&[4.0, -0.5])).unwrap();
    let p = p.to_f64();
    assert!((p[0] - (2.0 * 0.95 - 0.1)).abs() < 1e-10 && (p[1] - (-3.0 * 0.95 + 0.1)).abs() < 1e-10, "{p:?}");
    assert!((m.to_f64()[0] - 0.1).abs() < 1e-15 && (v.to_f64()[0] - 0.05).abs() < 1e-15);
}

#[test]
fn shapes_must_agree() {
    let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
    let (mut p, mut m, mut v) = (tensor(&[2.0]), tensor(&[0.0]), tensor(&[0.0]));
    assert!(adamw(s, &mut p, &mut m, &mut v, &tensor(&[1.0, 2.0])).is_err());
}
