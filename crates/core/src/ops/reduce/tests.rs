use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grads_on_every_axis() {
    let x = [normal(&device(), &[2, 3, 4], 1)];
    for axis in 0..3 {
        check_grad(&x, |t, v| sum_axis(t, &v[0], axis));
    }
    check_grad(&x, |t, v| sum_all(t, &v[0]));
}

#[test]
fn the_sum_is_the_sum() {
    let (d, t) = (device(), Tape::new());
    let x = t.leaf(Tensor::from_vec(&d, &[2, 2], vec![1.0f64, 2.0, 3.0, 5.0]).unwrap());
    assert_eq!(sum_axis(&t, &x, 0).unwrap().value.to_f64().unwrap(), [4.0, 7.0]);
    assert_eq!(sum_all(&t, &x).unwrap().value.item().unwrap(), 11.0);
}
