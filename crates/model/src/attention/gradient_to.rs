//! To whom the gradient of a router's scores goes: experiments take it from some of them.

use dash_core::ops::attention::chunk_summary;
use dash_core::{Result, Tape, Var};

use super::Inputs;

/// What gets the gradient that comes through the choice. The forward pass never depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientTo {
    /// Everything that the scores are made of.
    All,
    /// The queries.
    Queries,
    /// The chunk summaries: the keys, and the learned query of the summaries.
    Summaries,
    /// The learned query of the summaries.
    Indexer,
    /// Queries and keys. The learned query of the summaries stays what it is.
    AllButIndexer,
}

impl GradientTo {
    /// Queries, and summaries of chunks of `size` tokens of the keys with the learned query `qbar`, each a constant where it gets no gradient.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub(super) fn operands(self, tape: &Tape, x: &Inputs, [q, k, qbar]: [&Var; 3], size: usize) -> Result<(Var, Var)> {
        let constant = |x: &Var| tape.leaf(x.value.clone());
        let (queries, keys, indexer) = match self {
            GradientTo::All => (true, true, true),
            GradientTo::Queries => (true, false, false),
            GradientTo::Summaries => (false, true, true),
            GradientTo::Indexer => (false, false, true),
            GradientTo::AllButIndexer => (true, true, false),
        };
        let of = |x: &Var, gets: bool| if gets { x.clone() } else { constant(x) };
        let (q, k, qbar) = (of(q, queries), of(k, keys), of(qbar, indexer));
        let kbar = x.pooled(tape, "kbar", &k, (size, size), |k| chunk_summary(tape, k, &qbar, size))?;
        Ok((q, kbar))
    }
}
