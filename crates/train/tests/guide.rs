//! Finding one's way: what a file can hold, what is wrong with one, and what a trained model needs of its corpus.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Sandbox(tempfile::TempDir);

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..1500)
            .map(|i| format!("verse {} of {} asks the router for chunk {}\n", i % 89, i % 7, i * i % 61))
            .collect();
        fs::write(dir.path().join("own.txt"), text).unwrap();
        Sandbox(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn train(&self, args: &[&str]) -> Output {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(args).current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap()
    }

    /// Standard output of a command that has to succeed.
    fn out(&self, args: &[&str]) -> String {
        let o = self.train(args);
        assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
        String::from_utf8(o.stdout).unwrap()
    }

    /// Standard error of a command that has to end with this status.
    fn told(&self, status: i32, args: &[&str]) -> String {
        let o = self.train(args);
        let text = String::from_utf8(o.stderr).unwrap();
        assert_eq!(o.status.code(), Some(status), "{args:?}: {text}");
        assert!(!text.contains("panicked"), "{text}");
        text
    }
}

/// Keys of the reference as `[place] name`, from docs/config.md.
fn documented() -> Vec<(String, String)> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/config.md")).unwrap();
    let (mut place, mut out) = (String::new(), Vec::new());
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            place = title.trim_matches('`').trim_matches(['[', ']']).to_string();
        } else if let Some(name) = line.strip_prefix("| `").and_then(|l| l.split('`').next())
            && !place.contains(' ')
        {
            out.push((place.clone(), name.to_string()));
        }
    }
    assert!(out.len() > 60, "{}", out.len());
    out
}

const SMALL: [&str; 8] =
    ["--set", "run.steps=3", "--set", "data.vocab_size=300", "--set", "data.seq_len=64", "--set", "eval.batches=2"];

#[test]
fn a_new_file_has_every_key_and_trains_on_ones_own_text() {
    let s = Sandbox::new();
    let file = s.out(&["init", "--text", "own.txt"]);
    fs::write(s.path("mine.toml"), &file).unwrap();
    for (place, name) in documented().iter().filter(|(place, name)| {
        !["model.attention", "compare.arm"].contains(&place.as_str())
            && (place.as_str(), name.as_str()) != ("model", "attention")
    }) {
        let at = file.find(&format!("[{place}]\n")).unwrap_or_else(|| panic!("no table {place} in\n{file}"));
        let table = file[at + 1..].split("\n\n").next().unwrap();
        let set = |l: &str| l.trim_start_matches('#').split(" =").next() == Some(name);
        assert!(table.lines().any(set), "{place}.{name} in\n{table}");
    }
    let mut args = vec!["--config", "mine.toml"];
    args.extend(SMALL);
    s.out(&args);
    let resolved = fs::read_to_string(s.path("runs/mine/config.toml")).unwrap();
    assert!(resolved.contains("path = \"own.txt\"") && resolved.contains("kind = \"dash\""), "{resolved}");
    // what is switched off are the defaults: switched on they change nothing
    let on: String = file
        .split("\n\n")
        .filter(|table| !table.starts_with("#["))
        .map(|table| {
            let line = |l: &str| match l.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') && !rest.ends_with('=') && !rest.starts_with("name =") => {
                    format!("{rest}\n")
                }
                _ => format!("{l}\n"),
            };
            table.lines().map(line).collect::<String>() + "\n"
        })
        .collect();
    fs::write(s.path("on.toml"), on).unwrap();
    let mut args = vec!["--config", "on.toml", "--set", "run.name=mine", "--resume"];
    args.extend(SMALL);
    let told = s.told(0, &args);
    assert!(!told.contains("->"), "{told}");
}

#[test]
fn every_kind_has_a_file_that_loads() {
    let s = Sandbox::new();
    let told = s.told(2, &["init", "--kind", "sparse"]);
    let kinds: Vec<&str> = told.split("is none of ").nth(1).unwrap().trim().split(", ").collect();
    assert!(kinds.contains(&"nsa") && kinds.contains(&"dash-stopped"), "{told}");
    for kind in kinds {
        fs::write(s.path("k.toml"), s.out(&["init", "--text", "own.txt", "--kind", kind])).unwrap();
        let name = format!("run.name={kind}");
        let set = ["--set", "run.steps=1", "--set", "data.vocab_size=300", "--set", "eval.batches=1", "--set", &name];
        let args: Vec<&str> = ["--config", "k.toml"].into_iter().chain(set).collect();
        s.out(&args);
        assert!(s.path("runs").join(kind).join("checkpoints/step-00000001/model.safetensors").is_file(), "{kind}");
    }
}

#[test]
fn all_keys_that_are_wrong_are_told_at_once() {
    let s = Sandbox::new();
    let text = "[run]\nsteps = 3\n[data]\nseq_len = 64\n[optim]\nlearning_rate = 1e-3\n[model]\nd_model = 8\nn_layer = 2\n\
        [model.attention]\nchunksize = 8\n[trainer]\n";
    fs::write(s.path("bad.toml"), text).unwrap();
    let told = s.told(2, &["--config", "bad.toml"]);
    for part in [
        "line 6: unknown field `learning_rate` in [optim]; did you mean `lr`?",
        "line 8: unknown field `d_model` in [model]; did you mean `width`?",
        "line 9: unknown field `n_layer` in [model]; did you mean `layers`?",
        "line 11: unknown field `chunksize` in [model.attention]; did you mean `chunk_size`?",
        "line 12: unknown field `trainer`",
        "missing field `vocab_size` in [data] (integer, at least 2)",
        "missing field `batch_size` in [data]",
        "missing field `lr` in [optim]",
        "missing field `kv_heads` in [model] (integer, divides `heads`)",
    ] {
        assert!(told.contains(part), "{part:?} in {told}");
    }
    assert!(!told.contains("missing field `seq_len`") && !told.contains("missing field `steps`"), "{told}");
    // where nothing is near, what the table takes
    fs::write(s.path("far.toml"), s.out(&["init", "--text", "own.txt"])).unwrap();
    let told = s.told(2, &["--config", "far.toml", "--set", "model.zzz=1"]);
    assert!(told.contains("unknown field `zzz` in [model]; [model] takes layers, width, heads"), "{told}");
}

#[test]
fn a_key_is_explained_as_in_the_reference() {
    let s = Sandbox::new();
    let told = s.out(&["config", "optim.lr"]);
    assert!(told.contains("[optim]\nlr - Peak learning rate. (number, above 0; required)"), "{told}");
    assert!(!told.contains("beta1"));
    let gamma = s.out(&["config", "gamma"]);
    assert!(gamma.contains("[router]") && gamma.contains("[model.attention] with kind = \"dash\""), "{gamma}");
    let all = s.out(&["config"]);
    for (_, name) in documented().iter().filter(|(place, _)| place != "compare.arm") {
        assert!(all.contains(&format!("\n{name} - ")), "{name}");
    }
    assert!(s.told(2, &["config", "model.d_model"]).contains("did you mean width?"));
    assert!(s.told(2, &["config", "optim.wieght_decay"]).contains("did you mean weight_decay?"));
}

#[test]
fn help_has_examples_and_the_version_says_what_was_built() {
    let s = Sandbox::new();
    let listed = s.out(&["--help"]);
    let commands = listed.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names: Vec<&str> =
        commands.lines().filter_map(|l| l.strip_prefix("  ")?.split(' ').next()).filter(|n| !n.is_empty()).collect();
    assert!(names.len() >= 12, "{names:?}");
    for name in names.iter().filter(|n| **n != "help") {
        let help = s.out(&[name, "--help"]);
        assert!(help.contains("Examples:\n  train "), "{name}: {help}");
    }
    let version = s.out(&["--version"]);
    assert!(version.contains("commit ") && version.contains("instruction set "), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        let script = s.out(&["completions", shell]);
        assert!(script.contains("verify-resume") && script.contains("extend"), "{shell}");
    }
}

#[test]
fn a_run_that_is_hardly_sparse_is_told_and_tokens_are_not_chunks() {
    let s = Sandbox::new();
    fs::write(s.path("mine.toml"), s.out(&["init", "--text", "own.txt"])).unwrap();
    let run = |name: &str, set: &[&str]| {
        let name = format!("run.name={name}");
        let mut args = vec!["--config", "mine.toml", "--set", &name];
        set.iter().chain(&["run.steps=2", "data.vocab_size=300"]).for_each(|x| args.extend(["--set", x]));
        s.told(0, &args)
    };
    let dense = run("full", &["model.attention.gamma=0.01"]);
    assert!(dense.contains("hardly sparse") && dense.contains("raise model.attention.gamma"), "{dense}");
    let sparse = run("sparse", &["model.attention.gamma=1e4"]);
    assert!(!sparse.contains("hardly sparse"), "{sparse}");
    // the line of a step has both shares, and both are those of the record
    let line = sparse.lines().find(|l| l.starts_with("step 2/2")).unwrap();
    let before = |unit: &str| line.split(unit).next().unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    let record = fs::read_to_string(s.path("runs/sparse/metrics.jsonl")).unwrap();
    let record: serde_json::Value = record
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .find(|v| v["step"] == 2 && v["split"] == "train")
        .unwrap();
    let tokens = record["attended_tokens"].as_f64().unwrap() / ((256.0 + 1.0) / 2.0);
    let chunks = record["density"].as_f64().unwrap();
    assert!((before(" % of tokens") - 100.0 * tokens).abs() <= 0.5 + 1e-9, "{line} {tokens}");
    assert!((before(" % of chunks") - 100.0 * chunks).abs() <= 0.5 + 1e-9, "{line} {chunks}");
}

#[test]
fn a_model_outlives_its_corpus() {
    let s = Sandbox::new();
    fs::write(s.path("mine.toml"), s.out(&["init", "--text", "own.txt"])).unwrap();
    let mut args = vec!["--config", "mine.toml"];
    args.extend(SMALL);
    s.out(&args);
    let eval = |s: &Sandbox| -> serde_json::Value {
        serde_json::from_str(&s.out(&["eval", "--model", "runs/mine", "--json"])).unwrap()
    };
    let before = eval(&s);
    assert_eq!(before["corpus_changed"], false);
    let text = fs::read_to_string(s.path("own.txt")).unwrap();
    fs::write(s.path("own.txt"), text.clone() + &text.replace("verse", "line")).unwrap();
    let told = s.told(0, &["eval", "--model", "runs/mine"]);
    assert!(told.contains("the corpus changed since training"), "{told}");
    let mut changed = eval(&s);
    assert_eq!(changed["corpus_changed"], true);
    changed["corpus_changed"] = false.into();
    assert_eq!(changed, before, "evaluated on the text as it was");

    fs::remove_file(s.path("own.txt")).unwrap();
    let after = eval(&s);
    assert_eq!(after, before);
    s.out(&["export", "--model", "runs/mine", "--out", "hf"]);
    let mut longer = args.clone();
    longer.extend(["--extend", "5"]);
    let told = s.told(0, &longer);
    assert!(told.contains("the text is gone; using what was prepared from it"), "{told}");
    assert!(s.path("runs/mine/checkpoints/step-00000005").is_dir());

    fs::remove_dir_all(s.path("data")).unwrap();
    let told = s.told(2, &["eval", "--model", "runs/mine"]);
    assert!(told.contains("neither the text of the run nor what was prepared from it is there"), "{told}");
    // the old name of the option still means the folder
    s.out(&["export", "--checkpoint", "runs/mine", "--out", "hf2"]);
    assert!(s.path("hf2/parity.safetensors").is_file());
}
