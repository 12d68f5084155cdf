use super::*;
use crate::device::Device;
use crate::number::DType;
use crate::ops::{self, attention::chunk_summary, entmax::entmax_row};
use crate::testing::{check_grad, device, normal};

fn settings() -> Entmax {
    Entmax { chunk_size: 4, alpha: 1.5, gamma: 1.0, sigma: 1.0, center: Center::None, gradient: RouterGradient::Full }
}

#[test]
fn grad_of_the_bias_to_queries_summaries_and_diagonal() {
    let d = device();
    let inputs = [normal(&d, &[2, 22, 4, 3], 1), normal(&d, &[2, 5, 2, 3], 2), normal(&d, &[2], 3)];
    let cases = [
        settings(),
        Entmax { sigma: 2.0, center: Center::Mean, ..settings() },
        Entmax { alpha: 1.25, gamma: 3.0, ..settings() },
        Entmax { alpha: 2.0, gamma: 0.3, ..settings() },
    ];
    for case in cases {
        check_grad(&inputs, |t, v| Ok(entmax_routing(t, &v[0], &v[1], Some(&v[2]), case)?.bias));
    }
}

#[test]
fn the_list_is_the_union_of_the_heads_supports_and_ends_with_the_own_chunk() {
    let (dev, t) = (device(), Tape::new());
    let (q, kbar) = (t.leaf(normal(&dev, &[1, 40, 4, 6], 1)), t.leaf(normal(&dev, &[1, 10, 2, 6], 2)));
    let routing = entmax_routing(&t, &q, &kbar, None, Entmax { gamma: 3.0, ..settings() }).unwrap();
    let (qs, ks) = (q.value.to_f64().unwrap(), kbar.value.to_f64().unwrap());
    let weights = routing.weights.to_f64().unwrap();
    let (list, mut dropped) = (routing.routes.to_host().unwrap(), 0);
    for kv in 0..2 {
        for query in 0..40 {
            let own = query / 4;
            let mut w = vec![0.0; own];
            for head in 0..2 {
                let q = &qs[(query * 4 + kv * 2 + head) * 6..][..6];
                let dot = |c: usize| q.iter().zip(&ks[(c * 2 + kv) * 6..]).map(|(a, b)| a * b).sum::<f64>();
                let mut p: Vec<f64> = (0..own).map(|c| 3.0 * dot(c) / 6f64.sqrt()).collect();
                entmax_row(&mut p, 1.5);
                w.iter_mut().zip(&p).for_each(|(w, p)| *w += 0.5 * p);
            }
            let mut want: Vec<u32> = (0..own as u32).filter(|&c| w[c as usize] > 0.0).collect();
            dropped += own - want.len();
            want.push(own as u32);
            assert_eq!(list.chunks_of(0, kv, query), want);
            for (e, &c) in list.entries_of(0, kv, query).zip(&want) {
                let w = w.get(c as usize).copied().unwrap_or(0.0);
                assert!((weights[e] - w).abs() < 1e-12);
            }
        }
    }
    assert!(dropped > 50, "the case is sparse enough to test something: {dropped}");
}

#[test]
fn the_bias_is_the_centred_log_of_the_weights_over_sigma() {
    let (dev, t) = (device(), Tape::new());
    let (q, kbar) = (t.leaf(normal(&dev, &[2, 40, 4, 6], 1)), t.leaf(normal(&dev, &[2, 10, 2, 6], 2)));
    for center in [Center::None, Center::Mean, Center::MeanDetached] {
        let routing =
            entmax_routing(&t, &q, &kbar, None, Entmax { gamma: 3.0, sigma: 2.0, center, ..settings() }).unwrap();
        let (weights, bias) = (routing.weights.to_f64().unwrap(), routing.bias.value.to_f64().unwrap());
        let list = routing.routes.to_host().unwrap();
        for (batch, kv, query) in (0..2 * 2 * 40).map(|i| (i / 80, i / 40 % 2, i % 40)) {
            let entries = list.entries_of(batch, kv, query);
            let (own, routed) = (entries.end - 1, entries.start..entries.end - 1);
            let logs: Vec<f64> = weights[routed.clone()].iter().map(|w| w.ln()).collect();
            let mean = match center {
                Center::None => 0.0,
                _ => logs.iter().sum::<f64>() / logs.len().max(1) as f64,
            };
            for (b, log) in bias[routed].iter().zip(&logs) {
                assert!((b - (log - mean) / 2.0).abs() < 1e-12, "{center:?}, query {query}");
            }
            assert_eq!(bias[own], 0.0);
        }
    }
}

#[test]
fn stopped_has_the_forward_bits_of_full_and_no_gradient() {
    let dev = device();
    let run = |gradient| {
        let t = Tape::new();
        let (q, k) = (t.leaf(normal(&dev, &[1, 33, 2, 4], 1)), t.leaf(normal(&dev, &[1, 33, 1, 4], 2)));
        let qbar = t.leaf(normal(&dev, &[4], 3));
        let kbar = chunk_summary(&t, &k, &qbar, 4).unwrap();
        let bias = entmax_routing(&t, &q, &kbar, None, Entmax { gradient, ..settings() }).unwrap().bias;
        let seed = normal(&dev, bias.value.shape(), 4);
        let g = t.backward_from(&bias, seed).unwrap();
        (bias.value.to_f64().unwrap(), g.get(&qbar).map(|g| g.to_f64().unwrap()))
    };
    let (full, stopped) = (run(RouterGradient::Full), run(RouterGradient::Stopped));
    let straight = run(RouterGradient::StraightThrough);
    assert!(full.0 == stopped.0 && full.0 == straight.0);
    assert!(full.1.unwrap().iter().any(|&g| g != 0.0) && stopped.1.is_none() && straight.1.is_some());
}

#[test]
fn topk_takes_the_best_and_ties_go_to_the_lower_chunk() {
    let dev = device();
    let q = Tensor::from_vec(&dev, &[1, 10, 1, 1], vec![1.0f64; 10]).unwrap();
    let kbar = Tensor::from_vec(&dev, &[1, 5, 1, 1], vec![1.0f64, 3.0, 2.0, 3.0, 0.0]).unwrap();
    let list = |top| topk_routing(&q, &kbar, 2, top, 1.0).unwrap().to_host().unwrap();
    assert_eq!(list(2).chunks_of(0, 0, 9), [1, 4]);
    assert_eq!(list(3).chunks_of(0, 0, 9), [1, 3, 4]);
    assert_eq!(list(9).chunks_of(0, 0, 9), [0, 1, 2, 3, 4]);
    assert_eq!(list(1).chunks_of(0, 0, 3), [1]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let run = |threads| {
        let dev = Device::cpu(threads).unwrap();
        let t = Tape::new();
        let cast = |x: Tensor| t.leaf(x.to_dtype(DType::F32).unwrap());
        let (q, kbar) = (cast(normal(&dev, &[2, 200, 4, 8], 1)), cast(normal(&dev, &[2, 50, 2, 8], 2)));
        let bias = entmax_routing(&t, &q, &kbar, None, settings()).unwrap().bias;
        let (value, seed) = (bias.value.to_vec::<f32>().unwrap(), bias.value.clone());
        let g = t.backward_from(&bias, seed).unwrap();
        [value, g.get(&q).unwrap().to_vec().unwrap(), g.get(&kbar).unwrap().to_vec().unwrap()]
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn bad_settings_are_told() {
    let (dev, t) = (device(), Tape::new());
    let (q, kbar) = (t.leaf(normal(&dev, &[1, 8, 1, 2], 1)), t.leaf(normal(&dev, &[1, 2, 1, 2], 2)));
    let err = |s| entmax_routing(&t, &q, &kbar, None, s).err().unwrap().to_string();
    assert!(err(Entmax { sigma: 0.0, ..settings() }).contains("sigma is 0"));
    assert!(err(Entmax { alpha: 1.0, ..settings() }).contains("alpha is 1"));
    assert!(err(Entmax { chunk_size: 2, ..settings() }).contains("summaries of chunks of 2 are [1, 2, 1, 2]"));
    assert!(ops::attention::topk_routing(&q.value, &kbar.value, 4, 0, 1.0).is_err());
    let windows =
        WindowChoice { chunk_size: 4, top: 2, length: 4, stride: 4, init: 0, local: 1, pooling: Pooling::Max };
    let told = |choice| window_routing(&q.value, &kbar.value, choice).map(|_| ()).map_err(|e| e.to_string());
    assert_eq!(told(windows), Ok(()));
    assert_eq!(told(WindowChoice { top: usize::MAX, local: usize::MAX, ..windows }), Ok(()));
    assert!(
        told(WindowChoice { init: usize::MAX, ..windows }).unwrap_err().contains("top is 2, but 18446744073709551615")
    );
    assert!(told(WindowChoice { length: 3, ..windows }).unwrap_err().contains("at most the length"));
}

#[test]
fn without_a_complete_chunk_every_query_attends_its_own() {
    let dev = device();
    for gradient in [RouterGradient::Full, RouterGradient::StraightThrough] {
        let t = Tape::new();
        let (q, kbar) = (t.leaf(normal(&dev, &[2, 3, 4, 6], 1)), t.leaf(normal(&dev, &[2, 0, 2, 6], 2)));
        let routing = entmax_routing(&t, &q, &kbar, None, Entmax { gradient, ..settings() }).unwrap();
        assert_eq!(routing.weights.to_f64().unwrap(), vec![0.0; 2 * 2 * 3]);
        let seed = routing.bias.value.clone();
        let grads = t.backward_from(&routing.bias, seed).unwrap();
        assert!(grads.get(&q).unwrap().to_f64().unwrap().iter().all(|&dq| dq == 0.0));
    }
}
