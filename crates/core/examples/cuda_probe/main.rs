//! What the card at hand gives to the parts that kernels are made of: memory, L2, tensor cores, gathers. Run on an idle card:
//! `cargo run -p dash-core --example cuda_probe [folder of the CUDA libraries]..`

use dash_core::Result;
use dash_core::device::cuda::{Arg, CudaDevice, CudaOptions, Grid, Kind, Operand, Source, Unit};
use dash_core::device::{Accumulate, Gemm};
use dash_core::rng::Rng;

static SOURCE: Source = Source { name: "probe", text: include_str!("probe.cu") };

/// Blocks: one a multiprocessor, where shared memory or registers allow no second.
struct Probe {
    device: CudaDevice,
    blocks: usize,
}

impl Probe {
    /// Median of five runs after one that warms up, in seconds.
    fn seconds(&self, run: impl Fn() -> Result<()>) -> Result<f64> {
        run()?;
        let mut times = (0..5).map(|_| self.device.time(&run)).collect::<Result<Vec<f32>>>()?;
        times.sort_by(f32::total_cmp);
        Ok(f64::from(times[2]) / 1e3)
    }

    fn line(&self, what: &str, amount: f64, unit: &str, run: impl Fn() -> Result<()>) -> Result<()> {
        let seconds = self.seconds(run)?;
        println!("| {what} | {:.0} {unit} | {:.3} ms |", amount / seconds, seconds * 1e3);
        Ok(())
    }

    fn launch(&self, defines: &[(&'static str, i32)], name: &'static str, grid: Grid, args: &[Arg]) -> Result<()> {
        let defaults = [("SLABS", 1), ("RS", 0), ("GROUP", 4)];
        let value = |d: &(&'static str, i32)| defines.iter().find(|x| x.0 == d.0).map_or(d.1, |x| x.1).to_string();
        let unit = Unit { source: &SOURCE, defines: defaults.iter().map(|d| (d.0, value(d))).collect() };
        let kernel = self.device.kernel(&unit, name)?;
        // SAFETY: every call below passes the parameters of its kernel and buffers as large as it reads and writes.
        unsafe { kernel.launch(grid, args) }
    }

    fn memory(&self) -> Result<()> {
        let n = 1 << 30;
        let from = self.device.zeros("probe", Kind::F32, n)?;
        let to = std::cell::RefCell::new(self.device.alloc("probe", Kind::F32, n)?);
        self.line("copy of 4 GiB, read and written", 8.0 * n as f64 / 1e9, "GB/s", || {
            to.borrow_mut().copy_from(&from)
        })?;
        let (out, d) = (self.device.alloc("probe", Kind::F32, 4096)?, &self.device);
        for mib in [8u32, 16, 32] {
            let (rounds, bytes) = (2000, mib << 20);
            let total = (self.blocks * 2 * rounds * 16384) as f64 / 1e9;
            let args = [Arg::Buffer(&from), Arg::Buffer(&out), Arg::Int(bytes as i32), Arg::int(rounds)];
            let grid = Grid::line(self.blocks * 2, 128).shared(65536);
            self.line(&format!("L2 by the copy engine, {mib} MiB"), total, "GB/s", || {
                self.launch(&[], "l2_bulk", grid, &args)
            })?;
            let total = (self.blocks * 2 * rounds * 65536) as f64 / 1e9;
            let grid = Grid::line(self.blocks * 2, 1024);
            self.line(&format!("L2 by vector loads, {mib} MiB"), total, "GB/s", || {
                self.launch(&[], "l2_load", grid, &args)
            })?;
        }
        for region in [1u32 << 16, 1 << 18, 1 << 20] {
            let rounds = 1000;
            let sums = d.zeros("probe", Kind::F32, self.blocks * region as usize / 4)?;
            let args = [Arg::Buffer(&sums), Arg::Buffer(&out), Arg::Int(region as i32), Arg::int(rounds)];
            let (total, grid) =
                ((self.blocks * rounds * 16384) as f64 / 1e9, Grid::line(self.blocks, 128).shared(65536));
            let what = format!("sums by the copy engine, {} KiB a block", region >> 10);
            self.line(&what, total, "GB/s", || self.launch(&[], "reduce_bulk", grid, &args))?;
        }
        let rows = d.zeros("probe", Kind::Bf16, 32 << 20)?;
        for group in [1usize, 4, 16] {
            let (tokens, rounds) = ((64 << 20) / 2 / 64 / group / 2, 2000);
            let map = d.tensor_map((&rows, 0, 64), [64, tokens * group, 1], group as u32)?;
            let args = [Arg::Map(&map), Arg::Buffer(&out), Arg::int(tokens), Arg::int(rounds)];
            let (total, grid) =
                ((self.blocks * 2 * rounds * 8192) as f64 / 1e9, Grid::line(self.blocks * 2, 128).shared(32768));
            let defines = [("GROUP", group as i32)];
            let what = format!("64 rows of 128 bytes gathered by boxes of {group}");
            self.line(&what, total, "GB/s", || self.launch(&defines, "gather_boxes", grid, &args))?;
            let args = [Arg::Buffer(&from), args[1], args[2], args[3]];
            let what = format!("the same by 16-byte copies, {group} rows together");
            self.line(&what, total, "GB/s", || self.launch(&defines, "gather_copies", grid, &args))?;
        }
        Ok(())
    }

    fn arithmetic(&self) -> Result<()> {
        let (n, d) = (8192, &self.device);
        let mut rng = Rng::new(1);
        let mut matrix = || -> Result<_> {
            let normal = |_| ((rng.normal() as f32).to_bits() >> 16) as u16;
            d.upload("probe", &(0..n * n).map(normal).collect::<Vec<u16>>())
        };
        let (a, b, c) = (matrix()?, matrix()?, d.alloc("probe", Kind::Bf16, n * n)?);
        let rows = |x| Operand::rows(x, n);
        let flops = 2e-12 * (n as f64).powi(3);
        self.line("product of 8192^3, bf16", flops, "TFLOP/s", || {
            d.gemm(Gemm::new(n, n, n).with(Accumulate::Overwrite), rows(&a), rows(&b).t(), rows(&c))
        })?;
        let (out, rounds) = (d.alloc("probe", Kind::F32, 4096)?, 2000);
        let args = [Arg::Buffer(&out), Arg::int(rounds), Arg::Int(0)];
        for slabs in [1i32, 2] {
            let flops = 4e-12 * (self.blocks * rounds * 8 * 16 * slabs as usize * 64 * 128) as f64;
            let grid = Grid::line(self.blocks, 256).shared(65536);
            let what = format!("mma.sync, {} rows a warp, 64 keys of 128", 16 * slabs);
            self.line(&what, flops, "TFLOP/s", || self.launch(&[("SLABS", slabs)], "slab", grid, &args[..2]))?;
        }
        for rs in [0, 1] {
            let flops = 2e-12 * (self.blocks * rounds * 3 * 8 * 64 * 64 * 16) as f64;
            let grid = Grid::line(self.blocks, 384).shared(65536);
            let what = format!("wgmma m64n64k16, A in {}", ["shared memory", "registers"][rs as usize]);
            self.line(&what, flops, "TFLOP/s", || self.launch(&[("RS", rs)], "wgmma64", grid, &args))?;
        }
        println!("\ncuBLASLt chose {:?}", d.algorithms());
        Ok(())
    }
}

fn main() -> Result<()> {
    let folders = std::env::args_os().skip(1).map(Into::into).collect();
    let device = CudaDevice::new(CudaOptions { folders, ..CudaOptions::default() })?;
    println!("{:?}\n\n| what | rate | one run |\n|---|---|---|", device.properties());
    let probe = Probe { blocks: device.properties().multiprocessors as usize, device };
    probe.arithmetic()?;
    println!();
    probe.memory()
}
