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

#[test]
fn a_table_in_another_order_turns_as_at_those_places() {
    let (d, t) = (device(), Tape::new());
    let table = RopeTable::new(&d, DType::F64, 5, 4, 1e4).unwrap();
    let again = table.at(&Ids::places(&d, &[0, 1, 0, 1, 2]).unwrap()).unwrap();
    let x = normal(&d, &[1, 5, 2, 4], 1);
    let of = |from: usize, to: usize| {
        let rows = x.to_f64().unwrap()[from * 8..to * 8].to_vec();
        let x = t.leaf(Tensor::from_vec(&d, &[1, to - from, 2, 4], rows).unwrap());
        rope(&t, &x, &table, 0).unwrap().value.to_f64().unwrap()
    };
    let together = rope(&t, &t.leaf(x.clone()), &again, 0).unwrap().value.to_f64().unwrap();
    assert_eq!(together, [of(0, 2), of(2, 5)].concat());
    assert_eq!((again.positions(), again.width()), (5, 4));
    assert!(table.at(&Ids::places(&d, &[5]).unwrap()).is_err());
}
