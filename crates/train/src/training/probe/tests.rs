use super::*;
use dash_core::ops::attention::{HostRoutes, Routes};
use dash_core::rng::Rng;
use dash_core::{DType, Device};
use dash_data::LoaderState;
use dash_model::{Attention, ModelConfig, TopK};

/// Moves the value of one place along a direction.
struct Nudge {
    place: (String, &'static str),
    by: Vec<f64>,
}

impl Watcher for Nudge {
    fn value(&self, scope: &str, name: &str, value: &Tensor) -> Option<Tensor> {
        if (scope, name) != (self.place.0.as_str(), self.place.1) {
            return None;
        }
        let moved = value.to_f64().unwrap().iter().zip(&self.by).map(|(x, d)| x + d).collect();
        Some(Tensor::from_vec(value.device(), value.shape(), moved).unwrap())
    }
    fn gradient(&self, _: &str, _: &str, _: &Tensor) {}
}

fn tiny(kind: &str) -> (Model, Batch) {
    let attention = Attention::small(kind).unwrap();
    let config = ModelConfig { init_std: 0.4, attention, ..ModelConfig::new(2, 16, (4, 2), 16) };
    let device = Device::cpu(1).unwrap();
    let model = Model::new(config, 17, 26, 3, &device, DType::F64).unwrap();
    let mut rng = Rng::new(4);
    let mut ids = || (0..2 * 26).map(|_| rng.below(17) as u32).collect::<Vec<u32>>();
    let batch = Batch {
        inputs: ids().into(),
        targets: ids(),
        batch: 2,
        state: LoaderState::default(),
        questions: Vec::new(),
        documents: Vec::new(),
    };
    (model, batch)
}

fn loss(model: &Model, batch: &Batch, watcher: Rc<dyn Watcher>) -> f64 {
    let tape = Tape::new().watched(watcher);
    let leaves = model.leaves(&tape);
    let (ids, targets) = batch_ids(model, batch).unwrap();
    model.loss(&tape, &leaves, (&ids, &targets), batch.targets.len() as f64).unwrap().0.value.item().unwrap()
}

/// Norm of the gradient with respect to the value at a place, by central differences element by element. A step of 1e-5
/// is below the distance of any score of this model to the support edge in all but a few elements, whose contribution
/// to the norm vanishes with their gradient.
fn by_differences(model: &Model, batch: &Batch, layer: usize, name: &'static str, n: usize) -> Vec<f64> {
    let step = 1e-5;
    let at = |i: usize, by: f64| {
        let mut direction = vec![0.0; n];
        direction[i] = by;
        let place = (format!("model.layers.{layer}.self_attn"), name);
        loss(model, batch, Rc::new(Nudge { place, by: direction }))
    };
    (0..n).map(|i| (at(i, step) - at(i, -step)) / (2.0 * step)).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

#[test]
fn the_split_of_the_gradient_is_that_of_finite_differences() {
    let (model, batch) = tiny("dash");
    let (_, layers) = Probe::new(&batch, 2).run(&model).unwrap();
    for (layer, probe) in layers.iter().enumerate() {
        for (total, router, split, heads) in [("q", ROUTER_Q, &probe.q, 4), ("k", ROUTER_K, &probe.k, 2)] {
            let n = 2 * 26 * heads * 4;
            let all = by_differences(&model, &batch, layer, total, n);
            let through = by_differences(&model, &batch, layer, router, n);
            let tokens: Vec<f64> = all.iter().zip(&through).map(|(a, r)| a - r).collect();
            let inner: f64 = tokens.iter().zip(&through).map(|(a, b)| a * b).sum();
            let cosine = inner / (norm(&tokens) * norm(&through));
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs();
            assert!(split.router > 1e-4, "the case has a router gradient: {}", split.router);
            assert!(close(split.router, norm(&through)), "{total} {layer}: {} {}", split.router, norm(&through));
            assert!(close(split.token, norm(&tokens)), "{total} {layer}: {} {}", split.token, norm(&tokens));
            assert!((split.cosine - cosine).abs() < 1e-5, "{total} {layer}: {} {cosine}", split.cosine);
        }
    }
}

/// The loss depends on gamma through the scores alone, s = gamma q . kbar / sqrt d, so gamma dL/dgamma = <dL/ds, s>: every
/// recorded score gradient takes part. A fresh model's summaries are the mean keys.
#[test]
fn the_score_gradients_are_those_of_finite_differences_in_gamma() {
    let (mut model, batch) = tiny("dash");
    let recorder = Rc::new(Recorder::default());
    let tape = Tape::new().watched(recorder.clone());
    let leaves = model.leaves(&tape);
    let (ids, targets) = batch_ids(&model, &batch).unwrap();
    let (value, routers) = model.loss(&tape, &leaves, (&ids, &targets), batch.targets.len() as f64).unwrap();
    tape.backward(&value).unwrap();
    let mut inner = 0.0;
    for (layer, trace) in routers.iter().enumerate() {
        let list = trace.as_ref().unwrap().routes().unwrap().to_host().unwrap();
        let key = |name: &str| (format!("model.layers.{layer}.self_attn"), name.to_string());
        let ds = recorder.gradients.borrow()[&key(SCORES)].to_f64().unwrap();
        let values = recorder.values.borrow();
        let (q, k) = (values[&key(ROUTER_Q)].to_f64().unwrap(), values[&key(ROUTER_K)].to_f64().unwrap());
        for (b, kv, query) in (0..2 * 2 * 26).map(|i| (i / 52, i / 26 % 2, i % 26)) {
            let chunks = list.chunks_of(b, kv, query).iter();
            for (e, &chunk) in list.entries_of(b, kv, query).zip(chunks).filter(|(_, c)| **c as usize != query / 4) {
                for head in 0..2 {
                    let q = &q[((b * 26 + query) * 4 + kv * 2 + head) * 4..][..4];
                    let mean = |i: usize| {
                        (0..4).map(|j| k[((b * 26 + chunk as usize * 4 + j) * 2 + kv) * 4 + i]).sum::<f64>() / 4.0
                    };
                    let score = 2.0 * q.iter().enumerate().map(|(i, q)| q * mean(i)).sum::<f64>() / 2.0;
                    inner += ds[e * 2 + head] * score;
                }
            }
        }
    }
    let at = |model: &mut Model, gamma: f64| {
        model.set_knobs(Some(1.5), Some(gamma));
        loss(model, &batch, Rc::new(Recorder::default()))
    };
    let slope = (at(&mut model, 2.0 + 1e-5) - at(&mut model, 2.0 - 1e-5)) / 2e-5;
    assert!((2.0 * slope - inner).abs() <= 1e-6 * inner.abs().max(1e-3), "{} {inner}", 2.0 * slope);
    // and each head's norm is that of the recorded score gradients
    model.set_knobs(Some(1.5), Some(2.0));
    let (_, layers) = Probe::new(&batch, 2).run(&model).unwrap();
    for (layer, probe) in layers.iter().enumerate() {
        let key = (format!("model.layers.{layer}.self_attn"), SCORES.to_string());
        let all = norm(&recorder.gradients.borrow()[&key].to_f64().unwrap());
        assert!((norm(&probe.scores) - all).abs() <= 1e-12 && all > 0.0);
        assert!(probe.solver_error < 1e-12 && probe.entropy > 0.0);
    }
}

#[test]
fn a_stopped_or_hard_router_has_no_gradient_and_full_density_captures_everything() {
    for kind in ["dash-stopped", "topk"] {
        let (model, batch) = tiny(kind);
        for layer in Probe::new(&batch, 2).run(&model).unwrap().1 {
            assert_eq!(
                (layer.q.router, layer.k.router, layer.pairs_with_gradient, layer.indexer),
                (0.0, 0.0, 0.0, 0.0)
            );
            assert!(layer.q.token > 0.0 && layer.captured_mass > 0.0 && layer.captured_mass < 1.0);
        }
    }
    let (mut model, batch) = tiny("dash");
    model.set_knobs(Some(1.5), Some(1e-9));
    for layer in Probe::new(&batch, 2).run(&model).unwrap().1 {
        assert!((layer.captured_mass - 1.0).abs() < 1e-12 && layer.recall == 1.0);
        // all but those of the four queries that see one chunk: its p is 1 whatever its score
        let visible: usize = (4..26).map(|query| query / 4).sum();
        let want = (visible - 4) as f64 / visible as f64;
        assert!((layer.pairs_with_gradient - want).abs() < 1e-12 && layer.dead_chunks == 0.0);
        // a share, of one sequence as of two
        let one = Probe::new(&batch, 1).run(&model).unwrap().1.remove(layer.layer);
        assert!((one.pairs_with_gradient - want).abs() < 1e-12, "{}", one.pairs_with_gradient);
    }
    // a hard choice of the own chunk alone leaves every other chunk dead, for as long as it lasts
    let (mut model, batch) = tiny("topk");
    model.set_attention(TopK { chunk_size: 4, top: 1, ..TopK::default() }.into()).unwrap();
    let mut probe = Probe::new(&batch, 2);
    for n in 1..=STAYS {
        let layer = probe.run(&model).unwrap().1.remove(0);
        assert_eq!((layer.dead_chunks, layer.stay_dead), (1.0, if n == STAYS { 1.0 } else { 0.0 }));
    }
}

/// Earlier chunks by (row of batch and kv head, query), where there are any.
fn listed(extents: (usize, usize, usize), chunk_size: usize, chosen: &[(usize, usize, &[u32])]) -> HostRoutes {
    let device = Device::cpu(1).unwrap();
    let choose = |batch, kv, query, out: &mut Vec<u32>| {
        let row = batch * extents.1 + kv;
        let own = chosen.iter().filter(|c| (c.0, c.1) == (row, query));
        own.for_each(|c| out.extend_from_slice(c.2));
    };
    Routes::from_choice(&device, extents, chunk_size, choose).unwrap().to_host().unwrap()
}

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{got} instead of {want}");
}

/// Two kv heads of two heads, 5 tokens in chunks of 2: queries 2, 3 and 4 have an earlier chunk.
#[test]
fn entropy_support_edge_and_norms_of_literal_entries() {
    let chosen: [(usize, usize, &[u32]); 6] =
        [(0, 2, &[0]), (0, 3, &[0]), (0, 4, &[0, 1]), (1, 2, &[0]), (1, 3, &[0]), (1, 4, &[1])];
    let list = listed((1, 2, 5), 2, &chosen);
    assert_eq!(list.len(), 17);
    // the entries of earlier chunks, in the order of `chosen`; those of own chunks hold what must not be counted
    let at = [2, 4, 6, 7, 11, 13, 15];
    let (mut w, mut p, mut ds) = (vec![99.0; 17], vec![99.0; 34], vec![99.0; 34]);
    let weights = [1.0, 0.5, 0.25, 0.25, 1.0, 1.0, 0.5];
    let probabilities = [[1.0, 1.0], [1.0, 1.0], [0.25, 1.0], [0.75, 0.0], [1.0, 1.0], [1.0, 0.875], [1.0, 0.000001]];
    let gradients = [[3.0, -1.0], [0.0, 1.0], [-4.0, 2.0], [8.0, 5.0], [1.0, -2.0], [2.0, 2.0], [-2.0, 6.0]];
    for (i, &e) in at.iter().enumerate() {
        w[e] = weights[i];
        p[2 * e..2 * e + 2].copy_from_slice(&probabilities[i]);
        ds[2 * e..2 * e + 2].copy_from_slice(&gradients[i]);
    }
    let entries = |scores, soft, alpha| Entries { list: &list, heads: 4, scores, soft, alpha }.figures();
    let soft = entries(Some(ds.as_slice()), Some((w.as_slice(), p.as_slice())), Some(2.0));
    // -w ln w: 0.5 ln 2 for a half and for a quarter, over six queries
    close(soft.entropy(), 4.0 * 0.5 * 2f64.ln() / 6.0);
    close(soft.support(), 7.0 / 6.0);
    close(soft.solver_error, 1.0 - 0.000001);
    let norms = [(9.0 + 16.0 + 64.0f64).sqrt(), 31f64.sqrt(), 3.0, 44f64.sqrt()];
    soft.norms().iter().zip(norms).for_each(|(got, want)| close(*got, want));
    // u = p: all of 1, 0.75 and 0.875 are in the first bin, 0.25 in the third, a millionth in the last; p of 0 in none
    assert_eq!(soft.by_edge(), [(1.0, 24.0 / 11.0, 11), (0.25, 4.0, 1), (0.0078125, 6.0, 1)]);
    assert_eq!(soft.weights, weights);
    assert_eq!(soft.score_values, gradients.as_flattened().iter().map(|x: &f64| x.abs()).collect::<Vec<_>>());
    // u is the root of p, so that a quarter is on the edge of the second bin
    let root = entries(Some(ds.as_slice()), Some((w.as_slice(), p.as_slice())), Some(1.5));
    assert_eq!(root.by_edge(), [(1.0, 24.0 / 11.0, 11), (0.5, 4.0, 1), (0.0078125, 6.0, 1)]);
    assert!(entries(Some(ds.as_slice()), Some((w.as_slice(), p.as_slice())), None).by_edge().is_empty());
    // of a hard choice there is the list alone
    let hard = entries(None, None, None);
    assert_eq!((hard.entropy(), hard.solver_error, hard.norms()), (0.0, 0.0, vec![0.0; 4]));
    close(hard.support(), 7.0 / 6.0);
    // and of a sequence of one chunk nothing
    let one = Entries { list: &listed((1, 2, 2), 2, &[]), heads: 4, scores: None, soft: None, alpha: None }.figures();
    assert_eq!((one.entropy(), one.support()), (0.0, 0.0));
}

#[test]
fn dead_chunks_are_counted_by_row_and_forgiven_when_they_are_chosen() {
    // 2 sequences of 2 kv heads, 5 tokens in chunks of 2: two chunks each have a later query, eight in all
    let all: Vec<(usize, usize, &[u32])> = (0..4).map(|row| (row, 4, [0u32, 1].as_slice())).collect();
    let without = |row: usize, chunks: &'static [u32]| {
        let mut some = all.clone();
        some[row].2 = chunks;
        listed((2, 2, 5), 2, &some)
    };
    let mut dead = Dead::default();
    assert_eq!(dead.update(0, &listed((2, 2, 5), 2, &all)), (0.0, 0.0));
    assert_eq!(dead.update(0, &without(1, &[0])), (1.0 / 8.0, 0.0));
    assert_eq!(dead.update(0, &without(1, &[])), (2.0 / 8.0, 0.0));
    // chunk 1 of row 1 is dead for the third time, chunk 0 lives again; the other layer has its own counts
    assert_eq!(dead.update(1, &without(1, &[0])), (1.0 / 8.0, 0.0));
    assert_eq!(dead.update(0, &without(1, &[0])), (1.0 / 8.0, 1.0 / 8.0));
    assert_eq!(dead.update(0, &without(1, &[])), (2.0 / 8.0, 1.0 / 8.0));
    assert_eq!(dead.update(0, &without(2, &[1])), (1.0 / 8.0, 0.0));
    assert_eq!(dead.update(0, &without(2, &[1])), (1.0 / 8.0, 0.0));
    assert_eq!(dead.update(0, &without(2, &[1])), (1.0 / 8.0, 1.0 / 8.0));
    // the last chunk has no later query; one chunk alone has none at all
    assert_eq!(Dead::default().update(0, &listed((1, 1, 4), 2, &[(0, 2, &[0])])), (0.0, 0.0));
    assert_eq!(Dead::default().update(0, &listed((1, 1, 2), 2, &[])), (0.0, 0.0));
}

/// Keys whose score, exponentiated, is a whole number by (row, head of the group, token): width 4, so scores are halves of products.
fn pulls(b: usize, g: usize, t: usize, weight: impl Fn(usize, usize, usize) -> f64) -> (Vec<f64>, Vec<f64>) {
    let (mut q, mut k) = (vec![0.0; b * t * g * 2 * 4], vec![0.0; b * t * g * 4]);
    for (batch, token, kv, head) in (0..b * t * g * 2).map(|i| (i / 2 / g / t, i / 2 / g % t, i / 2 % g, i % 2)) {
        q[(((batch * t + token) * g + kv) * 2 + head) * 4 + head] = 2.0;
        k[((batch * t + token) * g + kv) * 4 + head] = weight(batch * g + kv, head, token).ln();
    }
    (q, k)
}

#[test]
fn recall_and_captured_mass_of_scores_that_are_whole_numbers() {
    // rows 0 and 3 choose, rows 1 and 2 attend their own chunk alone; 7 tokens in chunks of 2, queries 2 to 6
    let table = |row: usize, head: usize, token: usize| match (row, head) {
        (0, 0) => [1.0, 1.0, 4.0, 4.0, 2.0, 2.0, 2.0][token],
        (0, _) => [2.0, 2.0, 1.0, 1.0, 4.0, 4.0, 2.0][token],
        (3, 0) => [8.0, 1.0, 1.0, 2.0, 3.0, 3.0, 2.0][token],
        (3, _) => [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0][token],
        _ => 1.0,
    };
    let (q, k) = pulls(2, 2, 7, table);
    let list = listed((2, 2, 7), 2, &[(0, 6, &[0, 2]), (3, 5, &[1]), (3, 6, &[0, 1, 2])]);
    let (recall, captured) = overlap(&list, (&q, &k), 4, 4);
    // row 0, query 6: masses 2/16 + 4/16, 8/16 + 2/16, 4/16 + 8/16 (halved): chunks 2 and 1 are best, of which 2 was chosen.
    // row 3, query 5: chunk 0 is best, chunk 1 was chosen; query 6: all earlier chunks, which are the best three
    close(recall, (0.5 + 0.0 + 1.0) / 3.0);
    // the own chunk at queries 2 to 6, 1/3 + 2/4 + 1/5 + 2/6 + 1/7 where all are alike
    let plain = 1.0 / 3.0 + 2.0 / 4.0 + 1.0 / 5.0 + 2.0 / 6.0 + 1.0 / 7.0;
    let first = [4.0 / 6.0, 8.0 / 10.0, 2.0 / 12.0, 4.0 / 14.0, (2.0 + 4.0 + 2.0) / 16.0];
    let second = [1.0 / 5.0, 2.0 / 6.0, 4.0 / 10.0, 8.0 / 14.0, (4.0 + 8.0 + 2.0) / 16.0];
    let third = [1.0 / 10.0, 3.0 / 12.0, 3.0 / 15.0, (3.0 + 6.0) / 18.0, 1.0];
    let last = [1.0 / 3.0, 2.0 / 4.0, 1.0 / 5.0, 4.0 / 6.0, 1.0];
    let soft: f64 = [first, second, third, last].as_flattened().iter().sum::<f64>() / 2.0;
    close(captured, (soft + 2.0 * plain) / 20.0);
}

/// Every head, token and sequence has other queries and keys: against the formula on nested lists, whose places cannot be confused.
#[test]
fn recall_and_captured_mass_take_the_right_heads_and_tokens() {
    let (b, g, t) = (2, 2, 7);
    let mut rng = Rng::new(9);
    let mut rows = |heads: usize| -> Vec<Vec<Vec<[f64; 2]>>> {
        let mut row = || (0..heads).map(|_| [rng.normal(), rng.normal()]).collect::<Vec<_>>();
        (0..b).map(|_| (0..t).map(|_| row()).collect()).collect()
    };
    let (q, k) = (rows(4), rows(2));
    let list = listed((b, g, t), 2, &[(0, 3, &[0]), (1, 4, &[1]), (1, 6, &[0, 2]), (2, 5, &[1]), (3, 6, &[1])]);
    let (mut captured, mut recalls) = (0.0, Vec::new());
    for (batch, kv, query) in (0..b * g * 5).map(|i| (i / 5 / g, i / 5 % g, i % 5 + 2)) {
        let mut mass = [0.0; 4];
        for head in [2 * kv, 2 * kv + 1] {
            let of = |j: usize| {
                let (q, k) = (q[batch][query][head], k[batch][j][kv]);
                ((q[0] * k[0] + q[1] * k[1]) / 2f64.sqrt()).exp()
            };
            let all: f64 = (0..=query).map(of).sum();
            (0..=query).for_each(|j| mass[j / 2] += of(j) / all / 2.0);
        }
        let (own, chosen) = list.chunks_of(batch, kv, query).split_last().unwrap();
        captured += mass[*own as usize] + chosen.iter().map(|&c| mass[c as usize]).sum::<f64>();
        let better = |c: u32| (0..*own).filter(|&o| mass[o as usize] > mass[c as usize]).count();
        if !chosen.is_empty() {
            let best = chosen.iter().filter(|&&c| better(c) < chosen.len()).count();
            recalls.push(best as f64 / chosen.len() as f64);
        }
    }
    let flat = |x: &[Vec<Vec<[f64; 2]>>]| x.iter().flatten().flatten().flatten().copied().collect::<Vec<f64>>();
    let got = overlap(&list, (&flat(&q), &flat(&k)), 4, 2);
    assert_eq!(recalls.len(), 5);
    close(got.0, recalls.iter().sum::<f64>() / 5.0);
    close(got.1, captured / 20.0);
}

#[test]
fn long_sequences_are_sampled_and_short_ones_are_not() {
    for (t, step) in [(66, 1), (67, 2), (132, 3)] {
        let (q, k) = pulls(1, 1, t, |_, _, _| 1.0);
        let (recall, captured) = overlap(&listed((1, 1, t), 2, &[]), (&q, &k), 2, 4);
        let own = |query: usize| (query % 2 + 1) as f64 / (query + 1) as f64;
        let queries: Vec<usize> = (2..t).step_by(step).collect();
        assert!(queries.len() <= 64);
        close(captured, queries.iter().map(|&query| own(query)).sum::<f64>() / queries.len() as f64);
        assert_eq!(recall, 0.0, "nothing was chosen");
    }
    // no query has an earlier chunk
    let (q, k) = pulls(1, 1, 2, |_, _, _| 1.0);
    assert_eq!(overlap(&listed((1, 1, 2), 2, &[]), (&q, &k), 2, 4), (0.0, 0.0));
}

#[test]
fn a_split_of_literal_gradients() {
    // [1, 2, 2, 2]: head 0 has (3, 0) and (0, 0) through the router, head 1 nothing and (0, 2)
    let router = [3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0];
    let total = [3.0, 4.0, 1.0, 0.0, 3.0, 0.0, 0.0, 5.0];
    let (all, heads) = Split::by_head(&router, &total, 2, 2);
    // the rest: (0, 4), (1, 0), (3, 0), (0, 3)
    let (r, t) = (13f64.sqrt(), 35f64.sqrt());
    close(all.router, r);
    close(all.token, t);
    close(all.cosine, 6.0 / (r * t));
    close(all.share(), r / (r + t));
    assert_eq!(heads[0], Split { router: 3.0, token: 5.0, cosine: 0.0 });
    close(heads[1].token, 10f64.sqrt());
    close(heads[1].cosine, 6.0 / (2.0 * 10f64.sqrt()));
    // nothing through the router, or nothing through the tokens
    let none = Split::by_head(&[0.0; 2], &[1.0, 2.0], 1, 2).0;
    assert_eq!((none.cosine, none.share()), (0.0, 0.0));
    let only = Split::by_head(&[3.0, 4.0], &[3.0, 4.0], 1, 2).0;
    assert_eq!((only.router, only.token, only.cosine, only.share()), (5.0, 0.0, 0.0, 1.0));
}

#[test]
fn a_probe_looks_at_the_first_sequences_alone() {
    let (model, both) = tiny("dash");
    let question = |sequence| dash_data::Question { sequence, at: 9, evidence: 3 };
    let batch = Batch { questions: vec![question(0), question(1)], ..both };
    let probe = Probe::new(&batch, 1);
    assert_eq!((probe.batch.batch, probe.batch.inputs.len(), probe.batch.targets.len()), (1, 26, 26));
    assert_eq!(probe.batch.inputs[..], batch.inputs[..26]);
    assert_eq!(probe.batch.questions, [question(0)]);
    assert_eq!(Probe::new(&batch, 7).batch.batch, 2);
    // its loss is the mean over what counts
    let (value, _) = Probe::new(&batch, 2).run(&model).unwrap();
    close(value, loss(&model, &batch, Rc::new(Recorder::default())));
}
