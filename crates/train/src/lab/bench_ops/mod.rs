//! `bench --ops`: every op, and every attention variant as a whole, at the sizes of a configuration, against what the machine can do.
//!
//! Two ceilings are measured first: fused multiply-adds that touch no memory, and a copy that fits no cache. An op's
//! floor is the larger of operations / multiply-add rate and bytes / copy rate, where bytes counts each input read once
//! and each output written once; its share is floor / time.

mod attention;
mod ceilings;
mod layers;
mod optimizer;
mod variants;

use std::hint::black_box;
use std::time::Instant;

use dash_core::rng::Rng;
use dash_core::{DType, Device, Result as CoreResult, Tape, Tensor, Var};
use serde_json::{Value, json};

pub use ceilings::{Ceilings, ceilings};

use super::timing::spread;
use crate::config::Config;
use crate::console::print_line;
use crate::failure::Result;
use crate::training::device::device as device_of;
use attention::{Qkv, Routed};

/// What an op's floor is counted from, forward + backward.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// f32 operations.
    flops: f64,
    /// f32 numbers read once and written once.
    elements: f64,
}

/// What was measured of an op.
struct OpTime {
    name: String,
    seconds: f64,
    flops: f64,
    bytes: f64,
}

/// Extents of a configuration.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    width: usize,
    ffn: usize,
    vocab: usize,
}

impl Sizes {
    fn of(config: &Config) -> Self {
        let (m, d) = (&config.model, &config.data);
        Sizes {
            batch: d.batch_size,
            tokens: d.seq_len,
            heads: m.heads,
            kv_heads: m.kv_heads,
            head_dim: m.head_dim,
            width: m.width,
            ffn: m.ffn,
            vocab: d.vocab_size,
        }
    }

    /// Tokens of all sequences.
    fn rows(&self) -> usize {
        self.batch * self.tokens
    }

    /// Numbers of all queries.
    fn q(&self) -> f64 {
        (self.rows() * self.heads * self.head_dim) as f64
    }

    /// Numbers of all keys, or of all values.
    fn k(&self) -> f64 {
        (self.rows() * self.kv_heads * self.head_dim) as f64
    }

    /// Numbers of all hidden states.
    fn x(&self) -> f64 {
        (self.rows() * self.width) as f64
    }
}

/// The ops that are timed so far, and what times them.
struct Bench {
    device: Device,
    sizes: Sizes,
    steps: usize,
    rng: Rng,
    ops: Vec<OpTime>,
}

impl Bench {
    fn normal(&mut self, shape: &[usize]) -> CoreResult<Tensor> {
        Tensor::normal(&self.device, shape, DType::F32, 1.0, &mut self.rng)
    }

    fn add(&mut self, name: impl Into<String>, seconds: f64, cost: Cost) {
        self.ops.push(OpTime { name: name.into(), seconds, flops: cost.flops, bytes: 4.0 * cost.elements });
    }

    /// Times forward + backward of an op and adds it.
    fn time(
        &mut self,
        name: impl Into<String>,
        cost: Cost,
        inputs: &[Tensor],
        op: impl Fn(&Tape, &[Var]) -> CoreResult<Var>,
    ) -> Result<()> {
        let seconds = time(inputs, self.steps, op)?;
        self.add(name, seconds, cost);
        Ok(())
    }
}

/// Median seconds of forward, and backward from the output itself, after one run that warms up.
fn time(inputs: &[Tensor], steps: usize, f: impl Fn(&Tape, &[Var]) -> CoreResult<Var>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..steps + 1 {
        let tape = Tape::new();
        let vars: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
        let start = Instant::now();
        let y = f(&tape, &vars)?;
        let seed = y.value.clone();
        black_box(tape.backward_from(&y, seed)?);
        times.push(start.elapsed().as_secs_f64());
    }
    times.remove(0);
    Ok(spread(times).1)
}

/// Times every op, forward + backward, at the sizes of a configuration. With `density`, gamma is chosen so that the
/// random queries attend this share of the visible chunks.
///
/// # Errors
/// When an op refuses the sizes, or the density is out of reach.
pub fn ops(config: &Config, steps: usize, density: Option<f64>, as_json: bool) -> Result<()> {
    let device = device_of(config)?;
    let top = ceilings(&device)?;
    let sizes = Sizes::of(config);
    let mut bench = Bench { device, sizes, steps, rng: Rng::new(1), ops: Vec::new() };
    let qkv = Qkv::new(&mut bench)?;
    layers::time(&mut bench, &qkv.q)?;
    attention::time(&mut bench, &qkv)?;
    let routed = attention::time_routed(&mut bench, &qkv, &config.model.attention, density)?;
    variants::time(&mut bench, &qkv, config, routed)?;
    optimizer::time(&mut bench)?;
    print(&bench.ops, top, routed, as_json)
}

fn print(ops: &[OpTime], top: Ceilings, routed: Routed, as_json: bool) -> Result<()> {
    if as_json {
        let row = |r: &OpTime| json!({"op": r.name, "ms": r.seconds * 1e3, "gflop": r.flops / 1e9, "mb": r.bytes / 1e6, "share": share(r, top)});
        let all: Vec<Value> = ops.iter().map(row).collect();
        let line = json!({"multiply_add_gflops": top.flops / 1e9, "copy_gb_s": top.bytes / 1e9, "density": routed.density, "ops": all});
        print_line!("{line}")?;
        return Ok(());
    }
    print_line!(
        "multiply-add {:.0} GFLOP/s, copy {:.1} GB/s; block attention at density {:.3}, {:.1} chunks a query",
        top.flops / 1e9,
        top.bytes / 1e9,
        routed.density,
        routed.chunks_a_query
    )?;
    print_line!(
        "{:<24}{:>10}{:>10}{:>10}{:>12}{:>8}",
        "op, forward+backward",
        "ms",
        "GFLOP",
        "MB",
        "GFLOP/s",
        "share"
    )?;
    for r in ops {
        print_line!(
            "{:<24}{:>10.3}{:>10.3}{:>10.1}{:>12.1}{:>7.0}%",
            r.name,
            r.seconds * 1e3,
            r.flops / 1e9,
            r.bytes / 1e6,
            r.flops / r.seconds / 1e9,
            100.0 * share(r, top)
        )?;
    }
    Ok(())
}

fn share(r: &OpTime, top: Ceilings) -> f64 {
    (r.flops / top.flops).max(r.bytes / top.bytes) / r.seconds
}
