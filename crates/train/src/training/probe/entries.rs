//! One walk over the listed chunks of every query: what the router gave them, and the gradients of their scores.

use dash_core::ops::attention::HostRoutes;

/// Bins of u, the distance to the support edge: (1/2, 1], (1/4, 1/2], ... and the rest.
const EDGE_BINS: usize = 8;

/// What a layer's router left of every listed chunk. Of a hard choice there is the list alone.
pub struct Entries<'a> {
    /// Which chunks.
    pub list: &'a HostRoutes,
    /// Query heads.
    pub heads: usize,
    /// dL/d score, `[entries, group]`.
    pub scores: Option<&'a [f64]>,
    /// w `[entries]` and p `[entries, group]`.
    pub soft: Option<(&'a [f64], &'a [f64])>,
    /// alpha of the entmax, where there is one.
    pub alpha: Option<f64>,
}

/// Sums over the entries of queries with an earlier chunk; see the fields of the same names in [`super::LayerProbe`].
#[derive(Default)]
pub struct Figures {
    /// Such queries, over sequences and kv heads.
    rows: usize,
    /// By query head: sum of squares of dL/d score.
    squares: Vec<f64>,
    /// By bin: (sum of |dL/d score|, number).
    edge: [(f64, u64); EDGE_BINS],
    entropy: f64,
    support: f64,
    /// Largest |sum p - 1|.
    pub solver_error: f64,
    /// |dL/d score| of every entry and head.
    pub score_values: Vec<f64>,
    /// w of every entry.
    pub weights: Vec<f64>,
}

impl Entries<'_> {
    /// Walks all queries that have an earlier chunk.
    pub fn figures(&self) -> Figures {
        let (b, g, t) = self.list.extents();
        let mut out = Figures { squares: vec![0.0; self.heads], ..Figures::default() };
        for (bg, query) in (0..b * g).flat_map(|bg| (self.list.chunk_size()..t).map(move |query| (bg, query))) {
            self.add_query((bg / g, bg % g, query), self.heads / g, &mut out);
        }
        out
    }

    fn add_query(&self, (batch, kv, query): (usize, usize, usize), group: usize, out: &mut Figures) {
        let entries = self.list.entries_of(batch, kv, query);
        let routed = entries.start..entries.end - 1;
        out.rows += 1;
        out.support += routed.len() as f64;
        let Some((w, p)) = self.soft else { return };
        let mut sums = vec![0.0; group];
        for e in routed {
            out.entropy -= w[e] * w[e].ln();
            out.weights.push(w[e]);
            let p = &p[e * group..][..group];
            (0..group).for_each(|i| sums[i] += p[i]);
            let Some(ds) = self.scores else { continue };
            for i in 0..group {
                let size = ds[e * group + i].abs();
                out.squares[kv * group + i] += size * size;
                out.score_values.push(size);
                if let Some(alpha) = self.alpha.filter(|_| p[i] > 0.0) {
                    let u = p[i].powf(alpha - 1.0);
                    let bin = ((-u.log2()).floor().max(0.0) as usize).min(EDGE_BINS - 1);
                    out.edge[bin].0 += size;
                    out.edge[bin].1 += 1;
                }
            }
        }
        sums.iter().for_each(|sum| out.solver_error = out.solver_error.max((sum - 1.0).abs()));
    }
}

impl Figures {
    /// |dL/d scores| by query head.
    pub fn norms(&self) -> Vec<f64> {
        self.squares.iter().map(|x| x.sqrt()).collect()
    }

    /// Mean entropy of w in nats.
    pub fn entropy(&self) -> f64 {
        self.entropy / self.rows.max(1) as f64
    }

    /// Mean number of listed earlier chunks.
    pub fn support(&self) -> f64 {
        self.support / self.rows.max(1) as f64
    }

    /// By bin that is not empty: (upper bound of u, mean |dL/d score|, number).
    pub fn by_edge(&self) -> Vec<(f64, f64, u64)> {
        let bins = self.edge.iter().enumerate().filter(|(_, (_, n))| *n > 0);
        bins.map(|(bin, (sum, n))| (0.5f64.powi(bin as i32), sum / *n as f64, *n)).collect()
    }
}
