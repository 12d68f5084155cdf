//! Who attends what, as bits: one word of 64 bits a cell, which is 64 neighbouring tokens and one chunk.

use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::attention::figures::SUMS;
use crate::ops::attention::{Dims, HostRoutes, entries32};
use crate::shape::checked_numel;

static SOURCE: Source = Source { name: "attention_mask", text: include_str!("mask.cu") };

/// Cells that a block of `mask.cu` counts.
const CELLS: usize = 4096;

/// Everything that is compiled for masks.
pub fn units() -> Vec<Unit> {
    vec![unit()]
}

fn unit() -> Unit {
    Unit::new(&SOURCE, [("CELLS", CELLS.to_string())])
}

/// Bit r of cell (batch, kv head, tile, chunk) is set where token 64 tile + r attends the chunk; each attends its own. A set bit is
/// an *entry*. Entries are numbered by cell, then by token, so that those of a cell are neighbours for both sides of attention.
#[derive(Debug)]
pub struct BlockMask {
    cells: CudaBuffer,
    first: CudaBuffer,
    batch: usize,
    kv_heads: usize,
    queries: usize,
    chunk_size: usize,
    entries: usize,
}

impl BlockMask {
    /// Numbers the entries of cells `[b, g, ceil(t / 64), ceil(t / chunk_size)]`, of which there are at most `most`; the exact
    /// number stays on the device.
    ///
    /// # Errors
    /// When extents do not fit, or memory runs out.
    pub fn new(
        cells: CudaBuffer,
        (batch, kv_heads, queries): (usize, usize, usize),
        chunk_size: usize,
        most: usize,
    ) -> Result<Self> {
        let (op, device) = ("block_mask", cells.device().clone());
        ensure!(chunk_size > 0, op, "chunks of no token");
        let count = checked_numel(op, &[batch, kv_heads, queries.div_ceil(64), queries.div_ceil(chunk_size)])?;
        ensure!(cells.len() == count, op, "{cells:?} for {count} cells");
        let blocks = count.div_ceil(CELLS);
        let first = device.alloc(op, Kind::U32, count + 1)?;
        let sums = device.alloc(op, Kind::U32, blocks)?;
        let launch = |name, grid, args: &[Arg]| {
            // SAFETY: the kernels' parameters in order; a block takes CELLS of the `count` cells.
            device.kernel(&unit(), name).and_then(|kernel| unsafe { kernel.launch(grid, args) })
        };
        let (all, n) = ([&cells, &first, &sums].map(Arg::Buffer), Arg::int(count));
        launch("count_cells", Grid::line(blocks, 256), &[all[0], all[2], n])?;
        launch("scan_sums", Grid::line(1, 256), &[all[2], Arg::At(&first, count), Arg::int(blocks)])?;
        launch("number_cells", Grid::line(blocks, 256), &[all[0], all[2], all[1], n])?;
        Ok(BlockMask { cells, first, batch, kv_heads, queries, chunk_size, entries: most })
    }

    /// The bits of routes on the host.
    ///
    /// # Errors
    /// As [`BlockMask::new`].
    pub fn from_host(device: &CudaDevice, list: &HostRoutes) -> Result<Self> {
        let (batch, kv_heads, queries) = list.extents();
        let (tiles, chunks) = (queries.div_ceil(64), queries.div_ceil(list.chunk_size()));
        let mut cells = vec![0u64; batch * kv_heads * tiles * chunks];
        for (i, query) in (0..batch * kv_heads * queries).map(|n| (n / queries, n % queries)) {
            for &chunk in list.chunks_of(i / kv_heads, i % kv_heads, query) {
                cells[(i * tiles + query / 64) * chunks + chunk as usize] |= 1 << (query % 64);
            }
        }
        let cells = device.upload("block_mask", &cells)?;
        Self::new(cells, (batch, kv_heads, queries), list.chunk_size(), list.len())
    }

    /// `[b, g, tiles, chunks]`, 64-bit words.
    pub fn cells(&self) -> &CudaBuffer {
        &self.cells
    }

    /// Number of the first entry of every cell, and how many entries there are.
    pub fn first(&self) -> &CudaBuffer {
        &self.first
    }

    /// (batch, kv heads, queries).
    pub fn extents(&self) -> (usize, usize, usize) {
        (self.batch, self.kv_heads, self.queries)
    }

    /// Tokens that the queries attend of their own chunks, rows (kv head of a sequence, query), and the chunk size: what tokens follow from.
    fn sizes(&self) -> [Arg<'static>; 3] {
        let own: usize = (0..self.queries).map(|q| q % self.chunk_size + 1).sum();
        [self.batch * self.kv_heads * own, self.rows(), self.chunk_size].map(|n| Arg::Long(n as i64))
    }

    fn rows(&self) -> usize {
        self.batch * self.kv_heads * self.queries
    }

    /// Of each the mean number of tokens that a query attends, whole earlier chunks and its own up to itself: f64 `[all]` on the device.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn mean_tokens(device: &CudaDevice, all: &[&BlockMask]) -> Result<CudaBuffer> {
        let out = device.alloc("mean_tokens", Kind::F64, all.len())?;
        for (i, mask) in all.iter().enumerate() {
            let args = [&[Arg::At(&mask.first, mask.cells.len()), Arg::At(&out, i)], &mask.sizes()[..]].concat();
            // SAFETY: the kernel's parameters in order; one thread.
            unsafe { device.kernel(&unit(), "mean_tokens")?.launch(Grid::line(1, 1), &args)? };
        }
        Ok(out)
    }

    /// See [`crate::ops::attention::RouteFigures`]: density, sum and maximum of |bias|, tokens, then the histogram from 0 to all chunks; f64. The
    /// bias is f32 or f64.
    ///
    /// # Errors
    /// When the bias has no number for every entry, or memory runs out.
    pub fn figures(&self, bias: Option<&CudaBuffer>) -> Result<CudaBuffer> {
        let (op, device) = ("figures", self.cells.device());
        let wide = bias.is_some_and(|bias| bias.kind() == Kind::F64);
        ensure!(bias.is_none_or(|bias| bias.len() >= self.entries), op, "{bias:?} for {} entries", self.entries);
        let (rows, counts) = (self.rows(), self.chunks() + 1);
        let blocks = rows.div_ceil(128);
        let histogram = device.zeros(op, Kind::U32, counts)?;
        let (parts, out) = (device.alloc(op, Kind::F64, 3 * blocks)?, device.alloc(op, Kind::F64, SUMS + counts)?);
        let lists = [Arg::Buffer(&self.cells), Arg::Buffer(&self.first), bias.map_or(Arg::Null, Arg::Buffer)];
        let sizes = [Arg::Int(wide.into()), Arg::Long(rows as i64), Arg::int(self.queries), Arg::int(self.chunk_size)];
        let found = [&histogram, &parts].map(Arg::Buffer);
        let args = [&lists[..], &found, &sizes].concat();
        // SAFETY: the kernels' parameters in order; a thread a query of a kv head, then one block for all.
        unsafe { device.kernel(&unit(), "figures")?.launch(Grid::over(rows, 128), &args)? };
        let entries = [Arg::At(&self.first, self.cells.len()), Arg::Buffer(&out), Arg::int(blocks), Arg::int(counts)];
        let args = [&found[..], &entries, &self.sizes()].concat();
        // SAFETY: as above.
        unsafe { device.kernel(&unit(), "gather_figures")?.launch(Grid::line(1, 256), &args)? };
        Ok(out)
    }

    /// Chunks that each query attends: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn counts(&self) -> Result<Vec<u32>> {
        let (rows, device) = (self.rows(), self.cells.device());
        let counts = device.alloc("counts", Kind::U32, rows)?;
        let sizes = [Arg::Long(rows as i64), Arg::int(self.queries), Arg::int(self.chunk_size)];
        let args = [&[&self.cells, &counts].map(Arg::Buffer)[..], &sizes].concat();
        // SAFETY: the kernel's parameters in order; a thread a query of a kv head.
        unsafe { device.kernel(&unit(), "count_chunks")?.launch(Grid::over(rows, 128), &args)? };
        counts.download()
    }

    /// Where each query's list begins, with the end, and the chunks of all lists: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn lists(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let (cells, all) = (self.cells.download::<u64>()?, self.chunks());
        let (mut offsets, mut chunks) = (vec![0u32], Vec::new());
        for (row, query) in (0..self.batch * self.kv_heads).flat_map(|row| (0..self.queries).map(move |q| (row, q))) {
            let cells = &cells[(row * self.queries.div_ceil(64) + query / 64) * all..][..all];
            chunks.extend((0..all as u32).filter(|&c| cells[c as usize] >> (query % 64) & 1 == 1));
            offsets.push(entries32("block list", chunks.len())?);
        }
        Ok((offsets, chunks))
    }

    /// Tokens of a chunk.
    pub fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// Chunks of a sequence, a ragged last one included.
    pub fn chunks(&self) -> usize {
        self.queries.div_ceil(self.chunk_size)
    }

    /// At least as many as there are entries.
    pub fn entries(&self) -> usize {
        self.entries
    }

    pub(super) fn check(&self, op: &'static str, dims: Dims) -> Result<()> {
        let (chunk, own) = (self.chunk_size, self.extents());
        super::check_chunk(op, chunk)?;
        ensure!(
            own == (dims.b, dims.g, dims.t),
            op,
            "the mask is for {own:?}, q and k have {:?}",
            (dims.b, dims.g, dims.t)
        );
        Ok(())
    }
}
