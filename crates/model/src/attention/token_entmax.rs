//! Dense alpha-entmax attention over all earlier tokens (Peters et al. 2019, arXiv 1905.05702): sparse weights, no chunks.

use dash_core::ops::attention::Span;
use dash_core::{Result, Tape};

use super::keys::settings;
use super::{Attended, Inputs, Knob, Spec, Variant};

settings! {
    /// Settings of token-level entmax.
    pub struct TokenEntmax {
        /// Exponent of the entmax; larger is sparser.
        alpha: f64 = 1.5, Knob::Alpha.range();
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "token-entmax",
    about: "Dense alpha-entmax over all earlier tokens, without chunks (arXiv 1905.05702).",
    presets: &[],
    keys: TokenEntmax::KEYS,
    build: |given| TokenEntmax::from_given(given).into(),
    small: &[],
    golden: &["q", "k", "v"],
};

impl Variant for TokenEntmax {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        Ok((x.attend_span(tape, Span::Causal, self.alpha)?, None))
    }
}
