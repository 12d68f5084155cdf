use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grad_over_several_blocks_with_ignored_rows() {
    let d = device();
    let rows = 5;
    let targets = Ids::new(&d, &[rows], &[3, 0, IGNORE, 6, 3]).unwrap();
    check_grad(&[normal(&d, &[rows, 4], 1), normal(&d, &[7, 4], 2)], |t, v| {
        linear_cross_entropy(t, &v[0], &v[1], &targets, 3.5)
    });
    // more rows than one block holds: two halves summed are the whole
    let (x, w) = (normal(&d, &[ROWS + 9, 3], 3), normal(&d, &[5, 3], 4));
    let targets: Vec<u32> = (0..ROWS as u32 + 9).map(|i| i % 5).collect();
    let targets = Ids::new(&d, &[ROWS + 9], &targets).unwrap();
    let t = Tape::new();
    let (xv, wv) = (t.leaf(x.clone()), t.leaf(w.clone()));
    let loss = linear_cross_entropy(&t, &xv, &wv, &targets, 1.0).unwrap();
    let nll = token_nll(&x, &w, &targets, Compute::Full).unwrap().to_f64().unwrap();
    assert!((loss.value.item().unwrap() - nll.iter().sum::<f64>()).abs() < 1e-9);
    let g = t.backward(&loss).unwrap();
    let dx = g.get(&xv).unwrap().to_f64().unwrap();
    assert!(dx.iter().all(|v| v.is_finite()) && dx[(ROWS + 3) * 3..].iter().any(|&v| v != 0.0));
}

#[test]
fn uniform_logits_cost_the_logarithm_of_the_vocabulary() {
    let (d, t) = (device(), Tape::new());
    let (x, w) = (t.leaf(normal(&d, &[2, 3], 1)), t.leaf(Tensor::zeros(&d, &[11, 3], crate::DType::F64).unwrap()));
    let loss = linear_cross_entropy(&t, &x, &w, &Ids::new(&d, &[2], &[1, 2]).unwrap(), 2.0).unwrap();
    assert!((loss.value.item().unwrap() - 11f64.ln()).abs() < 1e-14);
}

#[test]
fn a_target_above_the_vocabulary_is_told() {
    let (d, t) = (device(), Tape::new());
    let (x, w) = (t.leaf(normal(&d, &[1, 3], 1)), t.leaf(normal(&d, &[11, 3], 2)));
    let err = linear_cross_entropy(&t, &x, &w, &Ids::new(&d, &[1], &[11]).unwrap(), 1.0).unwrap_err().to_string();
    assert_eq!(err, "cross_entropy: target 11 is not below the vocabulary size 11");
}
