use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn grads_with_and_without_broadcast() {
    let d = device();
    for (a, b) in [(vec![3, 4], vec![3, 4]), (vec![2, 3, 4], vec![4]), (vec![3, 1], vec![2, 3, 5]), (vec![1], vec![3])]
    {
        let inputs = [normal(&d, &a, 1), normal(&d, &b, 2)];
        check_grad(&inputs, |t, v| add(t, &v[0], &v[1]));
        check_grad(&inputs, |t, v| sub(t, &v[0], &v[1]));
        check_grad(&inputs, |t, v| mul(t, &v[0], &v[1]));
    }
    let x = [normal(&d, &[2, 5], 3)];
    check_grad(&x, |t, v| exp(t, &v[0]));
    check_grad(&x, |t, v| sigmoid(t, &v[0]));
    check_grad(&x, |t, v| scale(t, &v[0], -1.7));
    check_grad(&x, |t, v| ln(t, &exp(t, &v[0])?));
    let mask = Ids::mask(&d, &[5], &[true, false, false, true, false]).unwrap();
    check_grad(&x, |t, v| mask_fill(t, &v[0], &mask, 2.0));
    let t = Tape::new();
    let no_mask = Ids::new(&d, &[5], &[0, 1, 2, 0, 0]).unwrap();
    assert!(mask_fill(&t, &t.leaf(x[0].clone()), &no_mask, 2.0).unwrap_err().to_string().contains("2 is not below"));
}

#[test]
fn a_value_used_twice_gets_both_gradients() {
    check_grad(&[normal(&device(), &[3, 3], 1)], |t, v| mul(t, &add(t, &v[0], &v[0])?, &v[0]));
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let (d, t) = (device(), Tape::new());
    let (a, b) = (t.leaf(normal(&d, &[2, 3], 1)), t.leaf(normal(&d, &[4], 2)));
    assert_eq!(add(&t, &a, &b).unwrap_err().to_string(), "add: shapes [2, 3] and [4] do not broadcast: 3 against 4");
}
