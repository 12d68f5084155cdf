//! The loss of an indexer, with whole rows of scores in memory: the op `indexer_kl`.

use super::routing::{for_queries, mean_of_heads, query_args};
use super::{Batched, Sees, probabilities, product, rows, scale, scores, tokens, transposed};
use crate::device::Gemm;
use crate::device::cuda::{Arg, CudaBuffer};
use crate::error::{Result, ensure};
use crate::ops::attention::Dims;
use crate::ops::attention::cuda::BlockMask;
use crate::ops::cuda::{real, same};
use crate::ops::reduce::cuda::sum_axis;

/// Queries and keys of the indexer, `[b, t, g, width]` each, then `q [b, t, h, d]` and `k [b, t, g, d]` of attention.
type Operands<'a> = ([&'a CudaBuffer; 2], [&'a CudaBuffer; 2]);

/// The indexer has a query head a kv head.
fn of_indexer(dims: Dims, width: usize) -> Dims {
    Dims { h: dims.g, d: width, ..dims }
}

/// The divergence of every query over their number, and where `upstream` is given the gradients of the indexer's scores `[b, g, t, t]`, times it and
/// what scores were scaled with.
fn divergences(
    (dims, width): (Dims, usize),
    ([iq, ik], [q, k]): Operands,
    mask: &BlockMask,
    upstream: Option<&CudaBuffer>,
) -> Result<(CudaBuffer, CudaBuffer)> {
    let (op, device, kind, t) = ("indexer_kl", q.device(), q.kind(), dims.t);
    same(op, &[iq, ik, q, k])?;
    ensure!(upstream.is_none_or(|x| (x.kind(), x.len()) == (kind, 1)), op, "{upstream:?} is no gradient of a loss");
    let queries = dims.b * dims.g * t;
    let p = probabilities(op, dims, t, (q, k), Sees::Listed(mask, None), 1.0)?;
    let teacher = mean_of_heads(dims, t, &p, 1.0 / dims.group() as f64)?;
    let z = scores(op, of_indexer(dims, width), t, (iq, ik), scale(width))?;
    let parts = device.alloc(op, kind, queries)?;
    let share = 1.0 / queries.max(1) as f64;
    let inputs = [&z, &teacher, mask.cells(), mask.first(), &parts].map(Arg::Buffer);
    let upstream = [upstream.map_or(Arg::Null, Arg::Buffer)];
    let numbers = [Arg::int(mask.chunk_size()), real(kind, share), real(kind, scale(width))];
    let args = [&inputs[..], &upstream, &query_args(dims, t), &numbers].concat();
    for_queries(device, kind, "indexer_kl", dims, &args)?;
    Ok((parts, z))
}

/// The mean divergence: one number.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn indexer_kl(dims: (Dims, usize), x: Operands, mask: &BlockMask) -> Result<CudaBuffer> {
    let (parts, _) = divergences(dims, x, mask, None)?;
    sum_axis(&parts, (1, parts.len(), 1))
}

/// Gradients of `upstream` times [`indexer_kl`] to the indexer's queries and keys.
///
/// # Errors
/// As [`indexer_kl`].
pub fn indexer_kl_backward(
    dims: (Dims, usize),
    x: Operands,
    mask: &BlockMask,
    upstream: &CudaBuffer,
) -> Result<[CudaBuffer; 2]> {
    let op = "indexer_kl";
    let ([iq, ik], Dims { b, t, h, d, .. }) = (x.0, of_indexer(dims.0, dims.1));
    let (_, ds) = divergences(dims, x, mask, Some(upstream))?;
    let [dq, dk] = [iq, ik].map(|x| x.device().alloc(op, x.kind(), x.len()));
    let (dq, dk) = (dq?, dk?);
    let size = Batched { gemm: Gemm::new(t, d, t), batch: b, heads: h, div: 1, repeats: 1 };
    let (ds, all) = (rows(&ds, h, t, t, 1), |x| tokens(x, t, h, d, 1));
    product(op, size, ds, all(ik), all(&dq), 1.0)?;
    product(op, size, transposed(ds), all(iq), all(&dk), 1.0)?;
    Ok([dq, dk])
}
