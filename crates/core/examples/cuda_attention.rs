//! Times of attention on the card at hand, dense and of random and coherent lists. Run on an idle card:
//! `cargo run -p dash-core --example cuda_attention [--sweep] [folder of the CUDA libraries]..`
//! With `--sweep` over densities and lengths, as rows for `cargo run -p train --example draw`; `oracle/bench_attention.py` gives cuDNN's.

use dash_core::Result;
use dash_core::device::cuda::{CudaBuffer, CudaDevice, CudaOptions, Kind};
use dash_core::ops::attention::Dims;
use dash_core::ops::cuda::attention::{BlockMask, Operands, backward, forward};
use dash_core::rng::Rng;

/// Tokens of a chunk.
const CHUNK: usize = 64;

/// Cells in which a query attends `density` of its earlier chunks, all `run` neighbours the same ones; and how many pairs of tokens
/// attend each other, per query head.
fn cells(dims: Dims, density: f64, run: usize, seed: u64) -> (Vec<u64>, f64) {
    let (tiles, chunks) = (dims.t.div_ceil(64), dims.t.div_ceil(CHUNK));
    let mut cells = vec![0u64; dims.b * dims.g * tiles * chunks];
    let (mut state, bound) = (seed * 2 + 1, (density * 2f64.powi(32)) as u64);
    let (mut pairs, bits) = (0f64, if run == 64 { !0 } else { (1u64 << run) - 1 });
    for (i, cell) in cells.iter_mut().enumerate() {
        let (tile, chunk) = (i / chunks % tiles, i % chunks);
        if chunk == tile {
            *cell = !0;
            pairs += (CHUNK * (CHUNK + 1) / 2) as f64;
        } else if chunk < tile {
            for first in (0..64).step_by(run) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *cell |= if state >> 32 < bound { bits << first } else { 0 };
            }
            pairs += f64::from(cell.count_ones()) * CHUNK as f64;
        }
    }
    (cells, pairs * (dims.h / dims.g) as f64)
}

fn normals(device: &CudaDevice, n: usize, rng: &mut Rng) -> Result<CudaBuffer> {
    // a few million normals, repeated: what the host draws, not what the card needs, takes the time
    let some: Vec<u16> = (0..n.min(1 << 21)).map(|_| ((rng.normal() as f32).to_bits() >> 16) as u16).collect();
    device.upload("bench", &some.iter().copied().cycle().take(n).collect::<Vec<u16>>())
}

/// Median of five runs after one that warms up, in milliseconds.
fn median(device: &CudaDevice, run: impl Fn() -> Result<()>) -> Result<f64> {
    run()?;
    let mut times = (0..5).map(|_| device.time(&run)).collect::<Result<Vec<f32>>>()?;
    times.sort_by(f32::total_cmp);
    Ok(f64::from(times[2]))
}

/// Inputs of one shape, and their times.
struct Case<'a> {
    device: &'a CudaDevice,
    dims: Dims,
    /// Queries, keys, values and the gradient of the output.
    inputs: [CudaBuffer; 4],
}

impl<'a> Case<'a> {
    fn new(device: &'a CudaDevice, [b, t, h, g, d]: [usize; 5], rng: &mut Rng) -> Result<Self> {
        let dims = Dims { b, t, h, g, d };
        let (q, k) = (normals(device, b * t * h * d, rng)?, normals(device, b * t * g * d, rng)?);
        let v = normals(device, b * t * g * d, rng)?;
        let dout = normals(device, b * t * h * d, rng)?;
        Ok(Case { device, dims, inputs: [q, k, v, dout] })
    }

    /// Pairs of tokens of dense attention, over all heads.
    fn dense_pairs(&self) -> f64 {
        let Dims { b, t, h, .. } = self.dims;
        (b * h) as f64 * (t * (t + 1) / 2) as f64
    }

    /// Milliseconds of forward and of backward.
    fn times(&self, mask: Option<&BlockMask>, bias: Option<&CudaBuffer>) -> Result<(f64, f64)> {
        let (device, dims, [q, k, v, dout]) = (self.device, self.dims, &self.inputs);
        let operands = Operands::separate(dims, q, k, v);
        let there = median(device, || forward(dims, operands, mask, bias).map(|_| ()))?;
        let (o, lse) = forward(dims, operands, mask, bias)?;
        let back = median(device, || backward(dims, operands, mask, bias, (&o, &lse), dout).map(|_| ()))?;
        Ok((there, back))
    }

    /// Of lists of a density, alike for `run` neighbours; with the pairs of tokens.
    fn listed(&self, density: f64, run: usize) -> Result<(f64, (f64, f64))> {
        let Dims { b, t, g, .. } = self.dims;
        let (cells, pairs) = cells(self.dims, density, run, 1);
        let entries = cells.iter().map(|c| c.count_ones() as usize).sum();
        let mask = BlockMask::new(self.device.upload("bench", &cells)?, (b, g, t), CHUNK, entries)?;
        let bias = self.device.zeros("bench", Kind::F32, entries)?;
        Ok((pairs, self.times(Some(&mask), Some(&bias))?))
    }
}

/// A table of the shapes of docs/PERFORMANCE.md.
fn table(device: &CudaDevice) -> Result<()> {
    println!(
        "{:?}\n\n| shape | lists | forward | TFLOP/s | backward | TFLOP/s |\n|---|---|---|---|---|---|",
        device.properties()
    );
    let shapes = [
        ("A", [1, 32768, 32, 2, 128], 0.25),
        ("B", [4, 16384, 16, 4, 64], 0.25),
        ("C", [1, 65536, 32, 2, 128], 0.10),
        ("D", [2, 32768, 12, 4, 64], 0.10),
        ("E", [8, 8192, 12, 4, 64], 0.25),
    ];
    let mut rng = Rng::new(1);
    for (name, shape, density) in shapes {
        let case = Case::new(device, shape, &mut rng)?;
        let [b, t, h, g, d] = shape;
        let row = |lists: &str, pairs: f64, (there, back): (f64, f64)| {
            let rate = |products: f64, ms: f64| 2.0 * products * d as f64 * pairs / ms / 1e9;
            let rates = (rate(2.0, there), rate(5.0, back));
            println!(
                "| {name} b{b} h{h} g{g} d{d} t{t} | {lists} | {there:.2} ms | {:.0} | {back:.2} ms | {:.0} |",
                rates.0, rates.1
            );
        };
        row("dense", case.dense_pairs(), case.times(None, None)?);
        for (lists, run) in [("random", 1), ("alike for 16", 16)] {
            let (pairs, times) = case.listed(density, run)?;
            row(&format!("{:.0} % {lists}", 100.0 * density), pairs, times);
        }
    }
    println!("\n{:?}", device.usage());
    Ok(())
}

/// Rows `picture,line,x,y`: milliseconds of forward and backward by density at shape A, and TFLOP/s of dense attention by length, 65,536
/// tokens in all.
fn sweep(device: &CudaDevice) -> Result<()> {
    println!("picture,line,x,y");
    let mut rng = Rng::new(1);
    let case = Case::new(device, [1, 32768, 32, 2, 128], &mut rng)?;
    let (there, back) = case.times(None, None)?;
    for density in [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0] {
        for (lists, run) in [("lists at random", 1), ("lists alike for 16 tokens", 16)] {
            let (pairs, times) = case.listed(density, run)?;
            let attended = 100.0 * pairs / case.dense_pairs();
            println!("density,{lists},{attended:.2},{:.3}", times.0 + times.1);
        }
        println!("density,dense,{:.2},{:.3}", 100.0 * density, there + back);
    }
    for t in [1024, 2048, 4096, 8192, 16384, 32768, 65536] {
        for (what, [h, g, d]) in [("d 128", [32, 2, 128]), ("d 64", [16, 4, 64])] {
            let case = Case::new(device, [65536 / t, t, h, g, d], &mut rng)?;
            let (there, back) = case.times(None, None)?;
            let rate = |products: f64, ms: f64| 2.0 * products * d as f64 * case.dense_pairs() / ms / 1e9;
            println!("length forward,ours {what},{t},{:.1}", rate(2.0, there));
            println!("length both,ours {what},{t},{:.1}", rate(7.0, there + back));
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).peekable();
    let sweeps = args.next_if(|arg| arg == "--sweep").is_some();
    let device = CudaDevice::new(CudaOptions { folders: args.map(Into::into).collect(), ..CudaOptions::default() })?;
    if sweeps { sweep(&device) } else { table(&device) }
}
