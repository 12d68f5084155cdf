use super::*;
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
    let batch =
        Batch { inputs: ids().into(), targets: ids(), batch: 2, state: LoaderState::default(), questions: Vec::new() };
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
        let list = trace.as_ref().unwrap().routes().to_host().unwrap();
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
