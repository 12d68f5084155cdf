//! How long the sequences are that a query sees a part of: whole ones, or documents that share them.

use std::collections::BTreeMap;

use dash_data::Batch;
use dash_model::Attention;

/// Lengths, each with the share of all tokens that stand in sequences or documents so long.
#[derive(Debug, Clone, PartialEq)]
pub struct Lengths(Vec<(usize, f64)>);

impl Lengths {
    /// Those of batches: of documents where these do not see each other.
    pub fn of<'a>(batches: impl IntoIterator<Item = &'a Batch>) -> Self {
        let mut tokens = BTreeMap::<usize, usize>::new();
        for length in batches.into_iter().flat_map(Batch::lengths) {
            *tokens.entry(length).or_default() += length;
        }
        let all: usize = tokens.values().sum();
        Lengths(tokens.into_iter().map(|(length, n)| (length, n as f64 / all as f64)).collect())
    }

    /// Of sequences that are seen whole.
    #[cfg(test)]
    pub fn whole(t: usize) -> Self {
        Lengths(vec![(t, 1.0)])
    }

    /// Keys that a query sees on average, itself included.
    pub fn visible(&self) -> f64 {
        self.mean(|t| (t as f64 + 1.0) / 2.0)
    }

    /// Keys that a query attends on average, all branches together, where its chunks hold `listed` tokens.
    pub fn attended(&self, attention: &Attention, listed: f64) -> f64 {
        self.mean(|t| attention.attended(t, listed))
    }

    fn mean(&self, of: impl Fn(usize) -> f64) -> f64 {
        self.0.iter().map(|&(length, share)| share * of(length)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_model::{Dense, TopK};

    #[test]
    fn means_are_over_tokens() {
        let batch = |documents: Vec<usize>| {
            let (inputs, state) = ([0; 16].into(), Default::default());
            Batch { inputs, targets: vec![0; 16], batch: 2, state, questions: Vec::new(), documents }
        };
        let (whole, parted) = (batch(Vec::new()), batch(vec![2, 8, 11]));
        assert_eq!(Lengths::of([&whole, &whole]), Lengths::whole(8));
        // 2 + 6, and 3 + 5
        let lengths = Lengths::of([&parted]);
        assert_eq!(lengths.0, [(2, 2.0 / 16.0), (3, 3.0 / 16.0), (5, 5.0 / 16.0), (6, 6.0 / 16.0)]);
        let visible = (2.0 * 1.5 + 3.0 * 2.0 + 5.0 * 3.0 + 6.0 * 3.5) / 16.0;
        assert!((lengths.visible() - visible).abs() < 1e-15);
        assert!((lengths.attended(&Dense {}.into(), 0.0) - visible).abs() < 1e-15);
        assert!((lengths.attended(&TopK::default().into(), 2.25) - 2.25).abs() < 1e-15);
    }
}
