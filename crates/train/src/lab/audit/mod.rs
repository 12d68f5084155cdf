//! `audit`: what a sceptic can check on their own machine. Every op and every attention variant against central differences in
//! f64; whole models, every parameter, routing path included; a block against dfdx, an independent tape; the entmax solver on
//! flat, peaked and tied rows. Exit status 1 on any miss.

mod block;
mod check;
mod models;
mod ops;
mod routing;
mod solver;

use std::path::Path;

use dash_core::Device;
use serde_json::{Value, json};

use crate::config::Config;
use crate::config::reference::SMALLEST;
use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::training::device::device;
use check::Check;

/// The device of that name. A CPU has two threads: results do not depend on it, and a poisoned device would only slow the differences.
fn open(name: &str) -> Result<Device> {
    let set = [format!("run.device={name}"), "run.threads=2".to_string()];
    let config = Config::from_text(SMALLEST, &set, Path::new("audit.toml")).map_err(Failure::request)?;
    device(&config)
}

/// What a device is checked for. On a GPU: its kernels of f64, which are the source of those of f32. Routing by itself is compared with
/// primitives in the CPU's order of entries, and dfdx runs on a CPU.
fn checks(device: &Device) -> Result<Vec<Check>> {
    let (ops, models) = (ops::against_differences(device)?, models::against_differences(device)?);
    let (routing, block) = match device {
        Device::Cpu(_) => (routing::against_differences(device)?, block::against_dfdx(device)?),
        Device::Cuda(_) => (Vec::new(), Vec::new()),
    };
    Ok([ops, routing, models, block, solver::against_sorted(device)?].into_iter().flatten().collect())
}

/// Runs every check on a device, prints the table, and fails on any miss.
///
/// # Errors
/// [`Failure::Request`] where there is no such device, [`Failure::Run`] naming what missed.
pub fn audit(device: &str, as_json: bool) -> Result<()> {
    let device = open(device)?;
    let checks = checks(&device)?;
    let missed: Vec<&Check> = checks.iter().filter(|c| !c.passed()).collect();
    if as_json {
        let line = |c: &Check| json!({"what": c.what, "against": c.against, "error": c.error, "allowed": c.allowed, "passed": c.passed()});
        let all: Vec<Value> = checks.iter().map(line).collect();
        print_line!("{}", json!({"passed": missed.is_empty(), "device": device.to_string(), "checks": all}))?;
    } else {
        print_line!("{:<52} {:<20} {:>9} {:>9}", "what", "against", "error", "allowed")?;
        for c in &checks {
            let verdict = if c.passed() { "" } else { "  MISSED" };
            print_line!("{:<52} {:<20} {:>9.1e} {:>9.1e}{verdict}", c.what, c.against, c.error, c.allowed)?;
        }
        print_line!("{} checks on {}, {} missed", checks.len(), device.name(), missed.len())?;
    }
    match missed.first() {
        None => Ok(()),
        Some(first) => Err(Failure::Run(anyhow::anyhow!(
            "{} of {} checks missed; the first is {}: off {} by {:e}, allowed {:e}",
            missed.len(),
            checks.len(),
            first.what,
            first.against,
            first.error,
            first.allowed
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_core::Result as CoreResult;

    #[test]
    fn everything_passes() {
        let checks = |c: CoreResult<Vec<Check>>| c.unwrap();
        let device = Device::cpu(2).unwrap();
        let all =
            checks(ops::against_differences(&device)).into_iter().chain(checks(routing::against_differences(&device)));
        for c in
            all.chain(models::against_differences(&device).unwrap()).chain(solver::against_sorted(&device).unwrap())
        {
            assert!(c.passed(), "{}: {:e} of {:e}", c.what, c.error, c.allowed);
        }
    }
}
