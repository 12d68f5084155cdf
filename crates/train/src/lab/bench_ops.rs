//! `bench --ops`: every room at the sizes of a configuration, against what the machine can do.
//!
//! Two ceilings are measured first: fused multiply-adds that touch no memory, and a copy that fits no cache. A room's
//! floor is the larger of operations / multiply-add rate and bytes / copy rate, where bytes counts each input read once
//! and each output written once; its share is floor / time.

use std::hint::black_box;
use std::time::Instant;

use dash_core::device::{level, multiply_add_probe};
use dash_core::ops::attention::{
    Entmax, Span, block_attention, chunk_summary, dense_attention, entmax_routing, span_attention,
};
use dash_core::rng::Rng;
use dash_core::{DType, Device, Ids, Result as CoreResult, Tape, Tensor, Var, ops};
use dash_model::{Attention, Dash};
use serde_json::{Value, json};

use super::timing::spread;
use crate::config::Config;
use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::training::material::device as device_of;
use crate::training::router::{GAMMA, gamma_for};

/// What the machine does at best.
#[derive(Debug, Clone, Copy)]
pub struct Ceilings {
    /// f32 operations a second.
    pub flops: f64,
    /// Bytes read plus bytes written a second.
    pub bytes: f64,
}

/// Seconds of the fastest of `n` runs.
fn best(n: usize, mut f: impl FnMut()) -> f64 {
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
        best(5, || cpu.for_chunks(&mut to, piece, |i, out| out.copy_from_slice(&from[i * piece..][..out.len()])));
    black_box(&to);
    Ceilings { flops, bytes: 8.0 * n as f64 / seconds }
}

struct Room {
    name: &'static str,
    seconds: f64,
    flops: f64,
    bytes: f64,
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

/// Times every room, forward + backward, at the sizes of a configuration. With `density`, gamma is chosen so that the
/// random queries attend this share of the visible chunks.
///
/// # Errors
/// When an op refuses the sizes, or the density is out of reach.
pub fn rooms(config: &Config, steps: usize, density: Option<f64>, as_json: bool) -> Result<()> {
    let device = device_of(config)?;
    let top = ceilings(&device);
    let m = &config.model;
    let (b, t) = (config.data.batch_size, config.data.seq_len);
    let (h, g, d, c, f, v) = (m.heads, m.kv_heads, m.head_dim, m.width, m.ffn, config.data.vocab_size);
    let n = b * t;
    let mut rng = Rng::new(1);
    let mut normal = |shape: &[usize]| Tensor::normal(&device, shape, DType::F32, 1.0, &mut rng);
    let elements = |x: &[f64]| 4.0 * x.iter().sum::<f64>();
    let (nf, cf, ff, vf) = (n as f64, c as f64, f as f64, v as f64);
    let qkv = [normal(&[b, t, h, d])?, normal(&[b, t, g, d])?, normal(&[b, t, g, d])?];
    let qkv_bytes = 3.0 * elements(&[2.0 * nf * (h * d) as f64, 2.0 * nf * (g * d) as f64]);
    let mut rooms: Vec<Room> = Vec::new();
    let mut add = |name, seconds, flops, bytes| rooms.push(Room { name, seconds, flops, bytes });

    let x = normal(&[n, c])?;
    let (wq, wf, wd) = (normal(&[h * d, c])?, normal(&[f, c])?, normal(&[c, f])?);
    let s = time(&[x.clone(), wq], steps, |t, v| ops::linear(t, &v[0], &v[1]))?;
    add("linear width -> heads", s, 6.0 * nf * cf * (h * d) as f64, 3.0 * elements(&[nf * cf, nf * (h * d) as f64]));
    let s = time(&[x.clone(), wf], steps, |t, v| ops::linear(t, &v[0], &v[1]))?;
    add("linear width -> ffn", s, 6.0 * nf * cf * ff, 3.0 * elements(&[nf * cf, nf * ff, cf * ff]));
    let s = time(&[normal(&[n, f])?, wd], steps, |t, v| ops::linear(t, &v[0], &v[1]))?;
    add("linear ffn -> width", s, 6.0 * nf * cf * ff, 3.0 * elements(&[nf * cf, nf * ff, cf * ff]));
    let s = time(&[x.clone(), normal(&[c])?], steps, |t, v| ops::rmsnorm(t, &v[0], &v[1], 1e-6))?;
    add("rmsnorm", s, 12.0 * nf * cf, elements(&[5.0 * nf * cf]));
    let table = ops::RopeTable::new(&device, DType::F32, t, d, 1e4)?;
    let s = time(&qkv[..1], steps, |t, v| ops::rope(t, &v[0], &table, 0))?;
    add("rope (queries)", s, 6.0 * nf * (h * d) as f64, elements(&[4.0 * nf * (h * d) as f64]));
    let weights = [normal(&[f, c])?, normal(&[f, c])?, normal(&[c, f])?];
    let inputs: Vec<Tensor> = std::iter::once(x.clone()).chain(weights).collect();
    let s = time(&inputs, steps, |t, v| ops::swiglu(t, &v[0], [&v[1], &v[2], &v[3]], None))?;
    add("swiglu", s, (18.0 * cf + 40.0) * nf * ff, elements(&[4.0 * nf * cf, 4.0 * nf * ff, 9.0 * cf * ff]));
    let s = time(&[x.clone(), x.clone()], steps, |t, v| ops::add(t, &v[0], &v[1]))?;
    add("add", s, nf * cf, elements(&[3.0 * nf * cf]));
    let ids = Ids::places(&device, &(0..n).map(|i| i * 7919 % v).collect::<Vec<_>>())?;
    let s = time(&[normal(&[v, c])?], steps, |t, w| ops::embedding(t, &w[0], &ids))?;
    add("embedding", s, nf * cf, elements(&[4.0 * nf * cf, vf * cf]));
    let s = time(&[x, normal(&[v, c])?], steps, |t, v| ops::linear_cross_entropy(t, &v[0], &v[1], &ids, nf))?;
    add("cross-entropy", s, 6.0 * nf * cf * vf, elements(&[2.0 * nf * cf, 2.0 * vf * cf]));
    let s = time(&qkv, steps, |t, v| dense_attention(t, &v[0], &v[1], &v[2]))?;
    let keys = (t as f64 + 1.0) / 2.0;
    add("dense attention", s, 12.0 * nf * (h * d) as f64 * keys, qkv_bytes);

    let window = Span::Sliding(512.min(t));
    let s = time(&qkv, steps, |t, v| span_attention(t, &v[0], &v[1], &v[2], window, 1.0))?;
    let seen: usize = (0..t).map(|i| window.of(i).len()).sum();
    add("span attention (512)", s, 12.0 * (b * seen * h * d) as f64, qkv_bytes);

    let chunk = m.attention.chunk_size().unwrap_or(64).min(t / 2).max(1);
    // the configuration's own router where it has one; else one that routes random keys
    let dash = match m.attention {
        Attention::Dash(dash) => dash,
        _ => Dash { gamma: 4.0, ..Dash::default() },
    };
    let mut settings = Dash { chunk_size: chunk, ..dash }.entmax();
    let qbar = Tensor::zeros(&device, &[g * d], DType::F32)?;
    let mut summarised = qkv.to_vec();
    summarised.push(qbar);
    let s = time(&summarised[1..], steps, |t, v| chunk_summary(t, &v[0], &v[2], chunk))?;
    add("chunk summary", s, 14.0 * nf * (g * d) as f64, elements(&[4.0 * nf * (g * d) as f64]));
    let probe = Tape::inference();
    let leaves: Vec<Var> = summarised.iter().map(|x| probe.leaf(x.clone())).collect();
    let kbar = chunk_summary(&probe, &leaves[1], &leaves[3], chunk)?;
    let visible = (b * g) as f64 * (0..t).map(|i| (i / chunk + 1) as f64).sum::<f64>();
    let route = |settings| entmax_routing(&probe, &leaves[0], &kbar, None, settings);
    if let Some(target) = density {
        let share =
            |gamma| CoreResult::Ok(route(Entmax { gamma, ..settings })?.routes.to_host()?.len() as f64 / visible);
        let (most, least) = (share(GAMMA.0)?, share(GAMMA.1)?);
        if !(least..=most).contains(&target) {
            return Err(Failure::request(format!(
                "--density {target}: with these sizes between {least:.3} and {most:.3} of the visible chunks can be attended"
            )));
        }
        settings.gamma = gamma_for(target, 24, share)?;
    }
    let routing = route(settings)?;
    let entries = routing.routes.to_host()?.len() as f64;
    let density = entries / visible;
    let routed = [qkv[0].clone(), kbar.value.clone()];
    let s = time(&routed, steps, |t, v| Ok(entmax_routing(t, &v[0], &v[1], None, settings)?.bias))?;
    let group = (h / g) as f64;
    let work = 2.0 * nf * (h * d) as f64 * keys / chunk as f64 + 4.0 * entries * group * d as f64;
    add("entmax routing", s, work, elements(&[3.0 * nf * (h * d) as f64, entries * (3.0 + group)]));
    let attended = [qkv[0].clone(), qkv[1].clone(), qkv[2].clone(), routing.bias.value.clone()];
    let routes = routing.routes;
    let s = time(&attended, steps, |t, v| block_attention(t, &v[0], &v[1], &v[2], &routes, Some(&v[3])))?;
    add("block attention", s, 12.0 * entries * chunk as f64 * group * d as f64, qkv_bytes);

    let grad = normal(&[4 << 20])?;
    let (mut p, mut m1, mut m2) = (grad.clone(), Tensor::zeros(&device, &[4 << 20], DType::F32)?, grad.clone());
    let settings = ops::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };
    let one = Tensor::full(&device, &[], DType::F64, 1.0)?;
    m2.accumulate(&grad)?;
    ops::adamw(settings, &mut p, &mut m1, &mut m2, &grad, &one)?;
    let s = best(steps, || ops::adamw(settings, &mut p, &mut m1, &mut m2, &grad, &one).expect("shapes agree"));
    add("adamw (4 M)", s, 16.0 * (4 << 20) as f64, 7.0 * 4.0 * (4 << 20) as f64);
    let s = best(steps, || {
        black_box(ops::grad_norm(&device, [&grad]).expect("one device"));
    });
    add("grad norm (4 M)", s, 2.0 * (4 << 20) as f64, 4.0 * (4 << 20) as f64);

    if as_json {
        let row = |r: &Room| json!({"room": r.name, "ms": r.seconds * 1e3, "gflop": r.flops / 1e9, "mb": r.bytes / 1e6, "share": share(r, top)});
        let all: Vec<Value> = rooms.iter().map(row).collect();
        let line = json!({"multiply_add_gflops": top.flops / 1e9, "copy_gb_s": top.bytes / 1e9, "density": density, "rooms": all});
        print_line!("{line}")?;
        return Ok(());
    }
    print_line!(
        "multiply-add {:.0} GFLOP/s, copy {:.1} GB/s; block attention at density {density:.3}, {:.1} chunks a query",
        top.flops / 1e9,
        top.bytes / 1e9,
        entries / (b * g * t) as f64
    )?;
    print_line!(
        "{:<24}{:>10}{:>10}{:>10}{:>12}{:>8}",
        "room, forward+backward",
        "ms",
        "GFLOP",
        "MB",
        "GFLOP/s",
        "share"
    )?;
    for r in &rooms {
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

fn share(r: &Room, top: Ceilings) -> f64 {
    (r.flops / top.flops).max(r.bytes / top.bytes) / r.seconds
}
