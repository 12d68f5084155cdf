//! Random routing: which earlier chunks a query attends is a hash of its place, whatever it holds. What learns although nothing is
//! routed (the control of arXiv 2603.02227).
//!
//! The key of a chunk is `h` after `h = mix(h + x)` for x in (seed, layer, kv head, position of the query, chunk), from h = 0, where mix
//! is the output function of splitmix64 with its increment. Of the earlier chunks those with the largest keys are attended: a
//! uniform choice without replacement that is the same in every sequence, every pass and on every device.

use super::super::{Routes, cuda, entries32, positions32};
use super::Top;
use crate::device::Device;
use crate::error::{Result, ensure};
use crate::shape::checked_numel;

/// What random choices follow from, besides the place of the query.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    /// Of the run.
    pub seed: u64,
    /// Every layer draws its own.
    pub layer: usize,
    /// Tokens of a chunk.
    pub chunk_size: usize,
}

/// `h = mix(h + x)`
fn mix(h: u64, x: u64) -> u64 {
    let z = h.wrapping_add(x).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// For queries of `(batch, kv heads, queries)` = `extents` after `past` tokens: `top` chunks, the own one and others before it.
///
/// # Errors
/// When the chunk size is 0, there is not one number above 0 a query, there are 2^32 (query, chunk) pairs or more, or `past` is not 0 on
/// a GPU.
pub fn random_routing(
    device: &Device,
    extents: (usize, usize, usize),
    past: usize,
    random: Random,
    top: Top,
) -> Result<Routes> {
    let (op, (_, kv_heads, t), s) = ("random_routing", extents, random.chunk_size);
    ensure!(s > 0, op, "a chunk has at least one token");
    positions32(op, past, t)?;
    entries32(op, checked_numel(op, &[kv_heads, t])?)?;
    top.check(op, kv_heads, t)?;
    let layer = [random.seed, random.layer as u64].into_iter().fold(0, mix);
    match device {
        Device::Cpu(_) => {}
        Device::Cuda(gpu) => {
            ensure!(past == 0, op, "no kernel of this GPU routes after {past} kept tokens");
            return cuda::random_choice(gpu, extents, s, layer, top).map(Routes::cuda);
        }
    }
    // every sequence of the batch has the same
    let mut chosen: Vec<Vec<u32>> = Vec::with_capacity(kv_heads * t);
    for (kv, query) in (0..kv_heads).flat_map(|kv| (0..t).map(move |query| (kv, query))) {
        let position = past + query;
        let place = [kv as u64, position as u64].into_iter().fold(layer, mix);
        let mut chunks: Vec<u32> = (0..(position / s) as u32).collect();
        chunks.sort_by_key(|&c| (std::cmp::Reverse(mix(place, u64::from(c))), c));
        chunks.truncate(top.of(kv, query, t) - 1);
        chunks.sort_unstable();
        chosen.push(chunks);
    }
    Routes::from_choice_after(device, extents, (past, s), |_, kv, query, chunks| {
        chunks.extend_from_slice(&chosen[kv * t + query]);
    })
}
