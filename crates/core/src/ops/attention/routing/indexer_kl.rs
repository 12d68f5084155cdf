//! The loss of an indexer that learns where its layer attends (DSA, arXiv 2512.02556; MSA, arXiv 2606.13392): for each query the KL divergence
//! from what attention puts on each of some chunks to what the indexer puts on them. Both are a softmax of q . k / sqrt d over the
//! tokens of these chunks, added up by chunk: the layer's own P_c, the mean over the group and a constant; the indexer's p_c, of one query and key a
//! kv head. L = mean sum_c P_c (log P_c - log p_c), over sequences, kv heads and queries.
//!
//! With z the indexer's scores: dL/dz_j = (p_c - P_c) softmax_c(z)_j / rows for a token j of chunk c, softmax_c within the chunk. The published forms
//! compare tokens; a router that chooses whole chunks needs to know no more than their sums. Kept for backward: the operands.

use super::super::{Dims, Routes, cuda};
use super::cpu;
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The scalar loss of the indexer's queries and keys `index [b, t, g, d']`, whose chunks are `routes`, against attention of `q [b, t, h, d]` to
/// `k [b, t, g, d]`, which get no gradient.
///
/// # Errors
/// When shapes do not fit, or queries follow kept tokens.
pub fn indexer_kl(tape: &Tape, index: [&Var; 2], [q, k]: [&Tensor; 2], routes: &Routes) -> Result<Var> {
    let op = "indexer_kl";
    let [b, t, h, d] = q.dims(op)?;
    let [_, _, g, _] = k.dims(op)?;
    let dims = Dims::new(op, [b, t, h, d], g)?;
    ensure!(k.shape() == [b, t, g, d], op, "q is {:?}, k is {:?}", q.shape(), k.shape());
    let [iq, ik] = index.map(|x| x.value.shape());
    ensure!(
        iq.len() == 4 && iq == ik && iq[..3] == [b, t, g],
        op,
        "the indexer has {iq:?} and {ik:?}; a query and a key for each token and kv head are [{b}, {t}, {g}, ..]"
    );
    ensure!(routes.extents() == (b, g, t), op, "the list is for {:?}, q and k have {:?}", routes.extents(), (b, g, t));
    ensure!(routes.first() == 0, op, "{} tokens before the first query; a loss has whole sequences", routes.first());
    let width = iq[3];
    let loss = on_device!(op, [&index[0].value, &index[1].value, q, k]; Cpu<T>(cpu, [iq, ik, q, k]) => {
        let list = routes.on_cpu(op, cpu)?;
        let loss = cpu::indexer_kl::<T>(cpu, (dims, width), ([iq, ik], [q, k]), list);
        Tensor::from_buffer(&[], cpu.copy(&[loss]))
    }, Cuda(gpu, [iq, ik, q, k]) => {
        let mask = routes.on_cuda(op, gpu)?;
        let operands = ([iq.full()?, ik.full()?], [q.full()?, k.full()?]);
        Tensor::from_cuda(&[], cuda::plain::indexer_kl((dims, width), operands, mask)?)
    });
    let ([iq, ik], [q, k], routes) = (index.map(Var::clone), [q.clone(), k.clone()], routes.clone());
    tape.record(op, loss, move |dy, grads| {
        on_device!(op, [&iq.value, &ik.value, &q, &k, &dy]; Cpu<T>(cpu, [iqs, iks, q, k, dy]) => {
            let list = routes.on_cpu(op, cpu)?;
            let [dq, dk] = cpu::indexer_kl_backward::<T>(cpu, (dims, width), ([iqs, iks], [q, k]), list, dy[0]);
            grads.add(iq.id(), Tensor::from_buffer(iq.value.shape(), dq))?;
            grads.add(ik.id(), Tensor::from_buffer(ik.value.shape(), dk))
        }, Cuda(gpu, [iqs, iks, q, k, dy]) => {
            let mask = routes.on_cuda(op, gpu)?;
            let operands = ([iqs.full()?, iks.full()?], [q.full()?, k.full()?]);
            let [dq, dk] = cuda::plain::indexer_kl_backward((dims, width), operands, mask, dy.full()?)?;
            grads.add(iq.id(), Tensor::from_cuda(iq.value.shape(), dq))?;
            grads.add(ik.id(), Tensor::from_cuda(ik.value.shape(), dk))
        })
    })
}
