use super::*;
use crate::testing::{ODD_LENGTHS, check_grad, device, normal};

#[test]
fn grad_at_odd_widths() {
    for n in &ODD_LENGTHS[..4] {
        check_grad(&[normal(&device(), &[2, *n], 1)], |t, v| softmax(t, &v[0]));
    }
}

#[test]
fn masked_elements_are_zero_and_a_masked_row_is_all_zero() {
    let (d, t) = (device(), Tape::new());
    let x = t.leaf(
        Tensor::from_vec(&d, &[2, 2], vec![f64::NEG_INFINITY, 3.0, f64::NEG_INFINITY, f64::NEG_INFINITY]).unwrap(),
    );
    assert_eq!(softmax(&t, &x).unwrap().value.to_f64().unwrap(), [0.0, 1.0, 0.0, 0.0]);
}
