//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in Hugging Face's half-split layout: element j of the
//! first half pairs with element j of the second, angle = position * theta^(-2j/d). The gradient rotates back.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd::simd;
use crate::device::cuda::Kind;
use crate::device::{CpuDevice, CpuNumber, Device};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ids::Ids;
use crate::number::{Compute, DType, Number, with_number};
use crate::ops::layout::index_select;
use crate::shape::checked_numel;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Tokens a task rotates.
const TOKENS: usize = 32;

/// Cosines and sines for positions `0..positions`, rounded from f64.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    positions: usize,
    /// `[positions, d]`: d / 2 cosines, then d / 2 sines
    pub(crate) angles: Tensor,
}

impl RopeTable {
    /// Angles for heads of width `head_dim`, at the frequencies theta^(-2j/d).
    ///
    /// # Errors
    /// When the width is odd, memory cannot address so many angles, or the device has no memory left.
    pub fn new(device: &Device, dtype: DType, positions: usize, head_dim: usize, theta: f64) -> Result<Self> {
        ensure!(
            head_dim.is_multiple_of(2) && head_dim > 0,
            "rope",
            "head width {head_dim} is not even: rope rotates pairs"
        );
        Self::of_frequencies(device, dtype, positions, &frequencies(head_dim, theta))
    }

    /// Angles of `positions` times each of the `d / 2` frequencies, in radians a position.
    ///
    /// # Errors
    /// When there is no frequency, memory cannot address so many angles, or the device has no memory left.
    pub fn of_frequencies(device: &Device, dtype: DType, positions: usize, frequencies: &[f64]) -> Result<Self> {
        ensure!(!frequencies.is_empty(), "rope", "there is no frequency: rope rotates pairs");
        let half = frequencies.len();
        checked_numel("rope", &[positions, 2 * half])?;
        let angles = with_number!(dtype, T => {
            Tensor::from_vec(device, &[positions, 2 * half], table::<T>(positions, frequencies))?
        });
        Ok(RopeTable { half, positions, angles })
    }

    /// The same angles in another order: position i of the new table is position `places[i]` of this one. So tokens one behind the other are
    /// turned as at places that are not.
    ///
    /// # Errors
    /// When a place is none of the table's, or the device has no memory left.
    pub fn at(&self, places: &Ids) -> Result<Self> {
        let tape = Tape::inference();
        let angles = index_select(&tape, &tape.leaf(self.angles.clone()), 0, places)?.value;
        Ok(RopeTable { half: self.half, positions: places.len(), angles })
    }

    /// Width of the heads that it turns.
    pub fn width(&self) -> usize {
        2 * self.half
    }

    /// Number of positions covered.
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// The `d / 2` frequencies theta^(-2j/d) of a head's pairs, in radians a position.
pub fn frequencies(head_dim: usize, theta: f64) -> Vec<f64> {
    (0..head_dim / 2).map(|j| theta.powf(-2.0 * j as f64 / head_dim as f64)).collect()
}

fn table<T: Number>(positions: usize, frequencies: &[f64]) -> Vec<T> {
    let half = frequencies.len();
    let mut out = vec![T::ZERO; positions * 2 * half];
    for (position, row) in out.chunks_exact_mut(2 * half).enumerate() {
        for (j, frequency) in frequencies.iter().enumerate() {
            let angle = position as f64 * frequency;
            (row[j], row[half + j]) = (T::of(angle.cos()), T::of(angle.sin()));
        }
    }
    out
}

simd! {
    /// One token: `heads` rows of two halves; `angles` are the cosines, then the sines.
    fn rotate_token<T>(x: &[T], angles: &[T], backwards: bool, out: &mut [T]) {
        let half = angles.len() / 2;
        let (cos, sin) = angles.split_at(half);
        for (x, y) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
            let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
            for j in 0..half {
                let sin = if backwards { -sin[j] } else { sin[j] };
                y1[j] = x1[j] * cos[j] - x2[j] * sin;
                y2[j] = x2[j] * cos[j] + x1[j] * sin;
            }
        }
    }
}

/// Rows of `x`, `width` wide, `tokens` a sequence; `angles` are those of the first token's position and the following ones.
fn rotate_cpu<T: CpuNumber>(
    cpu: &CpuDevice,
    (x, angles): (&[T], &[T]),
    (tokens, width, head_dim): (usize, usize, usize),
    backwards: bool,
    out: &mut [T],
) {
    cpu.for_pieces(out, TOKENS * width, |task, out| {
        for (r, y) in out.chunks_exact_mut(width).enumerate() {
            let row = task * TOKENS + r;
            rotate_token(&x[row * width..][..width], &angles[row % tokens * head_dim..][..head_dim], backwards, y);
        }
    });
}

/// Turns `x [b, t, heads, d]`, whose first token stands at position `first`, which the table reaches; backwards for the gradient.
///
/// # Errors
/// When x and the table differ in element type or device, or the device has no memory left.
pub(crate) fn rotate(x: &Tensor, table: &RopeTable, first: usize, backwards: bool, compute: Compute) -> Result<Tensor> {
    let [_, tokens, heads, d] = x.dims("rope")?;
    on_device!("rope", [x, &table.angles]; Cpu<T>(cpu, [numbers, angles]) => {
        let mut out = cpu.alloc::<T>(numbers.len());
        rotate_cpu(cpu, (numbers, &angles[first * d..]), (tokens, heads * d, d), backwards, &mut out);
        Ok(Tensor::from_buffer(x.shape(), out))
    }, Cuda(_, [numbers, angles]) => {
        // what comes out is an operand of products, both ways
        let to = Kind::of_operands(compute, numbers.dtype());
        let out = cuda::rotate(numbers.full()?, angles.full()?, (tokens, heads, d), first, backwards, to)?;
        Ok(Tensor::from_cuda(x.shape(), out))
    })
}

/// Rotates `x [b, t, heads, d]`, whose first token stands at position `first`.
///
/// # Errors
/// When the table is for another width, element type or device, or has too few positions.
pub fn rope(tape: &Tape, x: &Var, table: &RopeTable, first: usize) -> Result<Var> {
    let [_, tokens, _, d] = x.value.dims("rope")?;
    ensure!(d == 2 * table.half, "rope", "head width {d}, the table is for {}", 2 * table.half);
    ensure!(
        first.checked_add(tokens).is_some_and(|end| end <= table.positions()),
        "rope",
        "{tokens} positions from {first} on asked, the table has {}",
        table.positions()
    );
    let compute = tape.compute();
    let y = rotate(&x.value, table, first, false, compute)?;
    let (id, table) = (x.id(), table.clone());
    tape.record("rope", y, move |dy, grads| grads.add(id, rotate(&dy, &table, first, true, compute)?))
}
