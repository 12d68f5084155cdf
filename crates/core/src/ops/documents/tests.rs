use std::sync::Arc;

use super::*;
use crate::testing::{check_grad, device, normal};

/// Two sequences of seven tokens: documents of 3, 2 and 2, and of 2 and 5.
fn documents(device: &Device, grouping: Grouping) -> Arc<Documents> {
    Arc::new(Documents::new(device, [2, 7], &[3, 5, 7, 9], grouping).unwrap())
}

#[test]
fn documents_of_a_length_stand_together_and_come_back() {
    let (d, t) = (device(), Tape::new());
    let documents = documents(&d, Grouping::Exact);
    assert_eq!(documents.positions(), [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4]);
    let x = t.leaf(Tensor::from_vec(&d, &[2, 7, 1], (0..14).map(f64::from).collect()).unwrap());
    let parts = split_documents(&t, &x, &documents).unwrap();
    let shapes: Vec<&[usize]> = parts.iter().map(|part| part.value.shape()).collect();
    assert_eq!(shapes, [[3, 2, 1], [1, 3, 1], [1, 5, 1]]);
    assert_eq!(parts[0].value.to_f64().unwrap(), [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    assert_eq!(parts[2].value.to_f64().unwrap(), [9.0, 10.0, 11.0, 12.0, 13.0]);
    let y = join_documents(&t, &parts, &documents).unwrap();
    assert_eq!((y.value.shape(), y.value.to_f64().unwrap()), (&[2, 7, 1][..], x.value.to_f64().unwrap()));
}

#[test]
fn similar_lengths_have_room_of_zeros_that_is_dropped() {
    let room = |length| Grouping::Similar(1).room(length, 2048);
    assert_eq!([1, 64, 65, 300, 513, 1500, 2040].map(room), [64, 64, 128, 320, 640, 1536, 2048]);
    assert!((1..2048).all(|length| room(length) <= length + (length / 4).max(63)));
    // no longer than a sequence
    assert_eq!(Grouping::Similar(1).room(90, 100), 100);
    assert_eq!([1, 100, 130].map(|length| Grouping::Similar(128).room(length, 2048)), [128, 128, 192]);
    let d = device();
    let documents = Arc::new(Documents::new(&d, [1, 5], &[2], Grouping::Similar(1)).unwrap());
    let t = Tape::new();
    let x = t.leaf(Tensor::from_vec(&d, &[1, 5, 1], vec![1.0f64, 2.0, 3.0, 4.0, 5.0]).unwrap());
    let parts = split_documents(&t, &x, &documents).unwrap();
    assert_eq!(parts.len(), 1);
    assert_eq!(parts[0].value.to_f64().unwrap(), [1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0]);
    assert_eq!(join_documents(&t, &parts, &documents).unwrap().value.to_f64().unwrap(), x.value.to_f64().unwrap());
}

#[test]
fn grads() {
    let d = device();
    for grouping in [Grouping::Exact, Grouping::Similar(1)] {
        for width in [1, 3] {
            let x = [normal(&d, &[2, 7, width], 1)];
            let documents = &documents(&d, grouping);
            // a group that is not used has a gradient of zero
            check_grad(&x, |t, v| Ok(split_documents(t, &v[0], documents)?.swap_remove(0)));
            check_grad(&x, |t, v| join_documents(t, &split_documents(t, &v[0], documents)?, documents));
        }
    }
}

/// More rows than a task has.
#[test]
fn many_rows_come_back() {
    let (d, t, n) = (device(), Tape::new(), ELEMENTWISE);
    let starts: Vec<usize> = (1..n).filter(|i| i % 97 == 0 || i % 64 == 5).collect();
    for grouping in [Grouping::Exact, Grouping::Similar(1)] {
        let documents = Arc::new(Documents::new(&d, [1, n], &starts, grouping).unwrap());
        let x = t.leaf(normal(&d, &[1, n, 3], 1));
        let y = join_documents(&t, &split_documents(&t, &x, &documents).unwrap(), &documents).unwrap();
        assert!(y.value.to_f64().unwrap() == x.value.to_f64().unwrap());
    }
}

#[test]
fn no_group_has_more_documents_than_a_card_takes() {
    let (d, t) = (device(), Tape::new());
    // seven of one token, then one of three
    let documents = Arc::new(Documents::grouped(&d, [2, 5], &[1, 2, 3, 4, 6, 7], Grouping::Exact, 3).unwrap());
    let extents: Vec<_> = documents.groups().iter().map(|group| (group.count(), group.length())).collect();
    assert_eq!(extents, [(3, 1), (3, 1), (1, 1), (1, 3)]);
    assert_eq!(documents.positions(), [0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    let x = t.leaf(normal(&d, &[2, 5, 2], 1));
    let y = join_documents(&t, &split_documents(&t, &x, &documents).unwrap(), &documents).unwrap();
    assert_eq!(y.value.to_f64().unwrap(), x.value.to_f64().unwrap());
}

#[test]
fn what_does_not_fit_is_told() {
    let (d, t) = (device(), Tape::new());
    let told = |starts: &[usize]| Documents::new(&d, [2, 7], starts, Grouping::Exact).unwrap_err().to_string();
    assert_eq!(told(&[3, 3]), "documents: their first tokens do not ascend");
    assert_eq!(told(&[14]), "documents: one begins at token 14 of 14");
    let x = t.leaf(normal(&d, &[7, 2, 1], 1));
    let documents = documents(&d, Grouping::Exact);
    let error = split_documents(&t, &x, &documents).unwrap_err().to_string();
    assert_eq!(error, "split_documents: [7, 2, 1] for documents of [2, 7] tokens");
    let error = join_documents(&t, &[x], &documents).unwrap_err().to_string();
    assert_eq!(error, "join_documents: 1 pieces, 3 groups");
    assert!(join_documents(&t, &[], &documents).is_err());
}
