//! What times an op, and the extents at which it does.

use std::hint::black_box;
use std::time::Instant;

use dash_core::rng::Rng;
use dash_core::{DType, Device, Result as CoreResult, Tape, Tensor, Var};

use super::super::timing::spread;
use crate::config::Config;
use crate::failure::Result;

/// What an op's floor is counted from, forward + backward.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// f32 operations.
    pub flops: f64,
    /// f32 numbers read once and written once.
    pub elements: f64,
}

/// What was measured of an op.
pub struct OpTime {
    pub name: String,
    pub seconds: f64,
    pub flops: f64,
    pub bytes: f64,
}

/// Extents of a configuration.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub tokens: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub width: usize,
    pub ffn: usize,
    pub vocab: usize,
}

impl Sizes {
    pub fn of(config: &Config) -> Self {
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
    pub fn rows(&self) -> usize {
        self.batch * self.tokens
    }

    /// Numbers of all queries.
    pub fn q(&self) -> f64 {
        (self.rows() * self.heads * self.head_dim) as f64
    }

    /// Numbers of all keys, or of all values.
    pub fn k(&self) -> f64 {
        (self.rows() * self.kv_heads * self.head_dim) as f64
    }

    /// Numbers of all hidden states.
    pub fn x(&self) -> f64 {
        (self.rows() * self.width) as f64
    }
}

/// The ops that are timed so far, and what times them.
pub struct Bench {
    pub device: Device,
    pub sizes: Sizes,
    pub steps: usize,
    pub rng: Rng,
    pub ops: Vec<OpTime>,
}

impl Bench {
    pub fn normal(&mut self, shape: &[usize]) -> CoreResult<Tensor> {
        Tensor::normal(&self.device, shape, DType::F32, 1.0, &mut self.rng)
    }

    pub fn add(&mut self, name: impl Into<String>, seconds: f64, cost: Cost) {
        self.ops.push(OpTime { name: name.into(), seconds, flops: cost.flops, bytes: 4.0 * cost.elements });
    }

    /// Times forward + backward of an op and adds it.
    pub fn time(
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
pub fn time(inputs: &[Tensor], steps: usize, f: impl Fn(&Tape, &[Var]) -> CoreResult<Var>) -> Result<f64> {
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
