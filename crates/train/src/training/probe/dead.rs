//! Chunks that nobody chooses.

use std::collections::HashMap;

use dash_core::ops::attention::HostRoutes;

/// Probes that a chunk has to be dead in, one after the other, to count as staying dead.
pub const STAYS: u32 = 3;
/// For how many probes a (layer, chunk) has been dead, one after the other.
#[derive(Default)]
pub struct Dead(HashMap<(usize, usize), u32>);

impl Dead {
    /// (share of chunks that are dead, share that has been for [`STAYS`] probes).
    pub fn update(&mut self, layer: usize, list: &HostRoutes) -> (f64, f64) {
        let (b, g, t) = list.extents();
        let s = list.chunk_size();
        // a chunk without a later query cannot be chosen
        let n = t.div_ceil(s) - 1;
        let mut chosen = vec![false; b * g * n];
        for row in 0..b * g {
            for query in s..t {
                let chunks = list.chunks_of(row / g, row % g, query);
                chunks[..chunks.len() - 1].iter().for_each(|&c| chosen[row * n + c as usize] = true);
            }
        }
        let (mut dead, mut stay) = (0, 0);
        for (i, chosen) in chosen.iter().enumerate() {
            let count = self.0.entry((layer, i)).or_default();
            *count = if *chosen { 0 } else { *count + 1 };
            dead += (*count > 0) as usize;
            stay += (*count >= STAYS) as usize;
        }
        let all = chosen.len().max(1) as f64;
        (dead as f64 / all, stay as f64 / all)
    }
}
