//! `bench`: speed of a training step on random tokens.

use std::time::Instant;

use dash_core::Device;
use dash_core::rng::Rng;
use dash_data::{Batch, LoaderState, Packing};
use dash_model::flops;
use serde_json::json;

use super::timing::spread;
use crate::config::Config;
use crate::console::{print_line, tell};
use crate::failure::Result;
use crate::training::device::{device as device_of, threads};
use crate::training::preflight::{check_memory, gpu_memory_bytes, memory_bytes};
use crate::training::trainer::Trainer;

/// Peak resident memory of this process so far, in MB of 1e6 bytes; 0 where the system does not tell.
pub fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<f64>().ok()).unwrap_or(0.0) * 1024.0 / 1e6
}

/// The batches of one update, of random tokens.
fn random_batches(config: &Config, rng: &mut Rng) -> Vec<Batch> {
    let d = &config.data;
    let mut ids = || (0..d.batch_size * d.seq_len).map(|_| rng.below(d.vocab_size) as u32).collect::<Vec<u32>>();
    let mut batch = || Batch {
        inputs: ids().into(),
        targets: ids(),
        batch: d.batch_size,
        state: LoaderState::default(),
        questions: Vec::new(),
        documents: Vec::new(),
    };
    (0..d.grad_accum).map(|_| batch()).collect()
}

/// What of a run is timed: random tokens hold no documents, as is told where they would be taken apart.
pub fn timed(mut config: Config) -> Config {
    if config.data.document_mask || config.data.packing != Packing::default() {
        tell!(
            "note: bench times whole sequences of random tokens; data.document_mask and data.packing mean nothing to it"
        );
    }
    (config.data.document_mask, config.data.packing) = (false, Packing::default());
    config
}

/// One update for every line on standard input, answered with its milliseconds: for timing in turn with another program, so
/// that both meet the same disturbances.
///
/// # Errors
/// When a step fails.
pub fn steps_in_turn(config: &Config) -> Result<()> {
    check_memory(config)?;
    let mut trainer = Trainer::new(config, &device_of(config)?)?;
    let mut rng = Rng::new(config.run.seed);
    for _ in std::io::stdin().lines().map_while(std::result::Result::ok) {
        let batches = random_batches(config, &mut rng);
        let start = Instant::now();
        trainer.step(config, &batches, false)?;
        trainer.settle()?;
        print_line!("{}", start.elapsed().as_secs_f64() * 1e3)?;
    }
    Ok(())
}

/// Median over `steps` updates after two of warm-up.
///
/// # Errors
/// When a step fails.
pub fn step_speed(config: &Config, steps: usize, as_json: bool) -> Result<()> {
    check_memory(config)?;
    let device = device_of(config)?;
    let mut trainer = Trainer::new(config, &device)?;
    let mut rng = Rng::new(config.run.seed);
    let d = &config.data;
    let (mut times, mut density, mut listed) = (Vec::new(), 1.0, 0.0);
    for i in 0..steps + 2 {
        let batches = random_batches(config, &mut rng);
        let last = i == steps + 1;
        let start = Instant::now();
        let stats = trainer.step(config, &batches, last)?;
        trainer.settle()?;
        let elapsed = start.elapsed().as_secs_f64();
        if i >= 2 {
            times.push(elapsed);
        }
        if let Some(stats) = stats.filter(|s| last && !s.routers.is_empty()) {
            let n = stats.routers.len() as f64;
            density = stats.routers.iter().map(|l| l.router.density).sum::<f64>() / n;
            listed = stats.routers.iter().map(|l| l.router.tokens).sum::<f64>() / n;
        }
    }
    let (fastest, median, slowest) = spread(times);
    let tokens = config.tokens_per_step() as f64;
    let work = flops(&config.model, d.vocab_size, d.seq_len, config.model.attention.attended(d.seq_len, listed))
        .total()
        * tokens;
    // the threads of a CPU; a GPU is named and its own memory told
    let threads = threads(&device);
    let on = match &device {
        Device::Cpu(_) => format!("{threads} threads"),
        Device::Cuda(gpu) => format!("{device}, {:.0} MB of its memory at the peak", gpu.usage().peak as f64 / 1e6),
    };
    let params = trainer.model.params().numel();
    let predicted = match &device {
        Device::Cpu(_) => memory_bytes(config, params),
        Device::Cuda(_) => gpu_memory_bytes(config, params),
    } / 1e6;
    if as_json {
        let line = json!({
            "tokens_per_s": tokens / median, "step_ms": median * 1e3, "gflops": work / median / 1e9,
            "peak_rss_mb": peak_rss_mb(), "predicted_mb": predicted, "threads": threads, "steps": steps, "density": density,
            "device": device.to_string(), "fastest_ms": fastest * 1e3, "slowest_ms": slowest * 1e3,
        });
        print_line!("{line}")?;
    } else {
        print_line!(
            "{:.0} tokens/s, {:.1} ms a step (median of {steps}, {:.1} to {:.1}), {:.1} GFLOP/s, {on}, peak {:.0} MB \
             (predicted {predicted:.0})",
            tokens / median,
            median * 1e3,
            fastest * 1e3,
            slowest * 1e3,
            work / median / 1e9,
            peak_rss_mb()
        )?;
    }
    Ok(())
}

/// One decoder block, forward + backward, in dfdx and here, alternating in this process.
///
/// # Errors
/// When an op refuses.
pub fn peers(config: &Config, steps: usize, as_json: bool) -> Result<()> {
    let (dfdx, ours) = super::peer::block_speed(&device_of(config)?, steps)?;
    if as_json {
        print_line!("{}", json!({"dfdx_ms": dfdx * 1e3, "ours_ms": ours * 1e3, "ratio": dfdx / ours}))?;
    } else {
        print_line!(
            "one block, forward + backward: dfdx {:.1} ms, ours {:.1} ms, {:.1} times",
            dfdx * 1e3,
            ours * 1e3,
            dfdx / ours
        )?;
    }
    Ok(())
}
