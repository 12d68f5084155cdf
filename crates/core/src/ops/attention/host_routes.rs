//! [`Routes`](super::Routes) on the host, for tests, figures and whoever writes a choice down.

use std::ops::Range;

use crate::device::Device;
use crate::error::{Result, ensure};
use crate::tensor::Tensor;

pub(super) fn mean_tokens(
    (batch, kv_heads, queries): (usize, usize, usize),
    first: usize,
    chunk_size: usize,
    entries: usize,
) -> f64 {
    let rows = batch * kv_heads * queries;
    let own: usize = (first..first + queries).map(|q| q % chunk_size + 1).sum();
    let own = batch * kv_heads * own;
    (own + (entries - rows) * chunk_size) as f64 / rows.max(1) as f64
}

/// [`super::Routes`] on the host. Entries are numbered by (batch, kv head, query) and ascend in the chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoutes {
    pub(super) extents: (usize, usize, usize),
    /// position of the first query
    pub(super) first: usize,
    pub(super) chunk_size: usize,
    /// first entry of each query, and the end
    pub(super) offsets: Vec<u32>,
    pub(super) chunks: Vec<u32>,
}

impl HostRoutes {
    /// Tokens of a chunk.
    pub fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// (batch, kv heads, queries).
    pub fn extents(&self) -> (usize, usize, usize) {
        self.extents
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// No query at all.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// See [`super::Routes::mean_tokens`].
    pub fn mean_tokens(&self) -> f64 {
        mean_tokens(self.extents, self.first, self.chunk_size, self.len())
    }

    /// The chunks of a query, ascending, its own last.
    pub fn chunks_of(&self, batch: usize, kv_head: usize, query: usize) -> &[u32] {
        &self.chunks[self.entries_of(batch, kv_head, query)]
    }

    /// The numbers of a query's entries.
    pub fn entries_of(&self, batch: usize, kv_head: usize, query: usize) -> Range<usize> {
        let (_, kv_heads, queries) = self.extents;
        let i = (batch * kv_heads + kv_head) * queries + query;
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }

    /// The entries in the order of a card's bits: by tile of 64 queries, in it by chunk, in it by query.
    pub(super) fn by_cell(&self) -> Vec<u32> {
        let (batch, kv_heads, queries) = self.extents;
        let mut order = Vec::with_capacity(self.len());
        let mut chunks: Vec<Vec<u32>> = vec![Vec::new(); queries.div_ceil(self.chunk_size)];
        for row in 0..batch * kv_heads {
            for first in (0..queries).step_by(64) {
                for query in first..queries.min(first + 64) {
                    for entry in self.entries_of(row / kv_heads, row % kv_heads, query) {
                        chunks[self.chunks[entry] as usize].push(entry as u32);
                    }
                }
                chunks.iter_mut().for_each(|entries| order.append(entries));
            }
        }
        order
    }

    /// What a tensor says of the entries, `[entries, ..]`, in the order of this list.
    ///
    /// # Errors
    /// When it is of other routes, or the device fails.
    pub fn per_entry(&self, x: &Tensor) -> Result<Vec<f64>> {
        match x.device() {
            Device::Cpu(_) => {
                let rows = x.shape().first().copied();
                ensure!(rows == Some(self.len()), "routes", "{:?} for {} entries", x.shape(), self.len());
                x.to_f64()
            }
            Device::Cuda(_) => {
                // room for every pair that could be attended: numbers beyond the entries mean nothing
                let rows = x.shape().first().copied().unwrap_or(0);
                ensure!(rows >= self.len(), "routes", "{:?} for {} entries", x.shape(), self.len());
                let (width, numbers) = (x.numel() / rows.max(1), x.to_f64()?);
                let mut out = vec![0.0; self.len() * width];
                for (from, to) in self.by_cell().into_iter().enumerate() {
                    let to = to as usize;
                    out[to * width..][..width].copy_from_slice(&numbers[from * width..][..width]);
                }
                Ok(out)
            }
        }
    }
}
