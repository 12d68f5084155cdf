//! Attention on a CUDA device: dense, of the chunks that a [`BlockMask`] marks, and of one range of keys a query. Operands are bf16, sums f32,
//! on `mma.sync`, and on `wgmma` where that is faster (`wide.rs`).
//!
//! Query side (`forward.cu`; backward `rows.cu`): a block owns rows (token, head of the group) of one kv head and walks the keys, ascending,
//! with its sums in registers. Key side (`keys.cu`): a block owns keys and walks the rows that attend them. Two passes of backward compute the
//! scores twice, and nothing is added atomically. Of long lists at width 64 the key side makes dq as well (`joint.rs`), in the order of chunks, and where few
//! heads share a kv head forward gathers the rows of each chunk (`gathered.rs`). The same operands give the same bits.

mod choice;
mod gathered;
mod joint;
mod key_side;
mod listed;
mod mask;
mod pass;
pub mod plain;
mod random;
mod router;
mod router_backward;
mod scored;
mod span;
mod wide;

pub use choice::{topk_routing, window_routing, window_scratch};
pub use listed::{ListedBias, softmax_bias, softmax_bias_backward};
pub use mask::BlockMask;
pub use random::random_choice;
pub(super) use router::routes_stream;
pub use router::{Keys, StreamedRouting, Summary, entmax_routing, head_weights, summary, summary_backward};
pub use router_backward::{Kept, entmax_routing_backward};
pub(super) use scored::scores_fit;
pub use span::{Rows, span_attention, span_attention_backward};

use super::Dims;
use crate::device::cuda::{CudaBuffer, CudaData, Kind, Unit};
use crate::error::{Error, Result, ensure};
use crate::number::Compute;
use pass::Pass;

/// Head widths that the kernels are compiled for; others are padded in shared memory to the next one.
const WIDTHS: [usize; 4] = [16, 32, 64, 128];
/// Chunk sizes that the kernels are compiled for.
pub const CHUNKS: [usize; 6] = [4, 8, 16, 32, 64, 128];

/// The width that a head of width `d` takes in shared memory, or why there is no kernel for it.
fn padded(op: &'static str, d: usize) -> Result<usize> {
    let wide = WIDTHS.into_iter().find(|&wide| wide >= d).filter(|_| d > 0 && d.is_multiple_of(8));
    wide.ok_or_else(|| {
        Error::invalid(op, format!("head width {d}: cuda has kernels for multiples of 8 up to {}", WIDTHS[3]))
    })
}

fn check_chunk(op: &'static str, chunk: usize) -> Result<()> {
    ensure!(CHUNKS.contains(&chunk), op, "chunks of {chunk}: kernels for {CHUNKS:?} exist on cuda");
    Ok(())
}

fn check_group(op: &'static str, dims: Dims) -> Result<()> {
    let Dims { h, g, .. } = dims;
    ensure!(
        g > 0 && h % g == 0 && (1..=16).contains(&dims.group()),
        op,
        "{h} query heads, {g} kv heads: cuda has kernels for 1 to 16 query heads a kv head"
    );
    Ok(())
}

/// Everything that these ops compile.
pub fn units() -> Vec<Unit> {
    pass::units()
        .into_iter()
        .chain(wide::units())
        .chain(gathered::units())
        .chain(joint::units())
        .chain(mask::units())
        .chain(plain::units())
        .chain(random::units())
        .chain(router::units())
        .collect()
}

/// Whether the streaming kernels take these operands: rounded to bf16, of widths and chunks that they are compiled for. Everything else
/// goes through [`plain`].
pub(super) fn streams(compute: Compute, x: &CudaData, dims: Dims, chunk: Option<usize>) -> bool {
    Kind::of_operands(compute, x.dtype()) == Kind::Bf16
        && why_whole_rows(compute, dims.d, dims.group(), chunk).is_none()
}

/// Why attention and routing with heads of this width, so many query heads a kv head and chunks of this size hold whole rows of scores in a
/// GPU's memory, which then grows with the square of the sequence; `None` where kernels stream them.
pub fn why_whole_rows(compute: Compute, head_dim: usize, group: usize, chunk: Option<usize>) -> Option<String> {
    if compute != Compute::Bf16 {
        return Some("operands are not rounded to bf16".into());
    }
    if padded("attention", head_dim).is_err() {
        return Some(format!("heads are {head_dim} wide: those of a multiple of 8 up to {} stream", WIDTHS[3]));
    }
    if !(1..=16).contains(&group) {
        return Some(format!("{group} query heads share a kv head: 1 to 16 stream"));
    }
    chunk
        .filter(|chunk| !CHUNKS.contains(chunk))
        .map(|chunk| format!("chunks are {chunk} tokens: those of {CHUNKS:?} stream"))
}

/// A buffer, its first element that counts, and elements from token to token.
pub type Strided<'a> = (&'a CudaBuffer, usize, usize);

/// Refuses `[b, t, heads, d]` in bf16 that does not fit, or that does not consist of whole pieces of 16 bytes.
fn check_strided(op: &'static str, name: &str, x: Strided, [b, t, heads, d]: [usize; 4]) -> Result<()> {
    let (buffer, first, stride) = x;
    let last = first + (b * t).saturating_sub(1) * stride + heads * d;
    ensure!(
        buffer.kind() == Kind::Bf16 && (b * t == 0 || last <= buffer.len()),
        op,
        "{name} [{b}, {t}, {heads}, {d}] in {buffer:?}"
    );
    ensure!(
        first.is_multiple_of(8) && stride.is_multiple_of(8),
        op,
        "{name} begins at {first}, {stride} apart: not whole pieces of 16 bytes"
    );
    Ok(())
}

/// Queries, keys and values: bf16, `[b, t, heads, d]`, the heads of a token side by side. Tokens may lie further apart than that, so
/// that one product makes all three.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// `[b, t, h, d]`.
    pub q: Strided<'a>,
    /// `[b, t, g, d]`; as many keys as the span has in the place of t.
    pub k: Strided<'a>,
    /// As k, tokens as far apart.
    pub v: Strided<'a>,
}

impl<'a> Operands<'a> {
    /// Three buffers without gaps.
    pub fn separate(dims: Dims, q: &'a CudaBuffer, k: &'a CudaBuffer, v: &'a CudaBuffer) -> Self {
        let (wide, narrow) = (dims.h * dims.d, dims.g * dims.d);
        Operands { q: (q, 0, wide), k: (k, 0, narrow), v: (v, 0, narrow) }
    }

    fn check(&self, op: &'static str, dims: Dims, keys: usize) -> Result<()> {
        let Dims { b, t, h, g, d } = dims;
        padded(op, d)?;
        check_group(op, dims)?;
        ensure!(self.k.2 == self.v.2, op, "keys and values lie {} and {} apart", self.k.2, self.v.2);
        check_strided(op, "q", self.q, [b, t, h, d])?;
        check_strided(op, "k", self.k, [b, keys, g, d])?;
        check_strided(op, "v", self.v, [b, keys, g, d])
    }
}

/// o `[b, t, h, d]` in bf16, and lse `[b, t, h]` in f32 (natural logarithm), of causal attention: to every token up to the query's own,
/// or to the chunks of a mask, with the bias of an entry added to its scaled scores.
///
/// # Errors
/// When extents do not fit, or there is no kernel for the head width or the chunk size.
pub fn forward(
    dims: Dims,
    operands: Operands,
    mask: Option<&BlockMask>,
    bias: Option<&CudaBuffer>,
) -> Result<(CudaBuffer, CudaBuffer)> {
    let pass = Pass::listed("attention", dims, operands, mask, bias)?;
    let lse = operands.q.0.device().alloc(pass.op, Kind::F32, dims.b * dims.t * dims.h)?;
    Ok((pass.forward(&lse)?, lse))
}

/// Gradients, f32.
#[derive(Debug)]
pub struct Gradients {
    /// `[b, t, h, d]`.
    pub dq: CudaBuffer,
    /// `[b, t, g, d]`.
    pub dk: CudaBuffer,
    /// `[b, t, g, d]`.
    pub dv: CudaBuffer,
    /// A number an entry, where there is a bias.
    pub dbias: Option<CudaBuffer>,
}

/// Gradients of [`forward`], from what it returned and the gradient of its output (bf16).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dims: Dims,
    operands: Operands,
    mask: Option<&BlockMask>,
    bias: Option<&CudaBuffer>,
    (o, lse): (&CudaBuffer, &CudaBuffer),
    dout: &CudaBuffer,
) -> Result<Gradients> {
    let pass = Pass::listed("attention", dims, operands, mask, bias)?;
    let delta = pass.delta(o, dout)?;
    pass.backward(lse, &delta, dout)
}

#[cfg(test)]
mod shapes {
    use super::*;

    #[test]
    fn what_does_not_stream_says_why() {
        let why = |compute, d, group, chunk| why_whole_rows(compute, d, group, chunk).unwrap_or_default();
        assert_eq!(why(Compute::Bf16, 64, 4, Some(32)), "");
        assert_eq!(why(Compute::Bf16, 24, 1, None), "");
        assert!(why(Compute::Full, 64, 4, None).contains("not rounded to bf16"));
        assert!(
            why(Compute::Bf16, 20, 4, None).contains("heads are 20 wide")
                && why(Compute::Bf16, 136, 1, None).contains("128")
        );
        assert!(why(Compute::Bf16, 64, 17, None).contains("17 query heads"));
        assert!(why(Compute::Bf16, 64, 4, Some(20)).contains("chunks are 20 tokens"));
    }
}

#[cfg(test)]
mod tests;
