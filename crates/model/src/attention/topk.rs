//! The hard twin of DashAttention: same summaries and scores, softmax, group mean, the best `top` chunks with the own
//! one, no bias, and no gradient into the choice. Summaries are means, which is what DashAttention's learned query starts
//! as; given a query (`indexer`), they use it.

use dash_core::ops::attention::{chunk_summary, topk_routing};
use dash_core::{Result, Tape, Tensor};

use super::{Attended, Inputs};
use crate::router::RouterTrace;

pub fn attend(tape: &Tape, x: Inputs, chunk_size: usize, top: usize, gamma: f64) -> Result<Attended> {
    let k = &x.k.value;
    let constants = Tape::inference();
    let zeros = || Tensor::zeros(k.device(), &[k.shape()[2] * k.shape()[3]], k.dtype());
    let qbar = constants.leaf(x.indexer.map_or_else(zeros, |q| q.value.clone()));
    let kbar = chunk_summary(&constants, x.k, &qbar, chunk_size)?;
    let list = topk_routing(&x.q.value, &kbar.value, chunk_size, top, gamma)?;
    let (out, list) = x.attend_to(tape, list, None)?;
    Ok((out, Some(RouterTrace::hard(list))))
}
