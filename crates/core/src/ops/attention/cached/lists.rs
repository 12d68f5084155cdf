//! Who attends what among kept keys, on a card: a list a query with room for every chunk, because how many there are is known to the card alone.

use crate::device::cuda::{CudaBuffer, CudaDevice, Kind};
use crate::error::{Result, ensure};
use crate::ops::attention::entries32;

/// For every (batch, kv head, query), in this order, its number of chunks and they, ascending, the query's own last. An *entry* of these routes is
/// a place of a list, filled or not.
#[derive(Debug)]
pub struct ChunkLists {
    pub counts: CudaBuffer,
    pub chunks: CudaBuffer,
    /// places of a list
    pub most: usize,
    /// (batch, kv heads, queries)
    pub extents: (usize, usize, usize),
    /// position of the first query
    pub first: usize,
    pub chunk_size: usize,
}

impl ChunkLists {
    /// Of counts and chunks that a kernel has filled in.
    ///
    /// # Errors
    /// When lengths or kinds differ from the extents, or there are 2^32 entries or more.
    pub fn new(
        (counts, chunks): (CudaBuffer, CudaBuffer),
        extents: (usize, usize, usize),
        (first, chunk_size): (usize, usize),
    ) -> Result<Self> {
        let (batch, kv_heads, queries) = extents;
        let (rows, most) = (batch * kv_heads * queries, (first + queries) / chunk_size + 1);
        let fits =
            (counts.kind(), counts.len(), chunks.kind(), chunks.len()) == (Kind::U32, rows, Kind::U32, rows * most);
        ensure!(fits, "routes", "{counts:?} and {chunks:?} for {rows} lists of {most}");
        entries32("routes", rows * most)?;
        Ok(ChunkLists { counts, chunks, most, extents, first, chunk_size })
    }

    /// Of a choice on the host: the first entry of each list and the end, and the chunks.
    ///
    /// # Errors
    /// As [`ChunkLists::new`], or when the card has no memory left.
    pub fn from_host(
        gpu: &CudaDevice,
        (offsets, chunks): (&[u32], &[u32]),
        extents: (usize, usize, usize),
        (first, chunk_size): (usize, usize),
    ) -> Result<Self> {
        let most = (first + extents.2) / chunk_size + 1;
        let counts: Vec<u32> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mut all = Vec::with_capacity(counts.len() * most);
        for (i, list) in offsets.windows(2).enumerate() {
            all.extend_from_slice(&chunks[list[0] as usize..list[1] as usize]);
            all.resize((i + 1) * most, 0);
        }
        let lists = (gpu.upload("routes", &counts)?, gpu.upload("routes", &all)?);
        ChunkLists::new(lists, extents, (first, chunk_size))
    }

    /// Entries.
    pub fn entries(&self) -> usize {
        self.chunks.len()
    }

    /// Offsets and chunks, as [`crate::ops::attention::HostRoutes`] has them: waits for the card.
    ///
    /// # Errors
    /// When it fails.
    pub fn lists(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let (counts, chunks) = (self.counts.download::<u32>()?, self.chunks.download::<u32>()?);
        let (mut offsets, mut all) = (vec![0], Vec::new());
        for (count, list) in counts.iter().zip(chunks.chunks(self.most)) {
            all.extend_from_slice(&list[..*count as usize]);
            offsets.push(all.len() as u32);
        }
        Ok((offsets, all))
    }

    /// Of each filled place its number, in the order of [`ChunkLists::lists`]: waits for the card.
    ///
    /// # Errors
    /// When it fails.
    pub fn filled(&self) -> Result<Vec<usize>> {
        let counts = self.counts.download::<u32>()?;
        let of = |(row, &count): (usize, &u32)| (0..count as usize).map(move |i| row * self.most + i);
        Ok(counts.iter().enumerate().flat_map(of).collect())
    }
}
