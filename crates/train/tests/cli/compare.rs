//! `compare`: pairs, what is refused, and the report.

use std::fs;
use std::process::{Command, Stdio};

use crate::sandbox::{RECALL, Sandbox, content, error_of, failed, succeeded};

#[test]
fn compare_reports_resumes_and_survives_an_arm_that_fails() {
    let s = Sandbox::new();
    let table = "compare={baseline=\"dense\",seeds=2,arm=[{name=\"dense\",set=[\"model.attention.kind=dense\"]},\
        {name=\"dash\"},{name=\"wild\",set=[\"optim.lr=1e30\",\"optim.clip=0\"]}]}";
    let set = [RECALL, "data.vocab_size=40", "run.steps=6", "probe.every=3", "log.every=2", table];
    let o = s.run(&["compare"], &set);
    succeeded(&o);
    let folder = s.path("runs/compare-test");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let (page, text) = (read("report.html"), read("report.md"));
    for part in ["Fewer than 3 seeds", "wild with seed 0 failed", "is not finite", "Whose fault", "too few seeds"] {
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

/// The page in a real browser, where one is installed.
#[test]
fn the_report_opens_in_a_browser() {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let found = browsers.iter().find(|b| Command::new(b).arg("--version").output().is_ok_and(|o| o.status.success()));
    let Some(browser) = found else {
        println!("skipped: no Chromium is installed");
        return;
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
