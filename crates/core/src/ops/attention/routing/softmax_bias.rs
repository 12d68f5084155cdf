//! A bias for chunks that were chosen in any way: b_c = log w_c, w_c the mean over the group of softmax over the listed chunks before the
//! query's own of s_hc = gamma q_h . kbar_c / sqrt d; 0 for the own chunk. The choice is data, the bias has a gradient: with
//! dp_hc = db_c / (group w_c), ds_hc = p_hc (dp_hc - <p_h, dp_h>). Kept for backward: q, kbar, w and each head's p, per entry.

use super::super::{Routes, cuda};
use super::{PAIRS, Routing, SCORES, check, cpu};
use crate::device::CudaData;
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ops::grad_norm::cuda::root_of_sum;
use crate::tape::{ScalarCell, Tape, Var};
use crate::tensor::Tensor;

/// The bias of `routes` for `q [b, t, h, d]` and the summaries `kbar [b, n, g, d]` of all complete chunks.
///
/// # Errors
/// When shapes do not fit, gamma is not positive, or the queries follow kept tokens on a tape that records or on a GPU.
// Above 60 lines: the passes of both devices share what is checked and kept here.
pub fn softmax_bias(tape: &Tape, q: &Var, kbar: &Var, routes: Routes, gamma: f64) -> Result<Routing> {
    let op = "softmax_bias";
    let past = routes.first();
    let (dims, n) = check(op, &q.value, &kbar.value, past, routes.chunk_size())?;
    let (extents, chunk) = ((dims.b, dims.g, dims.t), routes.chunk_size());
    ensure!(routes.extents() == extents, op, "the list is for {:?}, q and kbar have {extents:?}", routes.extents());
    ensure!(gamma > 0.0, op, "gamma is {gamma}, it must be positive");
    ensure!(past == 0 || !tape.is_recording(), op, "{past} tokens before the first query, but the tape records");
    let compute = tape.compute();
    let stream = move |q: &CudaData| cuda::routes_stream(compute, q, dims, chunk);
    let (bias, weights, heads) = on_device!(op, [&q.value, &kbar.value]; Cpu<T>(cpu, [qs, ks]) => {
        let list = routes.on_cpu(op, cpu)?;
        let out = cpu::bias_of::<T>(cpu, (dims, n), (qs, ks), list, gamma);
        let entries = list.len();
        (
            Tensor::from_buffer(&[entries], out.bias),
            Tensor::from_buffer(&[entries], out.weights),
            Some(Tensor::from_buffer(&[entries, dims.group()], out.heads)),
        )
    }, Cuda(gpu, [qs, ks]) => {
        ensure!(past == 0, op, "no kernel of this GPU routes after {past} kept tokens");
        let mask = routes.on_cuda(op, gpu)?;
        let out = if stream(qs) {
            let q = (qs.rounded()?, 0, dims.h * dims.d);
            cuda::softmax_bias(dims, q, ks.rounded()?, mask, gamma, tape.watcher().is_some())?
        } else {
            cuda::plain::softmax_bias(dims, n, (qs.full()?, ks.full()?), mask, gamma)?
        };
        let entries = mask.entries();
        (
            Tensor::from_cuda(&[entries], out.bias),
            Tensor::from_cuda(&[entries], out.weights),
            out.heads.map(|heads| Tensor::from_cuda(&[entries, dims.group()], heads)),
        )
    });
    let (q, kbar) = (q.clone(), kbar.clone());
    let kept = (routes.clone(), weights.clone(), heads.clone());
    let watch = tape.watcher().map(|w| (w.clone(), tape.scope_name()));
    let score_gradient = ScalarCell::default();
    let norm = score_gradient.clone();
    let bias = tape.record(op, bias, move |dy, grads| {
        let (routes, weights, heads) = kept;
        // a card computes them again
        let heads = heads.as_ref().unwrap_or(&weights);
        on_device!(op, [&q.value, &kbar.value, &weights, heads, &dy]; Cpu<T>(cpu, [qs, ks, weights, heads, dbias]) => {
            let list = routes.on_cpu(op, cpu)?;
            let d = cpu::bias_backward::<T>(cpu, (dims, n), (qs, ks), (list, weights, heads, dbias), gamma, watch.is_some());
            norm.set(Tensor::from_buffer(&[], cpu.copy(&[d.squares.sqrt()])));
            if let Some((watcher, scope)) = watch {
                let shape = [list.len(), dims.group()];
                watcher.gradient(&scope, SCORES, &Tensor::from_buffer(&shape, d.scores));
                watcher.gradient(&scope, PAIRS, &Tensor::from_buffer(&[], cpu.copy(&[d.pairs as f64])));
            }
            grads.add(q.id(), Tensor::from_buffer(q.value.shape(), d.dq))?;
            grads.add(kbar.id(), Tensor::from_buffer(kbar.value.shape(), d.dkbar))
        }, Cuda(gpu, [qs, ks, _weights, _heads, dbias]) => {
            let mask = routes.on_cuda(op, gpu)?;
            let d = if stream(qs) {
                let q = (qs.rounded()?, 0, dims.h * dims.d);
                cuda::softmax_bias_backward(dims, q, ks.rounded()?, mask, dbias.full()?, gamma, watch.is_some())?
            } else {
                let operands = (qs.full()?, ks.full()?);
                cuda::plain::softmax_bias_backward(dims, n, operands, (mask, dbias.full()?), gamma, watch.is_some())?
            };
            norm.set(Tensor::from_cuda(&[], root_of_sum(&d.squares)?));
            if let (Some((watcher, scope)), Some((scores, pairs))) = (watch, d.watched) {
                watcher.gradient(&scope, SCORES, &Tensor::from_cuda(&[mask.entries(), dims.group()], scores));
                watcher.gradient(&scope, PAIRS, &Tensor::from_cuda(&[], pairs));
            }
            if let Some((dq, dkbar)) = d.operands {
                grads.add(q.id(), Tensor::from_cuda(q.value.shape(), dq))?;
                grads.add(kbar.id(), Tensor::from_cuda(kbar.value.shape(), dkbar))?;
            }
            Ok(())
        })
    })?;
    Ok(Routing { routes, bias, weights, heads, score_gradient })
}
