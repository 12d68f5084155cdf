use super::*;
use crate::testing::{ODD_LENGTHS, check_grad, device, normal};

#[test]
fn grads() {
    let d = device();
    for n in &ODD_LENGTHS[..4] {
        let x = |seed| normal(&d, &[2, 3, *n], seed);
        let inputs = [normal(&d, &[2, 3, 3], 1), x(2), x(3), x(4)];
        check_grad(&inputs, |t, v| gated_sum(t, &v[0], [&v[1], &v[2], &v[3]]));
    }
}

#[test]
fn is_its_formula() {
    let (d, t) = (device(), Tape::new());
    let leaf = |shape: &[usize], x: &[f64]| t.leaf(Tensor::from_vec(&d, shape, x.to_vec()).unwrap());
    let gates = leaf(&[2, 3], &[1.0, 0.0, 0.5, 0.25, 2.0, 0.0]);
    let branches = [
        leaf(&[2, 2], &[1.0, 2.0, 4.0, 8.0]),
        leaf(&[2, 2], &[3.0, 5.0, 1.0, -1.0]),
        leaf(&[2, 2], &[6.0, -2.0, 7.0, 9.0]),
    ];
    let y = gated_sum(&t, &gates, branches.each_ref()).unwrap();
    assert_eq!(y.value.to_f64().unwrap(), [4.0, 1.0, 3.0, 0.0]);
}

#[test]
fn what_does_not_fit_is_told() {
    let (d, t) = (device(), Tape::new());
    let leaf = |shape: &[usize]| t.leaf(normal(&d, shape, 1));
    let (x, other, gates) = (leaf(&[2, 4]), leaf(&[2, 5]), leaf(&[2, 3]));
    let e = gated_sum(&t, &gates, [&x, &x, &other]).unwrap_err().to_string();
    assert!(e.contains("[2, 4] and [2, 5]"), "{e}");
    for shape in [&[2, 2][..], &[3, 3], &[3], &[]] {
        let e = gated_sum(&t, &leaf(shape), [&x, &x, &x]).unwrap_err().to_string();
        assert!(e.contains("a gate for each of three"), "{shape:?}: {e}");
    }
}
