//! The rows of a tile of queries, and those of them that work on a block.

use super::operands::Products;
use super::{QUERY_TILE, take_tile};
use crate::device::{Buffer, CpuDevice, CpuNumber};

/// Whether ascending queries are neighbours, so that their rows of a tile are one slice: always in dense attention.
pub(super) fn are_contiguous(queries: &[u32]) -> bool {
    (queries[queries.len() - 1] - queries[0]) as usize + 1 == queries.len()
}

/// Copies the rows of `queries` out of `tile [QUERY_TILE, len]` into `out [queries, len]`.
pub(super) fn gather<T: Copy>(tile: &[T], queries: &[u32], len: usize, out: &mut [T]) {
    if are_contiguous(queries) {
        let n = queries.len() * len;
        return out[..n].copy_from_slice(&tile[queries[0] as usize * len..][..n]);
    }
    for (o, &r) in out.chunks_exact_mut(len).zip(queries) {
        o.copy_from_slice(&tile[r as usize * len..][..len]);
    }
}

/// Copies `rows [queries, len]` back into `tile [QUERY_TILE, len]`.
pub(super) fn scatter<T: Copy>(rows: &[T], queries: &[u32], len: usize, tile: &mut [T]) {
    if are_contiguous(queries) {
        let n = queries.len() * len;
        return tile[queries[0] as usize * len..][..n].copy_from_slice(&rows[..n]);
    }
    for (row, &r) in rows.chunks_exact(len).zip(queries) {
        tile[r as usize * len..][..len].copy_from_slice(row);
    }
}

/// The rows of `queries` in a tile `[queries, len]`: in place where they are neighbours, else gathered into `scratch`.
fn rows_of<'a, T: Copy>(tile: &'a [T], queries: &[u32], len: usize, scratch: &'a mut [T]) -> &'a [T] {
    let n = queries.len() * len;
    if are_contiguous(queries) {
        return &tile[queries[0] as usize * len..][..n];
    }
    gather(tile, queries, len, scratch);
    &scratch[..n]
}

/// A tile of queries, or of gradients of their outputs: as rows, and as the columns of products over d.
pub(super) struct QueryTile<T: CpuNumber> {
    /// `[QUERY_TILE, len]`
    rows: Buffer<T>,
    /// `[QUERY_TILE / per_step, columns_len]`: what [`Products::columns`] makes of [`QueryTile::per_step`] neighbouring queries each
    columns: Buffer<T>,
    /// queries that work on a block at once
    pub per_step: usize,
    /// heads of a query that share a kv head, times d
    len: usize,
    /// `[per_step, len]`, and `[columns_len]` of them
    gathered_rows: Buffer<T>,
    gathered_columns: Buffer<T>,
}

impl<T: CpuNumber> QueryTile<T> {
    pub fn new(device: &CpuDevice, products: &Products<T>, per_step: usize, len: usize) -> Self {
        let columns = products.columns_len();
        QueryTile {
            rows: device.alloc(QUERY_TILE * len),
            columns: device.alloc(QUERY_TILE.div_ceil(per_step) * columns),
            per_step,
            len,
            gathered_rows: device.alloc(per_step * len),
            gathered_columns: device.alloc(columns),
        }
    }

    /// Takes `queries` rows that are `stride` apart.
    pub fn fill(&mut self, products: &Products<T>, x: &[T], stride: usize, queries: usize) {
        let rows = &mut self.rows[..queries * self.len];
        take_tile(x, stride, self.len, rows);
        let columns = self.columns.chunks_exact_mut(products.columns_len());
        for (rows, columns) in rows.chunks(self.per_step * self.len).zip(columns) {
            products.columns(rows, columns);
        }
    }

    /// Rows `[queries, len]` and columns `[columns_len]` of `queries`. The columns past theirs are those of others, or zero.
    pub fn of(&mut self, products: &Products<T>, queries: &[u32]) -> (&[T], &[T]) {
        let first = queries[0] as usize;
        let rows = rows_of(&self.rows, queries, self.len, &mut self.gathered_rows);
        if are_contiguous(queries) && first.is_multiple_of(self.per_step) {
            let size = products.columns_len();
            return (rows, &self.columns[first / self.per_step * size..][..size]);
        }
        products.columns(rows, &mut self.gathered_columns);
        (rows, &self.gathered_columns)
    }
}
