//! The bias that makes attention to listed chunks a softmax of softmaxes (Landmark, arXiv 2305.16300; HiLS, arXiv 2607.02980): with
//! b_c = r_c - log sum_{j in c} exp(s_j), r_c = gamma q . kbar_c / sqrt d and s_j = q . k_j / sqrt d, the tokens of an earlier chunk share the weight exp(r_c) among
//! them by softmax; those of the own chunk have exp(s_j) each, and their bias is 0. One query head a kv head, because s is a head's own.
//! With P the softmax of s within the chunk: dr_c = db_c, ds_j = -P_j db_c. Kept for backward: q, k, kbar.

use super::super::{Dims, Routes, cuda};
use super::cpu;
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// `[entries]` of `routes`, for `q [b, t, h, d]`, keys `k [b, past + t, h, d]` and the summaries `kbar [b, n, h, d]` of their complete chunks, where
/// `past` tokens stand before the first query.
///
/// # Errors
/// When shapes do not fit, gamma is not positive, or the queries follow kept tokens on a tape that records or on a GPU.
pub fn landmark_bias(tape: &Tape, [q, k, kbar]: [&Var; 3], routes: &Routes, gamma: f64) -> Result<Var> {
    let op = "landmark_bias";
    let (past, chunk) = (routes.first(), routes.chunk_size());
    let [b, t, h, d] = q.value.dims(op)?;
    let (keys, sums) = (k.value.shape(), kbar.value.shape());
    ensure!(
        keys == [b, past + t, h, d] && sums == [b, (past + t) / chunk, h, d],
        op,
        "q is {:?} after {past} tokens, k is {keys:?}, summaries of chunks of {chunk} are {sums:?}; every query head has keys of its own",
        q.value.shape()
    );
    ensure!(routes.extents() == (b, h, t), op, "the list is for {:?}, q has {:?}", routes.extents(), (b, h, t));
    ensure!(gamma > 0.0, op, "gamma is {gamma}, it must be positive");
    ensure!(past == 0 || !tape.is_recording(), op, "{past} tokens before the first query, but the tape records");
    let dims = Dims::new(op, [b, t, h, d], h)?;
    let bias = on_device!(op, [&q.value, &k.value, &kbar.value]; Cpu<T>(cpu, [qs, ks, sums]) => {
        let list = routes.on_cpu(op, cpu)?;
        Tensor::from_buffer(&[list.len()], cpu::landmark::<T>(cpu, dims, (qs, ks, sums), list, gamma))
    }, Cuda(gpu, [qs, ks, sums]) => {
        ensure!(past == 0, op, "no kernel of this GPU routes after {past} kept tokens");
        let mask = routes.on_cuda(op, gpu)?;
        let bias = cuda::plain::landmark(dims, [qs.full()?, ks.full()?, sums.full()?], mask, gamma)?;
        Tensor::from_cuda(&[mask.entries()], bias)
    });
    let (q, k, kbar, routes) = (q.clone(), k.clone(), kbar.clone(), routes.clone());
    tape.record(op, bias, move |dy, grads| {
        on_device!(op, [&q.value, &k.value, &kbar.value, &dy]; Cpu<T>(cpu, [qs, ks, sums, dbias]) => {
            let list = routes.on_cpu(op, cpu)?;
            let [dq, dk, dkbar] = cpu::landmark_backward::<T>(cpu, dims, (qs, ks, sums), (list, dbias), gamma);
            grads.add(q.id(), Tensor::from_buffer(q.value.shape(), dq))?;
            grads.add(k.id(), Tensor::from_buffer(k.value.shape(), dk))?;
            grads.add(kbar.id(), Tensor::from_buffer(kbar.value.shape(), dkbar))
        }, Cuda(gpu, [qs, ks, sums, dbias]) => {
            let operands = [qs.full()?, ks.full()?, sums.full()?];
            let entries = (routes.on_cuda(op, gpu)?, dbias.full()?);
            let [dq, dk, dkbar] = cuda::plain::landmark_backward(dims, operands, entries, gamma)?;
            grads.add(q.id(), Tensor::from_cuda(q.value.shape(), dq))?;
            grads.add(k.id(), Tensor::from_cuda(k.value.shape(), dk))?;
            grads.add(kbar.id(), Tensor::from_cuda(kbar.value.shape(), dkbar))
        })
    })
}
