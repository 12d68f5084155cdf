//! Who attends what: for every (batch, kv head, query) an ascending list of chunks that ends with the query's own, and
//! the same pairs transposed, chunk by chunk, for tiles of neighbouring queries.

use super::stream::{TILE, Visits};
use crate::device::{CpuDevice, Device};

/// A list of chunks per query. An *entry* is one (query, chunk) pair; entries are numbered by (batch, kv head, query)
/// and ascend in the chunk, and a bias tensor has one number per entry.
#[derive(Debug)]
pub struct BlockList {
    batch: usize,
    kv_heads: usize,
    queries: usize,
    chunk_size: usize,
    /// first entry of each query, [b * g * t + 1]
    offsets: Vec<usize>,
    chunks: Vec<u32>,
    tiles: Vec<Tile>,
}

/// The entries of [`TILE`] neighbouring queries, sorted by chunk: chunk `visits[i].0` is attended by the queries
/// `rows[visits[i].1..visits[i + 1].1]` of the tile.
#[derive(Debug)]
struct Tile {
    visits: Vec<(u32, u32)>,
    rows: Vec<u32>,
    entries: Vec<u32>,
}

impl BlockList {
    /// `offsets` has one more element than there are (batch, kv head, query) triples; `chunks[offsets[i]..offsets[i + 1]]`
    /// ascend and end with the query's own chunk.
    pub(crate) fn new(
        device: &CpuDevice,
        (batch, kv_heads, queries): (usize, usize, usize),
        chunk_size: usize,
        offsets: Vec<usize>,
        chunks: Vec<u32>,
    ) -> Self {
        assert_eq!(offsets.len(), batch * kv_heads * queries + 1, "one list per query");
        let across = queries.div_ceil(TILE);
        let tiles = device.map(batch * kv_heads * across, |i| {
            let first = i / across * queries + i % across * TILE;
            let count = TILE.min(queries - i % across * TILE);
            Tile::new(&offsets[first..=first + count], &chunks)
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
        let (mut offsets, mut chunks) = (vec![0], Vec::new());
        for i in 0..batch * kv_heads * queries {
            let (row, query) = (i / queries, i % queries);
            let before = chunks.len();
            choose(row / kv_heads, row % kv_heads, query, &mut chunks);
            chunks.push((query / chunk_size) as u32);
            assert!(chunks[before..].is_sorted_by(|a, b| a < b), "chosen chunks ascend and are before the own one");
            offsets.push(chunks.len());
        }
        Self::new(device.as_cpu(), (batch, kv_heads, queries), chunk_size, offsets, chunks)
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
        self.offsets[i]..self.offsets[i + 1]
    }

    /// Entries of each tile of queries, in order: how a bias gradient is cut among tasks.
    pub(crate) fn tile_lengths(&self) -> Vec<usize> {
        self.tiles.iter().map(|t| t.entries.len()).collect()
    }
}

impl Tile {
    fn new(offsets: &[usize], chunks: &[u32]) -> Self {
        let mut triples: Vec<(u32, u32, u32)> = Vec::with_capacity(offsets[offsets.len() - 1] - offsets[0]);
        for (row, pair) in offsets.windows(2).enumerate() {
            triples.extend((pair[0]..pair[1]).map(|e| (chunks[e], row as u32, e as u32)));
        }
        triples.sort_unstable();
        let mut visits: Vec<(u32, u32)> = Vec::new();
        for (i, t) in triples.iter().enumerate() {
            if visits.last().is_none_or(|v| v.0 != t.0) {
                visits.push((t.0, i as u32));
            }
        }
        Tile { visits, rows: triples.iter().map(|t| t.1).collect(), entries: triples.iter().map(|t| t.2).collect() }
    }
}

impl Visits for BlockList {
    fn block_size(&self) -> usize {
        self.chunk_size
    }

    fn for_each(&self, batch: usize, kv_head: usize, tile: usize, mut visit: impl FnMut(usize, &[u32], &[u32])) {
        let across = self.queries.div_ceil(TILE);
        let t = &self.tiles[(batch * self.kv_heads + kv_head) * across + tile];
        for (i, &(chunk, start)) in t.visits.iter().enumerate() {
            let end = t.visits.get(i + 1).map_or(t.rows.len(), |v| v.1 as usize);
            let range = start as usize..end;
            visit(chunk as usize, &t.rows[range.clone()], &t.entries[range]);
        }
    }
}
