use super::*;
use crate::testing::{check_grad, device, normal};

#[test]
fn repeated_ids_add_up() {
    let d = device();
    let ids = Ids::new(&d, &[2, 3], &[1, 4, 1, 0, 1, 2]).unwrap();
    check_grad(&[normal(&d, &[5, 3], 1)], |t, v| embedding(t, &v[0], &ids));
}

#[test]
fn an_id_above_the_vocabulary_is_told() {
    let (d, t) = (device(), Tape::new());
    let w = t.leaf(normal(&d, &[5, 3], 1));
    let error = |ids: &[u32]| embedding(&t, &w, &Ids::new(&d, &[2], ids).unwrap()).unwrap_err().to_string();
    assert_eq!(error(&[0, 5]), "embedding: token id 5 is not below the vocabulary size 5");
    assert!(error(&[0, crate::IGNORE]).starts_with("embedding: 1 token ids are IGNORE"));
}
