//! `bench --ops`: every op, and every attention variant as a whole, at the sizes of a configuration, against what the machine can do.
//!
//! Two ceilings are measured first: fused multiply-adds that touch no memory (on a card a large product), and a copy (on a card a sum)
//! that fits no cache. An op's
//! floor is the larger of operations / multiply-add rate and bytes / copy rate, where bytes counts each input read once
//! and each output written once; its share is floor / time.

mod attention;
mod bench;
mod ceilings;
mod decode;
mod layers;
mod optimizer;
mod variants;

use dash_core::rng::Rng;
use serde_json::{Value, json};

pub use ceilings::{Ceilings, ceilings};

use crate::config::Config;
use crate::console::print_line;
use crate::failure::Result;
use crate::training::device::device as device_of;
use attention::{Attended, Qkv};
use bench::{Bench, OpTime, Sizes};

/// Times every op, forward + backward, at the sizes of a configuration. With `density`, gamma is chosen so that the
/// random queries attend this share of the visible chunks.
///
/// # Errors
/// When an op refuses the sizes, or the density is out of reach.
pub fn ops(config: &Config, steps: usize, density: Option<f64>, as_json: bool) -> Result<()> {
    let device = device_of(config)?;
    let top = ceilings(&device)?;
    let sizes = Sizes::of(config);
    let compute = config.model.compute.into();
    let mut bench = Bench { device, sizes, steps, rng: Rng::new(1), ops: Vec::new(), compute };
    let qkv = Qkv::new(&mut bench)?;
    layers::time(&mut bench, &qkv.q)?;
    attention::time(&mut bench, &qkv)?;
    let routed = attention::time_routed(&mut bench, &qkv, &config.model.attention, density)?;
    decode::time(&mut bench, &qkv, &config.model.attention, routed)?;
    variants::time(&mut bench, &qkv, config, routed)?;
    optimizer::time(&mut bench)?;
    print(&bench.ops, top, routed, as_json)
}

fn print(ops: &[OpTime], top: Ceilings, routed: Attended, as_json: bool) -> Result<()> {
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
    print_line!(
        "MB: numbers that are read once and written once at least, of 4 bytes, or 2 where products round their operands to bf16. \
         decode, one token after the kept ones of each sequence, is forward alone. \
         share: floor / time, where the floor is the larger of GFLOP / multiply-add rate and MB / copy rate; above 100 % the \
         numbers stayed in a cache, which the copy cannot"
    )
}

fn share(r: &OpTime, top: Ceilings) -> f64 {
    (r.flops / top.flops).max(r.bytes / top.bytes) / r.seconds
}
