//! What the machine does at best.

use std::hint::black_box;
use std::time::Instant;

use dash_core::device::{level, multiply_add_probe};
use dash_core::{Compute, DType, Device, Result as CoreResult, Tape, Tensor, ops};

use crate::failure::Result;

/// What the machine does at best.
#[derive(Debug, Clone, Copy)]
pub struct Ceilings {
    /// Operations a second: f32 on a CPU, products of bf16 on a GPU.
    pub flops: f64,
    /// Bytes read plus bytes written a second.
    pub bytes: f64,
}

/// Waits until everything that was asked of the device is done.
pub fn wait(device: &Device) -> CoreResult<()> {
    match device {
        Device::Cpu(_) => Ok(()),
        Device::Cuda(gpu) => gpu.wait("bench"),
    }
}

/// Seconds of the fastest of `n` runs.
pub fn best(n: usize, mut f: impl FnMut()) -> f64 {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..n).map(|_| time(&mut f)).fold(f64::MAX, f64::min)
}

/// Rows and columns of the product, and numbers of the sum, that a card is measured with.
const PRODUCT: usize = 8192;
const SUM: usize = 1 << 28;

/// Of a card: a large product of bf16, and a sum in place of numbers that no cache holds, which reads two and writes one.
fn of_card(device: &Device) -> CoreResult<Ceilings> {
    let mut rng = dash_core::rng::Rng::new(1);
    let tape = Tape::inference().computing(Compute::Bf16);
    let x = tape.leaf(Tensor::normal(device, &[PRODUCT, PRODUCT], DType::F32, 1.0, &mut rng)?);
    black_box(ops::linear(&tape, &x, &x)?);
    let product = |times: usize| {
        (0..times).try_for_each(|_| ops::linear(&tape, &x, &x).map(|y| _ = black_box(y))).and_then(|()| wait(device))
    };
    product(2)?;
    let seconds = best(3, || product(8).expect("it has run before")) / 8.0;
    let flops = 2.0 * (PRODUCT as f64).powi(3) / seconds;
    let (mut sum, x) = (Tensor::zeros(device, &[SUM], DType::F32)?, Tensor::full(device, &[SUM], DType::F32, 1.0)?);
    let mut add = || (0..8).try_for_each(|_| sum.accumulate(&x)).and_then(|()| wait(device));
    add()?;
    let seconds = best(3, || add().expect("it has run before")) / 8.0;
    Ok(Ceilings { flops, bytes: 12.0 * SUM as f64 / seconds })
}

/// Measures both ceilings, on all threads of a CPU.
///
/// # Errors
/// When a card fails or has too little memory: 4 GB are needed.
pub fn ceilings(device: &Device) -> Result<Ceilings> {
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(_) => return Ok(of_card(device)?),
    };
    let threads = cpu.threads();
    let mut done = 0;
    let seconds = best(5, || {
        done = cpu
            .map(threads, |_| {
                multiply_add_probe(level(), 2_000_000, |x| {
                    black_box(x);
                })
            })
            .into_iter()
            .sum();
    });
    let flops = done as f64 / seconds;
    let n = 32 << 20;
    let (from, mut to) = (vec![1.0f32; n], vec![0.0f32; n]);
    let piece = n / threads / 4;
    let seconds =
        best(5, || cpu.for_pieces(&mut to, piece, |i, out| out.copy_from_slice(&from[i * piece..][..out.len()])));
    black_box(&to);
    Ok(Ceilings { flops, bytes: 8.0 * n as f64 / seconds })
}
