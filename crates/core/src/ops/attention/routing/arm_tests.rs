//! What experiments put in the place of a router's choice, bias or gradient.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::device::Device;
use crate::number::DType;
use crate::tape::{Tape, Watcher};
use crate::testing::{check_grad, device, normal};

pub(super) fn settings(gradient: RouterGradient) -> Entmax {
    Entmax { chunk_size: 4, alpha: 1.5, gamma: 1.0, sigma: 1.0, center: Center::None, gradient }
}

/// What a backward pass tells of the scores: their gradients `[entries, group]`, and how many pairs have one.
#[derive(Default)]
pub(super) struct Told {
    scores: RefCell<Option<Tensor>>,
    pairs: RefCell<Option<Tensor>>,
}

impl Watcher for Told {
    fn value(&self, _scope: &str, _name: &str, _value: &Tensor) -> Option<Tensor> {
        None
    }
    fn gradient(&self, _scope: &str, name: &str, value: &Tensor) {
        let place = if name == SCORES { &self.scores } else { &self.pairs };
        assert!(name == SCORES || name == PAIRS);
        place.replace(Some(value.clone()));
    }
}

/// What a backward pass of entmax routing gives for one upstream gradient.
pub(super) struct Seen {
    bias: Vec<f64>,
    pub dq: Vec<f64>,
    pub dkbar: Vec<f64>,
    pub scores: Vec<f64>,
    pub pairs: f64,
    pub norm: f64,
    pub routing: Routing,
}

pub(super) const GROUP: usize = 2;

/// Of an op that routes `q [2, 70, 4, 6]` over `kbar [2, 17, 2, 6]`.
pub(super) fn seen_of(dev: &Device, dtype: DType, upstream: u64, op: impl Fn(&Tape, &Var, &Var) -> Routing) -> Seen {
    let watcher = Rc::new(Told::default());
    let t = Tape::new().watched(watcher.clone());
    let leaf = |x: Tensor| t.leaf(x.to_dtype(dtype).unwrap());
    let (q, kbar) = (leaf(normal(dev, &[2, 70, 4, 6], 1)), leaf(normal(dev, &[2, 17, 2, 6], 2)));
    let routing = op(&t, &q, &kbar);
    let dbias = normal(dev, routing.bias.value.shape(), upstream).to_dtype(dtype).unwrap();
    let grads = t.backward_from(&routing.bias, dbias).unwrap();
    let of = |x: &Var| grads.get(x).unwrap().to_f64().unwrap();
    let list = routing.routes.to_host().unwrap();
    let of_entries = |x: &Tensor| list.per_entry(x).unwrap();
    let (scores, pairs) = (of_entries(&watcher.scores.take().unwrap()), watcher.pairs.take().unwrap().item().unwrap());
    let norm = routing.score_gradient.read().unwrap();
    Seen { bias: of_entries(&routing.bias.value), dq: of(&q), dkbar: of(&kbar), scores, pairs, norm, routing }
}

pub(super) fn seen(dev: &Device, dtype: DType, settings: Entmax, upstream: u64) -> Seen {
    seen_of(dev, dtype, upstream, |t, q, kbar| entmax_routing(t, q, kbar, None, settings).unwrap())
}

#[test]
fn the_flipped_gradient_is_the_full_one_with_the_other_sign() {
    let dev = device();
    for center in [Center::None, Center::Mean] {
        let of = |gradient| seen(&dev, DType::F64, Entmax { center, ..settings(gradient) }, 3);
        let (full, flipped) = (of(RouterGradient::Full), of(RouterGradient::Flipped));
        let minus = |x: &[f64]| x.iter().map(|x| -x).collect::<Vec<f64>>();
        assert_eq!((&full.bias, full.norm), (&flipped.bias, flipped.norm));
        assert!(full.norm > 0.0);
        assert_eq!(minus(&full.dq), flipped.dq);
        assert_eq!(minus(&full.dkbar), flipped.dkbar);
        assert_eq!(minus(&full.scores), flipped.scores);
    }
}

/// By query and head: the numbers of its entries in a watcher's `[entries, group]`, the own chunk left out.
fn by_head(routing: &Routing) -> Vec<Vec<usize>> {
    let list = routing.routes.to_host().unwrap();
    let mut out = Vec::new();
    for (batch, kv, query) in (0..2 * 2 * 70).map(|i| (i / 140, i / 70 % 2, i % 70)) {
        let entries = list.entries_of(batch, kv, query);
        for head in 0..GROUP {
            out.push((entries.start..entries.end - 1).map(|e| e * GROUP + head).collect());
        }
    }
    out
}

#[test]
fn a_placebo_has_the_norm_the_chunks_and_the_sum_of_the_gradient_and_another_direction() {
    is_a_placebo(&device());
}

#[test]
fn a_placebo_on_cuda_is_one_as_well() {
    let Some(gpu) = crate::ops::cuda::testing::cuda() else { return };
    is_a_placebo(&gpu.device());
}

fn is_a_placebo(dev: &Device) {
    let of = |gradient| seen(dev, DType::F64, settings(gradient), 3);
    let (full, placebo) = (of(RouterGradient::Full), of(RouterGradient::Placebo));
    assert_eq!(full.bias, placebo.bias);
    assert!((full.norm - placebo.norm).abs() <= 1e-12 * full.norm, "{} {}", full.norm, placebo.norm);
    let list = full.routing.routes.to_host().unwrap();
    let heads = list.per_entry(full.routing.heads.as_ref().unwrap()).unwrap();
    let (mut cosines, mut compared) = (0.0, 0);
    for places in by_head(&full.routing) {
        let of = |x: &[f64]| places.iter().map(|&i| x[i]).collect::<Vec<f64>>();
        let (f, p) = (of(&full.scores), of(&placebo.scores));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let norm = dot(&f, &f).sqrt();
        assert!((dot(&p, &p).sqrt() - norm).abs() <= 1e-12 * norm.max(1e-3), "{f:?} {p:?}");
        assert!(p.iter().sum::<f64>().abs() <= 1e-12 * norm.max(1e-3), "{p:?}");
        assert!(places.iter().zip(&p).all(|(&i, &p)| heads[i] > 0.0 || p == 0.0), "{p:?}");
        if places.iter().filter(|&&i| heads[i] > 0.0).count() > 2 {
            (cosines, compared) = (cosines + dot(&f, &p) / (norm * norm), compared + 1);
        }
    }
    // the mean cosine of independent directions: its deviation over so many heads is below 1 / sqrt(compared), however unlike their norms are
    assert!(compared > 300, "{compared}");
    let mean = cosines / compared as f64;
    assert!(mean.abs() < 4.0 / (compared as f64).sqrt(), "{mean}");
    // another gradient draws another direction, the same one the same
    let (again, other) = (of(RouterGradient::Placebo), seen(dev, DType::F64, settings(RouterGradient::Placebo), 4));
    assert!(again.scores == placebo.scores && other.scores != placebo.scores);
}

#[test]
fn arms_have_the_same_bits_over_threads() {
    let run = |threads, gradient| {
        let s = seen(&Device::cpu(threads).unwrap(), DType::F32, settings(gradient), 3);
        (s.bias, s.dq, s.dkbar)
    };
    for gradient in [RouterGradient::Placebo, RouterGradient::Flipped] {
        assert!(run(1, gradient) == run(3, gradient), "{gradient:?}");
    }
    let bias = |threads| {
        let (dev, t) = (Device::cpu(threads).unwrap(), Tape::new());
        let leaf = |x: Tensor| t.leaf(x.to_dtype(DType::F32).unwrap());
        let (q, kbar) = (leaf(normal(&dev, &[2, 70, 4, 6], 1)), leaf(normal(&dev, &[2, 17, 2, 6], 2)));
        let routes = topk_routing(&q.value, &kbar.value, 4, 5, 1.0).unwrap();
        let bias = softmax_bias(&t, &q, &kbar, routes, 1.0).unwrap().bias;
        let (value, upstream) = (bias.value.to_f64().unwrap(), bias.value.clone());
        let g = t.backward_from(&bias, upstream).unwrap();
        [value, g.get(&q).unwrap().to_f64().unwrap(), g.get(&kbar).unwrap().to_f64().unwrap()]
    };
    assert_eq!(bias(1), bias(3));
}

#[test]
fn grad_of_the_softmax_bias_to_queries_and_summaries() {
    let d = device();
    for (top, gamma) in [(3, 1.0), (2, 3.0), (9, 0.5), (1, 1.0)] {
        let inputs = [normal(&d, &[2, 22, 4, 3], 1), normal(&d, &[2, 5, 2, 3], 2)];
        // the choice is data: differences do not move it
        let routes = topk_routing(&inputs[0], &inputs[1], 4, top, gamma).unwrap();
        check_grad(&inputs, |t, v| Ok(softmax_bias(t, &v[0], &v[1], routes.clone(), gamma)?.bias));
    }
}

/// Probabilities 1/2, 1/3 and 1/6 of one head and the other way round of the other one, of which chunks 0 and 2 are listed: 3/4, 1/4
/// and 1/4, 3/4 of them, so half each.
#[test]
fn softmax_bias_of_literal_scores() {
    let (dev, t) = (device(), Tape::new());
    let leaf = |shape: &[usize], x: Vec<f64>| t.leaf(Tensor::from_vec(&dev, shape, x).unwrap());
    let kbar = leaf(&[1, 4, 1, 1], vec![3f64.ln(), 2f64.ln(), 0.0, 9.0]);
    let routes = || {
        let listed = |_, _, query: usize, chunks: &mut Vec<u32>| {
            if query >= 6 {
                chunks.extend([0, 2]);
            }
        };
        Routes::from_choice(&dev, (1, 1, 8), 2, listed).unwrap()
    };
    let near = |got: Vec<f64>, want: &[f64]| {
        let got = &got[got.len() - 3..];
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-14), "{got:?} {want:?}");
    };
    let one = leaf(&[1, 8, 1, 1], vec![1.0; 8]);
    let r = softmax_bias(&t, &one, &kbar, routes(), 1.0).unwrap();
    near(r.weights.to_f64().unwrap(), &[0.75, 0.25, 0.0]);
    near(r.bias.value.to_f64().unwrap(), &[0.75f64.ln(), 0.25f64.ln(), 0.0]);
    // twice as sharp: 9 to 1
    near(softmax_bias(&t, &one, &kbar, routes(), 2.0).unwrap().weights.to_f64().unwrap(), &[0.9, 0.1, 0.0]);
    let two = leaf(&[1, 8, 2, 1], [1.0, -1.0].repeat(8));
    near(
        softmax_bias(&t, &two, &kbar, routes(), 1.0).unwrap().bias.value.to_f64().unwrap(),
        &[0.5f64.ln(), 0.5f64.ln(), 0.0],
    );
    assert!(softmax_bias(&t, &one, &kbar, routes(), 0.0).is_err());
}

#[test]
fn a_chunk_too_far_behind_for_f32_has_the_least_bias_and_no_gradient() {
    let (dev, t) = (device(), Tape::new());
    let leaf = |shape: &[usize], x: Vec<f32>| t.leaf(Tensor::from_vec(&dev, shape, x).unwrap());
    let (q, kbar) = (leaf(&[1, 6, 1, 1], vec![1.0; 6]), leaf(&[1, 3, 1, 1], vec![200.0, 0.0, 0.0]));
    let routes = topk_routing(&q.value, &kbar.value, 2, 3, 1.0).unwrap();
    let bias = softmax_bias(&t, &q, &kbar, routes, 1.0).unwrap().bias;
    let values = bias.value.to_f64().unwrap();
    assert!(values.iter().all(|b| b.is_finite()) && values.iter().any(|&b| b < -80.0), "{values:?}");
    let upstream = Tensor::full(&dev, bias.value.shape(), DType::F32, 1.0).unwrap();
    let g = t.backward_from(&bias, upstream).unwrap();
    assert!(g.get(&q).unwrap().to_f64().unwrap().iter().all(|x| x.is_finite()));
}

#[test]
fn every_query_may_have_a_number_of_its_own() {
    let dev = device();
    let (q, kbar) = (normal(&dev, &[2, 40, 4, 6], 1), normal(&dev, &[2, 10, 2, 6], 2));
    let tops: Vec<u32> = (0..2 * 40).map(|i| 1 + i * 7 % 5).collect();
    let of = |top| topk_routing_after(0, &q, &kbar, 4, top, 1.0).unwrap().to_host().unwrap();
    let mixed = of(Top::Each(&tops));
    for (i, &top) in tops.iter().enumerate() {
        let (kv, query) = (i / 40, i % 40);
        let same = of(Top::All(top as usize));
        for batch in 0..2 {
            assert_eq!(mixed.chunks_of(batch, kv, query), same.chunks_of(batch, kv, query));
        }
    }
    let err = |top| topk_routing_after(0, &q, &kbar, 4, top, 1.0).unwrap_err().to_string();
    assert!(err(Top::Each(&tops[1..])).contains("79 numbers for 2 kv heads of 40 queries"));
    assert!(err(Top::Each(&[0; 80])).contains("top is 0"));
}

#[test]
fn random_chunks_are_uniform_fixed_and_differ_by_place() {
    let dev = device();
    let random = Random { seed: 5, layer: 1, chunk_size: 4 };
    let of = |random, t, past| random_routing(&dev, (2, 2, t), past, random, Top::All(3)).unwrap().to_host().unwrap();
    let list = of(random, 400, 0);
    let mut counts = [0; 50];
    for (kv, query) in (0..2).flat_map(|kv| (0..400).map(move |q| (kv, q))) {
        let chunks = list.chunks_of(0, kv, query);
        assert_eq!(chunks, list.chunks_of(1, kv, query), "sequences of a batch have the same");
        assert_eq!(chunks.len(), (query / 4 + 1).min(3));
        assert_eq!(chunks.last(), Some(&((query / 4) as u32)));
        if query >= 200 {
            chunks[..2].iter().filter(|&&c| c < 50).for_each(|&c| counts[c as usize] += 1);
        }
    }
    // of the queries from 200 on each takes two of its chunks / 4: chunk c < 50 is expected in 2 sum 2 / (q / 4) of them
    let expected: f64 = 2.0 * (200..400).map(|q| 2.0 / f64::from(q / 4)).sum::<f64>();
    let chi: f64 = counts.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
    assert!((20.0..90.0).contains(&chi), "chi square of 50 chunks: {chi}");
    // what is after a query does not matter, nor how a sequence is cut
    assert_eq!(of(random, 100, 0).chunks_of(0, 1, 99), list.chunks_of(0, 1, 99));
    assert_eq!(of(random, 50, 37).chunks_of(0, 1, 40), list.chunks_of(0, 1, 77));
    let differs = |other| (0..400).filter(|&q| list.chunks_of(0, 0, q) != of(other, 400, 0).chunks_of(0, 0, q)).count();
    assert!(differs(Random { seed: 6, ..random }) > 300 && differs(Random { layer: 0, ..random }) > 300);
    assert!((0..400).filter(|&q| list.chunks_of(0, 0, q) != list.chunks_of(0, 1, q)).count() > 300);
}

#[test]
fn grad_of_the_landmark_bias_to_queries_keys_and_summaries() {
    let d = device();
    for (top, gamma) in [(3, 1.0), (9, 2.0), (1, 1.0)] {
        let inputs = [normal(&d, &[2, 22, 3, 3], 1), normal(&d, &[2, 22, 3, 3], 2), normal(&d, &[2, 5, 3, 3], 3)];
        let routes = topk_routing(&inputs[0], &inputs[2], 4, top, gamma).unwrap();
        check_grad(&inputs, |t, v| landmark_bias(t, [&v[0], &v[1], &v[2]], &routes, gamma));
    }
}

/// Two chunks of two tokens: with e^b_c = e^r_c / sum e^s the weights of a chunk's tokens add up to e^r_c.
#[test]
fn tokens_of_a_chunk_share_the_weight_of_its_summary() {
    let (dev, t) = (device(), Tape::new());
    let leaf = |shape: &[usize], x: Vec<f64>| t.leaf(Tensor::from_vec(&dev, shape, x).unwrap());
    let q = leaf(&[1, 6, 1, 1], vec![1.0; 6]);
    let k = leaf(&[1, 6, 1, 1], vec![0.3, -0.7, 1.1, 0.2, 0.0, 0.0]);
    let kbar = leaf(&[1, 3, 1, 1], vec![2.0, 0.5, 9.0]);
    let routes = topk_routing(&q.value, &kbar.value, 2, 3, 1.0).unwrap();
    let bias = landmark_bias(&t, [&q, &k, &kbar], &routes, 2.0).unwrap().value.to_f64().unwrap();
    let [a, b, own] = bias[bias.len() - 3..] else { panic!() };
    let sum = |x: f64, y: f64| x.exp() + y.exp();
    assert!((a.exp() * sum(0.3, -0.7) - 4f64.exp()).abs() < 1e-12);
    assert!((b.exp() * sum(1.1, 0.2) - 1f64.exp()).abs() < 1e-12 && own == 0.0);
    let told = landmark_bias(&t, [&q, &q, &kbar], &routes, 0.0).unwrap_err().to_string();
    assert!(told.contains("gamma is 0"), "{told}");
}

/// Chunks of two tokens with equal mean keys: the one with the largest key has the mass, which a mean does not see.
#[test]
fn mass_routing_finds_what_a_mean_hides() {
    let dev = device();
    let x = |shape: &[usize], x: Vec<f64>| Tensor::from_vec(&dev, shape, x).unwrap();
    let q = x(&[1, 8, 1, 1], vec![1.0; 8]);
    let k = x(&[1, 8, 1, 1], vec![1.0, 1.0, 4.0, -2.0, 1.5, 0.5, 9.0, 9.0]);
    let of = |top| mass_routing(0, &q, &k, 2, Top::All(top)).unwrap().to_host().unwrap().chunks_of(0, 0, 7).to_vec();
    // e^4 > e^1.5 + e^0.5 > 2 e; the own chunk is not scored
    assert_eq!((of(2), of(3), of(9)), (vec![1, 3], vec![1, 2, 3], vec![0, 1, 2, 3]));
    // queries after kept tokens see the same
    let later = x(&[1, 2, 1, 1], vec![1.0; 2]);
    let list = mass_routing(6, &later, &k, 2, Top::All(2)).unwrap().to_host().unwrap();
    assert_eq!(list.chunks_of(0, 0, 1), [1, 3]);
    assert!(mass_routing(0, &later, &k, 2, Top::All(2)).is_err());
}

/// An indexer of width 5, attention of width 3, two heads a kv head; the choice and attention are data.
#[test]
fn grad_of_the_indexers_loss_to_its_queries_and_keys() {
    let d = device();
    let [q, k] = [normal(&d, &[2, 22, 4, 3], 1), normal(&d, &[2, 22, 2, 3], 2)];
    let inputs = [normal(&d, &[2, 22, 2, 5], 3), normal(&d, &[2, 22, 2, 5], 4)];
    for (chunk, top) in [(4, 3), (4, 9), (7, 2), (30, 1)] {
        let routes = mass_routing(0, &inputs[0], &inputs[1], chunk, Top::All(top)).unwrap();
        check_grad(&inputs, |t, v| indexer_kl(t, [&v[0], &v[1]], [&q, &k], &routes));
        // nobody else has a gradient of it
        let t = Tape::new();
        let leaves = [&q, &k, &inputs[0], &inputs[1]].map(|x| t.leaf(x.clone()));
        let loss = indexer_kl(&t, [&leaves[2], &leaves[3]], [&leaves[0].value, &leaves[1].value], &routes).unwrap();
        let grads = t.backward(&loss).unwrap();
        assert_eq!(leaves.each_ref().map(|x| grads.get(x).is_some()), [false, false, true, true]);
    }
}

#[test]
fn an_indexer_that_is_attention_itself_has_nothing_to_learn() {
    let d = device();
    let [q, k] = [normal(&d, &[1, 30, 2, 6], 1), normal(&d, &[1, 30, 2, 6], 2)];
    let routes = mass_routing(0, &q, &k, 4, Top::All(3)).unwrap();
    let t = Tape::new();
    let [iq, ik] = [&q, &k].map(|x| t.leaf(x.clone()));
    let loss = indexer_kl(&t, [&iq, &ik], [&q, &k], &routes).unwrap();
    assert!(loss.value.item().unwrap().abs() < 1e-15);
    let grads = t.backward(&loss).unwrap();
    assert!([&iq, &ik].iter().all(|x| grads.get(x).unwrap().to_f64().unwrap().iter().all(|g| g.abs() < 1e-16)));
}

/// Two tokens a chunk, width 1, the indexer all zero: the query of token 2 sees chunk 0 and itself, which the indexer takes for 2/3 and 1/3. Attention has
/// e^s of 1, 3 and 4: 1/2 and 1/2. The other queries: nothing but their own chunk at tokens 0 and 1, and token 3 with 1, 3 against 4, 4.
#[test]
fn the_loss_is_that_of_the_equation() {
    let d = device();
    let x = |x: &[f64]| Tensor::from_vec(&d, &[1, 4, 1, 1], x.to_vec()).unwrap();
    let (q, k) = (x(&[1.0; 4]), x(&[0.0, 3f64.ln(), 4f64.ln(), 4f64.ln()]));
    let t = Tape::new();
    let zeros = t.leaf(x(&[0.0; 4]));
    let routes = mass_routing(0, &q, &k, 2, Top::All(2)).unwrap();
    let loss = indexer_kl(&t, [&zeros, &zeros], [&q, &k], &routes).unwrap().value.item().unwrap();
    let third = 0.5 * (0.75f64.ln() + 1.5f64.ln());
    let fourth = (1.0 / 3.0) * (2.0f64 / 3.0).ln() + (2.0 / 3.0) * (4.0f64 / 3.0).ln();
    assert!((loss - (third + fourth) / 4.0).abs() < 1e-15, "{loss}");
    let told = |iq: &Tensor| {
        let t = Tape::new();
        indexer_kl(&t, [&t.leaf(iq.clone()), &t.leaf(x(&[0.0; 4]))], [&q, &k], &routes).unwrap_err().to_string()
    };
    let wide = normal(&d, &[1, 4, 2, 1], 1);
    assert!(told(&wide).contains("a query and a key for each token and kv head are [1, 4, 1, ..]"), "{}", told(&wide));
}
