//! The attention variants, one file each, and the one `match` that picks.

mod dash;
mod dense;
mod infllmv2;
mod nsa;
mod reroute;
mod token_entmax;
mod topk;

pub use dash::{ROUTER_K, ROUTER_Q};
pub use reroute::Reroute;

use std::sync::Arc;

use dash_core::ops::attention::{BlockList, block_attention};
use dash_core::{Result, Tape, Var};

use crate::config::Attention;
use crate::router::RouterTrace;

/// What a variant reads: queries `[b, t, h, d]`, keys and values `[b, t, g, d]` after rope, and the variant's own
/// parameters, each where the variant has it.
pub struct Inputs<'a> {
    /// Queries.
    pub q: &'a Var,
    /// Keys.
    pub k: &'a Var,
    /// Values.
    pub v: &'a Var,
    /// `self_attn.indexer_q [g * d]`: the query of the chunk summaries.
    pub indexer: Option<&'a Var>,
    /// `self_attn.diagonal [g]`: the own chunk's bias.
    pub diagonal: Option<&'a Var>,
    /// The further branches of native sparse attention.
    pub nsa: Option<Branches<'a>>,
    /// Who chooses the chunks in the place of the variant's own router.
    pub reroute: Option<&'a Reroute>,
}

impl Inputs<'_> {
    /// Attention to the chosen chunks, or to what [`Inputs::reroute`] puts in their place, and who was attended.
    fn attend_to(&self, tape: &Tape, list: Arc<BlockList>, bias: Option<Var>) -> Result<(Var, Arc<BlockList>)> {
        let (list, bias) = match self.reroute {
            None => (list, bias),
            Some(other) => other.apply(tape, self.q.value.device(), &list, bias.as_ref())?,
        };
        Ok((block_attention(tape, self.q, self.k, self.v, &list, bias.as_ref())?, list))
    }
}

/// What native sparse attention reads besides the keys and values of its chosen chunks.
pub struct Branches<'a> {
    /// Keys to compress, after rope, `[b, t, g, d]`.
    pub k_compressed: &'a Var,
    /// Values to compress.
    pub v_compressed: &'a Var,
    /// Keys of the sliding window, after rope.
    pub k_window: &'a Var,
    /// Values of the sliding window.
    pub v_window: &'a Var,
    /// From a window's keys to one key, `[g * length * d, d]`.
    pub compress_k: &'a Var,
    /// From a window's values to one value.
    pub compress_v: &'a Var,
    /// Added to a window's keys, `[g * length * d]`.
    pub position: &'a Var,
    /// In (0, 1), `[b, t, h, 3]`: compressed, chosen, sliding.
    pub gates: &'a Var,
}

/// Output `[b, t, h, d]`, and what the router did where there is one.
pub type Attended = (Var, Option<RouterTrace>);

/// Runs the configured variant.
///
/// # Errors
/// When shapes or settings do not fit.
pub fn attend(tape: &Tape, attention: &Attention, x: Inputs) -> Result<Attended> {
    let (q, k) = (tape.watch("q", x.q)?, tape.watch("k", x.k)?);
    let x = Inputs { q: &q, k: &k, ..x };
    match attention {
        Attention::Dense => dense::attend(tape, x),
        Attention::TopK { chunk_size, top, gamma, .. } => topk::attend(tape, x, *chunk_size, *top, *gamma),
        Attention::Dash(settings) => dash::attend(tape, x, settings),
        Attention::TokenEntmax { alpha } => token_entmax::attend(tape, x, *alpha),
        Attention::InfLlmV2(windows) => infllmv2::attend(tape, x, windows),
        Attention::Nsa(settings) => nsa::attend(tape, x, settings),
    }
}
