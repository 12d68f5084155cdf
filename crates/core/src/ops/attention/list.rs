//! Who attends what: for every (batch, kv head, query) an ascending list of chunks that ends with the query's own, and
//! the same pairs transposed, chunk by chunk, for tiles of neighbouring queries.

use super::engine::{QUERY_TILE, Visits};
use crate::device::{Buffer, CpuDevice, Device};

/// A list of chunks per query. An *entry* is one (query, chunk) pair; entries are numbered by (batch, kv head, query)
/// and ascend in the chunk, and a bias tensor has one number per entry.
#[derive(Debug)]
pub struct BlockList {
    batch: usize,
    kv_heads: usize,
    queries: usize,
    chunk_size: usize,
    /// first entry of each query, [b * g * t + 1]
    offsets: Buffer<u32>,
    chunks: Buffer<u32>,
    tiles: Vec<Tile>,
}

/// The entries of [`QUERY_TILE`] neighbouring queries, sorted by chunk: chunk `visited[i]` is attended by the queries
/// `rows[starts[i]..starts[i + 1]]` of the tile.
#[derive(Debug)]
struct Tile {
    visited: Buffer<u32>,
    starts: Buffer<u32>,
    rows: Buffer<u32>,
    entries: Buffer<u32>,
}

impl BlockList {
    /// `offsets` has one more element than there are (batch, kv head, query) triples; `chunks[offsets[i]..offsets[i + 1]]`
    /// ascend and end with the query's own chunk.
    pub(crate) fn new(
        device: &CpuDevice,
        (batch, kv_heads, queries): (usize, usize, usize),
        chunk_size: usize,
        offsets: Buffer<u32>,
        chunks: Buffer<u32>,
    ) -> Self {
        assert_eq!(offsets.len(), batch * kv_heads * queries + 1, "one list per query");
        let across = queries.div_ceil(QUERY_TILE);
        let most = queries.div_ceil(chunk_size);
        let tiles = device.map(batch * kv_heads * across, |i| {
            let first = i / across * queries + i % across * QUERY_TILE;
            let count = QUERY_TILE.min(queries - i % across * QUERY_TILE);
            Tile::new(device, &offsets[first..=first + count], &chunks, most)
        });
        BlockList { batch, kv_heads, queries, chunk_size, offsets, chunks, tiles }
    }

    /// A list from any choice: `choose(batch, kv head, query, chunks)` pushes earlier chunks in ascending order; the own
    /// chunk is added.
    ///
    /// # Panics
    /// When the chosen chunks do not ascend or are not all before the query's own.
    pub fn from_choice(
        device: &Device,
        (batch, kv_heads, queries): (usize, usize, usize),
        chunk_size: usize,
        mut choose: impl FnMut(usize, usize, usize, &mut Vec<u32>),
    ) -> Self {
        let (mut offsets, mut chunks) = (vec![0u32], Vec::new());
        for i in 0..batch * kv_heads * queries {
            let (row, query) = (i / queries, i % queries);
            let before = chunks.len();
            choose(row / kv_heads, row % kv_heads, query, &mut chunks);
            chunks.push((query / chunk_size) as u32);
            assert!(chunks[before..].is_sorted_by(|a, b| a < b), "chosen chunks ascend and are before the own one");
            offsets.push(u32::try_from(chunks.len()).expect("fewer than 2^32 (query, chunk) pairs"));
        }
        let cpu = device.as_cpu();
        Self::new(cpu, (batch, kv_heads, queries), chunk_size, cpu.copy(&offsets), cpu.copy(&chunks))
    }

    /// Tokens of a chunk.
    pub fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// (batch, kv heads, queries).
    pub fn extents(&self) -> (usize, usize, usize) {
        (self.batch, self.kv_heads, self.queries)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Mean number of tokens that a query attends: whole earlier chunks, and its own up to itself.
    pub fn mean_tokens(&self) -> f64 {
        let rows = self.batch * self.kv_heads * self.queries;
        let own: usize = (0..self.queries).map(|q| q % self.chunk_size + 1).sum();
        let own = self.batch * self.kv_heads * own;
        (own + (self.chunks.len() - rows) * self.chunk_size) as f64 / rows.max(1) as f64
    }

    /// No query at all.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The chunks of a query, ascending, its own last.
    pub fn chunks_of(&self, batch: usize, kv_head: usize, query: usize) -> &[u32] {
        &self.chunks[self.entries_of(batch, kv_head, query)]
    }

    /// The numbers of a query's entries.
    pub fn entries_of(&self, batch: usize, kv_head: usize, query: usize) -> std::ops::Range<usize> {
        let i = (batch * self.kv_heads + kv_head) * self.queries + query;
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }

    /// Entries of each tile of queries, in order: how a bias gradient is cut among tasks.
    pub(crate) fn tile_lengths(&self) -> Vec<usize> {
        self.tiles.iter().map(|t| t.entries.len()).collect()
    }
}

impl Tile {
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
        Tile { visited, starts, rows, entries: sorted }
    }
}

impl Visits for BlockList {
    fn block_size(&self) -> usize {
        self.chunk_size
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
