//! DashAttention (arXiv 2605.18753): learned chunk summaries, entmax routing, and attention to the routed chunks with the
//! log-probability of each as a bias, differentiable end to end.

use dash_core::ops::attention::{Entmax, chunk_summary, entmax_routing};
use dash_core::{Error, Result, Tape};

use super::{Attended, Inputs};
use crate::config::Dash;
use crate::router::RouterTrace;

/// The places where the router takes its queries and keys: what comes back there came through the choice.
pub const ROUTER_Q: &str = "router.q";
/// See [`ROUTER_Q`].
pub const ROUTER_K: &str = "router.k";

pub fn attend(tape: &Tape, x: Inputs, s: &Dash) -> Result<Attended> {
    let qbar = x.indexer.ok_or_else(|| Error::invalid("dash", "the layer has no self_attn.indexer_q"))?;
    let settings = Entmax {
        chunk_size: s.chunk_size,
        alpha: s.alpha,
        gamma: s.gamma,
        sigma: s.sigma,
        center: s.center,
        gradient: s.router_gradient,
    };
    let (q, k) = (tape.watch(ROUTER_Q, x.q)?, tape.watch(ROUTER_K, x.k)?);
    let kbar = chunk_summary(tape, &k, qbar, s.chunk_size)?;
    let routing = entmax_routing(tape, &q, &kbar, x.diagonal, settings)?;
    let (out, list) = x.attend_to(tape, routing.list.clone(), Some(routing.bias.clone()))?;
    let trace = if x.reroute.is_some() { RouterTrace::hard(list) } else { RouterTrace::soft(routing) };
    Ok((out, Some(trace)))
}
