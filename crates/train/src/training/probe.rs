//! `[probe]`: a look into the router's gradient, every so many updates, on a fixed batch and a tape of its own: training does
//! not know of it and its bits do not change.
//!
//! A gradient that reaches the queries or keys of a layer came through the choice of chunks (scores, summaries) or through
//! the attention to tokens; the two are told apart where the router takes its inputs. Norms are Euclidean over the batch.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use dash_core::ops::attention::{HostRoutes, PAIRS, SCORES};
use dash_core::ops::grad_norm;
use dash_core::{Tape, Tensor, Watcher};
use dash_data::Batch;
use dash_model::attention::{Knob, ROUTER_K, ROUTER_Q};
use dash_model::{Model, RouterTrace};
use serde_json::{Value, json};

use super::trainer::batch_ids;
use crate::failure::Result;

/// Probes that a chunk has to be dead in, one after the other, to count as staying dead.
pub const STAYS: u32 = 3;
/// Queries whose dense attention is computed, at most.
const SAMPLED: usize = 64;
/// Bins of u, the distance to the support edge: (1/2, 1], (1/4, 1/2], ... and the rest.
const EDGE_BINS: usize = 8;

/// Gradient through the router (r) against the one through the tokens (t).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Split {
    /// |r|
    pub router: f64,
    /// |t|
    pub token: f64,
    /// <r, t> / (|r| |t|), 0 where one is 0.
    pub cosine: f64,
}

impl Split {
    fn of(router: impl Iterator<Item = f64>, total: impl Iterator<Item = f64>) -> Self {
        let (mut rr, mut tt, mut rt) = (0.0, 0.0, 0.0);
        for (r, all) in router.zip(total) {
            let t = all - r;
            rr += r * r;
            tt += t * t;
            rt += r * t;
        }
        let (router, token) = (rr.sqrt(), tt.sqrt());
        let cosine = if router == 0.0 || token == 0.0 { 0.0 } else { rt / (router * token) };
        Split { router, token, cosine }
    }

    /// |r| / (|r| + |t|)
    pub fn share(&self) -> f64 {
        if self.router == 0.0 { 0.0 } else { self.router / (self.router + self.token) }
    }
}

/// What a probe saw of one layer.
#[derive(Debug, Clone)]
pub struct LayerProbe {
    /// Layer.
    pub layer: usize,
    /// dL/dq.
    pub q: Split,
    /// dL/dk.
    pub k: Split,
    /// dL/dq by query head.
    pub q_heads: Vec<Split>,
    /// dL/dk by key/value head.
    pub k_heads: Vec<Split>,
    /// |dL/d scores| by query head, over the listed chunks.
    pub scores: Vec<f64>,
    /// |dL/d indexer_q|; 0 where there is none.
    pub indexer: f64,
    /// Share of the visible (kv head, query, earlier chunk) triples whose score has a gradient.
    pub pairs_with_gradient: f64,
    /// Share of the chunks (sequence, kv head, chunk with a later query) that no query outside chose.
    pub dead_chunks: f64,
    /// The same, in this probe and the ones before, [`STAYS`] in all.
    pub stay_dead: f64,
    /// By bin of u = p^(alpha-1), from the edge outwards last: (upper bound, mean |dL/d score|, number).
    pub by_edge: Vec<(f64, f64, u64)>,
    /// Mean entropy of w in nats, and mean support size, over queries with an earlier chunk; 0 for a hard choice.
    pub entropy: f64,
    /// See [`LayerProbe::entropy`]; for a hard choice the number of its earlier chunks.
    pub support: f64,
    /// Largest |sum p - 1| over queries and heads; 0 for a hard choice.
    pub solver_error: f64,
    /// Chosen earlier chunks among the equally many with most dense attention, averaged.
    pub recall: f64,
    /// Dense attention's probability in the attended chunks, averaged.
    pub captured_mass: f64,
    /// |dL/d score| of every listed (chunk, head), for histograms.
    pub score_values: Vec<f64>,
    /// w of every listed chunk, for histograms.
    pub weights: Vec<f64>,
}

impl LayerProbe {
    /// For metrics.jsonl.
    pub fn json(&self) -> Value {
        let split = |s: &Split| json!({"router": s.router, "token": s.token, "share": s.share(), "cosine": s.cosine});
        let edge = self.by_edge.iter().map(|(u, mean, n)| json!({"u_at_most": u, "mean_abs": mean, "pairs": n}));
        let mut line = json!({
            "layer": self.layer, "score_grad_norm": self.scores.iter().map(|x| x * x).sum::<f64>().sqrt(),
            "indexer_q_grad_norm": self.indexer, "router_share_q": self.q.share(), "router_share_k": self.k.share(),
            "router_q": self.q.router, "token_q": self.q.token, "router_k": self.k.router, "token_k": self.k.token,
            "cosine_q": self.q.cosine, "cosine_k": self.k.cosine, "pairs_with_gradient": self.pairs_with_gradient,
            "dead_chunks": self.dead_chunks, "stay_dead": self.stay_dead, "entropy": self.entropy, "support": self.support,
            "solver_error": self.solver_error, "recall": self.recall, "captured_mass": self.captured_mass,
            "score_grad_norm_by_head": self.scores,
            "q_by_head": self.q_heads.iter().map(split).collect::<Vec<_>>(),
            "k_by_head": self.k_heads.iter().map(split).collect::<Vec<_>>(),
        });
        line["by_edge"] = edge.collect();
        for (u, mean, _) in &self.by_edge {
            line[format!("edge_u<={u}")] = json!(mean);
        }
        line
    }
}

/// Remembers what passes.
#[derive(Default)]
struct Recorder {
    values: RefCell<HashMap<(String, String), Tensor>>,
    gradients: RefCell<HashMap<(String, String), Tensor>>,
}

impl Watcher for Recorder {
    fn value(&self, scope: &str, name: &str, value: &Tensor) -> Option<Tensor> {
        self.values.borrow_mut().insert((scope.into(), name.into()), value.clone());
        None
    }
    fn gradient(&self, scope: &str, name: &str, gradient: &Tensor) {
        self.gradients.borrow_mut().insert((scope.into(), name.into()), gradient.clone());
    }
}

/// A fixed batch, and which chunks have been dead for how long.
pub struct Probe {
    batch: Batch,
    dead_for: HashMap<(usize, usize), u32>,
}

impl Probe {
    /// On the first `sequences` of a batch.
    pub fn new(batch: &Batch, sequences: usize) -> Self {
        let n = sequences.clamp(1, batch.batch);
        let t = batch.inputs.len() / batch.batch;
        let batch = Batch {
            inputs: batch.inputs[..n * t].into(),
            targets: batch.targets[..n * t].to_vec(),
            batch: n,
            state: batch.state,
            questions: batch.questions.iter().filter(|q| q.sequence < n).copied().collect(),
        };
        Probe { batch, dead_for: HashMap::new() }
    }

    /// Loss of the batch, and what every layer that routes shows.
    ///
    /// # Errors
    /// When the model refuses the batch.
    pub fn run(&mut self, model: &Model) -> Result<(f64, Vec<LayerProbe>)> {
        let recorder = Rc::new(Recorder::default());
        let tape = Tape::new().computing(model.config().compute.into()).watched(recorder.clone());
        let leaves = model.leaves(&tape);
        let b = &self.batch;
        let (ids, targets) = batch_ids(model, b)?;
        let (loss, routers) = model.loss(&tape, &leaves, (&ids, &targets), b.counted().max(1) as f64)?;
        let grads = tape.backward(&loss)?;
        let mut out = Vec::new();
        for (layer, trace) in routers.iter().enumerate().filter_map(|(i, t)| Some((i, t.as_ref()?))) {
            let gradient = model.indexer(layer).and_then(|i| grads.get(&leaves[i]));
            let indexer = gradient.map_or(Ok(0.0), |g| grad_norm(g.device(), [g])?.item())?;
            out.push(self.layer(model, layer, trace, &recorder, indexer)?);
        }
        Ok((loss.value.item()?, out))
    }

    fn layer(
        &mut self,
        model: &Model,
        layer: usize,
        trace: &RouterTrace,
        seen: &Recorder,
        indexer: f64,
    ) -> Result<LayerProbe> {
        let scope = format!("model.layers.{layer}.self_attn");
        let key = |name: &str| (scope.clone(), name.to_string());
        let gradient = |name: &str| seen.gradients.borrow().get(&key(name)).map(Tensor::to_f64).transpose();
        let c = model.config();
        let (list, d) = (trace.routes().to_host()?, c.head_dim);
        let (b, g, t) = list.extents();
        let (h, group, s) = (c.heads, c.heads / g, list.chunk_size());

        let split = |total: &str, router: &str, heads: usize| {
            let total = gradient(total)?.unwrap_or_else(|| vec![0.0; b * t * heads * d]);
            let router = gradient(router)?.unwrap_or_else(|| vec![0.0; total.len()]);
            let own = |x: &[f64], head: usize| -> Vec<f64> {
                x.chunks_exact(d).skip(head).step_by(heads).flatten().copied().collect()
            };
            let by_head = (0..heads)
                .map(|head| Split::of(own(&router, head).into_iter(), own(&total, head).into_iter()))
                .collect::<Vec<_>>();
            dash_core::Result::Ok((Split::of(router.iter().copied(), total.iter().copied()), by_head))
        };
        let (q, q_heads) = split("q", ROUTER_Q, h)?;
        let (k, k_heads) = split("k", ROUTER_K, g)?;

        let queries = || (0..b * g).flat_map(move |bg| (s..t).map(move |query| (bg / g, bg % g, query)));
        let visible: usize = queries().map(|(_, _, query)| query / s).sum();
        let pairs = gradient(PAIRS)?.map_or(0.0, |x| x[0]);
        let scores = seen.gradients.borrow().get(&key(SCORES)).map(|x| list.per_entry(x)).transpose()?;
        let soft = match trace.probabilities() {
            Some((w, p)) => Some((list.per_entry(w)?, list.per_entry(p)?)),
            None => None,
        };
        let alpha = c.attention.knob(Knob::Alpha);

        let mut squares = vec![0.0; h];
        let mut edge = [(0.0, 0u64); EDGE_BINS];
        let (mut entropy, mut support, mut solver_error) = (0.0, 0.0, 0.0f64);
        let (mut rows, mut score_values, mut weights) = (0usize, Vec::new(), Vec::new());
        for (batch, kv, query) in queries() {
            let entries = list.entries_of(batch, kv, query);
            let routed = entries.start..entries.end - 1;
            rows += 1;
            support += routed.len() as f64;
            let mut sums = vec![0.0; group];
            for e in routed {
                if let Some((w, p)) = &soft {
                    entropy -= w[e] * w[e].ln();
                    weights.push(w[e]);
                    (0..group).for_each(|i| sums[i] += p[e * group + i]);
                }
                let (Some(ds), Some((_, p))) = (&scores, &soft) else { continue };
                for i in 0..group {
                    let (size, p) = (ds[e * group + i].abs(), p[e * group + i]);
                    squares[kv * group + i] += size * size;
                    score_values.push(size);
                    if let Some(alpha) = alpha.filter(|_| p > 0.0) {
                        let u = p.powf(alpha - 1.0);
                        let bin = ((-u.log2()).floor().max(0.0) as usize).min(EDGE_BINS - 1);
                        edge[bin].0 += size;
                        edge[bin].1 += 1;
                    }
                }
            }
            if soft.is_some() {
                sums.iter().for_each(|sum| solver_error = solver_error.max((sum - 1.0).abs()));
            }
        }
        let (dead_chunks, stay_dead) = self.dead(layer, &list);
        let values = seen.values.borrow();
        let inputs = (values[&key("q")].to_f64()?, values[&key("k")].to_f64()?);
        let (recall, captured_mass) = overlap(&list, (&inputs.0, &inputs.1), h, d);
        let bound = |bin: usize| 0.5f64.powi(bin as i32);
        let by_edge = edge.iter().enumerate().filter(|(_, (_, n))| *n > 0);
        Ok(LayerProbe {
            layer,
            q,
            k,
            q_heads,
            k_heads,
            scores: squares.iter().map(|x: &f64| x.sqrt()).collect(),
            indexer,
            pairs_with_gradient: pairs / visible.max(1) as f64,
            dead_chunks,
            stay_dead,
            by_edge: by_edge.map(|(bin, (sum, n))| (bound(bin), sum / *n as f64, *n)).collect(),
            entropy: entropy / rows.max(1) as f64,
            support: support / rows.max(1) as f64,
            solver_error,
            recall,
            captured_mass,
            score_values,
            weights,
        })
    }

    /// (share of chunks that are dead, share that has been for [`STAYS`] probes).
    fn dead(&mut self, layer: usize, list: &HostRoutes) -> (f64, f64) {
        let (b, g, t) = list.extents();
        let s = list.chunk_size();
        // a chunk without a later query cannot be chosen
        let n = t.div_ceil(s) - 1;
        let mut chosen = vec![false; b * g * n];
        for row in 0..b * g {
            for query in s..t {
                let chunks = list.chunks_of(row / g, row % g, query);
                chunks[..chunks.len() - 1].iter().for_each(|&c| chosen[row * n + c as usize] = true);
            }
        }
        let (mut dead, mut stay) = (0, 0);
        for (i, chosen) in chosen.iter().enumerate() {
            let count = self.dead_for.entry((layer, i)).or_default();
            *count = if *chosen { 0 } else { *count + 1 };
            dead += (*count > 0) as usize;
            stay += (*count >= STAYS) as usize;
        }
        let all = chosen.len().max(1) as f64;
        (dead as f64 / all, stay as f64 / all)
    }
}

/// Over some queries: how many of the chosen earlier chunks are among the equally many with most dense attention (mean over
/// the group), and how much of dense attention lies in the attended chunks.
fn overlap(list: &HostRoutes, (q, k): (&[f64], &[f64]), h: usize, d: usize) -> (f64, f64) {
    let (b, g, t) = list.extents();
    let (group, s) = (h / g, list.chunk_size());
    let (mut recall, mut recalled, mut captured, mut rows) = (0.0, 0usize, 0.0, 0usize);
    for query in (s..t).step_by((t - s).div_ceil(SAMPLED).max(1)) {
        for (batch, kv) in (0..b * g).map(|i| (i / g, i % g)) {
            let mut mass = vec![0.0; query / s + 1];
            for head in kv * group..(kv + 1) * group {
                let q = &q[((batch * t + query) * h + head) * d..][..d];
                let z = (0..=query).map(|j| {
                    let k = &k[((batch * t + j) * g + kv) * d..][..d];
                    q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()
                });
                let z: Vec<f64> = z.collect();
                let top = z.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = z.iter().map(|x| (x - top).exp()).sum();
                z.iter().enumerate().for_each(|(j, x)| mass[j / s] += (x - top).exp() / sum / group as f64);
            }
            let chunks = list.chunks_of(batch, kv, query);
            captured += chunks.iter().map(|&c| mass[c as usize]).sum::<f64>();
            rows += 1;
            let (_, chosen) = chunks.split_last().expect("the own chunk");
            if !chosen.is_empty() {
                let mut order: Vec<u32> = (0..(query / s) as u32).collect();
                order.sort_by(|&a, &b| mass[b as usize].total_cmp(&mass[a as usize]).then(a.cmp(&b)));
                let best = &order[..chosen.len()];
                recall += chosen.iter().filter(|c| best.contains(c)).count() as f64 / chosen.len() as f64;
                recalled += 1;
            }
        }
    }
    (recall / recalled.max(1) as f64, captured / rows.max(1) as f64)
}

#[cfg(test)]
mod tests {
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
        let batch = Batch {
            inputs: ids().into(),
            targets: ids(),
            batch: 2,
            state: LoaderState::default(),
            questions: Vec::new(),
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
            let list = trace.as_ref().unwrap().routes().to_host().unwrap();
            let key = |name: &str| (format!("model.layers.{layer}.self_attn"), name.to_string());
            let ds = recorder.gradients.borrow()[&key(SCORES)].to_f64().unwrap();
            let values = recorder.values.borrow();
            let (q, k) = (values[&key(ROUTER_Q)].to_f64().unwrap(), values[&key(ROUTER_K)].to_f64().unwrap());
            for (b, kv, query) in (0..2 * 2 * 26).map(|i| (i / 52, i / 26 % 2, i % 26)) {
                let chunks = list.chunks_of(b, kv, query).iter();
                for (e, &chunk) in list.entries_of(b, kv, query).zip(chunks).filter(|(_, c)| **c as usize != query / 4)
                {
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
}
