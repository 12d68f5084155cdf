//! What a run will cost, printed before it starts.

use std::sync::Arc;
use std::time::Instant;

use dash_core::{DType, Device, Tape, Tensor, ops};
use dash_data::Shard;
use dash_model::{Model, flops};

use crate::config::Config;

/// Share of the measured matrix-product rate that a whole step reaches: what this trainer measures on bench-cpu.toml.
const STEP_EFFICIENCY: f64 = 0.75;

/// Bytes of the program itself, its threads and the scratch memory of their tasks: measured, 16 to 20 MB.
const PROCESS: f64 = 18e6;

/// Bytes that a training process needs at its peak: weights, gradients and two moments, and what the tape keeps for backward.
pub fn memory_bytes(config: &Config, params: usize) -> f64 {
    let m = &config.model;
    let tokens = (config.data.seq_len * config.data.batch_size) as f64;
    // gate and up are kept in panels of 32 features
    let (c, f) = (m.width as f64, m.ffn.next_multiple_of(32) as f64);
    let (h, g, d) = (m.heads as f64, m.kv_heads as f64, m.head_dim as f64);
    // Kept per token and layer: block input and its norm, q k v before rope is freed, q k after, attention output and
    // lse, residual, its norm, gate, up.
    let layer = 4.0 * c + 2.0 * h * d + 2.0 * g * d + h + 2.0 * f;
    let own = m.attention.cost(m, config.data.seq_len).kept;
    let logits = 1024.0f64.min(tokens) * config.data.vocab_size as f64;
    let head = 2.0 * tokens * c + config.data.vocab_size as f64 * c;
    // the feed-forward layer with the gradient that enters it, or attention
    let ffn = tokens * c + ops::swiglu_scratch(config.data.seq_len * config.data.batch_size, m.width, m.ffn) as f64;
    let backward = ffn.max(tokens * (4.0 * h * d + 4.0 * g * d));
    // with recomputation: every block's input, and one block in full
    let layers = m.layers as f64;
    let kept = if m.recompute { layers * c + layer + own } else { layers * (layer + own) };
    PROCESS + 4.0 * (4.0 * params as f64 + tokens * kept + logits + head + backward)
}

/// Rate of a 512-cubed product on this device, in FLOP/s: best of twenty, 30 ms in all.
///
/// # Errors
/// When the device fails.
pub fn matmul_rate(device: &Device) -> dash_core::Result<f64> {
    let tape = Tape::inference();
    let x = tape.leaf(Tensor::full(device, &[512, 512], DType::F32, 0.5)?);
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        let product = ops::linear(&tape, &x, &x)?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
        drop(product);
    }
    Ok(2.0 * 512f64.powi(3) / best)
}

/// The report.
///
/// # Errors
/// When the device fails.
pub fn report(config: &Config, model: &Model, device: &Device, train: &[Arc<Shard>]) -> dash_core::Result<String> {
    let train_tokens: usize = train.iter().map(|s| s.len()).sum();
    let params = model.params().numel();
    let per_step = config.tokens_per_step();
    let total = per_step as f64 * config.run.steps as f64;
    let (t, attention) = (config.data.seq_len, &config.model.attention);
    let (listed, assumed) = match attention.listed(t) {
        Some(listed) => (listed, ""),
        None => (0.5 * (t as f64 + 1.0) / 2.0, " (assuming half of the tokens are attended)"),
    };
    let work = flops(&config.model, config.data.vocab_size, t, attention.attended(t, listed));
    let step_flops = work.total() * per_step as f64;
    let rate = matmul_rate(device)?;
    let seconds = step_flops * config.run.steps as f64 / (rate * STEP_EFFICIENCY);
    let attention = match attention.chunk_size() {
        None => attention.kind().to_string(),
        Some(size) => format!("{}, {} chunks of {size}", attention.kind(), t.div_ceil(size)),
    };
    let task = config.task.as_ref().map(|t| format!("task {}", serde_json::json!(t.kind).as_str().unwrap_or_default()));
    let text = (train_tokens > 0).then(|| {
        let epochs = total / train_tokens as f64;
        format!("{:.1} M tokens of text ({epochs:.2} epochs)", train_tokens as f64 / 1e6)
    });
    let data = text.into_iter().chain(task).collect::<Vec<_>>().join(" and ");
    // the shards were just checked byte by byte, so that they count as resident
    let mapped = match train.iter().map(|s| s.bytes()).sum() {
        0usize => String::new(),
        bytes => format!(" and {:.0} MB of mapped text", bytes as f64 / 1e6),
    };
    Ok(format!(
        "run       {}\n\
         model     {:.2} M parameters, {} layers, width {}, {} heads, {} kv heads, attention {attention}\n\
         data      {}; this run sees {:.1} M tokens, {per_step} a step\n\
         compute   {:.1} GFLOP a step{assumed}; {} threads, {:.0} GFLOP/s in a matrix product\n\
         memory    about {:.0} MB{mapped}\n\
         time      about {}\n",
        config.folder().display(),
        params as f64 / 1e6,
        config.model.layers,
        config.model.width,
        config.model.heads,
        config.model.kv_heads,
        data,
        total / 1e6,
        step_flops / 1e9,
        match device {
            Device::Cpu(cpu) => cpu.threads(),
        },
        rate / 1e9,
        memory_bytes(config, params) / 1e6,
        duration(seconds),
    ))
}

/// Seconds for people.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}
