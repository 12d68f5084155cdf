//! What times an op, and the extents at which it does.

use std::hint::black_box;
use std::time::Instant;

use dash_core::rng::Rng;
use dash_core::{Compute, DType, Device, Result as CoreResult, Tape, Tensor, Var};

use super::super::timing::spread;
use super::ceilings::wait;
use crate::config::Config;
use crate::failure::Result;

/// What an op's floor is counted from, forward + backward.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Operations.
    pub flops: f64,
    /// Numbers read once and written once.
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
    /// How operands of products are rounded.
    pub compute: Compute,
}

impl Bench {
    pub fn normal(&mut self, shape: &[usize]) -> CoreResult<Tensor> {
        Tensor::normal(&self.device, shape, DType::F32, 1.0, &mut self.rng)
    }

    pub fn add(&mut self, name: impl Into<String>, seconds: f64, cost: Cost) {
        let number = match self.compute {
            Compute::Full => 4.0,
            Compute::Bf16 => 2.0,
        };
        self.push(name.into(), seconds, cost, number);
    }

    /// Of an op all of whose numbers are f32 whatever products take.
    pub fn add_f32(&mut self, name: impl Into<String>, seconds: f64, cost: Cost) {
        self.push(name.into(), seconds, cost, 4.0);
    }

    fn push(&mut self, name: String, seconds: f64, cost: Cost, number: f64) {
        self.ops.push(OpTime { name, seconds, flops: cost.flops, bytes: number * cost.elements });
    }

    /// Times forward + backward of an op and adds it.
    pub fn time(
        &mut self,
        name: impl Into<String>,
        cost: Cost,
        inputs: &[Tensor],
        op: impl Fn(&Tape, &[Var]) -> CoreResult<Var>,
    ) -> Result<()> {
        let seconds = time(&self.device, inputs, (self.steps, self.compute), op)?;
        self.add(name, seconds, cost);
        Ok(())
    }
}

/// Median seconds of forward, and backward from the output itself, after one run that warms up. A card is waited for.
pub fn time(
    device: &Device,
    inputs: &[Tensor],
    (steps, compute): (usize, Compute),
    f: impl Fn(&Tape, &[Var]) -> CoreResult<Var>,
) -> Result<f64> {
    median(steps, || {
        let tape = Tape::new().computing(compute);
        let vars: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
        let start = Instant::now();
        let y = f(&tape, &vars)?;
        let seed = y.value.clone();
        black_box(tape.backward_from(&y, seed)?);
        wait(device)?;
        Ok(start.elapsed().as_secs_f64())
    })
}

/// Median of the seconds that runs tell, after one that warms up.
pub fn median(steps: usize, run: impl Fn() -> CoreResult<f64>) -> Result<f64> {
    run()?;
    let times = (0..steps).map(|_| run()).collect::<CoreResult<Vec<f64>>>()?;
    Ok(spread(times).1)
}
