//! Floating-point operations of a training step, counted, so that a speed can be put next to the hardware's limit.

use crate::config::ModelConfig;

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

/// Operations per token at sequence length `t`, when a query attends `attended` keys on average
/// ([`crate::attention::Variant::attended`]).
pub fn flops(c: &ModelConfig, vocab: usize, t: usize, attended: f64) -> Flops {
    let (h, g, d) = (c.heads as f64, c.kv_heads as f64, c.head_dim as f64);
    let (width, layers) = (c.width as f64, c.layers as f64);
    let own = c.attention.cost(c, t);
    let block = 2.0 * width * h * d + 2.0 * width * g * d + 3.0 * width * c.ffn as f64 + own.products;
    Flops {
        matmul: 6.0 * (layers * block + width * vocab as f64),
        attention: 3.0 * layers * 4.0 * h * d * attended,
        routing: layers * 2.0 * h * d * own.candidates.floor(),
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
            attention: crate::Dense {}.into(),
        };
        let f = flops(&c, 4096, 1024, c.attention.attended(1024, 0.0));
        // 6 x (2 x 65536 + 2 x 16384 + 3 x 176128) + 1048576 = 5,201,920 matrix elements
        assert_eq!(f.matmul, 6.0 * 5_201_920.0);
        assert_eq!(f.attention, 6.0 * 12.0 * 256.0 * 512.5);
        assert_eq!(f.routing, 0.0);
    }
}
