use super::*;
use crate::number::{Compute, DType};
use crate::ops::attention::{dense_attention, topk_routing};
use crate::testing::{ODD_LENGTHS, attention_of_operands, bf16, check_grad, cpu, device, normal, relative_error};

fn some_list(dev: &crate::Device, b: usize, g: usize, t: usize, s: usize, top: usize) -> Routes {
    let q = normal(dev, &[b, t, g, 4], 20);
    topk_routing(&q, &normal(dev, &[b, t / s, g, 4], 21), s, top, 1.0).unwrap()
}

#[test]
fn grad_to_queries_keys_values_and_bias() {
    let d = device();
    for (t, s, h, g) in [(11, 3, 2, 1), (9, 2, 4, 2), (70, 16, 1, 1)] {
        let list = some_list(&d, 1, g, t, s, 3);
        let width = if t > 20 { 1 } else { 3 };
        let inputs = [
            normal(&d, &[1, t, h, width], 1),
            normal(&d, &[1, t, g, width], 2),
            normal(&d, &[1, t, g, width], 3),
            normal(&d, &[list.to_host().unwrap().len()], 4),
        ];
        check_grad(&inputs, |tape, v| block_attention(tape, &v[0], &v[1], &v[2], &list, Some(&v[3])));
    }
}

#[test]
fn every_block_is_dense_attention() {
    let dev = device();
    for t in ODD_LENGTHS {
        for s in [1, 7, 16, 100, usize::MAX] {
            let list = some_list(&dev, 2, 2, t, s, t);
            let inputs =
                [normal(&dev, &[2, t, 4, 6], 1), normal(&dev, &[2, t, 2, 6], 2), normal(&dev, &[2, t, 2, 6], 3)];
            let run = |sparse: bool| {
                let tape = Tape::new();
                let v: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
                let y = match sparse {
                    true => block_attention(&tape, &v[0], &v[1], &v[2], &list, None).unwrap(),
                    false => dense_attention(&tape, &v[0], &v[1], &v[2]).unwrap(),
                };
                let g = tape.backward_from(&y, normal(&dev, y.value.shape(), 5)).unwrap();
                std::iter::once(y.value.to_f64().unwrap())
                    .chain(v.iter().map(|v| g.get(v).unwrap().to_f64().unwrap()))
                    .collect::<Vec<_>>()
            };
            for (i, (a, b)) in run(true).into_iter().zip(run(false)).enumerate() {
                let a = Tensor::from_vec(&dev, &[a.len()], a).unwrap();
                assert!(relative_error(&a, &b) < 1e-12, "t {t} s {s}: output {i}");
            }
        }
    }
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_formula_with_rounded_operands() {
    let dev = device();
    for (t, s, d) in [(70, 7, 16), (200, 16, 33), (300, 64, 64)] {
        let list = some_list(&dev, 2, 2, t, s, 3);
        let shape = |heads| [2, t, heads, d];
        let inputs = [normal(&dev, &shape(6), 1), normal(&dev, &shape(2), 2), normal(&dev, &shape(2), 3)];
        let inputs = inputs.map(|x| x.to_dtype(DType::F32).unwrap());
        let seed = normal(&dev, &shape(6), 9).to_dtype(DType::F32).unwrap();
        let numbers: Vec<Vec<f64>> = inputs.iter().chain([&seed]).map(|x| x.to_f64().unwrap()).collect();
        let host = list.to_host().unwrap();
        let sees = |[b, kv, i, j]: [usize; 4]| host.chunks_of(b, kv, i).contains(&((j / s) as u32));
        let exact = attention_of_operands(&numbers, shape(6), 2, sees, |x| x);
        let naive = attention_of_operands(&numbers, shape(6), 2, sees, bf16);
        let tape = Tape::new().computing(Compute::Bf16);
        let v: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
        let y = block_attention(&tape, &v[0], &v[1], &v[2], &list, None).unwrap();
        let grads = tape.backward_from(&y, seed).unwrap();
        for (i, ours) in std::iter::once(&y.value).chain(v.iter().map(|v| grads.get(v).unwrap())).enumerate() {
            let naive = Tensor::from_vec(&dev, ours.shape(), naive[i].clone()).unwrap();
            let (n, o) = (relative_error(&naive, &exact[i]), relative_error(ours, &exact[i]));
            assert!(n > 1e-4 && o <= 2.0 * n, "t {t} s {s} d {d}, output {i}: ours {o:e}, rounded operands {n:e}");
        }
    }
}

#[test]
fn a_list_for_other_extents_is_told() {
    let (dev, t) = (device(), Tape::new());
    let list = some_list(&dev, 1, 1, 8, 2, 2);
    let q = t.leaf(normal(&dev, &[1, 9, 1, 4], 1));
    let err = block_attention(&t, &q, &q, &q, &list, None).unwrap_err().to_string();
    assert!(err.contains("(1, 1, 8), q and k have (1, 1, 9)"), "{err}");
}

#[test]
fn memory_grows_with_the_attended_chunks_and_not_with_the_square_of_the_length() {
    let peak = |t: usize| {
        let dev = crate::Device::cpu(1).unwrap();
        let cast = |x: Tensor| x.to_dtype(crate::DType::F32).unwrap();
        let (q, k) = (cast(normal(&dev, &[1, t, 2, 8], 1)), cast(normal(&dev, &[1, t, 1, 8], 2)));
        let list = topk_routing(&q, &cast(normal(&dev, &[1, t / 32, 1, 8], 3)), 32, 4, 1.0).unwrap();
        cpu(&dev).reset_peak();
        let before = cpu(&dev).peak_bytes();
        let tape = Tape::new();
        let (q, k) = (tape.leaf(q), tape.leaf(k));
        let y = block_attention(&tape, &q, &k, &k, &list, None).unwrap();
        let seed = y.value.clone();
        tape.backward_from(&y, seed).unwrap();
        (cpu(&dev).peak_bytes() - before) as f64
    };
    let (short, long) = (peak(2048), peak(8192));
    assert!(long < 4.2 * short, "{short} bytes at 2048, {long} at 8192");
    assert!(long < 8192.0 * 8192.0, "{long} bytes: a byte a pair of tokens would be {}", 8192u64 * 8192);
}
