use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grads() {
    let x = [normal(&device(), &[2, 3, 4], 1)];
    check_grad(&x, |t, v| reshape(t, &v[0], &[6, 4]));
    check_grad(&x, |t, v| transpose(t, &v[0], &[2, 0, 1]));
    check_grad(&x, |t, v| index_select(t, &v[0], 1, &[2, 0, 2, 2]));
}

#[test]
fn transpose_moves_the_right_element() {
    let (d, t) = (device(), Tape::new());
    let x = t.leaf(Tensor::from_vec(&d, &[2, 3], vec![0.0f64, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap());
    assert_eq!(transpose(&t, &x, &[1, 0]).unwrap().value.to_f64(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert!(transpose(&t, &x, &[1, 1]).is_err());
}
