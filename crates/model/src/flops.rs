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

    use crate::{Attention, Dash, Dense, InfLlmV2, Nsa, TokenEntmax, TopK};

    fn benchmark(attention: impl Into<Attention>) -> ModelConfig {
        ModelConfig { attention: attention.into(), ..ModelConfig::new(6, 256, (8, 2), 688) }
    }

    #[test]
    fn the_benchmark_model_is_counted_by_hand() {
        let c = benchmark(Dense {});
        let f = flops(&c, 4096, 1024, c.attention.attended(1024, 0.0));
        // 6 x (2 x 65536 + 2 x 16384 + 3 x 176128) + 1048576 = 5,201,920 matrix elements
        assert_eq!(f.matmul, 6.0 * 5_201_920.0);
        assert_eq!(f.attention, 6.0 * 12.0 * 256.0 * 512.5);
        assert_eq!(f.routing, 0.0);
    }

    #[test]
    fn every_variant_is_counted_by_hand() {
        // 512 tokens, chunks of 32: (512 + 1) / 2 visible tokens are 8.02 chunks, 32.06 windows of stride 8
        let count = |attention: Attention| {
            let c = benchmark(attention);
            let f = flops(&c, 4096, 512, attention.attended(512, 100.0));
            let matrices = f.matmul / 6.0 - 5_201_920.0;
            (matrices / 6.0, f.attention / (6.0 * 12.0 * 256.0), f.routing / (6.0 * 2.0 * 256.0))
        };
        assert_eq!(count(TokenEntmax::default().into()), (0.0, 256.5, 0.0));
        assert_eq!(count(Dash { chunk_size: 32, ..Dash::default() }.into()), (0.0, 100.0, 8.0));
        assert_eq!(count(TopK { chunk_size: 32, ..TopK::default() }.into()), (0.0, 100.0, 8.0));
        let windows = InfLlmV2 { chunk_size: 32, length: 16, stride: 8, ..InfLlmV2::default() };
        assert_eq!(count(windows.into()), (0.0, 100.0, 32.0));
        let nsa = Nsa { chunk_size: 32, length: 16, stride: 8, window: 64, ..Nsa::default() };
        // keys and values of two branches 4 x 256 x 64, gates 3 x 8 x 256, compression 2 x (16 / 8) windows x 2 x 32 x 32
        let own = 65_536.0 + 6_144.0 + 8_192.0;
        // a sliding window: 64 keys, less 63 + 62 + ... + 0 in all at the start; windows end at tokens 15, 23, 31, ...
        let sliding = 64.0 - 2016.0 / 512.0;
        let compressed = (0..512).map(|q| if q < 15 { 0 } else { (q - 15) / 8 + 1 }).sum::<i32>() as f64 / 512.0;
        assert_eq!(count(nsa.into()), (own, 100.0 + sliding + compressed, 32.0));
    }
}
