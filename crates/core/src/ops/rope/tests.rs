use super::*;
use crate::testing::{check_grad, device, normal, relative_error};

#[test]
fn grad() {
    let d = device();
    let table = RopeTable::new(&d, DType::F64, 9, 6, 100.0).unwrap();
    check_grad(&[normal(&d, &[2, 5, 3, 6], 1)], |t, v| rope(t, &v[0], &table, 4));
}

#[test]
fn scores_depend_on_the_distance_only() {
    let (d, t) = (device(), Tape::new());
    let table = RopeTable::new(&d, DType::F64, 50, 8, 10000.0).unwrap();
    let (q, k) = (t.leaf(normal(&d, &[1, 1, 1, 8], 1)), t.leaf(normal(&d, &[1, 1, 1, 8], 2)));
    let score = |i, j| {
        let (q, k) = (
            rope(&t, &q, &table, i).unwrap().value.to_f64().unwrap(),
            rope(&t, &k, &table, j).unwrap().value.to_f64().unwrap(),
        );
        q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>()
    };
    assert!((score(7, 3) - score(44, 40)).abs() < 1e-12);
    let start = rope(&t, &q, &table, 0).unwrap().value;
    assert_eq!(relative_error(&start, &q.value.to_f64().unwrap()), 0.0);
}

#[test]
fn odd_width_is_refused() {
    let err = RopeTable::new(&device(), DType::F64, 4, 7, 1e4).unwrap_err().to_string();
    assert_eq!(err, "rope: head width 7 is not even: rope rotates pairs");
}
