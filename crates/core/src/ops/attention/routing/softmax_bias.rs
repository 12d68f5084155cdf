//! A bias for chunks that were chosen in any way: b_c = log w_c, w_c the mean over the group of softmax over the listed chunks before the
//! query's own of s_hc = gamma q_h . kbar_c / sqrt d; 0 for the own chunk. The choice is data, the bias has a gradient: with
//! dp_hc = db_c / (group w_c), ds_hc = p_hc (dp_hc - <p_h, dp_h>). Kept for backward: q, kbar, w and each head's p, per entry.

use super::super::Routes;
use super::{PAIRS, Routing, SCORES, check, cpu};
use crate::dispatch::on_device;
use crate::error::{Error, Result, ensure};
use crate::tape::{ScalarCell, Tape, Var};
use crate::tensor::Tensor;

/// The bias of `routes` for `q [b, t, h, d]` and the summaries `kbar [b, n, g, d]` of all complete chunks.
///
/// # Errors
/// When shapes do not fit, gamma is not positive, the device has no kernel for it, or the queries follow kept tokens on a tape that
/// records.
pub fn softmax_bias(tape: &Tape, q: &Var, kbar: &Var, routes: Routes, gamma: f64) -> Result<Routing> {
    let op = "softmax_bias";
    let past = routes.first();
    let (dims, n) = check(op, &q.value, &kbar.value, past, routes.chunk_size())?;
    let extents = (dims.b, dims.g, dims.t);
    ensure!(routes.extents() == extents, op, "the list is for {:?}, q and kbar have {extents:?}", routes.extents());
    ensure!(gamma > 0.0, op, "gamma is {gamma}, it must be positive");
    ensure!(past == 0 || !tape.is_recording(), op, "{past} tokens before the first query, but the tape records");
    let no_kernel = |device: &dyn std::fmt::Debug| {
        Error::invalid(
            op,
            format!("{device:?} has no kernel for the bias of a fixed number of chunks; the CPU has one"),
        )
    };
    let (bias, weights, heads) = on_device!(op, [&q.value, &kbar.value]; Cpu<T>(cpu, [qs, ks]) => {
        let list = routes.on_cpu(op, cpu)?;
        let out = cpu::bias_of::<T>(cpu, (dims, n), (qs, ks), list, gamma);
        let entries = list.len();
        (
            Tensor::from_buffer(&[entries], out.bias),
            Tensor::from_buffer(&[entries], out.weights),
            Tensor::from_buffer(&[entries, dims.group()], out.heads),
        )
    }, Cuda(gpu, [_qs, _ks]) => {
        return Err(no_kernel(gpu));
    });
    let (q, kbar) = (q.clone(), kbar.clone());
    let kept = (routes.clone(), weights.clone(), heads.clone());
    let watch = tape.watcher().map(|w| (w.clone(), tape.scope_name()));
    let score_gradient = ScalarCell::default();
    let norm = score_gradient.clone();
    let bias = tape.record(op, bias, move |dy, grads| {
        let (routes, weights, heads) = kept;
        on_device!(op, [&q.value, &kbar.value, &weights, &heads, &dy]; Cpu<T>(cpu, [qs, ks, weights, heads, dbias]) => {
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
        }, Cuda(gpu, [_qs, _ks, _weights, _heads, _dbias]) => {
            Err(no_kernel(gpu))
        })
    })?;
    Ok(Routing { routes, bias, weights, heads: Some(heads), score_gradient })
}
