//! Times of attention on the card at hand, dense and of random and coherent lists. Run on an idle card:
//! `cargo run -p dash-core --example cuda_attention [folder of the CUDA libraries]..`

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

fn main() -> Result<()> {
    let folders = std::env::args_os().skip(1).map(Into::into).collect();
    let device = CudaDevice::new(CudaOptions { folders, ..CudaOptions::default() })?;
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
    for (name, [b, t, h, g, d], density) in shapes {
        let dims = Dims { b, t, h, g, d };
        let (q, k) = (normals(&device, b * t * h * d, &mut rng)?, normals(&device, b * t * g * d, &mut rng)?);
        let v = normals(&device, b * t * g * d, &mut rng)?;
        let operands = Operands::separate(dims, &q, &k, &v);
        let dout = normals(&device, b * t * h * d, &mut rng)?;
        let row = |lists: &str, pairs: f64, mask: Option<&BlockMask>, bias: Option<&CudaBuffer>| -> Result<()> {
            let there = median(&device, || forward(dims, operands, mask, bias).map(|_| ()))?;
            let (o, lse) = forward(dims, operands, mask, bias)?;
            let back = median(&device, || backward(dims, operands, mask, bias, (&o, &lse), &dout).map(|_| ()))?;
            let rate = |products: f64, ms: f64| 2.0 * products * d as f64 * pairs / ms / 1e9;
            let rates = (rate(2.0, there), rate(5.0, back));
            println!(
                "| {name} b{b} h{h} g{g} d{d} t{t} | {lists} | {there:.2} ms | {:.0} | {back:.2} ms | {:.0} |",
                rates.0, rates.1
            );
            Ok(())
        };
        row("dense", (b * h) as f64 * (t * (t + 1) / 2) as f64, None, None)?;
        for (lists, run) in [("random", 1), ("alike for 16", 16)] {
            let (cells, pairs) = cells(dims, density, run, 1);
            let entries = cells.iter().map(|c| c.count_ones() as usize).sum();
            let mask = BlockMask::new(device.upload("bench", &cells)?, (b, g, t), CHUNK, entries)?;
            let bias = device.zeros("bench", Kind::F32, entries)?;
            row(&format!("{:.0} % {lists}", 100.0 * density), pairs, Some(&mask), Some(&bias))?;
        }
    }
    println!("\n{:?}", device.usage());
    Ok(())
}
