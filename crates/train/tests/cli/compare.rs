//! `compare`: pairs, what is refused, and the report.

use std::fs;
use std::process::{Command, Stdio};

use crate::sandbox::{RECALL, Sandbox, content, error_of, failed, is_hidden, not_run, succeeded};

#[test]
fn compare_reports_resumes_and_survives_an_arm_that_fails() {
    let s = Sandbox::new();
    let table = "compare={baseline=\"dense\",seeds=2,arm=[{name=\"dense\",set=[\"model.attention.kind=dense\"]},\
        {name=\"dash\"},{name=\"wild\",set=[\"optim.lr=1e30\",\"optim.clip=0\"]}]}";
    let set = [RECALL, "data.vocab_size=40", "run.steps=6", "probe.every=3", "log.every=2", table];
    // its runs are one process each, also where a launcher started several of the comparison
    let o = s.command(&["compare"], &set).envs([("RANK", "0"), ("WORLD_SIZE", "2")]).output().unwrap();
    succeeded(&o);
    let folder = s.path("runs/compare-test");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let (page, text) = (read("report.html"), read("report.md"));
    for part in ["Fewer than 3 seeds", "wild with seed 0 failed", "is not finite", "Whose fault", "undecided"] {
        assert!(page.contains(part) && text.contains(part), "{part}");
    }
    assert!(page.matches("<svg").count() >= 6 && page.contains("name=\"viewport\"") && !page.contains("<script"));
    assert!(read("results.csv").starts_with("arm,seed,step,split,metric,at,value\n"));
    assert!(folder.join("runs/dash-s1/config.toml").is_file() && folder.join("runs/dash-s1/metrics.jsonl").is_file());

    // again: what is finished is not run again; the report is the same
    let o = s.run(&["compare"], &set);
    succeeded(&o);
    assert!(String::from_utf8_lossy(&o.stderr).contains("4 finished already"));
    assert_eq!(read("report.md"), text);

    // who trained it is told, and that it was not one build
    assert!(text.contains("Trained by version") && !text.contains("several builds"), "{text}");
    let place = folder.join("runs/dash-s0/provenance.json");
    let provenance = fs::read_to_string(&place).unwrap();
    fs::write(&place, provenance.replace("\"instruction_set\": \"", "\"instruction_set\": \"not ")).unwrap();
    succeeded(&s.run(&["compare", "--report-only"], &set));
    let mixed = read("report.md");
    assert!(mixed.contains("several builds or processors") && mixed.contains("instruction set not "), "{mixed}");
    fs::write(&place, provenance).unwrap();

    // a run that is gone comes back; until then the report says so
    fs::remove_dir_all(folder.join("runs/dash-s1")).unwrap();
    fs::remove_file(folder.join("logs/dash-s1.log")).unwrap();
    succeeded(&s.run(&["compare", "--report-only"], &set));
    assert!(read("report.md").contains("dash with seed 1 is not finished"));
    succeeded(&s.run(&["compare"], &set));
    assert_eq!(read("report.md"), text);

    // other data under the same folder: its runs are no runs of this comparison
    let other = "task={kind=\"recall\",pairs=2,eval_lengths=[96],eval_sequences=4}";
    let changed = [other, "data.vocab_size=40", "run.steps=6", "probe.every=3", "log.every=2", table];
    failed(
        &s.run(&["compare", "--report-only"], &changed),
        2,
        &["task.pairs: 3 -> 2", "prepared corpus", "another --out"],
    );
}

#[test]
fn an_arm_that_does_not_fit_is_refused_before_any_compute() {
    let s = Sandbox::new();
    let compare = |arms: &str, set: &[&str]| s.run(&["compare", "--arms", arms], set);
    failed(
        &compare("dense,topk", &["model.attention.top=99", "model.attention.kind=topk"]),
        2,
        &["99 is above the 6 chunks"],
    );
    failed(&compare("dense,dahs", &[]), 2, &["--arms", "\"dahs\" is none of dense"]);
    failed(&compare("dash,dash", &[]), 2, &["named twice"]);
    failed(&compare("dash", &["model.attention.chunk_size=48"]), 2, &["nothing to route"]);
    failed(&compare("dash", &["router.target_share=0.05"]), 2, &["router.target_share", "out of reach", "between"]);
    failed(&compare("dense", &["router.target_share=0.5", "model.attention.kind=dash"]), 2, &["arm \"dense\""]);
    let other = "compare={arm=[{name=\"a\"},{name=\"b\",set=[\"data.seq_len=40\"]}]}";
    failed(&s.run(&["compare"], &[other]), 2, &["arm \"b\"", "cannot be paired"]);
    let other = "compare={tuning_seeds=[101],arm=[{name=\"a\"},{name=\"b\",set=[\"run.seed=101\"]}]}";
    failed(&s.run(&["compare"], &[other]), 2, &["arm \"b\": changes run.seed", "cannot be paired"]);
    let topk = |chunk: usize| format!("model.attention={{kind=\\\"topk\\\",chunk_size={chunk},top=2}}");
    let arms = |key: &str, of: &str, set: &str| {
        format!("compare={{arm=[{{name=\"a\",set=[\"{of}\"]}},{{name=\"b\",{key}=\"a\",set=[\"{set}\"]}}]}}")
    };
    for (key, of, set, told) in [
        (
            "budget_of",
            "model.attention.kind=dense".to_string(),
            topk(8),
            "has dense attention, which chooses no chunks",
        ),
        ("budget_of", "model.attention.chunk_size=4".to_string(), topk(8), "has chunks of 4 tokens, the arm of 8"),
        ("budget_of", "model.layers=1".to_string(), topk(8), "layers, the arm"),
        ("gamma_of", "model.attention.kind=dense".to_string(), "model.attention.kind=dash".into(), "has no gamma"),
    ] {
        failed(&s.run(&["compare"], &[&arms(key, &of, &set)]), 2, &["arm \"b\"", key, told]);
    }
    assert!(!s.path("runs").exists() && !s.path("data").exists());
}

#[test]
fn gpus_that_are_not_there_are_refused_before_anything_is_written() {
    let s = Sandbox::new();
    let compare = |devices: &str, set: &[&str]| {
        error_of(&s.run(&["compare", "--arms", "dense,dash", "--devices", devices], set), 2)
    };
    assert!(compare("0,1,0", &[]).contains("--devices: 0 is named twice; --jobs 2 has two runs at a time on each GPU"));
    // where there is no driver, that is what is told
    let told = compare("63", &[]);
    assert!(told.contains("run.device = \"cuda:63\"") && told.contains("run.device = \"cpu\" needs no GPU"), "{told}");
    assert!(compare("64", &[]).contains("below 64"));
    let table = "compare={arm=[{name=\"dense\"},{name=\"dash\",set=[\"run.device=cpu\"]}]}";
    let told = compare("0", &[table]);
    assert!(told.contains("arm \"dash\": run.device = \"cpu\" with --devices"), "{told}");
    assert!(!s.path("runs").exists() && !s.path("data").exists());
}

#[test]
fn a_comparison_never_takes_runs_of_another_configuration_or_corpus() {
    let s = Sandbox::new();
    let compare = |set: &[&str], more: &[&str]| {
        let mut c = s.command(&["compare"], &[&["run.steps=5", "log.tensorboard=false"], set].concat());
        c.args(["--arms", "dense,dash", "--seeds", "1", "--out", "cmp"]).args(more).output().unwrap()
    };
    error_of(&compare(&[], &[]), 0);
    let folder = s.path("cmp");
    let before = content(&folder);
    assert!(before.iter().any(|(path, _)| path.ends_with("report.md")));
    // each of them changes a number of the report: the model, the optimiser, what is measured, what is read
    for (set, key) in [
        ("model.width=64", "model.width: 32 -> 64"),
        ("optim.lr=1e-6", "optim.lr: 0.003 -> 0.000001"),
        ("eval.batches=1", "eval.batches: 2 -> 1"),
        ("data.vocab_size=290", "data.vocab_size: 300 -> 290"),
    ] {
        for more in [&[][..], &["--report-only"]] {
            let text = error_of(&compare(&[set], more), 2);
            assert!(text.contains("made differently") && text.contains(key), "{text}");
        }
    }
    fs::write(s.path("corpus.txt"), "another text. ".repeat(9000)).unwrap();
    assert!(error_of(&compare(&["data.vocab_size=260"], &[]), 2).contains("data.vocab_size"));
    assert_eq!(content(&folder), before, "a refused comparison changes nothing");
}

#[test]
fn the_fate_of_a_compared_run_is_its_exit_status() {
    let s = Sandbox::new();
    // dies without a word, as a process that the system kills does
    let mut compare = s.command(&["compare"], &["run.steps=100000", "checkpoint.every=100000", "eval.every=100000"]);
    let mut compare = compare
        .args(["--arms", "dense", "--seeds", "1", "--out", "cmp"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let log = s.path("cmp/logs/dense-s0.log");
    while !fs::read_to_string(&log).unwrap_or_default().contains("step 5/") {
        assert!(compare.try_wait().unwrap().is_none(), "compare goes on while its run does");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kill = "kill -KILL $(pgrep -P \"$0\")";
    assert!(Command::new("sh").args(["-c", kill, &compare.id().to_string()]).status().unwrap().success());
    let mut text = String::new();
    std::io::Read::read_to_string(&mut compare.stderr.take().unwrap(), &mut text).unwrap();
    assert_eq!(compare.wait().unwrap().code(), Some(1), "{text}");
    assert!(text.contains("dense-s0 FAILED: signal 9"), "{text}");
}

/// An answer, its tests and its rules, from the first run to a changed declaration.
#[test]
// Above 60 lines: one folder goes through all its states, and each state takes a comparison to make.
fn a_declared_comparison_tunes_decides_and_tells_a_changed_rule_first() {
    let s = Sandbox::new();
    fs::write(s.path("criteria.md"), "dash counts as better at alpha 0.05").unwrap();
    let rules = |alpha: &str| {
        format!(
            "compare={{seeds=2,baseline=\"dense\",primary=\"accuracy\",contrast=\"dash\",margin=0.1,alpha={alpha},criteria=\"criteria.md\",\
             learning_rates=[1e-3,3e-3],tuning_seeds=[101,102],tuning_steps=4,arm=[{{name=\"dense\",\
             set=[\"model.attention.kind=dense\"]}},{{name=\"dash\"}},{{name=\"dash-stopped\",rate_of=\"dash\",\
             set=[\"model.attention.kind=dash-stopped\"]}}]}}"
        )
    };
    let (task, declared, changed) = (RECALL, rules("0.05"), rules("0.1"));
    let set = [task, "data.vocab_size=40", "run.steps=6", "eval.every=2", declared.as_str()];
    let o = s.run(&["compare"], &set);
    succeeded(&o);
    let told = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(
        told.contains("warning: budgets may differ: training decides what dash attends, dense attends 24.5"),
        "{told}"
    );
    assert!(
        told.contains("learning rates: 8 runs of 4 steps") && told.contains("learning rate of dash: 0.00"),
        "{told}"
    );
    let folder = s.path("runs/compare-test");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let text = read("report.md");
    assert!(text.lines().nth(2).unwrap().starts_with("It is undecided whether dash differs from dense"), "{text}");
    for part in [
        "Learning rates tried",
        "Time to solve",
        "Seed by seed",
        "not committed when the first run started",
        "101, 102",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let rate = |run: &str| {
        let config = fs::read_to_string(folder.join("runs").join(run).join("config.toml")).unwrap();
        config.lines().find(|l| l.starts_with("lr = ")).unwrap().to_string()
    };
    assert_eq!(rate("dash-s0"), rate("dash-stopped-s1"));

    // nothing is run again, and the published rows alone make the same tables
    let o = s.run(&["compare"], &set);
    assert!(String::from_utf8_lossy(&o.stderr).contains("6 runs of 6 steps, 6 finished already"));
    assert_eq!(read("report.md"), text);
    let rows = folder.join("results.csv");
    let from_rows = ["compare", "--rows", rows.to_str().unwrap(), "--out", "again"];
    succeeded(&s.run(&from_rows, &set));
    let again = fs::read_to_string(s.path("again/report.md")).unwrap();
    let tables = |t: &str| t.lines().filter(|l| l.starts_with('|')).map(str::to_string).collect::<Vec<_>>();
    assert!(tables(&text).len() > 30 && tables(&again) == tables(&text));
    let builds =
        |t: &str| t.lines().filter(|l| l.starts_with("Trained by version")).map(str::to_string).collect::<Vec<_>>();
    assert!(builds(&text).len() == 1 && builds(&again) == builds(&text), "{again}");

    // another rule or another text of the criteria is told in the first line
    let other = [task, "data.vocab_size=40", "run.steps=6", "eval.every=2", changed.as_str()];
    succeeded(&s.run(&["compare", "--report-only"], &other));
    let first = |text: String| text.lines().nth(2).unwrap().to_string();
    assert!(
        first(read("report.md")).starts_with("Criteria were changed after the first run (compare.alpha 0.05 -> 0.1)")
    );
    // other seeds after the first ones were seen
    succeeded(&s.run(&["compare", "--report-only"], &[&set[..], &["run.seed=5"]].concat()));
    let told = first(read("report.md"));
    assert!(told.starts_with("Criteria were changed after the first run (run.seed 0 -> 5)"), "{told}");
    fs::write(s.path("criteria.md"), "dash counts as better at any alpha").unwrap();
    succeeded(&s.run(&["compare", "--report-only"], &set));
    assert!(first(read("report.md")).contains("the text of criteria.md"));
    // from the published rows, too: the record lies beside them
    succeeded(&s.run(&from_rows, &set));
    assert!(first(fs::read_to_string(s.path("again/report.md")).unwrap()).contains("the text of criteria.md"));
    // a record that cannot be read is no record of no change
    fs::write(folder.join("criteria.json"), "{").unwrap();
    failed(&s.run(&["compare", "--report-only"], &set), 2, &["criteria.json", "is damaged"]);
}

#[test]
fn runs_stop_when_they_have_solved_their_task_and_are_finished() {
    let s = Sandbox::new();
    let task = "task={kind=\"recall\",pairs=3,queries=2,eval_sequences=64}";
    // a guess among the values is right often enough
    let rules = "compare={seeds=1,primary=\"time-to-solve\",solved=0.01,checks=1,stop_after=2}";
    let set = [task, "data.vocab_size=40", "run.steps=60", "eval.every=3", rules];
    let arms = ["compare", "--arms", "dense,dash"];
    let o = s.run(&arms, &set);
    succeeded(&o);
    let folder = s.path("runs/compare-test");
    let text = fs::read_to_string(folder.join("report.md")).unwrap();
    assert!(!text.contains("Attention:** dash") && !text.contains("mean over the run |"), "{text}");
    for part in [
        "stops 2 validations after",
        "shortcut, simulated",
        "Accuracy by question",
        "Where the budget goes",
        "Gamma and clipping",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    for arm in ["dense", "dash"] {
        let run = folder.join("runs").join(format!("{arm}-s0"));
        let record = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = record.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        let checks: Vec<(u64, f64)> = lines
            .filter(|l| l["split"] == "val")
            .map(|l| (l["step"].as_u64().unwrap(), l["task"][0]["accuracy"].as_f64().unwrap()))
            .collect();
        let solved = checks.iter().position(|c| c.1 >= 0.01).unwrap();
        assert_eq!(checks.len(), solved + 3, "{arm}: {checks:?}");
        assert!(checks[solved + 2].0 < 60);
        // nothing is left to do for a run that has done enough
        let config = folder.join("configs").join(format!("{arm}-s0.toml"));
        let o = std::process::Command::new(env!("CARGO_BIN_EXE_train"))
            .args(["--config", config.to_str().unwrap(), "--resume"])
            .current_dir(s.dir.path())
            .output()
            .unwrap();
        succeeded(&o);
        let told = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(told.contains(&format!("done: {} steps of 60, enough", checks[solved + 2].0)), "{told}");
        assert_eq!(fs::read_to_string(run.join("metrics.jsonl")).unwrap(), record);
    }
    let o = s.run(&arms, &set);
    assert!(String::from_utf8_lossy(&o.stderr).contains("2 runs of 60 steps, 2 finished already"));
    // a text is never solved
    failed(&s.run(&["compare"], &["compare={stop_after=3}"]), 2, &["compare.stop_after: means nothing without [task]"]);
    failed(
        &s.run(&[], &["eval.stop={accuracy=0.9,checks=2,after=0}"]),
        2,
        &["eval.stop: means nothing without [task]"],
    );
    let stop = |rule: &str| s.run(&[], &[task, "data.vocab_size=40", &format!("eval.stop={rule}")]);
    failed(&stop("{accuracy=1.5,checks=2,after=0}"), 2, &["eval.stop.accuracy: 1.5 is not above 0 and at most 1"]);
    failed(&stop("{accuracy=0.9,checks=0,after=0}"), 2, &["eval.stop.checks: is 0"]);
}

#[test]
fn declarations_that_no_run_can_satisfy_are_refused() {
    let s = Sandbox::new();
    let refused = |rules: &str, words: &[&str]| {
        let table = format!("compare={{{rules}}}");
        failed(&s.run(&["compare", "--arms", "dense,dash"], &[RECALL, "data.vocab_size=40", &table]), 2, words);
    };
    refused(
        "primary=\"speed\"",
        &["compare.primary: \"speed\" is measured by no arm", "\"accuracy\"", "\"time-to-solve\""],
    );
    refused("primary=\"accuracy length=128\"", &["measured by no arm", "\"accuracy length=96\""]);
    refused("primary=\"accuracy\",margin=0.0", &["compare.margin: 0 is not above 0"]);
    refused("primary=\"accuracy\",margin=-0.1", &["compare.margin: -0.1 is not above 0"]);
    refused("margin=0.1", &["compare.margin: means nothing without compare.primary"]);
    refused("tuning_seeds=[2,101]", &["compare.tuning_seeds: 2 is a seed of the comparison", "0 to 2", "from 101 on"]);
    refused("learning_rates=[1e-3],primary=\"loss\"", &["compare.tuning_seeds, for example"]);
    refused("primary=\"loss\",contrast=\"dense\"", &["compare.contrast: \"dense\" is the baseline"]);
    refused("primary=\"loss\",contrast=\"dsh\"", &["compare.contrast: \"dsh\" is none of the arms dense, dash"]);
    refused("seeds=1000000000000", &["compare.seeds: 1000000000000 is not 1 to 10000"]);
    refused("learning_rates=[1e-3,0.001],primary=\"loss\"", &["compare.learning_rates: 0.001 is named twice"]);
    refused("criteria=\"nowhere.md\"", &["compare.criteria: nowhere.md is no file"]);
    fs::write(s.path("empty.md"), "").unwrap();
    refused("criteria=\"empty.md\"", &["compare.criteria: empty.md is empty", "before the first run"]);
    refused("checks=0", &["compare.checks: is 0"]);
    refused("alpha=1.0", &["compare.alpha: 1 is not above 0 and at most 0.5"]);
    // text alone has no accuracy
    failed(
        &s.run(&["compare", "--arms", "dense,dash"], &["compare={primary=\"accuracy\"}"]),
        2,
        &["measured by no arm", "\"loss\""],
    );
    assert!(!s.path("runs").exists() && !s.path("data").exists());
}

/// The page in a real browser, where one is installed.
#[test]
fn the_report_opens_in_a_browser() {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let found = browsers.iter().find(|b| Command::new(b).arg("--version").output().is_ok_and(|o| o.status.success()));
    let Some(browser) = found else {
        return not_run("the_report_opens_in_a_browser", "no Chromium is installed");
    };
    let s = Sandbox::new();
    let set = [RECALL, "data.vocab_size=40", "run.steps=4"];
    succeeded(&s.run(&["compare", "--arms", "dense,dash", "--seeds", "1"], &set));
    let page = s.path("runs/compare-test/report.html");
    let picture = s.path("page.png");
    let o = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=412,3000", "--virtual-time-budget=2000"])
        .arg(format!("--user-data-dir={}", s.path("profile").display()))
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    succeeded(&o);
    let bytes = fs::read(&picture).unwrap();
    assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 20_000, "a picture of {} bytes", bytes.len());
}

/// Linux alone can tell a run that its comparison is gone.
#[cfg(target_os = "linux")]
#[test]
fn a_run_of_a_killed_comparison_saves_and_its_comparison_goes_on() {
    let s = Sandbox::new();
    let command = |steps: &str| {
        let set = [steps, "checkpoint.every=100000", "eval.every=100000", "log.tensorboard=false"];
        let mut c = s.command(&["compare"], &set);
        c.args(["--arms", "dense", "--seeds", "1", "--out", "cmp"]).stdout(Stdio::null());
        c
    };
    let mut compare = command("run.steps=3000").stderr(Stdio::null()).spawn().unwrap();
    let log = s.path("cmp/logs/dense-s0.log");
    while !fs::read_to_string(&log).unwrap_or_default().contains("step 5/") {
        assert!(compare.try_wait().unwrap().is_none(), "compare goes on while its run does");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    compare.kill().unwrap();
    compare.wait().unwrap();
    // a leftover of a kill in the middle of a save
    fs::create_dir_all(s.path("cmp/runs/dense-s0/checkpoints/.tmp-removed-1")).unwrap();
    let text = error_of(&command("run.steps=3000").output().unwrap(), 0);
    assert!(text.contains("dense-s0 done"), "{text}");
    let said = fs::read_to_string(s.path("cmp/runs/dense-s0/run.log")).unwrap();
    assert!(
        said.contains("saved; continue with: ") && !said.contains("--with-parent") && said.contains("resuming from"),
        "{said}"
    );
    let left = fs::read_dir(s.path("cmp/runs/dense-s0/checkpoints")).unwrap().map(|e| e.unwrap().path());
    assert!(!left.into_iter().any(|p| is_hidden(&p)), "a leftover stays");
}
