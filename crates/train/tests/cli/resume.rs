//! How a run is stopped and goes on.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

use dash_core::rng::Rng;
use serde_json::Value;

use crate::sandbox::{Sandbox, error_of, failed, is_hidden, kill, succeeded};

#[test]
fn killed_at_ten_random_moments_and_resumed_it_ends_with_the_same_bits() {
    let s = Sandbox::new();
    // with a spike guard that every few updates leaves one out
    let set = ["run.steps=150", "checkpoint.every=3", "run.threads=2", "optim.spike_guard=1.2"];
    let whole = s.train("whole", &set, false);
    let skipped = s.metrics("whole").iter().filter_map(|l| l["skipped_updates"].as_u64()).max();
    assert!(skipped.is_some_and(|n| (3..75).contains(&n)), "{skipped:?}");
    let mut rng = Rng::new(std::process::id() as u64);
    let all: Vec<&str> = ["run.name=killed"].iter().chain(&set).copied().collect();
    let newest = || {
        let all = fs::read_dir(s.path("runs/killed/checkpoints")).into_iter().flatten().flatten();
        all.map(|e| e.path()).filter(|p| !is_hidden(p)).max()
    };
    // every second kill comes at any moment from the process's start on, every other one soon after a checkpoint of its own
    let (mut hit, mut continued) = (0, 0);
    for i in 0..10 {
        let mut c = s.command(&[], &all);
        let before = newest();
        if s.path("runs/killed/config.toml").exists() {
            c.arg("--resume");
            continued += before.is_some() as usize;
        }
        let mut child = c.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while i % 2 == 1 && newest() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(rng.below(if i % 2 == 1 { 15 } else { 170 }) as u64));
        child.kill().unwrap();
        hit += (child.wait().unwrap().signal() == Some(9)) as usize;
    }
    // a run that had ended before it was killed, or that never got to a checkpoint, would show nothing
    assert!(hit >= 5 && continued >= 4, "{hit} kills hit a living run, {continued} went on from a checkpoint");
    let resume = s.path("runs/killed/config.toml").exists();
    assert!(whole == s.train("killed", &set, resume));
    let steps = |name: &str| s.metrics(name).iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(steps("whole"), steps("killed"), "the record has no gap and no line twice");
}

#[test]
fn sigterm_saves_and_exits_130_and_the_resumed_run_has_the_same_bits() {
    let s = Sandbox::new();
    let set = ["run.steps=400", "checkpoint.every=0", "eval.every=0"];
    let whole = s.train("whole", &set, false);
    let all: Vec<&str> = ["run.name=stopped"].iter().chain(&set).copied().collect();
    let mut child = s.command(&[], &all).stderr(Stdio::piped()).spawn().unwrap();
    let record = s.path("runs/stopped/metrics.jsonl");
    while !fs::read_to_string(&record).is_ok_and(|t| t.lines().count() >= 2) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    kill(&mut child, "TERM");
    let told = error_of(&child.wait_with_output().unwrap(), 130);
    let again = told.split_once("saved; continue with: ").expect(&told).1.lines().next().unwrap();
    assert!(
        again.contains("--config ") && again.contains("--set run.name=stopped") && again.ends_with(" --resume"),
        "{again}"
    );
    assert_eq!(s.checkpoints("stopped").len(), 1);
    assert!(whole == s.train("stopped", &set, true));
}

#[test]
fn a_closed_terminal_and_a_supervisors_warning_save_like_an_interrupt() {
    for signal in ["HUP", "USR1", "XCPU", "TERM", "INT"] {
        let s = Sandbox::new();
        let mut child = s.started(&[]);
        kill(&mut child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
        assert_eq!(s.saved().len(), 1, "{signal}");
    }
}

#[test]
fn a_second_process_is_kept_out_of_a_run_folder_and_a_killed_one_leaves_it_free() {
    let s = Sandbox::new();
    let mut first = s.started(&[]);
    for resume in [&["--resume"][..], &[]] {
        let out = s.command(&[], &["run.steps=100000"]).args(resume).output().unwrap();
        let text = error_of(&out, 2);
        assert!(text.contains(&format!("process {}", first.id())) || text.contains("holds a run already"), "{text}");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    let out = s.command(&[], &["run.steps=5"]).args(["--resume", "--allow-changes"]).output().unwrap();
    error_of(&out, 0);
    assert_eq!(s.saved(), ["step-00000005"]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_said_so() {
    let s = Sandbox::new();
    let whole = s.train("a", &[], false);
    let newest = s.newest("a");
    let model = newest.join("model.safetensors");
    let mut bytes = fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&model, bytes).unwrap();
    // half of a checkpoint under its hidden name is nobody's business
    fs::create_dir(newest.with_file_name(".tmp-step-00000025")).unwrap();
    let mut c = s.command(&[], &["run.name=a"]);
    let o = c.arg("--resume").output().unwrap();
    succeeded(&o);
    let stderr = String::from_utf8_lossy(&o.stderr);
    assert!(stderr.contains("step-00000020") && stderr.contains("does not match its hash"), "{stderr}");
    assert!(stderr.contains("resuming from") && stderr.contains("step 15"), "{stderr}");
    assert!(whole == s.weights("a"));
    // a state of another step would say that the run has ended
    let state = newest.join("state.json");
    let text = fs::read_to_string(&state).unwrap();
    fs::write(&state, text.replace("\"step\": 20", &format!("\"step\": {}", u64::MAX))).unwrap();
    let o = s.command(&[], &["run.name=a"]).arg("--resume").output().unwrap();
    succeeded(&o);
    let stderr = String::from_utf8_lossy(&o.stderr);
    assert!(stderr.contains(&format!("its state.json is of step {}", u64::MAX)), "{stderr}");
    assert!(stderr.contains("resuming from") && stderr.contains("step 15"), "{stderr}");
    assert!(whole == s.weights("a"));
}

#[test]
fn resuming_something_else_is_refused_unless_told() {
    let s = Sandbox::new();
    let nothing = s.command(&[], &["run.name=x"]).arg("--resume").output().unwrap();
    failed(&nothing, 2, &["nothing to resume", "leave out --resume"]);
    s.train("x", &["run.steps=10"], false);
    let resume = |set: &[&str], more: &[&str]| {
        let all: Vec<&str> = ["run.name=x"].iter().chain(set).copied().collect();
        s.command(&[], &all).arg("--resume").args(more).output().unwrap()
    };
    let refused = resume(&["run.steps=12", "eval.every=7"], &[]);
    failed(&refused, 2, &["run.steps: 10 -> 12", "--extend 12 instead of --resume", "--allow-changes"]);
    failed(&refused, 2, &["runs/x without --set has the settings of the run"]);
    assert!(!String::from_utf8_lossy(&refused.stderr).contains("resuming with"), "what is refused does not resume");
    let longer = s.command(&[], &["run.name=x", "run.steps=10", "data.seq_len=16"]).args(["--extend", "12"]).output();
    let longer = longer.unwrap();
    failed(&longer, 2, &["data.seq_len"]);
    assert!(!String::from_utf8_lossy(&longer.stderr).contains("instead of --resume"), "it was said: {longer:?}");
    failed(&resume(&["run.steps=8"], &[]), 2, &["run.steps: 10 -> 8", "--allow-changes"]);
    succeeded(&resume(&["run.steps=10", "eval.batches=1"], &[]));
    let corpus = s.path("corpus.txt");
    fs::write(&corpus, fs::read_to_string(&corpus).unwrap() + "one line more\n").unwrap();
    failed(&resume(&["run.steps=10"], &[]), 2, &["prepared corpus"]);
    succeeded(&resume(&["run.steps=12"], &["--allow-changes"]));
    assert!(s.newest("x").ends_with("step-00000012"));
}

#[test]
fn runs_of_builds_before_format_version_3_go_on_and_a_later_one_is_refused() {
    for version in [1, 2] {
        goes_on(&format!("tests/fixtures/checkpoint-version-{version}"));
    }
}

fn goes_on(fixture: &str) {
    let s = Sandbox::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture);
    let run = s.path("runs/old");
    let saved = run.join("checkpoints/step-00000002");
    fs::create_dir_all(&saved).unwrap();
    fs::copy(fixture.join("old.toml"), s.path("old.toml")).unwrap();
    fs::copy(fixture.join("config.toml"), run.join("config.toml")).unwrap();
    for name in ["state.json", "model.safetensors", "optimizer.safetensors"] {
        fs::copy(fixture.join("step-00000002").join(name), saved.join(name)).unwrap();
    }
    succeeded(&s.bin(&["eval", "--model", "runs/old"]));
    let resumed = s.bin(&["--config", "old.toml", "--resume"]);
    succeeded(&resumed);
    assert!(String::from_utf8_lossy(&resumed.stderr).contains("(step 2)"));
    let state = run.join("checkpoints/step-00000004/state.json");
    let new: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    assert_eq!((&new["version"], &new["optimizer"], &new["step"]), (&3.into(), &"adamw".into(), &4.into()));
    assert!(new.get("config_hash").is_none());
    // a later format is refused; the checkpoint before it, which could be read, is not taken instead
    let text = fs::read_to_string(&state).unwrap().replace("\"version\": 3", "\"version\": 4");
    fs::write(&state, text).unwrap();
    failed(
        &s.bin(&["--config", "old.toml", "--resume"]),
        2,
        &["step-00000004", "format version 4", "reads versions 1 to 3"],
    );
    failed(&s.bin(&["eval", "--model", "runs/old"]), 2, &["format version 4"]);
}

#[test]
fn resume_auto_starts_or_continues_and_extend_says_what_happens_to_the_schedule() {
    let s = Sandbox::new();
    let run = |args: &[&str], set: &[&str]| s.command(&[], set).args(args).output().unwrap();
    error_of(&run(&["--resume=auto"], &["run.steps=10"]), 0);
    assert_eq!(s.saved().last().unwrap(), "step-00000010");
    let text = error_of(&run(&["--resume=auto"], &["run.steps=10"]), 0);
    assert!(text.contains("already finished, 10 of 10 updates; --extend STEPS goes on"), "{text}");
    assert!(!text.contains("resuming"), "{text}");
    // the same command with another length is not silently another schedule
    assert!(error_of(&run(&["--resume"], &["run.steps=15"]), 2).contains("run.steps: 10 -> 15"));
    let text = error_of(&run(&["--extend", "10"], &[]), 2);
    assert!(text.contains("10 is not above the 10 updates"), "{text}");
    let text = error_of(&run(&["--extend", "15"], &[]), 0);
    // cosine from 3e-3 to a tenth of it: the tenth update had the lowest rate, the eleventh of fifteen has a higher one
    assert!(text.contains("the learning rate goes from 3.00e-4 to"), "{text}");
    assert_eq!(s.saved().last().unwrap(), "step-00000015");
    // what else differs is refused as ever
    assert!(error_of(&run(&["--extend", "20"], &["optim.lr=1e-3"]), 2).contains("optim.lr"));
    // the configuration still says 10: the run goes to where it was extended to
    let text = error_of(&run(&["--resume"], &["run.steps=10"]), 0);
    assert!(
        text.contains("run.steps = 15, to which the run was extended") && text.contains("already finished, 15 of 15"),
        "{text}"
    );
    assert!(error_of(&run(&["--resume"], &["run.steps=20"]), 2).contains("run.steps: 15 -> 20"));
}

#[test]
fn a_run_goes_on_by_its_folder_wherever_that_lies() {
    let s = Sandbox::new();
    let whole = s.train("whole", &["run.steps=12"], false);
    s.train("part", &["run.steps=12"], false);
    // as if it had been stopped in between: the newest checkpoint is gone
    let newest = s.newest("part");
    fs::remove_dir_all(&newest).unwrap();
    assert!(s.told(2, &["--resume"]).contains("or the folder of a run to continue"));
    assert!(s.told(2, &["--config", "."]).contains("is a folder without config.toml"));
    let text = s.told(0, &["--config", "runs/part", "--resume"]);
    assert!(text.contains("resuming from") || text.contains("no checkpoint yet"), "{text}");
    assert!(s.weights("part") == whole);
    fs::rename(s.path("runs/part"), s.path("moved")).unwrap();
    let text = s.told(0, &["--config", "moved", "--extend", "14"]);
    assert!(text.contains("extending from 12 to 14"), "{text}");
    assert!(s.path("moved/checkpoints/step-00000014").is_dir() && !s.path("runs/part").exists());
    // what is set stands above it; another name lies beside it
    s.told(0, &["--config", "moved", "--set", "run.name=other", "--set", "run.steps=2"]);
    assert!(s.path("other/checkpoints/step-00000002").is_dir());
}

#[test]
fn verify_resume_proves_equal_bits() {
    let s = Sandbox::new();
    for kind in ["optim.kind=adamw", "optim.kind=muon"] {
        let o = s.run(&["verify-resume"], &[kind]);
        succeeded(&o);
        assert!(String::from_utf8_lossy(&o.stdout).contains("bit-equal"), "{kind}");
    }
}

#[test]
fn a_run_knows_every_process_that_trained_it() {
    let s = Sandbox::new();
    let read =
        || -> Vec<Value> { serde_json::from_slice(&fs::read(s.path("runs/test/provenance.json")).unwrap()).unwrap() };
    let mut child = s.started(&[]);
    child.kill().unwrap();
    child.wait().unwrap();
    let first = read();
    assert_eq!(first.len(), 1, "written at the start, so that a killed process is known, too");
    for key in ["time", "version", "commit", "device", "instruction_set", "processor", "system"] {
        assert!(first[0][key].as_str().is_some_and(|x| !x.is_empty()), "{key} in {first:?}");
    }
    for package in ["rustc", "rand", "rand_chacha", "tokenizers"] {
        let version = first[0]["packages"][package].as_str().unwrap();
        assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{package} {version}");
    }
    let words = |start: &Value| -> Vec<String> { serde_json::from_value(start["command"].clone()).unwrap() };
    assert!(words(&first[0]).contains(&"run.steps=100000".to_string()), "{first:?}");
    assert_eq!((first[0]["step"].as_u64(), first[0]["changed"].is_boolean()), (Some(0), true));

    let go_on = |steps: &str| {
        let o = s.command(&[], &[steps, "run.threads=1"]).args(["--resume", "--allow-changes"]).output().unwrap();
        error_of(&o, 0)
    };
    let text = go_on("run.steps=5");
    assert!(!text.contains("other than at the last start"), "{text}");
    go_on("run.steps=8");
    let all = read();
    assert_eq!(all[0], first[0], "earlier starts stay as they are");
    assert_eq!(all.iter().map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 0, 5]);
    assert_eq!(all[2]["threads"], 1);
    // the checkpoint names the build, too
    let state = fs::read_to_string(s.newest("test").join("state.json")).unwrap();
    assert!(state.contains(&format!("(commit {}", first[0]["commit"].as_str().unwrap())), "{state}");

    // another processor and another build are told, and evaluation shows them
    let path = s.path("runs/test/provenance.json");
    let mut other = all;
    other[2]["instruction_set"] = "another".into();
    other[2]["packages"]["rand"] = "0.0.1".into();
    fs::write(&path, serde_json::to_vec(&other).unwrap()).unwrap();
    let text = go_on("run.steps=9");
    assert!(text.contains("other than at the last start: instruction set another -> "), "{text}");
    let shown = s.out(&["eval", "--model", "runs/test"]);
    assert!(shown.contains("started ") && shown.contains("at step 5") && shown.contains("4 starts in all"), "{shown}");
    let shown: Value = serde_json::from_str(&s.out(&["eval", "--model", "runs/test", "--json"])).unwrap();
    assert_eq!(shown["provenance"].as_array().unwrap().len(), 4);

    // a list that is damaged is kept, and stops no run
    fs::write(&path, "[{").unwrap();
    let text = go_on("run.steps=10");
    assert!(text.contains("provenance.json is damaged"), "{text}");
    assert_eq!((read().len(), fs::read_to_string(path.with_extension("json.damaged")).unwrap().as_str()), (1, "[{"));
}

#[test]
fn a_fork_with_moments_goes_on_with_the_bits_of_the_run_that_it_left() {
    let s = Sandbox::new();
    // a text with a tokenizer that was learned from it
    let set = ["optim.schedule=constant", "checkpoint.keep_last=9", "router.target_share=0.6"];
    let whole = s.train("whole", &set, false);
    let from = "init.from=runs/whole/checkpoints/step-00000010";
    let forked = |more: &[&'static str]| [&set[..], &[from, "init.moments=true"], more].concat();
    assert!(s.train("fork", &forked(&[]), false) == whole, "the same settings");
    assert_eq!(s.metrics("fork")[0]["step"], 15, "the record begins behind the updates that the other run made");
    // a decay of the last ten of 20 updates, from the flat part of the other run
    let decay: &[&str] = &["optim.schedule=warmup-stable-decay", "optim.decay_fraction=0.5"];
    let branch = [&[from, "init.moments=true"], decay, &set[1..]].concat();
    s.train("branch", &branch, false);
    let log = |name: &str| fs::read_to_string(s.path(&format!("runs/{name}/run.log"))).unwrap();
    let rate = "rate      2.73e-3 at update 11, 3.00e-4 at the last, 20; the decay begins after update 10";
    assert!(log("branch").contains(rate), "{}", log("branch"));
    s.train(
        "late",
        &[&[from, "init.moments=true"], &decay[..1], &["optim.decay_fraction=0.6"], &set[1..]].concat(),
        false,
    );
    assert!(log("late").contains("; the decay began at update 8, before these weights"), "{}", log("late"));
    let rates: Vec<f64> = s.metrics("branch").iter().filter_map(|l| l["lr"].as_f64()).collect();
    assert!(rates.len() == 2 && (rates[0] - 3e-3 * 0.55).abs() < 1e-9 && (rates[1] - 3e-4).abs() < 1e-9, "{rates:?}");
    // and it is resumed like any other
    assert!(s.train("again", &forked(&["checkpoint.every=2"]), false) == whole);
    for step in [16, 18, 20] {
        fs::remove_dir_all(s.path(&format!("runs/again/checkpoints/step-{step:08}"))).unwrap();
    }
    assert!(s.train("again", &forked(&["checkpoint.every=2"]), true) == whole);
    let told = |set: &[&str], expected: &str| failed(&s.run(&[], set), 2, &["init.moments", expected]);
    told(&forked(&["run.name=a", "run.steps=10"]), "has made 10 updates, which run.steps = 10 counts, too");
    told(&forked(&["run.name=b", "model.attention={kind=\"dense\"}", "router={}"]), "has other parameters");
    for (model, out, says) in
        [("whole", "out", "Trained from scratch on"), ("fork", "forked", "| weights before | `runs/whole/")]
    {
        succeeded(&s.bin(&["export", "--model", &format!("runs/{model}"), "--out", out]));
        let card = fs::read_to_string(s.path(out).join("README.md")).unwrap();
        assert!(card.contains(says) && card.contains("from scratch") == (model == "whole"), "{card}");
    }
    told(&["run.name=c", "init.from=out", "init.moments=true", "model={}"], "holds weights without moments");
}
