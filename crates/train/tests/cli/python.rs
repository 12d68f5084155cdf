//! What Python says of a finished run and of an export, where Python is there: `DASHLAB_PYTHON`, or `python3`. Where a module is
//! missing, a test says so on standard error and passes.
//!
//! - `oracle/check_loss.py` (numpy) computes the validation loss of runs of every kind once more, from their files.
//! - `oracle/check_export.py` (torch, transformers, safetensors) compares the logits of every export with those of
//!   `modeling_dashlab.py`, and dense, dash and top-k ones with a second implementation.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dash_model::VARIANTS;

use crate::sandbox::not_run;

fn oracle(script: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../oracle").canonicalize().unwrap().join(script)
}

/// A Python that has these modules. Without one it is said that the test did not run.
fn python(test: &str, modules: &[&str]) -> Option<Command> {
    let program = std::env::var("DASHLAB_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&program).arg("-c").arg(format!("import {}, tomllib", modules.join(", "))).output();
    let why = match has {
        Ok(o) if o.status.success() => return Some(Command::new(program)),
        Ok(o) => String::from_utf8_lossy(&o.stderr).lines().last().unwrap_or("it fails").to_string(),
        Err(e) => e.to_string(),
    };
    let modules = modules.join(", ");
    let needs = format!("needs Python 3.11 with {modules}; {program}: {why}. Set DASHLAB_PYTHON to one that has them");
    not_run(test, &needs);
    None
}

/// A corpus, and finished runs of every kind and of dash's further settings, in `runs/`.
struct Trained {
    dir: tempfile::TempDir,
    names: Vec<String>,
}

impl Trained {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // words that depend on the place, so that attention has something to learn
        let line =
            |i: usize| format!("the {} chunk of the {} query attends the {} key.\n", i % 7, i * i % 11, i / 3 % 5);
        fs::write(dir.path().join("corpus.txt"), (0..1500).map(line).collect::<String>()).unwrap();
        let mut trained = Trained { dir, names: Vec::new() };
        for kind in VARIANTS.iter().map(|v| v.kind).chain(["dash-released", "dash-stopped", "dash-gradient-only"]) {
            trained.train(kind, &[format!("model.attention.kind={kind}")]);
        }
        trained.train("dash-steered", &["router.target_share=0.5".into(), "model.attention.diagonal=true".into()]);
        let dense = || "model.attention.kind=dense".to_string();
        trained.train("biased", &["model.qkv_bias=true".into(), dense()]);
        trained.train("normed", &["model.qk_norm=true".into(), dense()]);
        trained.train("dash-biased-normed", &["model.qkv_bias=true".into(), "model.qk_norm=true".into()]);
        trained.train("untied", &["model.attention.kind=dense".into(), "model.tie_embeddings=false".into()]);
        trained
    }

    fn train_bin(&self, args: &[&str]) -> Output {
        let o = Command::new(env!("CARGO_BIN_EXE_train")).args(args).current_dir(self.dir.path()).output().unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        o
    }

    fn train(&mut self, name: &str, set: &[String]) {
        let config = oracle("../configs/test.toml");
        let mut args = vec!["--config".to_string(), config.display().to_string()];
        // 61 tokens: a last chunk of 5; three sequences a batch: the last batch is smaller
        let fixed = [
            "data.path=corpus.txt",
            "data.vocab_size=280",
            "data.seq_len=61",
            "data.batch_size=3",
            "eval.batches=3",
            "eval.sample_tokens=0",
        ];
        for s in fixed.iter().map(|s| s.to_string()).chain([format!("run.name={name}")]).chain(set.iter().cloned()) {
            args.extend(["--set".to_string(), s]);
        }
        self.train_bin(&args.iter().map(String::as_str).collect::<Vec<_>>());
        self.names.push(name.into());
    }

    fn told(&self, mut python: Command, args: &[String]) -> Output {
        let home = self.dir.path().join("hf");
        python.args(args).current_dir(self.dir.path()).env("HF_HOME", home).env("HF_HUB_OFFLINE", "1");
        python.env("PYTHONDONTWRITEBYTECODE", "1").output().unwrap()
    }
}

fn text(o: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr))
}

#[test]
fn the_validation_loss_of_every_kind_is_that_of_an_independent_program() {
    let test = "the_validation_loss_of_every_kind_is_that_of_an_independent_program";
    if python(test, &["numpy"]).is_none() {
        return;
    }
    let mut trained = Trained::new();
    // which no export holds
    trained.train("yoked", &["model.attention.kind=random".into(), "router.budget_from=runs/dash".into()]);
    let check = |name: &str| {
        let script = oracle("check_loss.py").display().to_string();
        trained.told(python(test, &["numpy"]).unwrap(), &[script, format!("runs/{name}")])
    };
    for name in &trained.names {
        let o = check(name);
        assert!(o.status.success() && text(&o).contains("agrees"), "{name}: {}", text(&o));
    }
    assert!(trained.names.len() >= VARIANTS.len() + 3);
    // a loss that is off by a ten-thousandth is found
    let record = trained.dir.path().join("runs/dash/metrics.jsonl");
    let lines = fs::read_to_string(&record).unwrap();
    let changed: String = lines
        .lines()
        .map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            if line["split"] == "val" {
                line["loss"] = (line["loss"].as_f64().unwrap() * 1.0001).into();
            }
            format!("{line}\n")
        })
        .collect();
    fs::write(&record, changed).unwrap();
    let o = check("dash");
    assert!(o.status.code() == Some(1) && text(&o).contains("DIFFERS"), "{}", text(&o));
}

#[test]
fn every_export_computes_the_same_in_python() {
    let modules = ["torch", "transformers", "safetensors"];
    let Some(command) = python("every_export_computes_the_same_in_python", &modules) else { return };
    let trained = Trained::new();
    for name in &trained.names {
        trained.train_bin(&["export", "--model", &format!("runs/{name}"), "--out", &format!("out/{name}")]);
    }
    // one process: most of its time goes into loading the libraries
    let script = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import check_export\n\
        for folder in sys.argv[2:]: print(folder, flush=True); check_export.check_logits(Path(folder))\n\
        import check_generation\n\
        for name in ('dense', 'biased', 'normed', 'dash'): check_generation.check(Path('out') / name)";
    let folders = trained.names.iter().map(|name| format!("out/{name}"));
    let args: Vec<String> =
        ["-c".into(), script.into(), oracle("").display().to_string()].into_iter().chain(folders).collect();
    let o = trained.told(command, &args);
    assert!(o.status.success(), "{}", text(&o));
    let compared = text(&o).matches("largest difference").count();
    // and four of them are used as people do
    assert!(compared >= trained.names.len() + 4, "{compared} comparisons of {} exports", trained.names.len());
}
