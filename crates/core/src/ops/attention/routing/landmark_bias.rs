//! The bias that makes attention to listed chunks a softmax of softmaxes (Landmark, arXiv 2305.16300; HiLS, arXiv 2607.02980): with
//! b_c = r_c - log sum_{j in c} exp(s_j), r_c = gamma q . kbar_c / sqrt d and s_j = q . k_j / sqrt d, the tokens of an earlier chunk share the weight exp(r_c) among
//! them by softmax; those of the own chunk have exp(s_j) each, and their bias is 0. One query head a kv head, because s is a head's own.
//! With P the softmax of s within the chunk: dr_c = db_c, ds_j = -P_j db_c. Kept for backward: q, k, kbar.

use super::super::{Dims, Routes};
use super::cpu;
use crate::dispatch::on_device;
use crate::error::{Error, Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// `[entries]` of `routes`, for `q [b, t, h, d]`, keys `k [b, past + t, h, d]` and the summaries `kbar [b, n, h, d]` of their complete chunks, where
/// `past` tokens stand before the first query.
///
/// # Errors
/// When shapes do not fit, gamma is not positive, the device has no kernel for it, or the queries follow kept tokens on a tape that
/// records.
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
    let dims = Dims { b, t, h, g: h, d };
    let no_kernel = |device: &dyn std::fmt::Debug| {
        Error::invalid(op, format!("{device:?} has no kernel for the bias of a softmax of softmaxes; the CPU has one"))
    };
    let bias = on_device!(op, [&q.value, &k.value, &kbar.value]; Cpu<T>(cpu, [qs, ks, sums]) => {
        let list = routes.on_cpu(op, cpu)?;
        Tensor::from_buffer(&[list.len()], cpu::landmark::<T>(cpu, dims, (qs, ks, sums), list, gamma))
    }, Cuda(gpu, [_qs, _ks, _sums]) => {
        return Err(no_kernel(gpu));
    });
    let (q, k, kbar, routes) = (q.clone(), k.clone(), kbar.clone(), routes.clone());
    tape.record(op, bias, move |dy, grads| {
        on_device!(op, [&q.value, &k.value, &kbar.value, &dy]; Cpu<T>(cpu, [qs, ks, sums, dbias]) => {
            let list = routes.on_cpu(op, cpu)?;
            let [dq, dk, dkbar] = cpu::landmark_backward::<T>(cpu, dims, (qs, ks, sums), (list, dbias), gamma);
            grads.add(q.id(), Tensor::from_buffer(q.value.shape(), dq))?;
            grads.add(k.id(), Tensor::from_buffer(k.value.shape(), dk))?;
            grads.add(kbar.id(), Tensor::from_buffer(kbar.value.shape(), dkbar))
        }, Cuda(gpu, [_qs, _ks, _sums, _dbias]) => {
            Err(no_kernel(gpu))
        })
    })
}
