//! Who attends what, on the CPU: for every (batch, kv head, query) an ascending list of chunks that ends with the query's own, and
//! the same pairs transposed, chunk by chunk, for tiles of neighbouring queries.

use super::engine::{QUERY_TILE, Visits};
use crate::device::{Buffer, CpuDevice};

/// A list of chunks per query. An *entry* is one (query, chunk) pair; entries are numbered by (batch, kv head, query)
/// and ascend in the chunk, and a bias tensor has one number per entry.
#[derive(Debug)]
pub(crate) struct BlockList {
    batch: usize,
    kv_heads: usize,
    queries: usize,
    /// position of the first query
    first: usize,
    chunk_size: usize,
    /// first entry of each query, [b * g * t + 1]
    offsets: Buffer<u32>,
    chunks: Buffer<u32>,
    tiles: Vec<TileEntries>,
}

/// The entries of [`QUERY_TILE`] neighbouring queries, sorted by chunk: chunk `visited[i]` is attended by the queries
/// `rows[starts[i]..starts[i + 1]]` of the tile.
#[derive(Debug)]
struct TileEntries {
    visited: Buffer<u32>,
    starts: Buffer<u32>,
    rows: Buffer<u32>,
    entries: Buffer<u32>,
}

impl BlockList {
    /// `offsets` has one more element than there are (batch, kv head, query) triples; `chunks[offsets[i]..offsets[i + 1]]`
    /// ascend and end with the query's own chunk. The first query stands at position `first`.
    pub(crate) fn new(
        device: &CpuDevice,
        (batch, kv_heads, queries): (usize, usize, usize),
        (first, chunk_size): (usize, usize),
        offsets: Buffer<u32>,
        chunks: Buffer<u32>,
    ) -> Self {
        assert_eq!(offsets.len(), batch * kv_heads * queries + 1, "one list per query");
        let across = queries.div_ceil(QUERY_TILE);
        let most = (first + queries).div_ceil(chunk_size);
        let tiles = device.map(batch * kv_heads * across, |i| {
            let start = i / across * queries + i % across * QUERY_TILE;
            let count = QUERY_TILE.min(queries - i % across * QUERY_TILE);
            TileEntries::new(device, &offsets[start..=start + count], &chunks, most)
        });
        BlockList { batch, kv_heads, queries, first, chunk_size, offsets, chunks, tiles }
    }

    /// Tokens of a chunk.
    pub(crate) fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// Position of the first query: 0 but where earlier tokens are kept from an earlier pass.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// (batch, kv heads, queries).
    pub(crate) fn extents(&self) -> (usize, usize, usize) {
        (self.batch, self.kv_heads, self.queries)
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// The chunks of a query, ascending, its own last.
    pub(crate) fn chunks_of(&self, batch: usize, kv_head: usize, query: usize) -> &[u32] {
        &self.chunks[self.entries_of(batch, kv_head, query)]
    }

    /// The numbers of a query's entries.
    pub(crate) fn entries_of(&self, batch: usize, kv_head: usize, query: usize) -> std::ops::Range<usize> {
        let i = (batch * self.kv_heads + kv_head) * self.queries + query;
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }

    /// First entry of each query with the end, and the chunks by entry.
    pub(crate) fn lists(&self) -> (&[u32], &[u32]) {
        (&self.offsets, &self.chunks)
    }

    /// The device that owns the memory.
    pub(crate) fn device(&self) -> &CpuDevice {
        self.chunks.device()
    }

    /// Entries of each tile of queries, in order: how a bias gradient is cut among tasks.
    pub(crate) fn tile_lengths(&self) -> Vec<usize> {
        self.tiles.iter().map(|t| t.entries.len()).collect()
    }
}

impl TileEntries {
    /// A counting sort by chunk, of which there are `most`; queries of a chunk stay in order.
    fn new(device: &CpuDevice, offsets: &[u32], chunks: &[u32], most: usize) -> Self {
        let entries = offsets[0] as usize..offsets[offsets.len() - 1] as usize;
        let mut next = device.zeros::<u32>(most);
        chunks[entries.clone()].iter().for_each(|&c| next[c as usize] += 1);
        let (mut visited, mut starts) = (device.list(most), device.list(most + 1));
        let mut total = 0;
        for (chunk, next) in next.iter_mut().enumerate() {
            let count = std::mem::replace(next, total);
            if count > 0 {
                visited.push(chunk as u32);
                starts.push(total);
                total += count;
            }
        }
        starts.push(total);
        let (mut rows, mut sorted) = (device.alloc(entries.len()), device.alloc(entries.len()));
        for (row, pair) in offsets.windows(2).enumerate() {
            for entry in pair[0]..pair[1] {
                let place = &mut next[chunks[entry as usize] as usize];
                (rows[*place as usize], sorted[*place as usize]) = (row as u32, entry);
                *place += 1;
            }
        }
        TileEntries { visited, starts, rows, entries: sorted }
    }
}

impl Visits for BlockList {
    /// A chunk, or the whole sequence where that is shorter.
    fn block_size(&self) -> usize {
        self.chunk_size.min(self.queries.max(1))
    }

    fn for_each(&self, batch: usize, kv_head: usize, tile: usize, mut visit: impl FnMut(usize, &[u32], &[u32])) {
        let across = self.queries.div_ceil(QUERY_TILE);
        let t = &self.tiles[(batch * self.kv_heads + kv_head) * across + tile];
        for (&chunk, range) in t.visited.iter().zip(t.starts.windows(2)) {
            let range = range[0] as usize..range[1] as usize;
            visit(chunk as usize, &t.rows[range.clone()], &t.entries[range]);
        }
    }
}
