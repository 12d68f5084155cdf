//! The attention variants, one file each, and the one `match` that picks.

mod dash;
mod dense;
mod topk;

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
}

/// Output `[b, t, h, d]`, and what the router did where there is one.
pub type Attended = (Var, Option<RouterTrace>);

/// Runs the configured variant.
///
/// # Errors
/// When shapes or settings do not fit.
pub fn attend(tape: &Tape, attention: &Attention, x: Inputs) -> Result<Attended> {
    match attention {
        Attention::Dense => dense::attend(tape, x),
        Attention::TopK { chunk_size, top, gamma } => topk::attend(tape, x, *chunk_size, *top, *gamma),
        Attention::Dash(settings) => dash::attend(tape, x, settings),
    }
}
