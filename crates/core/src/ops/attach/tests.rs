use super::*;
use crate::ops::{mul, scale, sum_all};
use crate::testing::{device, normal};

/// Of out = 3 sum x with the loss sum y^2 at weight 0.5 attached to x: dx = 3, dy = 0.5 * 2 y, and out is 3 sum x.
#[test]
fn the_loss_has_its_weight_and_the_output_does_not_see_it() {
    let d = device();
    let t = Tape::new();
    let (x, y) = (t.leaf(normal(&d, &[2, 3], 1)), t.leaf(normal(&d, &[4], 2)));
    let loss = sum_all(&t, &mul(&t, &y, &y).unwrap()).unwrap();
    let attached = attach(&t, &x, &loss, 0.5).unwrap();
    assert_eq!(attached.value.to_f64().unwrap(), x.value.to_f64().unwrap());
    let out = scale(&t, &sum_all(&t, &attached).unwrap(), 3.0).unwrap();
    let grads = t.backward(&out).unwrap();
    assert_eq!(grads.get(&x).unwrap().to_f64().unwrap(), [3.0; 6]);
    assert_eq!(grads.get(&y).unwrap().to_f64().unwrap(), y.value.to_f64().unwrap());
}

#[test]
fn two_attached_losses_add_up_and_a_pass_apart_reaches_none() {
    let d = device();
    let gradient = |reached: bool| {
        let t = Tape::new();
        let (x, y) = (t.leaf(normal(&d, &[3], 1)), t.leaf(normal(&d, &[3], 2)));
        let loss = sum_all(&t, &y).unwrap();
        let once = attach(&t, &x, &loss, 0.25).unwrap();
        let twice = attach(&t, &once, &loss, 0.5).unwrap();
        let out = sum_all(&t, if reached { &twice } else { &x }).unwrap();
        t.backward(&out).unwrap().get(&y).map(|g| g.to_f64().unwrap())
    };
    assert_eq!((gradient(true), gradient(false)), (Some(vec![0.75; 3]), None));
}

#[test]
fn only_a_scalar_is_a_loss() {
    let t = Tape::new();
    let x = t.leaf(normal(&device(), &[3], 1));
    let told = attach(&t, &x, &x, 1.0).unwrap_err().to_string();
    assert!(told.contains("a loss is a scalar, got shape [3]"), "{told}");
}
