//! What a run logs of a choice: found where the routes live, and read in one piece, so that a step is handed to a device whole before the host
//! waits for any of it.

use super::host_routes::HostRoutes;
use crate::error::{Result, ensure};
use crate::tensor::Tensor;

/// Numbers before the histogram in what a device finds.
pub(super) const SUMS: usize = 4;

/// What [`super::Routes::figures`] finds.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteFigures {
    /// `histogram[n]`: (batch, kv head, query) triples behind the first chunk that attend n chunks, the own one included.
    pub histogram: Vec<u64>,
    /// Over the same the sum of attended over visible chunks.
    pub density: f64,
    /// The sum of |bias| over the entries of other chunks than the own one; 0 without a bias.
    pub bias_sum: f64,
    /// The largest of them.
    pub bias_max: f64,
    /// The mean number of tokens that a query attends, as [`super::Routes::mean_tokens`].
    pub tokens: f64,
}

/// Figures on their way.
#[derive(Debug)]
pub struct AskedFigures(Asked);

#[derive(Debug)]
enum Asked {
    Found(RouteFigures),
    /// `SUMS` numbers and the histogram over every count, f64.
    Device(Tensor),
}

impl AskedFigures {
    pub(super) fn found(figures: RouteFigures) -> Self {
        AskedFigures(Asked::Found(figures))
    }

    pub(super) fn on_device(numbers: Tensor) -> Self {
        AskedFigures(Asked::Device(numbers))
    }

    /// Waits for the device.
    ///
    /// # Errors
    /// When it fails.
    pub fn read(&self) -> Result<RouteFigures> {
        let numbers = match &self.0 {
            Asked::Found(figures) => return Ok(figures.clone()),
            Asked::Device(numbers) => numbers.to_f64()?,
        };
        ensure!(numbers.len() > SUMS, "routes", "{} figures of routes", numbers.len());
        let (sums, counts) = numbers.split_at(SUMS);
        let end = counts.iter().rposition(|&n| n > 0.0).map_or(0, |last| last + 1);
        let histogram = counts[..end].iter().map(|&n| n as u64).collect();
        Ok(RouteFigures { histogram, density: sums[0], bias_sum: sums[1], bias_max: sums[2], tokens: sums[3] })
    }
}

impl HostRoutes {
    /// See [`super::Routes::figures`].
    ///
    /// # Errors
    /// When the bias is of other routes, or the device fails.
    pub fn figures(&self, bias: Option<&Tensor>) -> Result<RouteFigures> {
        let bias = bias.map(|bias| self.per_entry(bias)).transpose()?;
        let ((batch, kv_heads, queries), chunk) = (self.extents(), self.chunk_size());
        let none = RouteFigures { histogram: Vec::new(), density: 0.0, bias_sum: 0.0, bias_max: 0.0, tokens: 0.0 };
        let mut out = RouteFigures { tokens: self.mean_tokens(), ..none };
        for (row, query) in (0..batch * kv_heads).flat_map(|row| (0..queries).map(move |query| (row, query))) {
            let entries = self.entries_of(row / kv_heads, row % kv_heads, query);
            for b in bias.iter().flat_map(|b| &b[entries.start..entries.end - 1]) {
                out.bias_sum += b.abs();
                out.bias_max = out.bias_max.max(b.abs());
            }
            if query < chunk {
                continue;
            }
            let (active, visible) = (entries.len(), query / chunk + 1);
            out.density += active as f64 / visible as f64;
            if out.histogram.len() <= active {
                out.histogram.resize(active + 1, 0);
            }
            out.histogram[active] += 1;
        }
        Ok(out)
    }
}
