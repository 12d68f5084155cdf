use super::*;
use crate::device::Device;
use crate::ids::Ids;
use crate::number::{Compute, DType};
use crate::ops;
use crate::testing::{ODD_LENGTHS, attention_of_operands, bf16, check_grad, device, normal, relative_error};

/// The equation with primitives, in f64: a t x t matrix and nothing clever.
fn plain(t: &Tape, q: &Var, k: &Var, v: &Var) -> Result<Var> {
    let [_, tokens, h, d] = q.value.dims("plain")?;
    let [_, _, g, _] = k.value.dims("plain")?;
    let heads: Vec<usize> = (0..h).map(|i| i / (h / g)).collect();
    let heads = Ids::places(q.value.device(), &heads)?;
    let q = ops::transpose(t, q, &[0, 2, 1, 3])?;
    let k = ops::transpose(t, &ops::index_select(t, k, 2, &heads)?, &[0, 2, 3, 1])?;
    let v = ops::transpose(t, &ops::index_select(t, v, 2, &heads)?, &[0, 2, 1, 3])?;
    let z = ops::scale(t, &ops::matmul(t, &q, &k)?, 1.0 / (d as f64).sqrt())?;
    let mask: Vec<bool> = (0..tokens * tokens).map(|i| i % tokens > i / tokens).collect();
    let mask = Ids::mask(q.value.device(), &[tokens, tokens], &mask)?;
    let p = ops::softmax(t, &ops::mask_fill(t, &z, &mask, f64::NEG_INFINITY)?)?;
    ops::transpose(t, &ops::matmul(t, &p, &v)?, &[0, 2, 1, 3])
}

type Run = (Tensor, Vec<Tensor>);

fn run(inputs: &[Tensor], f: impl Fn(&Tape, &Var, &Var, &Var) -> Result<Var>) -> Run {
    run_on(Tape::new(), inputs, f)
}

fn run_on(t: Tape, inputs: &[Tensor], f: impl Fn(&Tape, &Var, &Var, &Var) -> Result<Var>) -> Run {
    let v: Vec<Var> = inputs.iter().map(|x| t.leaf(x.clone())).collect();
    let y = f(&t, &v[0], &v[1], &v[2]).unwrap();
    let seed = normal(y.value.device(), y.value.shape(), 9).to_dtype(y.value.dtype()).unwrap();
    let grads = t.backward_from(&y, seed).unwrap();
    (y.value, v.iter().map(|v| grads.get(v).unwrap().clone()).collect())
}

#[test]
fn grad() {
    let d = device();
    check_grad(&[normal(&d, &[1, 6, 2, 3], 1), normal(&d, &[1, 6, 1, 3], 2), normal(&d, &[1, 6, 1, 3], 3)], |t, v| {
        dense_attention(t, &v[0], &v[1], &v[2])
    });
}

#[test]
fn agrees_with_the_plain_formula_at_odd_lengths_and_every_grouping() {
    let dev = device();
    for t in ODD_LENGTHS {
        for (h, g, d) in [(1, 1, 8), (4, 2, 10), (6, 1, 16), (3, 3, 5)] {
            let inputs =
                [normal(&dev, &[2, t, h, d], 1), normal(&dev, &[2, t, g, d], 2), normal(&dev, &[2, t, g, d], 3)];
            let (want, got) = (run(&inputs, plain), run(&inputs, dense_attention));
            assert!(relative_error(&got.0, &want.0.to_f64().unwrap()) < 1e-13, "t {t} h {h} g {g}");
            for (i, (a, b)) in got.1.iter().zip(&want.1).enumerate() {
                assert!(relative_error(a, &b.to_f64().unwrap()) < 1e-12, "t {t} h {h} g {g}: gradient {i}");
            }
        }
    }
}

#[test]
fn f32_error_is_at_most_twice_that_of_the_plain_formula() {
    let dev = device();
    let cast = |x: &[Tensor], to| x.iter().map(|x| x.to_dtype(to).unwrap()).collect::<Vec<_>>();
    for (t, sharp) in [(37, 1.0), (257, 1.0), (257, 8.0)] {
        let shape = |heads| [2, t, heads, 16];
        let mut wide = vec![normal(&dev, &shape(4), 1), normal(&dev, &shape(2), 2), normal(&dev, &shape(2), 3)];
        let sharper: Vec<f64> = wide[0].to_f64().unwrap().iter().map(|x| x * sharp).collect();
        wide[0] = Tensor::from_vec(&dev, &shape(4), sharper).unwrap();
        let narrow = cast(&wide, DType::F32);
        let exact = run(&cast(&narrow, DType::F64), plain);
        let (naive, ours) = (run(&narrow, plain), run(&narrow, dense_attention));
        let all = |r: &Run| std::iter::once(r.0.clone()).chain(r.1.clone()).collect::<Vec<_>>();
        for (i, ((e, n), o)) in all(&exact).iter().zip(all(&naive)).zip(all(&ours)).enumerate() {
            let (n, o) = (relative_error(&n, &e.to_f64().unwrap()), relative_error(&o, &e.to_f64().unwrap()));
            assert!(o <= 2.0 * n, "t {t} sharp {sharp}, output {i}: ours {o:e}, plain {n:e}");
        }
    }
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_formula_with_rounded_operands() {
    let dev = device();
    for (t, d) in [(5, 8), (37, 17), (130, 33), (200, 64)] {
        let shape = |heads| [2, t, heads, d];
        let inputs = [normal(&dev, &shape(4), 1), normal(&dev, &shape(2), 2), normal(&dev, &shape(2), 3)];
        let inputs = inputs.map(|x| x.to_dtype(DType::F32).unwrap());
        let seed = normal(&dev, &shape(4), 9).to_dtype(DType::F32).unwrap();
        let numbers: Vec<Vec<f64>> = inputs.iter().chain([&seed]).map(|x| x.to_f64().unwrap()).collect();
        let exact = attention_of_operands(&numbers, shape(4), 2, |_| true, |x| x);
        let naive = attention_of_operands(&numbers, shape(4), 2, |_| true, bf16);
        let ours = run_on(Tape::new().computing(Compute::Bf16), &inputs, dense_attention);
        for (i, ours) in std::iter::once(&ours.0).chain(&ours.1).enumerate() {
            let naive = Tensor::from_vec(&dev, ours.shape(), naive[i].clone()).unwrap();
            let (n, o) = (relative_error(&naive, &exact[i]), relative_error(ours, &exact[i]));
            assert!(n > 1e-4 && o <= 2.0 * n, "t {t} d {d}, output {i}: ours {o:e}, with rounded operands {n:e}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let go = |threads, compute| {
        let dev = Device::cpu(threads).unwrap();
        let cast = |x: Tensor| x.to_dtype(DType::F32).unwrap();
        let inputs = [
            cast(normal(&dev, &[2, 200, 4, 8], 1)),
            cast(normal(&dev, &[2, 200, 2, 8], 2)),
            cast(normal(&dev, &[2, 200, 2, 8], 3)),
        ];
        let (y, g) = run_on(Tape::new().computing(compute), &inputs, dense_attention);
        [y.to_f64().unwrap(), g[0].to_f64().unwrap(), g[1].to_f64().unwrap(), g[2].to_f64().unwrap()]
    };
    for compute in [Compute::Full, Compute::Bf16] {
        assert_eq!(go(1, compute), go(4, compute));
    }
}

#[test]
fn a_later_token_changes_no_earlier_output() {
    let dev = device();
    let inputs = |change: f64| {
        let mut k = normal(&dev, &[1, 150, 1, 4], 2).to_f64().unwrap();
        k[100 * 4] += change;
        [
            normal(&dev, &[1, 150, 2, 4], 1),
            Tensor::from_vec(&dev, &[1, 150, 1, 4], k).unwrap(),
            normal(&dev, &[1, 150, 1, 4], 3),
        ]
    };
    for (compute, dtype) in [(Compute::Full, DType::F64), (Compute::Bf16, DType::F32)] {
        let go = |change: f64| {
            let inputs = inputs(change).map(|x| x.to_dtype(dtype).unwrap());
            run_on(Tape::new().computing(compute), &inputs, dense_attention).0.to_f64().unwrap()
        };
        let (a, b) = (go(0.0), go(1.0));
        assert_eq!(a[..100 * 8], b[..100 * 8]);
        assert_ne!(a[100 * 8..], b[100 * 8..]);
    }
}

#[test]
fn heads_that_do_not_divide_are_told() {
    let (dev, t) = (device(), Tape::new());
    let (q, k) = (t.leaf(normal(&dev, &[1, 2, 3, 4], 1)), t.leaf(normal(&dev, &[1, 2, 2, 4], 2)));
    let err = dense_attention(&t, &q, &k, &k).unwrap_err().to_string();
    assert_eq!(err, "dense_attention: 3 query heads do not divide into 2 key/value heads");
}

#[test]
fn tasks_of_a_backward_pass_have_equal_parts_of_the_triangle() {
    use super::super::engine::owner;
    for splits in 1..9 {
        for rounds in 1..7 {
            let mut parts = vec![0; splits];
            (0..rounds * splits).for_each(|tile| parts[owner(tile, splits)] += tile + 1);
            let (least, most) = (parts.iter().min().unwrap(), parts.iter().max().unwrap());
            let bound = if rounds % 2 == 0 { 0 } else { splits - 1 };
            assert_eq!(most - least, bound, "{splits} tasks, {rounds} tiles each");
        }
    }
}
