//! The crate's random draws. The stream and the algorithms are part of the format: a library may change its own shuffle between
//! releases, and the order of a resumed run must not follow it.

use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// An independent stream of a seed.
pub(crate) fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// Uniform in [0, 1].
pub(crate) fn unit(rng: &mut ChaCha8Rng) -> f64 {
    rng.next_u64() as f64 / 2f64.powi(64)
}

/// Uniform in 0..n by the high half of a product: the bias is below n / 2^64.
pub(crate) fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((rng.next_u64() as u128 * n as u128) >> 64) as usize
}

/// Fisher-Yates, from the last element down.
pub(crate) fn shuffle<T>(rng: &mut ChaCha8Rng, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        let j = below(rng, i + 1);
        items.swap(i, j);
    }
}

/// `count` different elements of `0..n` in random order: the first steps of Fisher-Yates from the first element up, which remembers
/// the places that it has touched only, so that `n` may be large.
pub(crate) fn choose(rng: &mut ChaCha8Rng, n: usize, count: usize) -> Vec<usize> {
    let mut moved = std::collections::HashMap::new();
    let step = |i: usize| {
        let j = i + below(rng, n - i);
        let taken = moved.get(&j).copied().unwrap_or(j);
        let here = moved.remove(&i).unwrap_or(i);
        if j != i {
            moved.insert(j, here);
        }
        taken
    };
    (0..count).map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_draws_are_pinned() {
        // a change here breaks the data order of every existing checkpoint
        let mut order: Vec<u32> = (0..8).collect();
        shuffle(&mut stream(42, 1), &mut order);
        assert_eq!(order, [6, 3, 7, 0, 4, 2, 1, 5]);
        assert_eq!(choose(&mut stream(42, 1), 1000, 5), [716, 167, 483, 846, 70]);
    }

    #[test]
    fn choosing_is_the_shuffle_of_the_whole_list() {
        for (n, count) in [(1, 1), (9, 9), (50, 7), (50, 50)] {
            for seed in 0..20 {
                let mut all: Vec<usize> = (0..n).collect();
                let mut rng = stream(seed, 0);
                for i in 0..count {
                    let j = i + below(&mut rng, n - i);
                    all.swap(i, j);
                }
                assert_eq!(choose(&mut stream(seed, 0), n, count), all[..count]);
            }
        }
    }

    #[test]
    fn few_of_very_many_take_little_memory() {
        let few = choose(&mut stream(1, 0), 1 << 60, 3);
        assert!(few.iter().all(|&x| x < 1 << 60) && few[0] != few[1] && few[1] != few[2]);
    }
}
