//! y[i] = w[ids[i]]. dw[v] is the sum of dy over the places where v stands, in order of place.

pub mod cuda;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::device::{Buffer, CpuDevice};
use crate::error::{Error, Result};
use crate::number::with_number;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Vocabulary rows a task of the backward owns.
const ROWS: usize = 64;

/// Rows of `w [v, c]` for `ids`, as `[.. shape of ids .., c]`; `shape` is the shape of the ids.
///
/// # Errors
/// When an id is not below `v`, or the number of ids does not fit `shape`.
pub fn embedding(tape: &Tape, w: &Var, ids: &Arc<[u32]>, shape: &[usize]) -> Result<Var> {
    let [vocab, width] = w.value.dims("embedding")?;
    if let Some(place) = ids.iter().position(|&id| id as usize >= vocab) {
        let what = format!("token id {} at place {place} is not below the vocabulary size {vocab}", ids[place]);
        return Err(Error::invalid("embedding", what));
    }
    let mut out_shape = shape.to_vec();
    out_shape.push(width);
    crate::error::ensure!(
        ids.len() * width == crate::shape::numel(&out_shape),
        "embedding",
        "{} ids do not fill shape {shape:?}",
        ids.len()
    );
    let y = with_number!(w.value.dtype(), T => {
        let table = w.value.data::<T>();
        let mut out = w.value.cpu().alloc::<T>(ids.len() * width);
        w.value.cpu().for_chunks(&mut out, ROWS * width, |i, rows| {
            for (row, &id) in rows.chunks_mut(width).zip(&ids[i * ROWS..]) {
                row.copy_from_slice(&table[id as usize * width..][..width]);
            }
        });
        Tensor::from_buffer(&out_shape, out)
    });
    let (id, ids) = (w.id(), ids.clone());
    tape.record("embedding", y, move |dy, grads| {
        let (starts, places) = places_by_id(dy.cpu(), &ids, vocab);
        let dw = with_number!(dy.dtype(), T => {
            let g = dy.data::<T>();
            let mut dw = dy.cpu().zeros::<T>(vocab * width);
            dy.cpu().for_chunks(&mut dw, ROWS * width, |task, rows| {
                for (r, row) in rows.chunks_mut(width).enumerate() {
                    let v = task * ROWS + r;
                    for &p in &places[starts[v] as usize..starts[v + 1] as usize] {
                        row.iter_mut().zip(&g[p as usize * width..]).for_each(|(d, &g)| *d += g);
                    }
                }
            });
            Tensor::from_buffer(&[vocab, width], dw)
        });
        grads.add(id, dw)
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
