//! How fast processes exchange gradients: the time of one exchange by its size, for the model of docs/SCALING.md.
//!
//! `torchrun --no-python --standalone --nproc-per-node=2 target/debug/examples/exchange`: one process a GPU; NCCL is looked for as `train` does.

use std::time::{Duration, Instant};

use dash_core::communicator::Incoming;
use dash_core::{CudaOptions, DType, Device, Tensor};
use train::peers::Peers;
use train::peers::hello::Hello;
use train::peers::seat::{Asked, asked};
use train::training::device::folders;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Asked::Sit(seat) = asked(&|name| std::env::var(name).ok()).map_err(|e| e.to_string())? else {
        return Err("start it by torchrun, srun or mpirun".into());
    };
    let text = String::new;
    let hello = Hello {
        rank: seat.rank,
        world: seat.world,
        host: text(),
        build: text(),
        binary: text(),
        config: text(),
        token: text(),
    };
    let options = CudaOptions { ordinal: seat.local_rank, folders: folders(), ..CudaOptions::default() };
    let device = Device::cuda(options)?;
    let peers = Peers::join(&seat, &hello, true, Duration::from_secs(60)).map_err(|e| e.to_string())?;
    peers.connect(&device, &folders()).map_err(|e| e.to_string())?;
    if peers.is_first() {
        println!("{:>12} {:>10} {:>12}", "MB a process", "ms", "GB/s out");
    }
    for exponent in 12..=27 {
        let numbers = 1usize << exponent;
        let each = Tensor::zeros(&device, &[numbers / peers.world()], DType::F32)?;
        let others: Vec<usize> = (0..peers.world()).filter(|r| *r != peers.rank()).collect();
        let sends: Vec<_> = others.iter().map(|&r| (r, &each)).collect();
        let like = |&from: &usize| Incoming { from, shape: each.shape().to_vec(), dtype: DType::F32 };
        let receives: Vec<_> = others.iter().map(like).collect();
        let mut best = f64::INFINITY;
        for _ in 0..10 {
            device.synchronize()?;
            peers.any(false).map_err(|e| e.to_string())?;
            let start = Instant::now();
            let got = peers.exchange(&device, &sends, &receives).map_err(|e| e.to_string())?;
            device.synchronize()?;
            drop(got);
            best = best.min(start.elapsed().as_secs_f64());
        }
        if peers.is_first() {
            let out = (others.len() * each.numel() * 4) as f64;
            println!("{:>12.3} {:>10.3} {:>12.1}", 4e-6 * numbers as f64, 1e3 * best, out / best / 1e9);
        }
    }
    peers.leave(&Ok(()));
    Ok(())
}
