//! Shape arithmetic: row-major, contiguous, run-time rank.

use crate::error::{Result, ensure};

/// Number of elements.
pub fn numel(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Row-major strides, in elements.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

/// The shape that both sides broadcast to: ranks are aligned at the right and an axis of one is repeated.
pub fn broadcast(op: &'static str, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let axis = |s: &[usize], i: usize| if i + s.len() < rank { 1 } else { s[i + s.len() - rank] };
    let mut out = Vec::with_capacity(rank);
    for i in 0..rank {
        let (x, y) = (axis(a, i), axis(b, i));
        ensure!(x == y || x == 1 || y == 1, op, "shapes {a:?} and {b:?} do not broadcast: {x} against {y}");
        out.push(if x == 1 { y } else { x });
    }
    Ok(out)
}

/// For every element of `out` in order, the offset of the element of `shape` that it reads.
pub fn broadcast_offsets(shape: &[usize], out: &[usize]) -> Vec<usize> {
    let own = strides(shape);
    let lead = out.len() - shape.len();
    let stride: Vec<usize> =
        (0..out.len()).map(|i| if i < lead || shape[i - lead] == 1 { 0 } else { own[i - lead] }).collect();
    walk(out, &stride)
}

/// For every index of `shape` in row-major order, the sum of index times `stride`.
pub fn walk(shape: &[usize], stride: &[usize]) -> Vec<usize> {
    let mut offsets = vec![0];
    for (&n, &step) in shape.iter().zip(stride) {
        offsets = offsets.iter().flat_map(|&o| (0..n).map(move |i| o + i * step)).collect();
    }
    offsets
}
