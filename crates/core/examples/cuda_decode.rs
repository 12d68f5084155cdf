//! Times of one token after 131072 kept ones on the card at hand, dense and routed, against what its bytes take. Run on an idle card:
//! `cargo run -p dash-core --example cuda_decode [folder of the CUDA libraries]..`

use dash_core::Result;
use dash_core::device::cuda::{CudaBuffer, CudaDevice, CudaOptions, Kind};
use dash_core::ops::attention::{Center, Dims, Entmax, RouterGradient, Span};
use dash_core::ops::cuda::attention::cached::{Sees, attention, route};
use dash_core::rng::Rng;

/// Kept tokens, and tokens of a chunk.
const PAST: usize = 131_071;
const CHUNK: usize = 64;
/// Share of the chunks that is attended.
const DENSITY: f64 = 0.05;

/// Normals: some million, repeated, because what the host draws, not what the card needs, takes the time.
fn normals(device: &CudaDevice, n: usize, scale: f64, rng: &mut Rng) -> Result<CudaBuffer> {
    let draw = |_| ((((rng.normal() * scale) as f32).to_bits()) >> 16) as u16;
    let some = device.upload("bench", &(0..n.min(1 << 20)).map(draw).collect::<Vec<u16>>())?;
    let mut all = device.alloc("bench", Kind::Bf16, n)?;
    for at in (0..n).step_by(1 << 20) {
        if n - at >= some.len() {
            all.copy_at(at, &some)?;
        } else {
            let rest = some.download::<u16>()?[..n - at].to_vec();
            all.copy_at(at, &device.upload("bench", &rest)?)?;
        }
    }
    Ok(all)
}

/// Median of 21 timings in microseconds, each of so many runs in a row, after one that warms up.
fn median(device: &CudaDevice, times: usize, run: impl Fn() -> Result<()>) -> Result<f64> {
    let all = || (0..times).try_for_each(|_| run());
    all()?;
    let mut found = (0..21).map(|_| device.time(all)).collect::<Result<Vec<f32>>>()?;
    found.sort_by(f32::total_cmp);
    Ok(f64::from(found[10]) * 1e3 / times as f64)
}

/// The gamma at which about [`DENSITY`] of the chunks are attended, and the share that is.
fn settings(dims: Dims, q: &CudaBuffer, kbar: &CudaBuffer) -> Result<(Entmax, f64)> {
    let of = |gamma: f64| Entmax {
        chunk_size: CHUNK,
        alpha: 1.5,
        gamma,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::Full,
    };
    let (mut low, mut high, mut found) = (0.01f64, 1000.0f64, 1.0);
    for _ in 0..20 {
        let gamma = (low * high).sqrt();
        let counts = route(dims, PAST, (q, kbar), None, of(gamma))?.lists.counts.download::<u32>()?;
        found =
            counts.iter().map(|&n| f64::from(n)).sum::<f64>() / counts.len() as f64 / (PAST + 1).div_ceil(CHUNK) as f64;
        if found > DENSITY {
            low = gamma;
        } else {
            high = gamma;
        }
    }
    Ok((of((low * high).sqrt()), found))
}

fn main() -> Result<()> {
    let folders = std::env::args_os().skip(1).map(Into::into).collect();
    let device = CudaDevice::new(CudaOptions { folders, ..CudaOptions::default() })?;
    let (from, mut to) = (device.zeros("bench", Kind::F32, 1 << 29)?, device.zeros("bench", Kind::F32, 1 << 29)?);
    let mut copy = f64::MAX;
    for _ in 0..5 {
        copy = copy.min(f64::from(device.time(|| to.copy_from(&from))?) * 1e-3);
    }
    // bytes read and written a microsecond
    let rate = 2.0 * 4.0 * f64::from(1u32 << 29) / copy / 1e6;
    drop((from, to));
    println!("{:?}\ncopy {:.0} GB/s, read and written\n", device.properties().name, rate / 1e3);
    println!("| shape | | us | floor us | share |\n|---|---|---|---|---|");
    let mut rng = Rng::new(1);
    for [b, h, g, d] in [[1, 32, 8, 128], [16, 32, 8, 128], [1, 32, 2, 128], [16, 32, 2, 128], [1, 16, 16, 64]] {
        let dims = Dims { b, t: 1, h, g, d };
        let (keys, n) = (PAST + 1, (PAST + 1) / CHUNK);
        let q = normals(&device, b * h * d, 1.0, &mut rng)?;
        let k = normals(&device, b * keys * g * d, 1.0, &mut rng)?;
        let v = normals(&device, b * keys * g * d, 1.0, &mut rng)?;
        let kbar = normals(&device, b * n * g * d, 1.0, &mut rng)?;
        let kept = |seen: f64| 2.0 * seen * (b * keys * g * d) as f64 * 2.0;
        let row = |name: &str, bytes: f64, us: f64| {
            let floor = bytes / rate;
            println!("| b{b} h{h} g{g} d{d} | {name} | {us:.1} | {floor:.1} | {:.0} % |", 100.0 * floor / us);
        };
        let times = if b == 1 { 20 } else { 4 };
        let dense = median(&device, times, || {
            attention(dims, (PAST, keys), [&q, &k, &v], Sees::Span(Span::Causal)).map(|_| ())
        })?;
        row("dense", kept(1.0), dense);
        let (settings, density) = settings(dims, &q, &kbar)?;
        let routing = median(&device, times, || route(dims, PAST, (&q, &kbar), None, settings).map(|_| ()))?;
        let summaries = (b * n * g * d * 2) as f64;
        row("routing", summaries, routing);
        let routed = route(dims, PAST, (&q, &kbar), None, settings)?;
        let listed = || Sees::Lists(&routed.lists, Some(&routed.bias));
        let chosen = median(&device, times, || attention(dims, (PAST, keys), [&q, &k, &v], listed()).map(|_| ()))?;
        row(&format!("attention to {:.1} % of the chunks", 100.0 * density), kept(density), chosen);
        let both = median(&device, times, || {
            let routed = route(dims, PAST, (&q, &kbar), None, settings)?;
            let sees = Sees::Lists(&routed.lists, Some(&routed.bias));
            attention(dims, (PAST, keys), [&q, &k, &v], sees).map(|_| ())
        })?;
        row(&format!("both, {:.1} times as fast as dense", dense / both), kept(density) + summaries, both);
    }
    Ok(())
}
