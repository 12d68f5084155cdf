//! The figures of one layer.

use serde_json::{Value, json};

use super::split::Split;

/// What a probe saw of one layer.
#[derive(Debug, Clone)]
pub struct LayerProbe {
    /// Layer.
    pub layer: usize,
    /// dL/dq.
    pub q: Split,
    /// dL/dk.
    pub k: Split,
    /// dL/dq by query head.
    pub q_heads: Vec<Split>,
    /// dL/dk by key/value head.
    pub k_heads: Vec<Split>,
    /// |dL/d scores| by query head, over the listed chunks.
    pub scores: Vec<f64>,
    /// |dL/d indexer_q|; 0 where there is none.
    pub indexer: f64,
    /// Share of the visible (kv head, query, earlier chunk) triples whose score has a gradient.
    pub pairs_with_gradient: f64,
    /// Share of the chunks (sequence, kv head, chunk with a later query) that no query outside chose.
    pub dead_chunks: f64,
    /// The same, in this probe and the ones before, [`super::STAYS`] in all.
    pub stay_dead: f64,
    /// By bin of u = p^(alpha-1), from the edge outwards last: (upper bound, mean |dL/d score|, number).
    pub by_edge: Vec<(f64, f64, u64)>,
    /// Mean entropy of w in nats, and mean support size, over queries with an earlier chunk; 0 for a hard choice.
    pub entropy: f64,
    /// See [`LayerProbe::entropy`]; for a hard choice the number of its earlier chunks.
    pub support: f64,
    /// Largest |sum p - 1| over queries and heads; 0 for a hard choice.
    pub solver_error: f64,
    /// Chosen earlier chunks among the equally many with most dense attention, averaged.
    pub recall: f64,
    /// Dense attention's probability in the attended chunks, averaged.
    pub captured_mass: f64,
    /// |dL/d score| of every listed (chunk, head), for histograms.
    pub score_values: Vec<f64>,
    /// w of every listed chunk, for histograms.
    pub weights: Vec<f64>,
}

impl LayerProbe {
    /// For metrics.jsonl.
    pub fn json(&self) -> Value {
        let split = |s: &Split| json!({"router": s.router, "token": s.token, "share": s.share(), "cosine": s.cosine});
        let edge = self.by_edge.iter().map(|(u, mean, n)| json!({"u_at_most": u, "mean_abs": mean, "pairs": n}));
        let mut line = json!({
            "layer": self.layer, "score_grad_norm": self.scores.iter().map(|x| x * x).sum::<f64>().sqrt(),
            "indexer_q_grad_norm": self.indexer, "router_share_q": self.q.share(), "router_share_k": self.k.share(),
            "router_q": self.q.router, "token_q": self.q.token, "router_k": self.k.router, "token_k": self.k.token,
            "cosine_q": self.q.cosine, "cosine_k": self.k.cosine, "pairs_with_gradient": self.pairs_with_gradient,
            "dead_chunks": self.dead_chunks, "stay_dead": self.stay_dead, "entropy": self.entropy, "support": self.support,
            "solver_error": self.solver_error, "recall": self.recall, "captured_mass": self.captured_mass,
            "score_grad_norm_by_head": self.scores,
            "q_by_head": self.q_heads.iter().map(split).collect::<Vec<_>>(),
            "k_by_head": self.k_heads.iter().map(split).collect::<Vec<_>>(),
        });
        line["by_edge"] = edge.collect();
        for (u, mean, _) in &self.by_edge {
            line[format!("edge_u<={u}")] = json!(mean);
        }
        line
    }
}
