//! What a router did, and the figures a run reports of it.

use dash_core::ops::attention::{AskedFigures, RouteFigures, Routes, Routing};
use dash_core::{Error, Result, ScalarCell, Tensor};

/// The choice of one layer in one forward pass.
pub struct RouterTrace {
    /// One, or one for each group of documents.
    parts: Vec<Part>,
}

/// The choice for sequences of one length.
struct Part {
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

impl Part {
    fn of(routes: Routes) -> Self {
        Part { routes, bias: None, soft: None, score_gradient: ScalarCell::default(), indexer_loss: None }
    }

    fn ask(&self) -> Result<AskedPart> {
        let ((b, g, t), chunk) = (self.routes.extents(), self.routes.chunk_size());
        Ok(AskedPart {
            figures: self.routes.figures(self.bias.as_ref())?,
            queries: (b * g * t) as u64,
            rows: (b * g * t.saturating_sub(chunk)) as u64,
            score_gradient: self.score_gradient.clone(),
            indexer_loss: self.indexer_loss.clone(),
        })
    }
}

impl RouterTrace {
    /// A hard choice.
    pub fn hard(routes: Routes) -> Self {
        RouterTrace { parts: vec![Part::of(routes)] }
    }

    /// The same with the scalar that an indexer is trained by.
    pub(crate) fn with_indexer_loss(mut self, loss: Tensor) -> Self {
        self.parts.iter_mut().for_each(|part| part.indexer_loss = Some(loss.clone()));
        self
    }

    /// A choice with a bias.
    pub fn soft(routing: Routing) -> Self {
        RouterTrace {
            parts: vec![Part {
                routes: routing.routes,
                bias: Some(routing.bias.value),
                soft: Some((routing.weights, routing.heads)),
                score_gradient: routing.score_gradient,
                indexer_loss: None,
            }],
        }
    }

    /// The choices of the groups of documents of a pass; `None` of none.
    pub(crate) fn joined(traces: Vec<Self>) -> Option<Self> {
        let parts: Vec<Part> = traces.into_iter().flat_map(|trace| trace.parts).collect();
        (!parts.is_empty()).then_some(RouterTrace { parts })
    }

    fn whole(&self) -> Result<&Part> {
        match &self.parts[..] {
            [whole] => Ok(whole),
            parts => Err(Error::invalid(
                "router",
                format!("the pass was over documents in {} groups, each with a choice of its own", parts.len()),
            )),
        }
    }

    /// Where the choice is soft: w `[entries]` and, where the device keeps it, each head's p `[entries, group]`, 0 for the own
    /// chunk.
    ///
    /// # Errors
    /// When the pass was over documents of several lengths.
    pub fn probabilities(&self) -> Result<Option<(&Tensor, Option<&Tensor>)>> {
        Ok(self.whole()?.soft.as_ref().map(|(w, p)| (w, p.as_ref())))
    }

    /// Who attended what, where it was computed.
    ///
    /// # Errors
    /// When the pass was over documents of several lengths: see [`RouterTrace::all_routes`].
    pub fn routes(&self) -> Result<&Routes> {
        Ok(&self.whole()?.routes)
    }

    /// [`RouterTrace::routes`] of every group of documents; one of a pass over whole sequences.
    pub fn all_routes(&self) -> impl Iterator<Item = &Routes> {
        self.parts.iter().map(|part| &part.routes)
    }

    /// Where backward leaves the norms of the gradients that reach the routing scores, of each group of documents.
    pub(crate) fn gradient_cells(&self) -> Vec<ScalarCell> {
        self.parts.iter().map(|part| part.score_gradient.clone()).collect()
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
        let parts = self.parts.iter().map(Part::ask).collect::<Result<_>>()?;
        Ok(AskedStats { parts, has_bias: self.parts.iter().any(|part| part.bias.is_some()) })
    }
}

/// Figures of one layer on their way.
pub struct AskedStats {
    parts: Vec<AskedPart>,
    has_bias: bool,
}

struct AskedPart {
    figures: AskedFigures,
    /// (batch, kv head, query) triples, all of them and those behind the first chunk
    queries: u64,
    rows: u64,
    score_gradient: ScalarCell,
    indexer_loss: Option<Tensor>,
}

impl AskedStats {
    /// Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(&self) -> Result<RouterStats> {
        let (mut histogram, mut density, mut bias_sum, mut bias_max) = (Vec::new(), 0.0, 0.0, 0.0f64);
        let (mut tokens, mut losses, mut gradients) = (0.0, None, Vec::with_capacity(self.parts.len()));
        let all: u64 = self.parts.iter().map(|part| part.queries).sum();
        for part in &self.parts {
            let found: RouteFigures = part.figures.read()?;
            let share = part.queries as f64 / all.max(1) as f64;
            histogram.resize(found.histogram.len().max(histogram.len()), 0);
            histogram.iter_mut().zip(&found.histogram).for_each(|(sum, rows)| *sum += rows);
            (density, bias_sum, bias_max) =
                (density + found.density, bias_sum + found.bias_sum, bias_max.max(found.bias_max));
            tokens += found.tokens * share;
            if let Some(loss) = &part.indexer_loss {
                *losses.get_or_insert(0.0) += loss.item()? * share;
            }
            gradients.push(part.score_gradient.read()?);
        }
        let of_rows: u64 = self.parts.iter().map(|part| part.rows).sum();
        let active: u64 = histogram.iter().zip(0..).map(|(&rows, n): (&u64, u64)| rows * n).sum();
        let rows = of_rows.max(1) as f64;
        let routed = if self.has_bias { active - of_rows } else { 0 };
        Ok(RouterStats {
            density: density / rows,
            active_chunks: active as f64 / rows,
            tokens,
            empty: histogram.get(1).copied().unwrap_or(0) as f64 / rows,
            histogram,
            bias_mean: bias_sum / routed.max(1) as f64,
            bias_max,
            score_gradient: match gradients[..] {
                // as it was found, without the rounding of a root
                [one] => one,
                _ => gradients.iter().map(|norm| norm.powi(2)).sum::<f64>().sqrt(),
            },
            indexer_loss: losses,
            rows: of_rows,
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
