use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grad() {
    let d = device();
    check_grad(&[normal(&d, &[3, 37], 1), normal(&d, &[3, 37], 2)], |t, v| swiglu(t, &v[0], &v[1]));
}

#[test]
fn large_gates_saturate_without_nan() {
    let (d, t) = (device(), Tape::new());
    let gate = t.leaf(Tensor::from_vec(&d, &[3], vec![-500.0f32, 0.0, 500.0]).unwrap());
    let up = t.leaf(Tensor::from_vec(&d, &[3], vec![2.0f32, 2.0, 2.0]).unwrap());
    assert_eq!(swiglu(&t, &gate, &up).unwrap().value.to_f64(), [0.0, 0.0, 1000.0]);
}
