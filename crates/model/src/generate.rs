//! Sampling text from a model.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use dash_core::ops::cuda::attention::cached::MOST_GROUP;
use dash_core::rng::Rng;
use dash_core::{Device, Result};

use crate::decoder::Model;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Keeps the smallest set of tokens whose probability reaches this.
    pub top_p: f64,
}

/// How a text is continued.
#[derive(Debug, Clone, Copy)]
pub struct Generation {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is drawn.
    pub sampling: Sampling,
    /// Whether keys, values and summaries of earlier tokens are kept, so that a new token is computed alone. Without, every token
    /// is computed again for each new one; the logits are the same to the rounding of sums in another order. Where [`has_cache`] says
    /// no, nothing is kept.
    pub cache: bool,
}

/// Whether the model's device has kernels for what its attention keeps. Without them [`generate`] reads the whole text for every token.
pub fn has_cache(model: &Model) -> bool {
    match model.device() {
        Device::Cpu(_) => true,
        Device::Cuda(_) => {
            let c = model.config();
            c.attention.decodes_on_a_card() && c.heads / c.kv_heads <= MOST_GROUP
        }
    }
}

/// Continues `prompt`, handing each token to `emit`, which returns false to stop (so an end-of-text token, a closed pipe or a
/// time limit is the caller's business).
///
/// The context is the last [`Model::positions`] tokens. A longer text slides through it: then every token stands at another position
/// than before, nothing that was kept is of use, and each new token takes a pass over the whole context.
///
/// # Errors
/// When an id is not below the vocabulary.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    how: Generation,
    rng: &mut Rng,
    mut emit: impl FnMut(u32) -> bool,
) -> Result<()> {
    let mut ids = prompt.to_vec();
    let mut cache = (how.cache && has_cache(model)).then(|| model.cache());
    for _ in 0..how.max_tokens {
        let positions = model.positions();
        let logits = match cache.as_mut().filter(|_| ids.len() <= positions) {
            Some(cache) => model.logits_after(cache, &model.ids(&ids[cache.len()..], 1)?)?,
            None => {
                cache = None;
                model.last_logits(&model.ids(&ids[ids.len().saturating_sub(positions)..], 1)?)?
            }
        };
        let next = draw(&logits.to_f64()?, how.sampling, rng);
        ids.push(next);
        if !emit(next) {
            break;
        }
    }
    Ok(())
}

/// A token and its logit; the larger logit is the greater one, then the smaller id.
#[derive(PartialEq)]
struct Candidate {
    logit: f64,
    id: usize,
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit.total_cmp(&other.logit).then(other.id.cmp(&self.id))
    }
}

/// The best tokens come off a heap until they have the share: most of a vocabulary is never put in order.
fn draw(logits: &[f64], s: Sampling, rng: &mut Rng) -> u32 {
    let candidates = logits.iter().enumerate().map(|(id, &logit)| Candidate { logit, id });
    if s.temperature <= 0.0 {
        return candidates.max().map_or(0, |best| best.id as u32);
    }
    let mut heap: BinaryHeap<Candidate> = candidates.collect();
    let top = heap.peek().map_or(0.0, |best| best.logit);
    let weight = |logit: f64| ((logit - top) / s.temperature).exp();
    let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let mut kept = 0.0;
    let mut nucleus = Vec::new();
    while let Some(Candidate { logit, id }) = heap.pop().filter(|_| nucleus.is_empty() || kept < s.top_p * total) {
        kept += weight(logit);
        nucleus.push((id, weight(logit)));
    }
    let mut at = rng.uniform() * kept;
    let inside = nucleus.iter().find(|(_, weight)| {
        at -= weight;
        at < 0.0
    });
    inside.or(nucleus.last()).map_or(0, |&(id, _)| id as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_best_and_top_p_cuts_the_tail() {
        let logits = [0.0, 2.0, 2.0, -5.0];
        let mut rng = Rng::new(1);
        assert_eq!(draw(&logits, Sampling { temperature: 0.0, top_p: 1.0 }, &mut rng), 1);
        let s = Sampling { temperature: 1.0, top_p: 0.9 };
        let mut seen = [0; 4];
        (0..2000).for_each(|_| seen[draw(&logits, s, &mut rng) as usize] += 1);
        assert!(seen[0] == 0 && seen[3] == 0 && seen[1] > 850 && seen[2] > 850, "{seen:?}");
    }
}
