//! Sampling text from a model.

use dash_core::Result;
use dash_core::rng::Rng;

use crate::decoder::Model;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Keeps the smallest set of tokens whose probability reaches this.
    pub top_p: f64,
}

/// Continues `prompt` by up to `max_tokens` tokens, handing each to `emit`, which returns false to stop (so an
/// end-of-text token, a closed pipe or a time limit is the caller's business). The context is the last
/// [`Model::positions`] tokens.
///
/// # Errors
/// When an id is not below the vocabulary.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    max_tokens: usize,
    sampling: Sampling,
    rng: &mut Rng,
    mut emit: impl FnMut(u32) -> bool,
) -> Result<()> {
    let mut ids = prompt.to_vec();
    for _ in 0..max_tokens {
        let context = &ids[ids.len().saturating_sub(model.positions())..];
        let logits = model.last_logits(&model.ids(context, 1)?)?.to_f64()?;
        let next = draw(&logits, sampling, rng);
        ids.push(next);
        if !emit(next) {
            break;
        }
    }
    Ok(())
}

fn draw(logits: &[f64], s: Sampling, rng: &mut Rng) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if s.temperature <= 0.0 {
        return order[0] as u32;
    }
    let top = logits[order[0]];
    let weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - top) / s.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let mut nucleus = 0;
    while nucleus < weights.len() && (nucleus == 0 || kept < s.top_p * total) {
        kept += weights[nucleus];
        nucleus += 1;
    }
    let mut at = rng.uniform() * kept;
    for (&i, &w) in order[..nucleus].iter().zip(&weights) {
        at -= w;
        if at < 0.0 {
            return i as u32;
        }
    }
    order[nucleus - 1] as u32
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
