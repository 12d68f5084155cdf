use super::*;
use crate::testing::{check_grad, device, normal, relative_error};

#[test]
fn grad_with_a_ragged_last_chunk() {
    let d = device();
    for (t, s) in [(7, 3), (8, 4), (5, 5), (3, 1)] {
        check_grad(&[normal(&d, &[2, t, 2, 5], 1), normal(&d, &[10], 2)], |t, v| chunk_summary(t, &v[0], &v[1], s));
    }
}

#[test]
fn a_zero_query_gives_the_mean_and_a_short_sequence_no_chunk() {
    let (d, t) = (device(), Tape::new());
    let k = normal(&d, &[1, 4, 1, 3], 1);
    let x = k.to_f64().unwrap();
    let mean: Vec<f64> = (0..6).map(|i| 0.5 * (x[i / 3 * 6 + i % 3] + x[i / 3 * 6 + 3 + i % 3])).collect();
    let (k, q) = (t.leaf(k), t.leaf(Tensor::zeros(&d, &[3], crate::DType::F64).unwrap()));
    assert!(relative_error(&chunk_summary(&t, &k, &q, 2).unwrap().value, &mean) < 1e-15);
    assert_eq!(chunk_summary(&t, &k, &q, 9).unwrap().value.shape(), [1, 0, 1, 3]);
}
