//! What a run computes on, and where CUDA's libraries are looked for.

use std::path::{Path, PathBuf};

use dash_core::{CudaOptions, Device};

use crate::config::{Config, DeviceName};
use crate::failure::{Failure, Result};
use crate::peers::seat::Seat;

/// The device of a configuration.
///
/// # Errors
/// When the operating system refuses the threads that `run.threads` asks for, when there is no such GPU, or when a library of CUDA
/// is missing: what was searched where.
pub fn device(config: &Config) -> Result<Device> {
    device_at(config, &Seat::alone())
}

/// The device of a process among others of its host: a GPU of its own, by its number there, or its part of the cores.
///
/// # Errors
/// As [`device`]; and when `run.device` names one GPU for all.
pub fn device_at(config: &Config, seat: &Seat) -> Result<Device> {
    let threads = match config.run.threads {
        0 if seat.local_world > 1 => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            (cores / seat.local_world).max(1)
        }
        threads => threads,
    };
    match config.run.device_name().map_err(Failure::request)? {
        DeviceName::Cpu => Device::cpu(threads).map_err(|e| Failure::request(format!("run.threads = {threads}: {e}"))),
        DeviceName::Cuda(ordinal) => {
            let ordinal = if seat.world > 1 { own_gpu(config, seat)? } else { ordinal };
            let folders = folders();
            let searched = match folders.as_slice() {
                [] => "none of them has one here".to_string(),
                all => all.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "),
            };
            let options = CudaOptions { ordinal, folders, kernels: kernels(), poison: false };
            let open = || {
                let device = Device::cuda(options)?;
                device.prepare()?;
                Ok(device)
            };
            open().map_err(|e: dash_core::Error| {
                let asked = &config.run.device;
                Failure::request(format!(
                    "run.device = \"{asked}\": {e}\nFolders come from CUDA_HOME, CUDA_PATH, the NVIDIA packages of the Python environment \
                     (VIRTUAL_ENV, CONDA_PREFIX, python3 on the path) and /usr/local/cuda: {searched}\nrun.device = \"cpu\" needs no GPU"
                ))
            })
        }
    }
}

/// Where a launcher shows each process one GPU only, it is number 0.
fn own_gpu(config: &Config, seat: &Seat) -> Result<usize> {
    if config.run.device != "cuda" {
        return Err(Failure::request(format!(
            "run.device = {:?} is one GPU for {} processes; \"cuda\" gives each its own",
            config.run.device, seat.world
        )));
    }
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let one = !visible.is_empty() && !visible.contains(',');
    Ok(if one { 0 } else { seat.local_rank })
}

/// Threads that a device's host works with.
pub fn threads(device: &Device) -> usize {
    match device {
        Device::Cpu(cpu) => cpu.threads(),
        // one hands out the work
        Device::Cuda(_) => 1,
    }
}

/// Where compiled kernels are kept: they depend on the card and on the program, not on a run.
fn kernels() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?;
    Some(cache.join("dashlab").join("kernels"))
}

/// Folders that hold CUDA's libraries on one machine or another and exist on this one, the most deliberate first: CUDA_HOME, the
/// Python packages of an active environment, those of the `python3` on the path, `/usr/local/cuda`. The loader's own places come
/// last.
pub fn folders() -> Vec<PathBuf> {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(named);
    let python = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|p| p.join("python3")).find(|p| p.is_file()));
    // of a virtual environment, where the program is a link: the folder beside `bin`
    let beside = python.as_deref().and_then(Path::parent).and_then(Path::parent).map(Path::to_path_buf);
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(named).chain(beside);
    let wheels: Vec<PathBuf> = environments.flat_map(|e| wheels(&e)).collect();
    let all = toolkits.flat_map(|t| of_toolkit(&t)).chain(wheels).chain(of_toolkit(Path::new("/usr/local/cuda")));
    let mut out: Vec<PathBuf> = Vec::new();
    for folder in all.filter(|p| p.is_dir()) {
        // a relative path would be looked for by another rule when the loader opens it
        let Ok(folder) = std::path::absolute(folder) else { continue };
        if !out.contains(&folder) {
            out.push(folder);
        }
    }
    out
}

fn of_toolkit(home: &Path) -> [PathBuf; 3] {
    ["lib64", "lib", "targets/x86_64-linux/lib"].map(|lib| home.join(lib))
}

/// The folders with libraries of NVIDIA's Python packages in an environment.
fn wheels(environment: &Path) -> Vec<PathBuf> {
    let entries = |folder: PathBuf| -> Vec<PathBuf> {
        let mut all: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        all.sort();
        all
    };
    let pythons = entries(environment.join("lib"));
    let pythons = pythons.iter().filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python")));
    let sites = pythons.flat_map(|p| ["site-packages", "dist-packages"].map(|site| p.join(site).join("nvidia")));
    let packages: Vec<PathBuf> = sites.flat_map(entries).collect();
    let mut libs: Vec<PathBuf> = packages.iter().map(|p| p.join("lib")).filter(|p| p.is_dir()).collect();
    // `cu13` and later hold everything; before it each library has a package of its own
    libs.sort_by_key(|p| !p.to_string_lossy().contains("/cu1"));
    libs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_an_environment_are_found() {
        let home = tempfile::tempdir().unwrap();
        let site = home.path().join("lib/python3.12/site-packages/nvidia");
        for package in ["cublas/lib", "cu13/lib", "cuda_nvrtc/lib", "cuda_nvrtc/include"] {
            std::fs::create_dir_all(site.join(package)).unwrap();
        }
        let found = wheels(home.path());
        assert_eq!(found, ["cu13/lib", "cublas/lib", "cuda_nvrtc/lib"].map(|p| site.join(p)));
        assert!(wheels(&home.path().join("nowhere")).is_empty());
    }
}
