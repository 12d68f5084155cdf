//! The launch: one block, a thread a norm.

use super::{ENOUGH, WINDOW};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};

static SOURCE: Source = Source { name: "spike_guard", text: include_str!("kernel.cu") };

fn unit() -> Unit {
    Unit::new(&SOURCE, [("WINDOW", WINDOW.to_string()), ("ENOUGH", ENOUGH.to_string())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    vec![unit()]
}

/// Scale and what the norm exceeded, one f64 each, from norm and clip factor; the norm goes into the window.
///
/// # Errors
/// When memory runs out, or a buffer is not of f64 or of another length.
pub fn spike_guard(state: &mut CudaBuffer, [norm, factor]: [&CudaBuffer; 2], limit: f64) -> Result<[CudaBuffer; 2]> {
    let (op, device) = ("spike_guard", norm.device());
    for (x, len) in [(&*state, 1 + WINDOW), (norm, 1), (factor, 1)] {
        ensure!((x.kind(), x.len()) == (Kind::F64, len), op, "{x:?} is not {len} f64");
    }
    let (scale, exceeded) = (device.alloc(op, Kind::F64, 1)?, device.alloc(op, Kind::F64, 1)?);
    let buffers = [&*state, norm, factor, &scale, &exceeded].map(Arg::Buffer);
    let args = [&buffers[..], &[Arg::F64(limit)]].concat();
    // SAFETY: the kernel's parameters in order; one block with a thread for every place of the window.
    unsafe { device.kernel(&unit(), "spike_guard")?.launch(Grid::line(1, WINDOW as u32), &args)? };
    Ok([scale, exceeded])
}
