//! What a run takes from another one: the number of attended chunks, and gamma.

use std::fs;

use dash_model::Budget;

use crate::sandbox::{RECALL, Sandbox, failed, succeeded};

/// On a task, so that there are two lengths.
const TASK: [&str; 4] = [RECALL, "data.vocab_size=40", "run.steps=8", "log.every=2"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    TASK.iter().chain(more).copied().collect()
}

/// Attended tokens of the last validation.
fn attended(s: &Sandbox, name: &str) -> f64 {
    let lines = s.metrics(name);
    lines.iter().rfind(|l| l["split"] == "val").unwrap()["attended_tokens"].as_f64().unwrap()
}

#[test]
fn a_run_attends_as_many_chunks_as_another_one() {
    let s = Sandbox::new();
    s.train("dash", &with(&["router.target_share=0.5"]), false);
    let budget = fs::read_to_string(s.path("runs/dash/budget.json")).unwrap();
    let budget: Budget = serde_json::from_str(&budget).unwrap();
    let lengths: Vec<usize> = budget.lengths.iter().map(|p| p.length).collect();
    assert_eq!((budget.chunk_size, lengths), (8, vec![48, 96]));
    let kind = "model.attention={kind=\"topk\",chunk_size=8,top=1}";
    let set = with(&[kind, "router.budget_from=runs/dash"]);
    let weights = s.train("yoked", &set, false);
    // whole numbers of chunks a kv head, rounded along the positions: 6 chunks of at most half a chunk in the mean of 48 positions
    let (dash, yoked) = (attended(&s, "dash"), attended(&s, "yoked"));
    assert!((dash - yoked).abs() < 0.25, "{dash} {yoked}");
    assert!(yoked > 6.0 && yoked < 20.0, "top = 1 alone is 4.5, everything 24.5: {yoked}");

    // it keeps what it took: the other run may go
    fs::rename(s.path("runs/dash"), s.path("elsewhere")).unwrap();
    let told = s.out(&["eval", "--model", "runs/yoked", "--json"]);
    assert!(told.contains("accuracy"), "{told}");
    let again = s.train("yoked", &[&set[..], &["run.steps=8"]].concat(), true);
    assert!(again == weights);
    failed(
        &s.bin(&["export", "--model", "runs/yoked", "--out", "out"]),
        2,
        &["router.budget_from", "no place for that table"],
    );
    fs::remove_file(s.path("runs/yoked/yoke.json")).unwrap();
    failed(&s.bin(&["eval", "--model", "runs/yoked"]), 2, &["has no yoke.json"]);
}

#[test]
fn an_interrupted_yoked_run_ends_with_the_bits_of_one_that_was_not() {
    let s = Sandbox::new();
    s.train("dash", &with(&[]), false);
    let yoked =
        ["model.attention={kind=\"random\",chunk_size=8,top=1}", "router.budget_from=runs/dash", "checkpoint.every=4"];
    let whole = s.train("whole", &with(&yoked), false);
    s.train("parts", &with(&yoked), false);
    // as if it had been stopped after update 4
    fs::remove_dir_all(s.newest("parts")).unwrap();
    assert!(s.train("parts", &with(&yoked), true) == whole);
}

#[test]
fn gamma_of_another_run_is_replayed() {
    let s = Sandbox::new();
    let every = ["log.every=1", "router.target_share=0.6"];
    s.train("dash", &with(&every), false);
    let stopped = "model.attention={kind=\"dash-stopped\",chunk_size=8}";
    s.train("stopped", &with(&["log.every=1", stopped, "router.gamma_from=runs/dash"]), false);
    let gammas = |name: &str| -> Vec<f64> {
        let lines = s.metrics(name);
        lines.iter().filter(|l| l["split"] == "train").map(|l| l["gamma"].as_f64().unwrap()).collect()
    };
    let (dash, stopped) = (gammas("dash"), gammas("stopped"));
    assert!(dash.len() == 8 && dash.windows(2).any(|g| g[0] != g[1]), "the controller moves it: {dash:?}");
    assert!(dash.iter().zip(&stopped).all(|(a, b)| (a / b - 1.0).abs() < 1e-12), "{dash:?} {stopped:?}");
}

#[test]
fn what_cannot_be_taken_is_refused_before_any_compute() {
    let s = Sandbox::new();
    s.train("dash", &with(&[]), false);
    let topk = "model.attention={kind=\"topk\",chunk_size=8,top=2}";
    let refused = |set: &[&str], parts: &[&str]| {
        let set: Vec<&str> = with(&["run.name=other"]).into_iter().chain(set.iter().copied()).collect();
        failed(&s.run(&[], &set), 2, parts);
        assert!(!s.path("runs/other").exists());
    };
    refused(&[topk, "router.budget_from=runs/dahs"], &["router.budget_from: runs/dahs holds no run", "has ended"]);
    refused(&["router.budget_from=runs/dash"], &["the attention is dash, which has no such number", "topk-bias"]);
    let other = "model.attention={kind=\"topk\",chunk_size=4,top=2}";
    refused(&[other, "router.budget_from=runs/dash"], &["runs/dash does not fit: its chunks have 8 tokens, here 4"]);
    refused(&[topk, "model.layers=3", "router.budget_from=runs/dash"], &["does not fit: it has 2 layers, here 3"]);
    let long = "task={kind=\"recall\",pairs=3,eval_lengths=[192],eval_sequences=4}";
    refused(&[topk, long, "router.budget_from=runs/dash"], &["sequences of up to 96 tokens, here there are 192"]);
    refused(&["router.gamma_from=runs/dash", "run.steps=9"], &["logged gamma up to update 8, this run has 9"]);
    refused(&["router.gamma_from=runs/dash", "router.target_share=0.6"], &["router.target_share: cannot move gamma"]);
    s.train("dense", &with(&["model.attention={kind=\"dense\"}"]), false);
    refused(&["router.gamma_from=runs/dense"], &["runs/dense logged no gamma"]);
    refused(&[topk, "router.budget_from=runs/dense"], &["runs/dense has no budget.json", "--resume"]);
}

#[test]
fn a_yoked_arm_runs_after_the_run_of_its_seed() {
    let s = Sandbox::new();
    // the yoked arms stand first, and two runs go at a time
    let table = "compare={baseline=\"dash\",seeds=2,arm=[{name=\"yoked\",budget_of=\"dash\",set=[\"model.attention={kind=\\\"topk\\\",\
        chunk_size=8}\"]},{name=\"replayed\",gamma_of=\"dash\",set=[\"model.attention.router_gradient=stopped\"]},{name=\"dash\"},\
        {name=\"random\",set=[\"model.attention={kind=\\\"random\\\",chunk_size=8,top=2}\"]}]}";
    let set = with(&[table]);
    succeeded(&s.run(&["compare", "--jobs", "2"], &set));
    let folder = s.path("runs/compare-test");
    for seed in [0, 1] {
        let config = fs::read_to_string(folder.join(format!("runs/yoked-s{seed}/config.toml"))).unwrap();
        assert!(config.contains(&format!("budget_from = \"runs/compare-test/runs/dash-s{seed}\"")), "{config}");
        assert!(folder.join(format!("runs/replayed-s{seed}/yoke.json")).is_file());
        // random choices are another draw for every seed of the comparison
        let random = fs::read_to_string(folder.join(format!("runs/random-s{seed}/config.toml"))).unwrap();
        let attention = &random[random.find("[model.attention]").unwrap()..];
        assert!(attention.contains(&format!("seed = {seed}")), "{attention}");
    }
    let again = s.run(&["compare"], &set);
    succeeded(&again);
    assert!(String::from_utf8_lossy(&again.stderr).contains("8 finished already"));

    let refused = |arm: &str, parts: &[&str]| {
        let table = format!("compare={{arm=[{{name=\"dash\"}},{arm}]}}");
        failed(&s.run(&["compare", "--out", "other"], &with(&[&table])), 2, parts);
    };
    refused("{name=\"a\",budget_of=\"dahs\"}", &["arm \"a\": its budget_of \"dahs\" is none of the arms"]);
    refused("{name=\"a\",budget_of=\"dash\"}", &["arm \"a\": budget_of", "the attention is dash"]);
    refused("{name=\"a\",gamma_of=\"b\"},{name=\"b\",gamma_of=\"dash\"}", &["takes something of another arm itself"]);
    assert!(!s.path("other").exists());
}

#[test]
fn the_oracle_routes_in_training_and_its_validations() {
    let s = Sandbox::new();
    failed(&s.run(&[], &["router.oracle=true"]), 2, &["router.oracle", "it needs a [task]"]);
    failed(&s.run(&[], &with(&["router.oracle=true", "model.attention={kind=\"dense\"}"])), 2, &["router.oracle"]);
    let kind = "model.attention={kind=\"topk\",chunk_size=8,top=1}";
    let own = s.train("own", &with(&[kind]), false);
    let oracle = s.train("oracle", &with(&[kind, "router.oracle=true"]), false);
    assert!(own != oracle);
    let unseen = |name: &str| {
        let lines = s.metrics(name);
        let last = lines.iter().rfind(|l| l["split"] == "val").unwrap().clone();
        last["task"][0]["unseen"].as_f64().unwrap()
    };
    // with its own chunk alone a query sees no earlier answer
    assert!(unseen("own") > 0.5 && unseen("oracle") == 0.0, "{} {}", unseen("own"), unseen("oracle"));
}
