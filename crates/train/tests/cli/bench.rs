//! `bench`, and the memory that is announced.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use dash_model::VARIANTS;
use serde_json::Value;

use crate::sandbox::{Sandbox, not_run, repository, succeeded};

#[test]
fn the_memory_that_is_announced_is_what_a_step_takes() {
    if !Path::new("/proc/self/status").exists() {
        return not_run("the_memory_that_is_announced_is_what_a_step_takes", "no /proc/self/status tells it here");
    }
    // in the last one, one layer and a long batch, what backward takes besides counts most
    let kinds = VARIANTS.iter().map(|v| (v.kind, false, 2, 3, 1));
    let more =
        [("dense", true, 2, 3, 1), ("dash", true, 2, 3, 1), ("dense", false, 2, 3, 4), ("dense", false, 32, 1, 1)];
    for (kind, recompute, batch, layers, accumulated) in kinds.chain(more) {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(["bench", "--steps", "1", "--json", "--config"]).arg(repository().join("configs/bench-cpu.toml"));
        let sizes = [format!("data.batch_size={batch}"), format!("model.layers={layers}")];
        for set in sizes.into_iter().chain([format!("data.grad_accum={accumulated}"), "run.threads=2".to_string()]) {
            c.args(["--set", &set]);
        }
        c.args(["--set", &format!("model.attention.kind={kind}"), "--set", &format!("model.recompute={recompute}")]);
        let o = c.output().unwrap();
        succeeded(&o);
        let line: Value = serde_json::from_slice(&o.stdout).unwrap();
        let ratio = line["peak_rss_mb"].as_f64().unwrap() / line["predicted_mb"].as_f64().unwrap();
        let what = format!("{kind}, recompute {recompute}, batch {batch}, {accumulated} micro-batches");
        assert!((ratio - 1.0).abs() <= 0.15, "{what}: {line}");
    }
}

#[test]
fn bench_in_turn_answers_every_line_with_milliseconds() {
    let s = Sandbox::new();
    let mut c = s.command(&["bench", "--in-turn"], &[]);
    let mut child = c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\n\n\n").unwrap();
    let o = child.wait_with_output().unwrap();
    succeeded(&o);
    let times: Vec<f64> = std::str::from_utf8(&o.stdout).unwrap().lines().map(|l| l.parse().unwrap()).collect();
    assert!(times.len() == 3 && times.iter().all(|&ms| ms > 0.0), "{times:?}");
}

#[test]
fn bench_refuses_steps_that_memory_cannot_hold() {
    let s = Sandbox::new();
    for how in ["--steps=2", "--in-turn"] {
        let wide =
            ["model.layers=8", "model.width=131072", "model.ffn=131072", "model.heads=128", "model.kv_heads=128"];
        let o = s.run(&["bench", how], &wide);
        let told = String::from_utf8_lossy(&o.stderr);
        assert_eq!(o.status.code(), Some(2), "{how}: {told}");
        assert!(
            told.contains("of memory") && told.contains("lower data.seq_len, model.width or model.layers"),
            "{told}"
        );
    }
}

#[test]
fn bench_says_that_it_takes_no_documents_apart() {
    let s = Sandbox::new();
    for set in ["data.document_mask=true", "data.packing=best-fit"] {
        let o = s.run(&["bench", "--steps", "1"], &[set]);
        succeeded(&o);
        let told = String::from_utf8_lossy(&o.stderr);
        assert!(told.contains("bench times whole sequences of random tokens"), "{told}");
    }
}

#[test]
fn bench_of_ops_has_rows_with_floor_and_share() {
    let s = Sandbox::new();
    let rows = [
        "swiglu",
        "dense attention",
        "entmax routing",
        "decode, dense",
        "decode, routed",
        "all of dash",
        "adamw (4 M)",
    ];
    let o = s.run(&["bench", "--ops", "--steps", "1"], &[]);
    succeeded(&o);
    let told = String::from_utf8_lossy(&o.stdout);
    for row in rows {
        let line = told.lines().find_map(|line| line.strip_prefix(row)).unwrap_or_else(|| panic!("{row} in {told}"));
        assert!(line.split_whitespace().count() == 5 && line.ends_with('%'), "{row}{line}");
    }
    // for people they are rounded, where a small number may be 0
    let o = s.run(&["bench", "--ops", "--steps", "1", "--json"], &[]);
    succeeded(&o);
    let told: Value = serde_json::from_slice(&o.stdout).unwrap();
    for row in rows {
        let found = told["ops"].as_array().unwrap().iter().find(|of| of["op"] == row);
        let found = found.unwrap_or_else(|| panic!("{row} in {told}"));
        for key in ["ms", "gflop", "mb", "share"] {
            assert!(found[key].as_f64().is_some_and(|x| x > 0.0), "{key}: {found}");
        }
    }
}

#[test]
fn bench_prints_one_json_object() {
    let s = Sandbox::new();
    let o = s.run(&["bench", "--steps", "2", "--json"], &[]);
    succeeded(&o);
    let line: Value = serde_json::from_slice(&o.stdout).unwrap();
    for key in ["tokens_per_s", "step_ms", "gflops"] {
        assert!(line[key].as_f64().is_some_and(|x| x > 0.0), "{key}");
    }
    // only Linux tells
    assert!(line["peak_rss_mb"].as_f64().is_some_and(|x| x > 0.0 || !cfg!(target_os = "linux")));
}
