//! Who attends what, as bits: one word of 64 bits a cell, which is 64 neighbouring tokens and one chunk.

use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
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

    /// The mean number of tokens that a query attends, whole earlier chunks and its own up to itself: one f64 on the device.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn mean_tokens(&self) -> Result<CudaBuffer> {
        let device = self.cells.device();
        let out = device.alloc("mean_tokens", Kind::F64, 1)?;
        let rows = self.batch * self.kv_heads * self.queries;
        let own: usize = (0..self.queries).map(|q| q % self.chunk_size + 1).sum();
        let sizes = [self.batch * self.kv_heads * own, rows, self.chunk_size].map(|n| Arg::Long(n as i64));
        let args = [&[Arg::At(&self.first, self.cells.len()), Arg::Buffer(&out)], &sizes[..]].concat();
        // SAFETY: the kernel's parameters in order; one thread.
        unsafe { device.kernel(&unit(), "mean_tokens")?.launch(Grid::line(1, 1), &args)? };
        Ok(out)
    }

    /// By query: attended chunks, and of the others than its own the sum of |bias| and the largest, 0 without a bias (f32 or f64). Waits for the
    /// device.
    ///
    /// # Errors
    /// When the bias has no number for every entry, or the device fails.
    pub fn figures(&self, bias: Option<&CudaBuffer>) -> Result<(Vec<u32>, Vec<f64>, Vec<f64>)> {
        let (op, device) = ("figures", self.cells.device());
        let wide = bias.is_some_and(|bias| bias.kind() == Kind::F64);
        ensure!(bias.is_none_or(|bias| bias.len() >= self.entries), op, "{bias:?} for {} entries", self.entries);
        let rows = self.batch * self.kv_heads * self.queries;
        let counts = device.alloc(op, Kind::U32, rows)?;
        let (sums, tops) = (device.alloc(op, Kind::F64, rows)?, device.alloc(op, Kind::F64, rows)?);
        let lists = [Arg::Buffer(&self.cells), Arg::Buffer(&self.first), bias.map_or(Arg::Null, Arg::Buffer)];
        let outputs = [&counts, &sums, &tops].map(Arg::Buffer);
        let sizes = [Arg::Int(wide.into()), Arg::Long(rows as i64), Arg::int(self.queries), Arg::int(self.chunk_size)];
        let args = [&lists[..], &outputs, &sizes].concat();
        // SAFETY: the kernel's parameters in order; a thread a query of a kv head.
        unsafe { device.kernel(&unit(), "figures")?.launch(Grid::over(rows, 128), &args)? };
        Ok((counts.download()?, sums.download()?, tops.download()?))
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
