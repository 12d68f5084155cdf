//! A driver for machines without libFuzzer: seeds and seeded mutations, without coverage.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --target-dir target -- TARGET [INPUTS [FIRST]]
//!
//! Input I of a target is the same on every machine. What panics or takes longer than a second is written to `fuzz/found/TARGET/` and told; an
//! input that ends the process (memory, a stack) is found by running the last block that was told with `TRACE=1`, which writes every
//! input down before it is tried.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

mod data;
mod mutate;
mod train;

use mutate::{Draws, mutate, seeds};

const SEED: u64 = 1;
const BLOCK: u64 = 100_000;
const SLOW: Duration = Duration::from_secs(1);

/// The time that an input takes; the least of three if that was long, so that a busy machine is no fault.
fn fastest(target: data::Target, input: &[u8]) -> Duration {
    let time = || {
        let start = Instant::now();
        target(input);
        start.elapsed()
    };
    let first = time();
    if first <= SLOW { first } else { first.min(time()).min(time()) }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, other: u64| arguments.get(i).map_or(Some(other), |n| n.parse().ok());
    let all = || data::TARGETS.into_iter().chain(train::TARGETS);
    let asked = all().find(|t| Some(t.0) == arguments.first().map(String::as_str));
    let (Some((name, target)), Some(inputs), Some(first)) = (asked, number(1, 10_000_000), number(2, 0)) else {
        let names: Vec<_> = all().map(|t| t.0).collect();
        eprintln!("usage: TARGET [INPUTS [FIRST]]; targets: {}", names.join(", "));
        return ExitCode::from(2);
    };
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (seeds, trace) = (seeds(here, name), std::env::var_os("TRACE").is_some());
    let found = here.join("found").join(name);
    fs::create_dir_all(&found).expect("a folder for what is found");
    let (mut faults, began) = (0, Instant::now());
    for i in first..first + inputs {
        let input = mutate(&seeds, &mut Draws::of(SEED, i));
        if trace {
            fs::write(found.join("last"), &input).expect("written");
        }
        let time = catch_unwind(AssertUnwindSafe(|| fastest(target, &input)));
        if !matches!(time, Ok(time) if time <= SLOW) {
            fs::write(found.join(i.to_string()), &input).expect("written");
            println!("{name} {i}: {}", time.map_or("panic".into(), |time| format!("{time:?}")));
            faults += 1;
            if faults >= 20 {
                break;
            }
        }
        if (i + 1) % BLOCK == 0 {
            println!("{name}: {} inputs, {faults} faults, {:.0} s", i + 1 - first, began.elapsed().as_secs_f64());
        }
    }
    println!("{name}: done, {faults} faults, {:.0} s", began.elapsed().as_secs_f64());
    ExitCode::from(u8::from(faults > 0))
}
