use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grads() {
    let d = device();
    let x = [normal(&d, &[2, 3, 4], 1)];
    check_grad(&x, |t, v| reshape(t, &v[0], &[6, 4]));
    check_grad(&x, |t, v| transpose(t, &v[0], &[2, 0, 1]));
    let places = Ids::places(&d, &[2, 0, 2, 2]).unwrap();
    check_grad(&x, |t, v| index_select(t, &v[0], 1, &places));
    let t = Tape::new();
    let error = index_select(&t, &t.leaf(x[0].clone()), 0, &places).unwrap_err().to_string();
    assert_eq!(error, "index_select: index 2 is not below the extent of axis 0 of shape [2, 3, 4]: 2");
}

#[test]
fn transpose_moves_the_right_element() {
    let (d, t) = (device(), Tape::new());
    let x = t.leaf(Tensor::from_vec(&d, &[2, 3], vec![0.0f64, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap());
    assert_eq!(transpose(&t, &x, &[1, 0]).unwrap().value.to_f64().unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert!(transpose(&t, &x, &[1, 1]).is_err());
}
