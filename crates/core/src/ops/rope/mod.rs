//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in Hugging Face's half-split layout: element j of the
//! first half pairs with element j of the second, angle = position * theta^(-2j/d). The gradient rotates back.

pub mod cuda;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::device::cpu::simd::simd;
use crate::error::{Result, ensure};
use crate::number::with_number;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Cosines and sines for positions `0..positions`, in f64.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    /// [positions, d / 2] pairs (cos, sin)
    angles: Arc<[(f64, f64)]>,
}

impl RopeTable {
    /// Angles for heads of width `head_dim`.
    ///
    /// # Errors
    /// When the width is odd.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Result<Self> {
        ensure!(
            head_dim.is_multiple_of(2) && head_dim > 0,
            "rope",
            "head width {head_dim} is not even: rope rotates pairs"
        );
        let half = head_dim / 2;
        let angles = (0..positions * half)
            .map(|i| {
                let (position, j) = (i / half, i % half);
                let angle = position as f64 * theta.powf(-2.0 * j as f64 / head_dim as f64);
                (angle.cos(), angle.sin())
            })
            .collect();
        Ok(RopeTable { half, angles })
    }

    /// Number of positions covered.
    pub fn positions(&self) -> usize {
        self.angles.len() / self.half
    }
}

simd! {
    /// One token: `heads` rows of two halves; `angles` are the cosines, then the sines.
    fn rotate_token<T>(x: &[T], angles: &[T], out: &mut [T]) {
        let half = angles.len() / 2;
        let (cos, sin) = angles.split_at(half);
        for (x, y) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
            let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
            for j in 0..half {
                y1[j] = x1[j] * cos[j] - x2[j] * sin[j];
                y2[j] = x2[j] * cos[j] + x1[j] * sin[j];
            }
        }
    }
}

fn rotate(x: &Tensor, table: &RopeTable, first: usize, tokens: usize, width: usize, backwards: bool) -> Tensor {
    let half = table.half;
    let sign = if backwards { -1.0 } else { 1.0 };
    with_number!(x.dtype(), T => {
        let mut angles = x.cpu().alloc::<T>(tokens * 2 * half);
        for (token, out) in angles.chunks_exact_mut(2 * half).enumerate() {
            for (j, &(cos, sin)) in table.angles[(first + token) * half..][..half].iter().enumerate() {
                out[j] = T::of(cos);
                out[half + j] = T::of(sign * sin);
            }
        }
        let data = x.data::<T>();
        let mut out = x.cpu().alloc::<T>(data.len());
        const TOKENS: usize = 32;
        x.cpu().for_chunks(&mut out, TOKENS * width, |task, out| {
            for (r, y) in out.chunks_exact_mut(width).enumerate() {
                let row = task * TOKENS + r;
                rotate_token(&data[row * width..][..width], &angles[row % tokens * 2 * half..][..2 * half], y);
            }
        });
        Tensor::from_buffer(x.shape(), out)
    })
}

/// Rotates `x [b, t, heads, d]`, whose first token stands at position `first`.
///
/// # Errors
/// When the table is for another width or has too few positions.
pub fn rope(tape: &Tape, x: &Var, table: &RopeTable, first: usize) -> Result<Var> {
    let [_, tokens, heads, d] = x.value.dims("rope")?;
    ensure!(d == 2 * table.half, "rope", "head width {d}, the table is for {}", 2 * table.half);
    ensure!(
        first + tokens <= table.positions(),
        "rope",
        "positions up to {} asked, the table has {}",
        first + tokens,
        table.positions()
    );
    let y = rotate(&x.value, table, first, tokens, heads * d, false);
    let (id, table) = (x.id(), table.clone());
    tape.record("rope", y, move |dy, grads| grads.add(id, rotate(&dy, &table, first, tokens, heads * d, true)))
}
