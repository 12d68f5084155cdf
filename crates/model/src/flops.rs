//! Floating-point operations of a training step, counted, so that a speed can be put next to the hardware's limit.

use crate::config::{Attention, ModelConfig};

/// Operations per token, forward and backward; a multiply-add counts as two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// Matrix products with parameters: 6 per matrix element (2 forward, 4 backward), the output projection included.
    pub matmul: f64,
    /// Query-key and probability-value products of the attended pairs: 4 h d forward, twice that backward (recomputation
    /// of the scores in backward is not counted), for the mean number of attended keys.
    pub attention: f64,
    /// Routing scores: 2 h d per visible chunk or window, forward only (backward is sparse).
    pub routing: f64,
}

impl Flops {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.matmul + self.attention + self.routing
    }
}

/// Operations per token at sequence length `t`, when a query attends `attended` keys on average ([`Attention::attended`]).
pub fn flops(c: &ModelConfig, vocab: usize, t: usize, attended: f64) -> Flops {
    let (h, g, d) = (c.heads as f64, c.kv_heads as f64, c.head_dim as f64);
    let (width, layers, t) = (c.width as f64, c.layers as f64, t as f64);
    let mut block = 2.0 * width * h * d + 2.0 * width * g * d + 3.0 * width * c.ffn as f64;
    let visible = (t + 1.0) / 2.0;
    let candidates = match c.attention {
        Attention::Dense | Attention::TokenEntmax { .. } => 0.0,
        Attention::TopK { chunk_size, .. } => visible / chunk_size as f64,
        Attention::Dash(s) => visible / s.chunk_size as f64,
        Attention::InfLlmV2(w) => visible / w.stride as f64,
        Attention::Nsa(n) => {
            // two more pairs of keys and values, the gates, and a window's key and value every `stride` tokens
            block += 4.0 * width * g * d + 3.0 * width * h;
            block += 2.0 * g * (n.windows.length as f64 / n.windows.stride as f64) * d * d;
            visible / n.windows.stride as f64
        }
    };
    Flops {
        matmul: 6.0 * (layers * block + width * vocab as f64),
        attention: 3.0 * layers * 4.0 * h * d * attended,
        routing: layers * 2.0 * h * d * candidates.floor(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmark_model_is_counted_by_hand() {
        let c = ModelConfig {
            layers: 6,
            width: 256,
            heads: 8,
            kv_heads: 2,
            head_dim: 32,
            ffn: 688,
            rope_theta: 1e4,
            norm_eps: 1e-6,
            tie_embeddings: true,
            init_std: 0.02,
            compute: Default::default(),
            recompute: false,
            attention: Attention::Dense,
        };
        let f = flops(&c, 4096, 1024, c.attention.attended(1024, 0.0));
        // 6 x (2 x 65536 + 2 x 16384 + 3 x 176128) + 1048576 = 5,201,920 matrix elements
        assert_eq!(f.matmul, 6.0 * 5_201_920.0);
        assert_eq!(f.attention, 6.0 * 12.0 * 256.0 * 512.5);
        assert_eq!(f.routing, 0.0);
    }
}
