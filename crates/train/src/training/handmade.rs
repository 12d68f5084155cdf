//! Models whose every weight is set by hand, so that a test can say what they answer without running one.
//!
//! All are in f64. Rotary angles are zero but for the first pair of a head: `rope_theta` is 1e300, so the pairs behind it turn by
//! 1e-37 a token and less. Norms divide by the root of the mean square of a row, whose square is 1 over the width for a row with a
//! single 1: after a norm that row has the root of the width there.

use std::path::Path;

use dash_core::{DType, Device, Tensor};
use dash_model::{Attention, Model, ModelConfig, Params};

use crate::config::Config;

/// configs/test.toml with some settings.
pub fn config(set: &[&str]) -> Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/test.toml");
    Config::load(&path, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap()
}

/// A decoder of one head whose parameters are zero but for norms, which are 1, and what `weight(name, shape)` gives.
fn model(config: ModelConfig, positions: usize, weight: impl Fn(&str, &[usize]) -> Option<Vec<f64>>) -> Model {
    let device = Device::cpu(1).unwrap();
    let vocab = config.width;
    let config = ModelConfig { rope_theta: 1e300, norm_eps: 1e-30, ..config };
    let fresh = Params::init(&config, vocab, 0, &device, DType::F64).unwrap();
    let find = |name: &str| {
        let shape = fresh.get(name)?.shape();
        let n = shape.iter().product();
        let plain = vec![if name.contains("norm") { 1.0 } else { 0.0 }; n];
        let data = weight(name.rsplit_once("layers.").map_or(name, |(_, rest)| rest), shape).unwrap_or(plain);
        Some(Tensor::from_vec(&device, shape, data).unwrap())
    };
    let params = Params::from_named(&config, vocab, find).unwrap();
    Model::with_params(config, params, positions).unwrap()
}

/// The identity `[rows, cols]` times `factor`.
fn identity(shape: &[usize], factor: f64) -> Vec<f64> {
    (0..shape[0] * shape[1]).map(|i| if i / shape[1] == i % shape[1] { factor } else { 0.0 }).collect()
}

/// Which keys a query of a token goes to, in one direction of the head: `q[token]` times `k[token]` over the root of the head's
/// width is the score.
pub struct Pull<'a> {
    /// By token.
    pub q: &'a [f64],
    /// By token.
    pub k: &'a [f64],
}

impl Pull<'_> {
    /// A projection `[d, c]` whose row 1 gives these numbers for the tokens.
    fn weights(shape: &[usize], by_token: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; shape[0] * shape[1]];
        // a normed embedding is the root of the width at its token
        let root = (shape[1] as f64).sqrt();
        out[shape[1]..][..by_token.len()].iter_mut().zip(by_token).for_each(|(w, x)| *w = x / root);
        out
    }
}

/// p(next | token) = `table[token][next]`, whatever came before: attention and feed-forward layer add nothing. `pull` moves the
/// router of the first layer; later layers route with scores of zero.
pub fn bigram(attention: Attention, layers: usize, positions: usize, table: &[[f64; 4]; 4], pull: &Pull) -> Model {
    let config =
        ModelConfig { attention, tie_embeddings: false, head_dim: 4, ..ModelConfig::new(layers, 4, (1, 1), 4) };
    model(config, positions, |name, shape| match name {
        "model.embed_tokens.weight" => Some(identity(shape, 1.0)),
        // hidden is 2 at the token: row `next` has ln p(next | token) / 2 in column `token`
        "lm_head.weight" => Some((0..16).map(|i| table[i % 4][i / 4].ln() / 2.0).collect()),
        "0.self_attn.q_proj.weight" => Some(Pull::weights(shape, pull.q)),
        "0.self_attn.k_proj.weight" => Some(Pull::weights(shape, pull.k)),
        _ => None,
    })
}

/// Answers with the token that its first layer attends; later layers add nothing and score all chunks alike. Hidden is 3 at that token and 1 at the query's own, over the root of 10 / 8.
/// Eight tokens, a head of 8.
pub fn reader(attention: Attention, layers: usize, positions: usize, pull: &Pull) -> Model {
    let config = ModelConfig { attention, head_dim: 8, ..ModelConfig::new(layers, 8, (1, 1), 4) };
    model(config, positions, |name, shape| match name {
        "model.embed_tokens.weight" => Some(identity(shape, 1.0)),
        "0.self_attn.v_proj.weight" => Some(identity(shape, 1.0)),
        // values are the root of 8 at their token
        "0.self_attn.o_proj.weight" => Some(identity(shape, 3.0 / 8f64.sqrt())),
        "0.self_attn.q_proj.weight" => Some(Pull::weights(shape, pull.q)),
        "0.self_attn.k_proj.weight" => Some(Pull::weights(shape, pull.k)),
        _ => None,
    })
}
