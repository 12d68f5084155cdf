use super::*;
use crate::number::{Compute, DType};
use crate::ops::{add, linear, reshape, rope, sum_all};
use crate::testing::{check_grad, device, normal};

#[test]
fn grad_of_all_three() {
    let d = device();
    let table = RopeTable::new(&d, DType::F64, 9, 6, 100.0).unwrap();
    let inputs = [normal(&d, &[2, 5, 4], 1), normal(&d, &[18, 4], 2), normal(&d, &[6, 4], 3), normal(&d, &[6, 4], 4)];
    check_grad(&inputs, |t, x| {
        let [q, k, v] = attention_heads(t, &x[0], [&x[1], &x[2], &x[3]], &table, 4)?;
        let q = sum_all(t, &q)?;
        add(t, &q, &add(t, &k, &v)?)
    });
}

/// The same bits as products and rotations of their own, gradients included, whichever of the three are used.
#[test]
fn same_bits_as_single_ops() {
    let d = device();
    let (heads, kv_heads, width) = (3, 1, 6);
    for compute in [Compute::Full, Compute::Bf16] {
        let single = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let table = RopeTable::new(&d, DType::F32, 9, width, 100.0).unwrap();
        let shapes: [&[usize]; 4] = [&[2, 5, 8], &[18, 8], &[6, 8], &[6, 8]];
        let inputs: Vec<Tensor> = shapes.iter().zip(1..).map(|(s, i)| single(&normal(&d, s, i))).collect();
        for used in [[true; 3], [true, false, true], [false, true, false]] {
            let run = |together: bool| {
                let tape = Tape::new().computing(compute);
                let x: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
                let all = if together {
                    attention_heads(&tape, &x[0], [&x[1], &x[2], &x[3]], &table, 2).unwrap()
                } else {
                    let cut =
                        |w: &Var, n| reshape(&tape, &linear(&tape, &x[0], w).unwrap(), &[2, 5, n, width]).unwrap();
                    let q = rope(&tape, &cut(&x[1], heads), &table, 2).unwrap();
                    let k = rope(&tape, &cut(&x[2], kv_heads), &table, 2).unwrap();
                    [q, k, cut(&x[3], kv_heads)]
                };
                let mut bits: Vec<Vec<f64>> = all.iter().map(|x| x.value.to_f64().unwrap()).collect();
                let sums = all.iter().zip(used).filter(|(_, used)| *used).map(|(x, _)| sum_all(&tape, x).unwrap());
                let sum = sums.reduce(|a, b| add(&tape, &a, &b).unwrap()).unwrap();
                let grads = tape.backward(&sum).unwrap();
                bits.extend(x.iter().map(|x| grads.get(x).map_or(Vec::new(), |g| g.to_f64().unwrap())));
                bits
            };
            assert!(run(true) == run(false), "{compute:?} {used:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_told() {
    let (d, t) = (device(), Tape::new());
    let table = RopeTable::new(&d, DType::F64, 9, 6, 100.0).unwrap();
    let told = |shapes: [&[usize]; 3], first| {
        let x = t.leaf(normal(&d, &[2, 5, 4], 1));
        let w = shapes.map(|shape| t.leaf(normal(&d, shape, 2)));
        attention_heads(&t, &x, w.each_ref(), &table, first).unwrap_err().to_string()
    };
    let op = "attention_heads: ";
    let heads = "x has shape [2, 5, 4], heads are 6 wide: a weight has shape";
    assert_eq!(told([&[12, 4], &[7, 4], &[6, 4]], 0), format!("{op}{heads} [7, 4]"));
    assert_eq!(told([&[12, 3], &[6, 4], &[6, 4]], 0), format!("{op}{heads} [12, 3]"));
    assert_eq!(told([&[12, 4], &[6, 4], &[12, 4]], 0), format!("{op}1 heads of keys, 2 of values"));
    assert_eq!(told([&[12, 4], &[6, 4], &[6, 4]], 5), format!("{op}positions up to 10 asked, the table has 9"));
}
