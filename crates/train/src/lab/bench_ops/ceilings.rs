//! What the machine does at best.

use std::hint::black_box;
use std::time::Instant;

use dash_core::Device;
use dash_core::device::{level, multiply_add_probe};

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
pub fn ceilings(device: &Device) -> Ceilings {
    let Device::Cpu(cpu) = device;
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
    Ceilings { flops, bytes: 8.0 * n as f64 / seconds }
}
