//! How many chunks a run attended by layer and position, and the same number for another model: what compares two ways to choose at
//! an equal budget.

use dash_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// Mean attended chunks, the own one included, by length of the sequence, layer and position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Tokens of a chunk.
    pub chunk_size: usize,
    /// By length of the sequences, ascending.
    pub lengths: Vec<Profile>,
}

/// Of sequences of one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Tokens of a sequence.
    pub length: usize,
    /// Sequences that the means are over.
    pub sequences: usize,
    /// By layer and position: the mean over sequences and kv heads.
    pub layers: Vec<Vec<f64>>,
}

impl Budget {
    /// Says why it cannot be another model's budget, if it cannot: the model has `layers`, chunks of `chunk_size` tokens and sequences
    /// of up to `positions`.
    pub fn misfit(&self, layers: usize, chunk_size: usize, positions: usize) -> Option<String> {
        if self.chunk_size != chunk_size {
            return Some(format!("its chunks have {} tokens, here {chunk_size}", self.chunk_size));
        }
        if let Some(p) = self.lengths.iter().find(|p| p.layers.len() != layers) {
            return Some(format!("it has {} layers, here {layers}", p.layers.len()));
        }
        let bad = |p: &&Profile| {
            let inside = |(i, &mean): (usize, &f64)| (1.0..=(i / chunk_size + 1) as f64 + 1e-9).contains(&mean);
            p.layers.iter().any(|layer| layer.len() != p.length || !layer.iter().enumerate().all(inside))
        };
        if let Some(p) = self.lengths.iter().find(bad) {
            return Some(format!(
                "of length {} it has no number between 1 and the visible chunks for every position",
                p.length
            ));
        }
        let longest = self.lengths.iter().map(|p| p.length).max().unwrap_or(0);
        (longest < positions).then(|| format!("it has sequences of up to {longest} tokens, here there are {positions}"))
    }

    /// The chunks of each query `[g, t]` at positions `first..first + t` of a layer. Whole numbers whose mean over the kv heads and
    /// over any stretch of positions is that of the table: with C_i the sum of the means up to position i, kv head k of g attends
    /// floor(C_i + (k + 1/2) / g) - floor(C_(i-1) + (k + 1/2) / g). The table is that of the shortest length that holds the positions.
    ///
    /// # Errors
    /// When there is no such layer or position.
    pub fn tops(&self, layer: usize, kv_heads: usize, first: usize, t: usize) -> Result<Vec<u32>> {
        let end = first + t;
        let profile = self.lengths.iter().filter(|p| p.length >= end).min_by_key(|p| p.length);
        let Some(means) = profile.and_then(|p| p.layers.get(layer)) else {
            return Err(Error::invalid("budget", format!("it has no layer {layer} with {end} positions")));
        };
        let mut out = Vec::with_capacity(kv_heads * t);
        for kv in 0..kv_heads {
            let offset = (kv as f64 + 0.5) / kv_heads as f64;
            let mut sum = 0.0;
            for (i, mean) in means[..end].iter().enumerate() {
                let before = (sum + offset).floor();
                sum += mean;
                if i >= first {
                    out.push(((sum + offset).floor() - before) as u32);
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(means: &[f64]) -> Budget {
        let layers = vec![vec![1.0; means.len()], means.to_vec()];
        let long = Profile { length: 2 * means.len(), sequences: 1, layers: vec![vec![1.0; 2 * means.len()]; 2] };
        Budget { chunk_size: 2, lengths: vec![Profile { length: means.len(), sequences: 1, layers }, long] }
    }

    #[test]
    fn whole_numbers_have_the_mean_of_the_table() {
        let means: Vec<f64> = (0..200).map(|i| 1.0 + (i / 2) as f64 * 0.37).collect();
        let budget = of(&means);
        let tops = budget.tops(1, 2, 0, 200).unwrap();
        let mut sum = [0.0; 2];
        for (i, mean) in means.iter().enumerate() {
            for (kv, sum) in sum.iter_mut().enumerate() {
                let top = f64::from(tops[kv * 200 + i]);
                assert!((top - mean).abs() < 1.0, "{top} for {mean}");
                *sum += top - mean;
                assert!(sum.abs() <= 1.0, "{sum}");
            }
            // the heads do not round at the same places
            assert!((sum[0] + sum[1]).abs() <= 1.0, "{sum:?}");
        }
        assert_eq!(budget.tops(1, 2, 37, 3).unwrap(), [&tops[37..40], &tops[237..240]].concat());
        assert_eq!(budget.tops(0, 1, 0, 200).unwrap(), vec![1; 200]);
        // sums 1, 2, 3.5, 5, 6.5 with 1/4 and with 3/4: 1 2 3 5 6 and 1 2 4 5 7
        let halves = of(&[1.0, 1.0, 1.5, 1.5, 1.5]).tops(1, 2, 0, 5).unwrap();
        assert_eq!(halves, [1, 1, 1, 2, 1, 1, 1, 2, 1, 2]);
        // longer sequences have a table of their own
        assert_eq!(budget.tops(1, 1, 0, 201).unwrap(), vec![1; 201]);
        assert!(budget.tops(1, 1, 0, 401).unwrap_err().to_string().contains("no layer 1 with 401 positions"));
        assert!(budget.tops(2, 1, 0, 10).is_err());
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let budget = of(&[1.0, 1.0, 2.0, 1.5]);
        let misfit = |layers, chunk, positions| budget.misfit(layers, chunk, positions).unwrap_or_default();
        assert_eq!(misfit(2, 2, 8), "");
        assert_eq!(misfit(2, 4, 8), "its chunks have 2 tokens, here 4");
        assert_eq!(misfit(3, 2, 8), "it has 2 layers, here 3");
        assert_eq!(misfit(2, 2, 9), "it has sequences of up to 8 tokens, here there are 9");
        assert!(of(&[1.0, 2.0, 2.0, 1.5]).misfit(2, 2, 8).unwrap().contains("of length 4 it has no number"));
        assert!(of(&[1.0, 0.5, 2.0, 1.5]).misfit(2, 2, 8).unwrap().contains("of length 4 it has no number"));
    }
}
