use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn repeated_ids_add_up() {
    let ids: Arc<[u32]> = vec![1, 4, 1, 0, 1, 2].into();
    check_grad(&[normal(&device(), &[5, 3], 1)], |t, v| embedding(t, &v[0], &ids, &[2, 3]));
}

#[test]
fn an_id_above_the_vocabulary_is_told() {
    let t = Tape::new();
    let w = t.leaf(normal(&device(), &[5, 3], 1));
    let err = embedding(&t, &w, &vec![0, 5].into(), &[2]).unwrap_err();
    assert_eq!(err.to_string(), "embedding: token id 5 at place 1 is not below the vocabulary size 5");
}
