//! Attention where a sequence holds several documents that must not see each other: each is a sequence of its own to the variant, whose chunks,
//! windows and positions then begin with the document. So it holds for every kind, and for those that are not written yet.

use std::sync::Arc;

use dash_core::ops::{Documents, Grouping, RopeTable, join_documents, split_documents};
use dash_core::{Device, Error, Ids, Result, Tape};

use super::{Attended, Attention, Inputs, Layer, attend};
use crate::trace::RouterTrace;

/// The documents of a pass, where a sequence holds several.
#[derive(Clone)]
pub struct Parted {
    /// Where they stand.
    pub documents: Arc<Documents>,
    /// The angles of all b * t tokens one behind the other: positions begin anew with each document. A learned query of a chunk's summary has no
    /// position, so keys are not alike at others.
    pub rope: RopeTable,
}

impl Parted {
    /// Of tokens; `rope` has the angles of positions.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn of(ids: &Ids, attention: &Attention, rope: &RopeTable) -> Result<Option<Self>> {
        let (Some(starts), &[b, t], device) = (ids.documents(), ids.shape(), ids.device()) else { return Ok(None) };
        let grouping = match device {
            // a loss over all queries would count those of the room behind a document
            // a complete chunk at least: routing has something to choose from
            Device::Cuda(_) if !attention.has_own_loss() => Grouping::Similar(attention.chunk_size().unwrap_or(1)),
            Device::Cpu(_) | Device::Cuda(_) => Grouping::Exact,
        };
        let documents = Arc::new(Documents::new(device, [b, t], starts, grouping)?);
        let rope = rope.at(&Ids::places(device, &documents.positions())?)?;
        Ok(Some(Parted { documents, rope }))
    }
}

/// [`attend`], document by document. `layer` is what the variant's own projections are made from; `x.own` is not read.
///
/// # Errors
/// When shapes or settings do not fit, or another router is to choose.
pub fn attend_documents(
    tape: &Tape,
    attention: &Attention,
    x: &Inputs,
    layer: &Layer,
    documents: &Arc<Documents>,
) -> Result<Attended> {
    if x.reroute.is_some() || x.cache.is_some() {
        return Err(Error::invalid("documents", "another router and generation know whole sequences only"));
    }
    let [q, k, v] = [x.q, x.k, x.v].map(|x| split_documents(tape, x, documents));
    let (q, k, v) = (q?, k?, v?);
    // only for those that project: a parameter has no documents
    let inputs = if layer.params.is_empty() { Vec::new() } else { split_documents(tape, layer.x, documents)? };
    let tokens = x.q.value.shape()[..2].iter().product::<usize>();
    let (mut outs, mut traces) = (Vec::new(), Vec::new());
    for (i, group) in documents.groups().iter().enumerate() {
        let own = match inputs.get(i) {
            None => Vec::new(),
            Some(of_group) => attention.project(tape, &Layer { x: of_group, first: 0, ..*layer })?,
        };
        let share = (group.count() * group.length()) as f64 / tokens as f64;
        let loss_share = x.loss_share.map(|of_all| of_all * share);
        let (out, trace) =
            attend(tape, attention, &Inputs { q: &q[i], k: &k[i], v: &v[i], own: &own, loss_share, ..*x })?;
        outs.push(out);
        traces.extend(trace);
    }
    Ok((join_documents(tape, &outs, documents)?, RouterTrace::joined(traces)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::kinds;
    use crate::config::ModelConfig;
    use dash_core::{DType, Tensor, Var, testing};

    const B: usize = 2;
    const T: usize = 70;

    /// Output and gradients of all inputs, of documents of 3, 20 and 47 tokens, and of one as long as the sequence.
    fn attended(attention: Attention, grouping: Grouping) -> Vec<Vec<f64>> {
        let config = ModelConfig { attention, ..ModelConfig::new(1, 24, (4, 2), 32) };
        let (d, device) = (config.head_dim, testing::device());
        let shapes = [vec![B, T, 4, d], vec![B, T, 2, d], vec![B, T, 2, d], vec![B, T, 24]];
        let shapes = shapes.into_iter().chain(attention.params(&config).into_iter().map(|p| p.shape));
        let inputs: Vec<Tensor> = shapes.enumerate().map(|(i, s)| testing::normal(&device, &s, i as u64 + 1)).collect();
        let tape = Tape::new();
        let leaves: Vec<Var> = inputs.into_iter().map(|x| tape.leaf(x)).collect();
        let [q, k, v, x, params @ ..] = &leaves[..] else { unreachable!("four inputs and the parameters") };
        let rope = RopeTable::new(&device, DType::F64, T, d, 1e4).unwrap();
        let documents = Arc::new(Documents::new(&device, [B, T], &[3, 23], grouping).unwrap());
        let of = Inputs { q, k, v, own: &[], layer: 0, budget: None, reroute: None, loss_share: None, cache: None };
        let layer = Layer { x, params, config: &config, rope: &rope, first: 0 };
        let (out, _) = attend_documents(&tape, &attention, &of, &layer, &documents).unwrap();
        let mut all = vec![out.value.to_f64().unwrap()];
        let grads = tape.backward_from(&out, testing::normal(&device, &[B, T, 4, d], 77)).unwrap();
        all.extend(leaves.iter().map(|leaf| grads.get(leaf).map_or(Vec::new(), |g| g.to_f64().unwrap())));
        all
    }

    #[test]
    fn room_behind_a_document_changes_nothing_of_any_kind() {
        let mut looked = 0;
        // the placebo draws its gradients from their places in the batch
        for kind in kinds().into_iter().filter(|kind| *kind != "dash-placebo") {
            let attention = Attention::small(kind).unwrap();
            let (want, got) = (attended(attention, Grouping::Exact), attended(attention, Grouping::Similar(1)));
            for (i, (want, got)) in want.iter().zip(&got).enumerate() {
                // a position that is added to all windows moves no probability: its gradient is a rounding
                let size = want.iter().fold(1e-2f64, |max, x| max.max(x.abs()));
                let off = want.iter().zip(got).fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
                assert!(want.len() == got.len() && off < 1e-10 * size, "{kind}, {i}: off by {off:e} of {size:e}");
            }
            looked += 1;
        }
        assert!(looked >= 15, "{looked} kinds");
    }

    #[test]
    fn another_router_is_refused() {
        let (attention, device) = (Attention::small("topk").unwrap(), testing::device());
        let config = ModelConfig { attention, ..ModelConfig::new(2, 24, (4, 2), 32) };
        let model = crate::Model::new(config, 5, 8, 1, &device, DType::F64).unwrap();
        let ids = |starts: &[usize]| model.ids(&[1; 8], 1).unwrap().of_documents(starts).unwrap();
        let tape = Tape::inference();
        let pass = |ids: &Ids| {
            let leaves = model.leaves(&tape);
            model.forward_as(&tape, &leaves, ids, Some(&crate::attention::Reroute::Random(1))).map(|_| ())
        };
        assert!(pass(&ids(&[])).is_ok());
        let told = pass(&ids(&[3])).unwrap_err().to_string();
        assert_eq!(told, "documents: another router and generation know whole sequences only");
    }
}
