//! What a router did, and the figures a run reports of it.

use dash_core::ops::attention::{AskedFigures, RouteFigures, Routes, Routing};
use dash_core::{Result, ScalarCell, Tensor};

/// The choice of one layer in one forward pass.
pub struct RouterTrace {
    routes: Routes,
    bias: Option<Tensor>,
    soft: Option<(Tensor, Option<Tensor>)>,
    score_gradient: ScalarCell,
    indexer_loss: Option<Tensor>,
}

/// Figures of one layer. A *row* is a (batch, kv head, query) triple; rows in the first chunk have nothing to route and
/// do not count.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RouterStats {
    /// Mean over rows of attended chunks / visible chunks, the own chunk counted in both.
    pub density: f64,
    /// Mean over rows of attended chunks, the own one included.
    pub active_chunks: f64,
    /// Mean number of tokens in the attended chunks, over all queries, those of the first chunk included.
    pub tokens: f64,
    /// `histogram[n]`: rows that attend n chunks.
    pub histogram: Vec<u64>,
    /// Share of rows that attend no chunk but their own.
    pub empty: f64,
    /// Mean |bias| over routed chunks, in nats; 0 without a bias.
    pub bias_mean: f64,
    /// Largest |bias|, in nats.
    pub bias_max: f64,
    /// Norm of the gradient that reaches the routing scores; 0 before backward and where the choice has none.
    pub score_gradient: f64,
    /// The loss of an indexer that has one of its own, in nats; `None` elsewhere and in passes without a loss.
    pub indexer_loss: Option<f64>,
    /// Number of rows.
    pub rows: u64,
}

impl RouterTrace {
    /// A hard choice.
    pub fn hard(routes: Routes) -> Self {
        RouterTrace { routes, bias: None, soft: None, score_gradient: ScalarCell::default(), indexer_loss: None }
    }

    /// The same with the scalar that an indexer is trained by.
    pub(crate) fn with_indexer_loss(self, loss: Tensor) -> Self {
        RouterTrace { indexer_loss: Some(loss), ..self }
    }

    /// A choice with a bias.
    pub fn soft(routing: Routing) -> Self {
        RouterTrace {
            routes: routing.routes,
            bias: Some(routing.bias.value),
            soft: Some((routing.weights, routing.heads)),
            score_gradient: routing.score_gradient,
            indexer_loss: None,
        }
    }

    /// Where the choice is soft: w `[entries]` and, where the device keeps it, each head's p `[entries, group]`, 0 for the own
    /// chunk.
    pub fn probabilities(&self) -> Option<(&Tensor, Option<&Tensor>)> {
        self.soft.as_ref().map(|(w, p)| (w, p.as_ref()))
    }

    /// Who attended what, where it was computed.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// Where backward leaves the norm of the gradient that reaches the routing scores.
    pub(crate) fn gradient_cell(&self) -> ScalarCell {
        self.score_gradient.clone()
    }

    /// The figures; call after backward to have the gradient in them. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn stats(&self) -> Result<RouterStats> {
        self.ask()?.read()
    }

    /// Has the device find the figures, which whoever asked reads once the step is handed out.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn ask(&self) -> Result<AskedStats> {
        let ((b, g, t), chunk) = (self.routes.extents(), self.routes.chunk_size());
        Ok(AskedStats {
            figures: self.routes.figures(self.bias.as_ref())?,
            rows: (b * g * t.saturating_sub(chunk)) as u64,
            has_bias: self.bias.is_some(),
            score_gradient: self.score_gradient.clone(),
            indexer_loss: self.indexer_loss.clone(),
        })
    }
}

/// Figures of one layer on their way.
pub struct AskedStats {
    figures: AskedFigures,
    rows: u64,
    has_bias: bool,
    score_gradient: ScalarCell,
    indexer_loss: Option<Tensor>,
}

impl AskedStats {
    /// Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(&self) -> Result<RouterStats> {
        let RouteFigures { histogram, density, bias_sum, bias_max, tokens } = self.figures.read()?;
        let active: u64 = histogram.iter().zip(0..).map(|(&rows, n): (&u64, u64)| rows * n).sum();
        let rows = self.rows.max(1) as f64;
        let routed = if self.has_bias { active - self.rows } else { 0 };
        Ok(RouterStats {
            density: density / rows,
            active_chunks: active as f64 / rows,
            tokens,
            empty: histogram.get(1).copied().unwrap_or(0) as f64 / rows,
            histogram,
            bias_mean: bias_sum / routed.max(1) as f64,
            bias_max,
            score_gradient: self.score_gradient.read()?,
            indexer_loss: self.indexer_loss.as_ref().map(Tensor::item).transpose()?,
            rows: self.rows,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_core::{DType, Tape, testing};

    /// Five tokens in chunks of two, two kv heads: queries 2 and 3 see two chunks, query 4 sees three. Head 0 attends every chunk but
    /// chunk 1 from query 4; head 1 its own alone.
    fn routes() -> Routes {
        let chosen = Routes::from_choice(&testing::device(), (1, 2, 5), 2, |_, kv, query, chunks| {
            if kv == 0 && query >= 2 {
                chunks.push(0);
            }
        });
        chosen.unwrap()
    }

    #[test]
    fn figures_of_a_literal_choice() {
        let s = RouterTrace::hard(routes()).stats().unwrap();
        assert_eq!(s.rows, 6);
        // head 0: 2/2, 2/2, 2/3; head 1: 1/2, 1/2, 1/3
        assert!((s.density - (2.0 + 2.0 / 3.0 + 1.0 + 1.0 / 3.0) / 6.0).abs() < 1e-15, "{}", s.density);
        assert_eq!((s.active_chunks, s.empty, s.histogram), (1.5, 0.5, vec![0, 3, 3]));
        // own chunks 1 + 2 + 1 + 2 + 1 tokens a head, and two of chunk 0 for each of three queries of head 0
        assert_eq!(s.tokens, (7.0 + 7.0 + 6.0) / 10.0);
        assert_eq!((s.bias_mean, s.bias_max, s.score_gradient), (0.0, 0.0, 0.0));
    }

    #[test]
    fn biases_count_by_size_and_without_the_own_chunks() {
        let routes = routes();
        let host = routes.to_host().unwrap();
        // every own chunk 9; the three chosen ones -1, 2, -3
        let mut bias = vec![9.0; host.len()];
        [2, 3, 4].iter().zip([-1.0, 2.0, -3.0]).for_each(|(&q, b)| bias[host.entries_of(0, 0, q).start] = b);
        let entries = |x: &[f64]| routes.entries_from_host(x, DType::F64).unwrap();
        let (weights, bias) = (entries(&vec![0.5; host.len()]), entries(&bias));
        let routing = Routing {
            bias: Tape::inference().leaf(bias),
            heads: None,
            weights,
            score_gradient: ScalarCell::default(),
            routes,
        };
        let s = RouterTrace::soft(routing).stats().unwrap();
        assert_eq!((s.bias_mean, s.bias_max), (2.0, 3.0));
    }

    #[test]
    fn a_sequence_of_one_chunk_has_nothing_to_route() {
        let one = Routes::from_choice(&testing::device(), (2, 1, 2), 2, |_, _, _, _| {}).unwrap();
        let s = RouterTrace::hard(one).stats().unwrap();
        assert_eq!((s.rows, s.density, s.active_chunks, s.empty, s.tokens), (0, 0.0, 0.0, 0.0, 1.5));
    }
}
