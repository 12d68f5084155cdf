use super::*;
use crate::device::Device;
use crate::number::DType;
use crate::ops;
use crate::testing::device;

fn scalar(device: &Device, value: f64) -> Tensor {
    Tensor::full(device, &[], DType::F64, value).unwrap()
}

#[test]
fn a_variable_of_another_tape_has_no_gradient_and_takes_none() {
    let d = device();
    let (ours, theirs) = (Tape::new(), Tape::new());
    let x = ours.leaf(scalar(&d, 3.0));
    // the same index on both tapes, and one that ours does not have
    let (same, far) = (theirs.leaf(scalar(&d, 5.0)), (0..9).map(|_| theirs.leaf(scalar(&d, 5.0))).last().unwrap());
    let y = ops::mul(&ours, &x, &x).unwrap();
    let mut grads = ours.backward(&y).unwrap();
    assert_eq!(grads.get(&x).unwrap().item().unwrap(), 6.0);
    for foreign in [&same, &far] {
        assert!(grads.get(foreign).is_none() && grads.take(foreign).is_none());
        let error = grads.add(foreign.id(), scalar(&d, 1.0)).unwrap_err().to_string();
        assert!(error.contains("another tape"), "{error}");
    }
    assert_eq!(grads.take(&x).unwrap().item().unwrap(), 6.0);
    assert!(grads.take(&x).is_none());
}

#[test]
fn an_op_on_a_variable_of_another_tape_fails_in_backward_and_does_not_mix() {
    let d = device();
    let (ours, theirs) = (Tape::new(), Tape::new());
    let (x, foreign) = (ours.leaf(scalar(&d, 3.0)), theirs.leaf(scalar(&d, 5.0)));
    let y = ops::mul(&ours, &x, &foreign).unwrap();
    assert!(ours.backward(&y).err().unwrap().to_string().contains("another tape"));
    let tape = Tape::new();
    assert!(tape.backward(&foreign).err().unwrap().to_string().contains("a variable of another tape"));
}

#[test]
fn a_tape_that_does_not_record_refuses_backward_and_keeps_nothing() {
    let d = device();
    let tape = Tape::inference();
    let x = tape.leaf(scalar(&d, 3.0));
    let y = ops::mul(&tape, &x, &x).unwrap();
    assert!(tape.nodes.borrow().is_empty());
    assert_eq!(tape.backward(&y).err().unwrap().to_string(), "backward: this tape does not record");
}

#[test]
fn the_seed_fits_the_output() {
    let d = device();
    let output = || {
        let tape = Tape::new();
        let x = tape.leaf(Tensor::full(&d, &[2], DType::F64, 1.0).unwrap());
        let y = ops::scale(&tape, &x, 2.0).unwrap();
        (tape, y)
    };
    let fails = |seed: Option<Tensor>| {
        let (tape, y) = output();
        let result = match seed {
            Some(seed) => tape.backward_from(&y, seed),
            None => tape.backward(&y),
        };
        result.err().unwrap().to_string()
    };
    assert!(fails(None).contains("the output must be a scalar, got shape [2]"));
    assert!(fails(Some(scalar(&d, 1.0))).contains("seed [] for an output [2]"));
    let single = Tensor::full(&d, &[2], DType::F32, 1.0).unwrap();
    assert!(fails(Some(single)).contains("inputs differ in device or element type: F64 [2]"));
    assert!(
        fails(Some(Tensor::full(&device(), &[2], DType::F64, 1.0).unwrap()))
            .contains("inputs differ in device or element type")
    );
}

#[test]
fn a_checking_tape_names_scope_op_and_side() {
    let d = device();
    let tape = Tape::checking();
    tape.scope(|| "model.layers.3".into());
    let zero = tape.leaf(scalar(&d, 0.0));
    let error = ops::ln(&tape, &zero).unwrap_err().to_string();
    assert_eq!(error, "the output of ln in model.layers.3 is not finite");

    let tape = Tape::checking();
    tape.scope(|| "model.norm".into());
    let x = tape.leaf(scalar(&d, 2.0));
    let id = x.id();
    let infinite = scalar(&d, f64::INFINITY);
    let y = tape.record("steep", scalar(&d, 1.0), move |_, grads| grads.add(id, infinite)).unwrap();
    tape.scope(|| "lm_head".into());
    let z = ops::scale(&tape, &y, 1.0).unwrap();
    // a leaf's own gradient is checked by whoever uses it; an op's is when the walk comes to it
    assert!(tape.backward(&z).is_ok());

    let tape = Tape::checking();
    tape.scope(|| "model.norm".into());
    let x = tape.leaf(scalar(&d, 2.0));
    let y = ops::scale(&tape, &x, 1.0).unwrap();
    let id = y.id();
    let infinite = scalar(&d, f64::INFINITY);
    tape.scope(|| "lm_head".into());
    let z = tape.record("steep", scalar(&d, 1.0), move |_, grads| grads.add(id, infinite)).unwrap();
    let error = tape.backward(&z).err().unwrap().to_string();
    assert_eq!(error, "the gradient of the output of scale in model.norm is not finite");
}

#[test]
fn scopes_are_kept_only_where_someone_asks() {
    let plain = Tape::new();
    plain.scope(|| unreachable!("nobody asks"));
    assert_eq!(plain.scope_name(), "");
    let checking = Tape::checking();
    checking.scope(|| "a".into());
    checking.scope(|| "b".into());
    assert_eq!(checking.scope_name(), "b");
}

#[test]
fn a_scalar_waits_on_the_device_until_it_is_read() {
    let cell = ScalarCell::default();
    assert_eq!(cell.read().unwrap(), 0.0);
    cell.clone().set(scalar(&device(), 2.5));
    assert_eq!(cell.read().unwrap(), 2.5);
}

/// An op's backward reads as many numbers as its output has: a closure of somebody else cannot give it fewer or more.
#[test]
fn a_gradient_of_another_shape_than_the_value_is_refused() {
    let d = device();
    let backward = |wrong: &'static [usize]| {
        let tape = Tape::new();
        let x = tape.leaf(Tensor::full(&d, &[2, 3], DType::F64, 1.0).unwrap());
        let y = ops::scale(&tape, &x, 2.0).unwrap();
        let (id, g) = (y.id(), Tensor::full(&d, wrong, DType::F64, 1.0).unwrap());
        let z = tape.record("mine", scalar(&d, 1.0), move |_, grads| grads.add(id, g)).unwrap();
        tape.backward(&z).map(|grads| grads.get(&x).unwrap().to_f64().unwrap())
    };
    assert_eq!(backward(&[2, 3]).unwrap(), [2.0; 6]);
    for (wrong, shown) in [(&[2][..], "[2]"), (&[3, 2], "[3, 2]"), (&[2, 3, 1], "[2, 3, 1]")] {
        let told = backward(wrong).unwrap_err().to_string();
        assert_eq!(told, format!("scale: backward: the output is [2, 3], a gradient {shown} was added for it"));
    }
}

#[test]
fn an_op_of_several_outputs_gets_the_gradients_that_are_there() {
    let d = device();
    let sides = |reach: [bool; 2]| {
        let tape = Tape::new();
        let x = tape.leaf(scalar(&d, 3.0));
        let id = x.id();
        let values = [scalar(&d, 6.0), scalar(&d, 15.0)];
        let [double, fivefold] = tape
            .record_several("sides", values, move |[a, b], grads| {
                for (dy, factor) in [(a, 2.0), (b, 5.0)] {
                    if let Some(dy) = dy {
                        grads.add(id, scalar(dy.device(), factor * dy.item()?))?;
                    }
                }
                Ok(())
            })
            .unwrap();
        let mut sum = ops::scale(&tape, &tape.leaf(scalar(&d, 1.0)), 1.0).unwrap();
        for (out, _) in [&double, &fivefold].into_iter().zip(reach).filter(|(_, reached)| *reached) {
            sum = ops::add(&tape, &sum, out).unwrap();
        }
        tape.backward(&sum).unwrap().get(&x).map(|d| d.item().unwrap())
    };
    assert_eq!(sides([true, true]), Some(7.0));
    assert_eq!((sides([true, false]), sides([false, true])), (Some(2.0), Some(5.0)));
    assert_eq!(sides([false, false]), None);

    let tape = Tape::checking();
    tape.scope(|| "model.norm".into());
    let values = [scalar(&d, 1.0), scalar(&d, f64::NAN)];
    let error = tape.record_several("sides", values, |_, _| Ok(())).unwrap_err().to_string();
    assert_eq!(error, "the output of sides in model.norm is not finite");
}
