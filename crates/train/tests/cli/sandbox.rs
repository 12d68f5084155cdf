//! A folder with a small corpus, the binary in it, and what is asked of its answers.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use dash_core::rng::Rng;
use serde_json::Value;

/// A folder with a small corpus; runs and prepared data go there.
pub struct Sandbox {
    pub dir: tempfile::TempDir,
}

/// A task that replaces the text.
pub const RECALL: &str = "task={kind=\"recall\",pairs=3,eval_lengths=[96],eval_sequences=4}";

/// Makes a configuration of `train init` small.
pub const SMALL: [&str; 8] =
    ["--set", "run.steps=3", "--set", "data.vocab_size=300", "--set", "data.seq_len=64", "--set", "eval.batches=2"];

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Sandbox {
    /// With `corpus.txt`, which configs/test.toml reads.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = Rng::new(1);
        let words =
            ["chunk", "query", "key", "value", "router", "support", "entmax", "softmax", "the", "of", "attends"];
        let line = |rng: &mut Rng| (0..9).map(|_| words[rng.below(words.len())]).collect::<Vec<_>>().join(" ");
        let text: String = (0..900).map(|_| line(&mut rng) + ".\n").collect();
        fs::write(dir.path().join("corpus.txt"), text).unwrap();
        Sandbox { dir }
    }

    /// With `own.txt`, for configurations of one's own.
    pub fn with_verses() -> Self {
        let s = Sandbox { dir: tempfile::tempdir().unwrap() };
        let line = |i: usize| format!("verse {} of {} asks the router for chunk {}\n", i % 89, i % 7, i * i % 61);
        fs::write(s.path("own.txt"), (0..1500).map(line).collect::<String>()).unwrap();
        s
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `train BEFORE --config configs/test.toml` inside the sandbox.
    pub fn command(&self, before: &[&str], set: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(before).arg("--config").arg(repository().join("configs/test.toml")).current_dir(self.dir.path());
        for s in ["data.path=corpus.txt"].iter().chain(set) {
            c.args(["--set", s]);
        }
        c.stdin(Stdio::null());
        c
    }

    pub fn run(&self, before: &[&str], set: &[&str]) -> Output {
        self.command(before, set).output().unwrap()
    }

    /// `train ARGS` inside the sandbox, without a configuration.
    pub fn bin(&self, args: &[&str]) -> Output {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(args).current_dir(self.dir.path()).stdin(Stdio::null()).output().unwrap()
    }

    /// Standard output of a command that has to succeed.
    pub fn out(&self, args: &[&str]) -> String {
        let o = self.bin(args);
        succeeded(&o);
        String::from_utf8(o.stdout).unwrap()
    }

    /// Standard error of a command that has to end with this status.
    pub fn told(&self, status: i32, args: &[&str]) -> String {
        error_of(&self.bin(args), status)
    }

    /// Trains, expecting success, and returns the final weights.
    pub fn train(&self, name: &str, set: &[&str], resume: bool) -> Vec<u8> {
        let name_key = format!("run.name={name}");
        let all: Vec<&str> = std::iter::once(name_key.as_str()).chain(set.iter().copied()).collect();
        let mut c = self.command(&[], &all);
        if resume {
            c.arg("--resume");
        }
        succeeded(&c.output().unwrap());
        self.weights(name)
    }

    /// Starts a run that goes on for long, and returns once it has logged a few steps.
    pub fn started(&self, set: &[&str]) -> Child {
        let long = ["run.steps=100000", "checkpoint.every=100000", "eval.every=100000", "log.every=1"];
        let set: Vec<&str> = long.iter().chain(set).copied().collect();
        let mut child = self.command(&[], &set).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        // the thread goes on reading, so that the run never waits for a full pipe
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if line.starts_with("step 3/") {
                    let _ = send.send(());
                }
            }
        });
        receive.recv().expect("the run reaches step 3");
        child
    }

    pub fn weights(&self, name: &str) -> Vec<u8> {
        fs::read(self.newest(name).join("model.safetensors")).unwrap()
    }

    pub fn checkpoints(&self, name: &str) -> Vec<PathBuf> {
        let folder = self.path("runs").join(name).join("checkpoints");
        let entries = fs::read_dir(folder).into_iter().flatten();
        let mut all: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        all.sort();
        all
    }

    /// Names of the checkpoints of the run called test.
    pub fn saved(&self) -> Vec<String> {
        let name = |p: PathBuf| p.file_name().unwrap().to_str().unwrap().to_string();
        self.checkpoints("test").into_iter().map(name).collect()
    }

    pub fn newest(&self, name: &str) -> PathBuf {
        self.checkpoints(name).pop().unwrap()
    }

    pub fn metrics(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path("runs").join(name).join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// Folder of the prepared corpus, made by an earlier run.
    pub fn data(&self) -> PathBuf {
        let mut folders = fs::read_dir(self.path("data")).unwrap().map(|e| e.unwrap().path());
        folders.find(|p| p.join("report.json").exists()).unwrap()
    }
}

pub fn succeeded(o: &Output) {
    assert!(o.status.success(), "{}\n{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
}

/// Standard error of a command that has to end with this status, without a panic.
pub fn error_of(o: &Output, status: i32) -> String {
    let text = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(status), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// Asserts the exit status and that standard error holds all of `parts`.
pub fn failed(o: &Output, status: i32, parts: &[&str]) {
    let stderr = error_of(o, status);
    for part in parts {
        assert!(stderr.contains(part), "expected {part:?} in:\n{stderr}");
    }
}

pub fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'))
}

/// By the shell's own `kill`: a minimal system has no other.
pub fn kill(child: &mut Child, signal: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().unwrap();
    assert!(status.success());
}

/// Every file below a folder with its content, run.lock aside.
pub fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("run.lock") {
                all.push((path.clone(), fs::read(&path).unwrap()));
            }
        }
    }
    all.sort();
    all
}

/// Says past the test's captured output that it could not run: a skipped test must not look like a passed one.
pub fn not_run(test: &str, why: &str) {
    _ = std::io::Write::write_all(&mut std::io::stderr(), format!("NOT RUN: {test}: {why}\n").as_bytes());
}
