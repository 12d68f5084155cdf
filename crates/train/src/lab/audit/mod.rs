//! `audit`: what a sceptic can check on his own machine. Every op and every attention variant against central differences in
//! f64; whole models, every parameter, routing path included; a block against dfdx, an independent tape; the entmax solver on
//! flat, peaked and tied rows. Exit status 1 on any miss.

mod block;
mod check;
mod models;
mod ops;
mod routing;
mod solver;

use dash_core::Device;
use serde_json::{Value, json};

use crate::console::print_line;
use crate::failure::{Failure, Result};
use check::Check;

/// Runs every check, prints the table, and fails on any miss.
///
/// # Errors
/// [`Failure::Run`] naming what missed.
pub fn audit(as_json: bool) -> Result<()> {
    // two threads: results do not depend on it, and a poisoned device would only slow the differences
    let device = Device::cpu(2)?;
    let mut checks = ops::against_differences(&device)?;
    checks.extend(routing::against_differences(&device)?);
    checks.extend(models::against_differences(&device)?);
    checks.extend(block::against_dfdx(&device)?);
    checks.extend(solver::against_sorted(&device)?);
    let missed: Vec<&Check> = checks.iter().filter(|c| !c.passed()).collect();
    if as_json {
        let line = |c: &Check| json!({"what": c.what, "against": c.against, "error": c.error, "allowed": c.allowed, "passed": c.passed()});
        let all: Vec<Value> = checks.iter().map(line).collect();
        print_line!("{}", json!({"passed": missed.is_empty(), "checks": all}))?;
    } else {
        print_line!("{:<52} {:<20} {:>9} {:>9}", "what", "against", "error", "allowed")?;
        for c in &checks {
            let verdict = if c.passed() { "" } else { "  MISSED" };
            print_line!("{:<52} {:<20} {:>9.1e} {:>9.1e}{verdict}", c.what, c.against, c.error, c.allowed)?;
        }
        print_line!("{} checks, {} missed", checks.len(), missed.len())?;
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
