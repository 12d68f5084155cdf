//! y[i] = w[ids[i]]. dw[v] is the sum of dy over the places where v stands, in order of place.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::{Buffer, CpuDevice};
use crate::dispatch::on_device;
use crate::error::Result;
use crate::ids::Ids;
use crate::shape::{checked_numel, count32};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Vocabulary rows a task of the backward owns.
const ROWS: usize = 64;

/// Rows of `w [v, c]` for `ids`, as `[.. shape of ids .., c]`.
///
/// # Errors
/// When an id is not below `v`, [`crate::IGNORE`] is among them, or there are 2^32 or more.
pub fn embedding(tape: &Tape, w: &Var, ids: &Ids) -> Result<Var> {
    let [vocab, width] = w.value.dims("embedding")?;
    ids.check_below("embedding", "token id", vocab, "the vocabulary size")?;
    ids.check_counted("embedding", "token ids")?;
    let mut shape = ids.shape().to_vec();
    shape.push(width);
    checked_numel("embedding", &shape)?;
    count32("embedding", ids.len(), "token ids")?;
    let y = on_device!("embedding", [&w.value]; Cpu<T>(cpu, [table]) => {
        let ids = ids.on_cpu("embedding", cpu)?;
        let mut out = cpu.alloc::<T>(ids.len() * width);
        cpu.for_pieces(&mut out, ROWS * width, |i, rows| {
            for (row, &id) in rows.chunks_mut(width).zip(&ids[i * ROWS..]) {
                row.copy_from_slice(&table[id as usize * width..][..width]);
            }
        });
        Tensor::from_buffer(&shape, out)
    }, Cuda(gpu, [table]) => {
        let ids = ids.on_cuda("embedding", gpu)?;
        Tensor::from_cuda(&shape, cuda::forward(table.full()?, ids, width)?)
    });
    let (w, ids) = (w.clone(), ids.clone());
    tape.record("embedding", y, move |dy, grads| {
        let dw = on_device!("embedding", [&dy]; Cpu<T>(cpu, [g]) => {
            let (starts, places) = places_by_id(cpu, ids.on_cpu("embedding", cpu)?, vocab);
            let mut dw = cpu.zeros::<T>(vocab * width);
            cpu.for_pieces(&mut dw, ROWS * width, |task, rows| {
                for (r, row) in rows.chunks_mut(width).enumerate() {
                    let v = task * ROWS + r;
                    for &p in &places[starts[v] as usize..starts[v + 1] as usize] {
                        row.iter_mut().zip(&g[p as usize * width..]).for_each(|(d, &g)| *d += g);
                    }
                }
            });
            Tensor::from_buffer(&[vocab, width], dw)
        }, Cuda(gpu, [g]) => {
            // added to the gradient of a tied output projection, where that has been begun
            let (mut dw, add) = grads.begin(&w)?;
            let sum = dw.cuda_mut("embedding", gpu)?.full_mut()?;
            if !add {
                sum.fill_bytes(0)?;
            }
            cuda::backward(g.full()?, ids.on_cuda("embedding", gpu)?, width, sum)?;
            dw
        });
        grads.add(w.id(), dw)
    })
}

/// Counting sort: places of id v are `places[starts[v]..starts[v + 1]]`, ascending.
fn places_by_id(device: &CpuDevice, ids: &[u32], vocab: usize) -> (Buffer<u32>, Buffer<u32>) {
    let mut starts = device.zeros::<u32>(vocab + 1);
    ids.iter().for_each(|&id| starts[id as usize + 1] += 1);
    for v in 0..vocab {
        starts[v + 1] += starts[v];
    }
    let mut next = device.alloc::<u32>(vocab);
    next.copy_from_slice(&starts[..vocab]);
    let mut places = device.alloc::<u32>(ids.len());
    for (p, &id) in ids.iter().enumerate() {
        places[next[id as usize] as usize] = p as u32;
        next[id as usize] += 1;
    }
    (starts, places)
}
