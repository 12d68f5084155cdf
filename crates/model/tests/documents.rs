//! Documents that share sequences are to a model what they are alone: loss and every gradient, for every kind of attention.

use dash_core::{DType, Tape, testing};
use dash_model::attention::kinds;
use dash_model::{Attention, Model, ModelConfig};

const VOCAB: usize = 50;
const T: usize = 45;
/// Of two sequences: shorter than a chunk of 4, one chunk, one token, long ones, and the whole second sequence but its last tokens.
const STARTS: [usize; 7] = [3, 7, 8, 28, 41, T, 2 * T - 2];

/// All that can be alone: the placebo draws its gradients from their places in the batch.
fn attentions() -> impl Iterator<Item = (&'static str, Attention)> {
    let all = kinds().into_iter().filter(|kind| *kind != "dash-placebo");
    all.map(|kind| (kind, Attention::small(kind).unwrap()))
}

fn model(attention: Attention, recompute: bool) -> Model {
    // far from zero, so that attention is neither uniform nor the router flat; queries and keys by the way that norms take, too
    let config =
        ModelConfig { init_std: 0.5, attention, recompute, qk_norm: recompute, ..ModelConfig::new(2, 24, (4, 2), 32) };
    Model::new(config, VOCAB, T, 3, &testing::device(), DType::F64).unwrap()
}

fn tokens(seed: u64) -> Vec<u32> {
    let mut rng = dash_core::rng::Rng::new(seed);
    (0..2 * T).map(|_| rng.below(VOCAB) as u32).collect()
}

/// Loss over `2 T` tokens, and the gradients of all parameters, of `batch` sequences of which documents begin at `starts`.
fn gradients(m: &Model, (x, y): (&[u32], &[u32]), batch: usize, starts: &[usize]) -> (f64, Vec<Vec<f64>>) {
    let (x, y) = (m.ids(x, batch).unwrap().of_documents(starts).unwrap(), m.ids(y, batch).unwrap());
    let tape = Tape::new();
    let leaves = m.leaves(&tape);
    let (loss, _) = m.loss(&tape, &leaves, (&x, &y), 2.0 * T as f64).unwrap();
    let value = loss.value.item().unwrap();
    let grads = tape.backward(&loss).unwrap();
    let of = |leaf| grads.get(leaf).map_or(Vec::new(), |g: &dash_core::Tensor| g.to_f64().unwrap());
    (value, leaves.iter().map(of).collect())
}

#[test]
fn documents_together_are_what_each_is_alone() {
    let (x, y) = (tokens(1), tokens(2));
    let mut starts = vec![0];
    starts.extend(STARTS);
    let mut looked = 0;
    for (kind, attention) in attentions() {
        for recompute in [false, true] {
            let m = model(attention, recompute);
            let (loss, together) = gradients(&m, (&x, &y), 2, &STARTS);
            let (mut sum, mut alone) = (0.0, vec![Vec::new(); together.len()]);
            for (i, &from) in starts.iter().enumerate() {
                let to = starts.get(i + 1).copied().unwrap_or(2 * T);
                let (loss, grads) = gradients(&m, (&x[from..to], &y[from..to]), 1, &[]);
                sum += loss;
                for (total, grad) in alone.iter_mut().zip(grads) {
                    total.resize(grad.len().max(total.len()), 0.0);
                    total.iter_mut().zip(grad).for_each(|(total, g)| *total += g);
                }
            }
            assert!((loss - sum).abs() < 1e-12 * sum, "{kind}: {loss} together, {sum} alone");
            for ((p, together), alone) in m.params().iter().zip(&together).zip(&alone) {
                let size = alone.iter().fold(1e-6f64, |max, x| max.max(x.abs()));
                let zero = vec![0.0; alone.len()];
                let together = if together.is_empty() { &zero } else { together };
                assert_eq!(together.len(), alone.len(), "{kind}: {}", p.name);
                let off = together.iter().zip(alone).fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
                assert!(off < 1e-9 * size, "{kind}: the gradient of {} is off by {off:e} of {size:e}", p.name);
            }
            // the documents do see each other without
            let (crossing, _) = gradients(&m, (&x, &y), 2, &[]);
            assert!((crossing - loss).abs() > 1e-6, "{kind}: {crossing} and {loss}");
            looked += 1;
        }
    }
    assert!(looked >= 2 * 15, "{looked} cases");
}

#[test]
fn a_token_moves_nothing_of_another_document() {
    let x = tokens(1);
    for (kind, attention) in attentions() {
        let m = model(attention, false);
        let logits = |x: &[u32]| {
            let ids = m.ids(x, 2).unwrap().of_documents(&STARTS).unwrap();
            m.logits(&ids).unwrap().to_f64().unwrap()
        };
        let before = logits(&x);
        // the first token of the document of 20
        let mut changed = x.clone();
        changed[8] = (changed[8] + 1) % VOCAB as u32;
        let after = logits(&changed);
        let moved: Vec<usize> =
            (0..2 * T).filter(|i| before[i * VOCAB..][..VOCAB] != after[i * VOCAB..][..VOCAB]).collect();
        assert!(moved.contains(&8) && moved.len() > 10, "{kind}: {moved:?}");
        assert!(moved.iter().all(|i| (8..28).contains(i)), "{kind}: {moved:?}");
    }
}

#[test]
fn figures_of_the_choice_are_those_of_all_documents() {
    let (x, y) = (tokens(1), tokens(2));
    for (kind, attention) in attentions() {
        let m = model(attention, false);
        let targets = m.ids(&y, 2).unwrap();
        let (nll, traces) = m.nll((&m.ids(&x, 2).unwrap().of_documents(&STARTS).unwrap(), &targets), None).unwrap();
        let (mut sum, mut tokens, mut rows, mut density) = (0.0, 0.0, 0, 0.0);
        for (from, to) in [0].into_iter().chain(STARTS).zip(STARTS.into_iter().chain([2 * T])) {
            let ids = |x: &[u32]| m.ids(&x[from..to], 1).unwrap();
            let (nll, traces) = m.nll((&ids(&x), &ids(&y)), None).unwrap();
            sum += nll.to_f64().unwrap().iter().sum::<f64>();
            let Some(trace) = &traces[1] else { continue };
            let stats = trace.stats().unwrap();
            tokens += stats.tokens * (to - from) as f64 / (2 * T) as f64;
            rows += stats.rows;
            density += stats.density * stats.rows as f64;
        }
        assert!((nll.to_f64().unwrap().iter().sum::<f64>() - sum).abs() < 1e-9 * sum, "{kind}");
        let Some(trace) = &traces[1] else { continue };
        // of eight documents, two have four tokens
        assert!(trace.routes().unwrap_err().to_string().contains("over documents in 7 groups"), "{kind}");
        let stats = trace.stats().unwrap();
        assert!((stats.tokens - tokens).abs() < 1e-12 * tokens, "{kind}: {} and {tokens}", stats.tokens);
        assert_eq!(stats.rows, rows, "{kind}");
        assert!((stats.density * rows as f64 - density).abs() < 1e-9, "{kind}: {} and {density}", stats.density);
    }
}
