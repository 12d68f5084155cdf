//! What the machine does at best.

use std::hint::black_box;
use std::time::Instant;

use dash_core::Device;
use dash_core::device::{level, multiply_add_probe};

use crate::failure::{Failure, Result};

/// What the machine does at best.
#[derive(Debug, Clone, Copy)]
pub struct Ceilings {
    /// f32 operations a second.
    pub flops: f64,
    /// Bytes read plus bytes written a second.
    pub bytes: f64,
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

/// Measures both ceilings on all threads of the device.
///
/// # Errors
/// On a GPU, whose ceilings are another program's: `cargo run -p dash-core --example cuda_probe`.
pub fn ceilings(device: &Device) -> Result<Ceilings> {
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(_) => {
            return Err(Failure::request("bench --ops measures a CPU; leave --ops out, or set run.device = \"cpu\""));
        }
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
