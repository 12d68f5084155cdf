use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grad_at_odd_widths_and_over_several_tasks() {
    let d = device();
    for (rows, width) in [(1, 1), (3, 7), (2, 37), (130, 5)] {
        check_grad(&[normal(&d, &[rows, width], 1), normal(&d, &[width], 2)], |t, v| rmsnorm(t, &v[0], &v[1], 1e-6));
    }
}

#[test]
fn a_residual_stream_gets_both_gradients() {
    // the gradient of x begins as the sum's own and is added to in place
    let d = device();
    check_grad(&[normal(&d, &[130, 5], 1), normal(&d, &[5], 2)], |t, v| {
        crate::ops::add(t, &v[0], &rmsnorm(t, &v[0], &v[1], 1e-6)?)
    });
}

#[test]
fn eps_is_inside_the_root() {
    let (d, t) = (device(), Tape::new());
    let x = t.leaf(Tensor::from_vec(&d, &[1, 2], vec![3.0f64, 1.0]).unwrap());
    let w = t.leaf(Tensor::from_vec(&d, &[2], vec![1.0f64, 2.0]).unwrap());
    let y = rmsnorm(&t, &x, &w, 4.0).unwrap().value.to_f64().unwrap();
    assert!((y[0] - 1.0).abs() < 1e-15 && (y[1] - 2.0 / 3.0).abs() < 1e-15, "{y:?}");
}

#[test]
fn wrong_weight_is_told() {
    let (d, t) = (device(), Tape::new());
    let (x, w) = (t.leaf(normal(&d, &[2, 4], 1)), t.leaf(normal(&d, &[5], 2)));
    assert_eq!(rmsnorm(&t, &x, &w, 1e-6).unwrap_err().to_string(), "rmsnorm: weight is [5], last axis is 4");
}
