//! Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

use rand_chacha::ChaCha8Rng;

use super::{Alphabet, Sequence};
use crate::rng::{below, choose, unit};

/// `pairs` of a key and a value, then each key again at a gap of the power law.
pub(super) fn fill(s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet, pairs: usize, power: f64) {
    let keys = choose(rng, alphabet.size, pairs);
    for (i, &key) in keys.iter().enumerate() {
        s.inputs[2 * i] = alphabet.key(key);
        s.inputs[2 * i + 1] = alphabet.value(below(rng, alphabet.size));
    }
    let room = (s.inputs.len() - 2 * pairs) / 2;
    for (place, i) in gaps(rng, room, pairs, power) {
        let at = 2 * pairs + 2 * place;
        s.inputs[at] = s.inputs[2 * i];
        s.ask(at, 2 * i + 1);
    }
}

/// (place, pair) ascending by place: places of two tokens, drawn without replacement with weight `gap^(power - 1)`.
fn gaps(rng: &mut ChaCha8Rng, room: usize, pairs: usize, power: f64) -> Vec<(usize, usize)> {
    let mut weights: Vec<f64> = (1..=room).map(|gap| (gap as f64).powf(power - 1.0)).collect();
    let mut drawn = Vec::with_capacity(pairs);
    for i in 0..pairs {
        let mut left = unit(rng) * weights.iter().sum::<f64>();
        let mut place = weights.iter().position(|&w| w > 0.0).expect("there are more places than pairs");
        for (j, &w) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
            place = j;
            left -= w;
            if left < 0.0 {
                break;
            }
        }
        weights[place] = 0.0;
        drawn.push((place, i));
    }
    drawn.sort_unstable();
    drawn
}
