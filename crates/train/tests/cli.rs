//! Drives the binary as a user does: what a run leaves behind, how it resumes, and what bad input is told.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use dash_core::rng::Rng;
use serde_json::Value;

/// A folder with a small corpus; runs and prepared data go there.
struct Sandbox {
    dir: tempfile::TempDir,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = Rng::new(1);
        let words =
            ["chunk", "query", "key", "value", "router", "support", "entmax", "softmax", "the", "of", "attends"];
        let line = |rng: &mut Rng| (0..9).map(|_| words[rng.below(words.len())]).collect::<Vec<_>>().join(" ");
        let text: String = (0..900).map(|_| line(&mut rng) + ".\n").collect();
        fs::write(dir.path().join("corpus.txt"), text).unwrap();
        Sandbox { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `train` with configs/test.toml inside the sandbox.
    fn command(&self, before: &[&str], set: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(before).arg("--config").arg(repository().join("configs/test.toml")).current_dir(self.dir.path());
        for s in ["data.path=corpus.txt"].iter().chain(set) {
            c.args(["--set", s]);
        }
        c.stdin(Stdio::null());
        c
    }

    fn run(&self, before: &[&str], set: &[&str]) -> Output {
        self.command(before, set).output().unwrap()
    }

    /// Trains, expecting success, and returns the final weights.
    fn train(&self, name: &str, set: &[&str], resume: bool) -> Vec<u8> {
        let name_key = format!("run.name={name}");
        let all: Vec<&str> = std::iter::once(name_key.as_str()).chain(set.iter().copied()).collect();
        let mut c = self.command(&[], &all);
        if resume {
            c.arg("--resume");
        }
        succeeded(&c.output().unwrap());
        self.weights(name)
    }

    fn weights(&self, name: &str) -> Vec<u8> {
        fs::read(self.newest(name).join("model.safetensors")).unwrap()
    }

    fn checkpoints(&self, name: &str) -> Vec<PathBuf> {
        let folder = self.path("runs").join(name).join("checkpoints");
        let mut all: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        all
    }

    fn newest(&self, name: &str) -> PathBuf {
        self.checkpoints(name).pop().unwrap()
    }

    fn metrics(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path("runs").join(name).join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// Folder of the prepared corpus, made by an earlier run.
    fn data(&self) -> PathBuf {
        let mut folders = fs::read_dir(self.path("data")).unwrap().map(|e| e.unwrap().path());
        folders.find(|p| p.join("report.json").exists()).unwrap()
    }
}

fn succeeded(o: &Output) {
    assert!(o.status.success(), "{}\n{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
}

/// Asserts the exit status and that standard error holds all of `parts` in one readable paragraph without a panic.
fn failed(o: &Output, status: i32, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(status), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "expected {part:?} in:\n{stderr}");
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'))
}

/// By the shell's own `kill`: a minimal system has no other.
fn kill(child: &mut Child, signal: i32) {
    let status = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_run_leaves_what_the_interface_promises_and_its_model_can_be_used() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &[]));
    let run = s.path("runs/test");
    let resolved = fs::read_to_string(run.join("config.toml")).unwrap();
    for key in ["beta1 = 0.9", "router_gradient = \"full\"", "sigma = 1.0", "grad_accum = 1", "keep_best = 1"] {
        assert!(resolved.contains(key), "{key} in {resolved}");
    }
    let lines = s.metrics("test");
    let train: Vec<&Value> = lines.iter().filter(|l| l["split"] == "train").collect();
    let val: Vec<&Value> = lines.iter().filter(|l| l["split"] == "val").collect();
    assert_eq!(train.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 5, 10, 15, 20]);
    for key in [
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "density",
        "active_chunks",
        "empty",
        "bias_mean",
        "bias_max",
    ] {
        assert!(train.iter().all(|l| l[key].is_number()), "{key}");
    }
    for key in ["density", "score_grad_norm", "indexer_q_grad_norm"] {
        assert!(train[2]["layers"][1][key].as_f64().unwrap() > 0.0, "{key}");
    }
    let last = train[4];
    assert_eq!(last["tokens"].as_u64(), Some(20 * 4 * 48));
    let density = last["density"].as_f64().unwrap();
    assert!(density > 0.0 && density <= 1.0);
    assert!(last["loss"].as_f64().unwrap() < train[0]["loss"].as_f64().unwrap() - 0.5);
    assert_eq!(val.len(), 2);
    assert!(val[1]["bits_per_byte"].as_f64().unwrap() > 0.0 && val[1]["sample"].is_string());
    let events: Vec<_> = fs::read_dir(run.join("tensorboard")).unwrap().collect();
    assert_eq!(events.len(), 1);
    assert!(events[0].as_ref().unwrap().metadata().unwrap().len() > 1000);
    // keep_last 2; the best by validation is among them or a third
    let kept = s.checkpoints("test");
    assert!(
        kept.len() <= 3
            && kept.iter().any(|p| p.ends_with("step-00000015"))
            && kept[kept.len() - 1].ends_with("step-00000020")
    );
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        assert!(kept[0].join(file).is_file(), "{file}");
    }

    failed(&s.run(&[], &[]), 2, &["holds a run already", "--resume"]);

    let train_bin = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_train")).args(args).current_dir(s.dir.path()).output().unwrap()
    };
    let eval = |model: &str| -> Value {
        let o = train_bin(&["eval", "--model", model, "--json"]);
        succeeded(&o);
        serde_json::from_slice(&o.stdout).unwrap()
    };
    let of_run = eval("runs/test");
    assert_eq!(of_run["loss"], val[1]["loss"]);
    assert_eq!(of_run["loss_by_position"].as_array().unwrap().len(), 48);
    let text = |seed: &str| {
        let o = train_bin(&[
            "generate",
            "--model",
            "runs/test",
            "--prompt",
            "the router",
            "--max-tokens",
            "12",
            "--seed",
            seed,
        ]);
        succeeded(&o);
        String::from_utf8(o.stdout).unwrap()
    };
    assert!(text("1").starts_with("the router") && text("1") == text("1") && text("1") != text("2"));

    succeeded(&train_bin(&["plot", "--run", "runs/test", "--out", "pictures"]));
    for (file, label) in [("loss.svg", "validation"), ("density.svg", "layer 1")] {
        assert!(fs::read_to_string(s.path("pictures").join(file)).unwrap().contains(label), "{file}");
    }

    succeeded(&train_bin(&["export", "--checkpoint", "runs/test", "--out", "out"]));
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "README.md",
    ] {
        assert!(s.path("out").join(file).is_file(), "{file}");
    }
    let config: Value = serde_json::from_slice(&fs::read(s.path("out/config.json")).unwrap()).unwrap();
    assert_eq!((config["chunk_size"].as_u64(), config["scaling_factor"].as_f64()), (Some(8), Some(4.0)));
    assert_eq!(config["estimate_diagonal"], false);
    assert_eq!(eval("out")["loss"], of_run["loss"]);
    let bytes = fs::read(s.path("out/model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    assert!(header.info("lm_head.weight").is_none(), "the tied head is left out");
    let bytes = fs::read(s.path("out/parity.safetensors")).unwrap();
    let parity = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(parity.tensor("ids").unwrap().shape(), [1, 37]);
    assert_eq!(parity.tensor("logits").unwrap().shape(), [1, 37, 300]);
}

#[test]
fn the_bits_do_not_depend_on_threads_or_on_the_run() {
    let s = Sandbox::new();
    let one = s.train("one", &["run.threads=1"], false);
    assert!(one == s.train("two", &["run.threads=2"], false));
    assert!(one == s.train("again", &["run.threads=2"], false));
    assert!(one != s.train("other", &["run.seed=1"], false));
    // the same global batch, cut differently, gives the same losses up to rounding
    s.train("cut", &["data.batch_size=2", "data.grad_accum=2"], false);
    let loss = |name: &str| s.metrics(name).iter().rfind(|l| l["split"] == "train").unwrap()["loss"].as_f64().unwrap();
    assert!((loss("one") - loss("cut")).abs() < 1e-3, "{} {}", loss("one"), loss("cut"));
}

#[test]
fn killed_at_ten_random_moments_and_resumed_it_ends_with_the_same_bits() {
    let s = Sandbox::new();
    let set = ["run.steps=40", "checkpoint.every=3", "run.threads=2"];
    let whole = s.train("whole", &set, false);
    let mut rng = Rng::new(std::process::id() as u64);
    let all: Vec<&str> = ["run.name=killed"].iter().chain(&set).copied().collect();
    for _ in 0..10 {
        let mut c = s.command(&[], &all);
        if s.path("runs/killed/config.toml").exists() {
            c.arg("--resume");
        }
        let mut child = c.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20 + rng.below(150) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
    }
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
    kill(&mut child, 15);
    failed(&child.wait_with_output().unwrap(), 130, &["interrupted at step", "--resume"]);
    assert_eq!(s.checkpoints("stopped").len(), 1);
    assert!(whole == s.train("stopped", &set, true));
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
    failed(&resume(&["run.steps=12"], &[]), 2, &["run.steps: 10 -> 12", "--allow-changes"]);
    succeeded(&resume(&["run.steps=10", "eval.batches=1"], &[]));
    let corpus = s.path("corpus.txt");
    fs::write(&corpus, fs::read_to_string(&corpus).unwrap() + "one line more\n").unwrap();
    failed(&resume(&["run.steps=10"], &[]), 2, &["prepared corpus"]);
    succeeded(&resume(&["run.steps=12"], &["--allow-changes"]));
    assert!(s.newest("x").ends_with("step-00000012"));
}

#[test]
fn a_run_of_a_build_before_format_version_2_goes_on_and_a_later_one_is_refused() {
    let s = Sandbox::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-version-1");
    let run = s.path("runs/old");
    let saved = run.join("checkpoints/step-00000002");
    fs::create_dir_all(&saved).unwrap();
    fs::copy(fixture.join("old.toml"), s.path("old.toml")).unwrap();
    fs::copy(fixture.join("config.toml"), run.join("config.toml")).unwrap();
    for name in ["state.json", "model.safetensors", "optimizer.safetensors"] {
        fs::copy(fixture.join("step-00000002").join(name), saved.join(name)).unwrap();
    }
    let train = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_train")).args(args).current_dir(s.dir.path()).output().unwrap()
    };
    succeeded(&train(&["eval", "--model", "runs/old"]));
    let resumed = train(&["--config", "old.toml", "--resume"]);
    succeeded(&resumed);
    assert!(String::from_utf8_lossy(&resumed.stderr).contains("(step 2)"));
    let state = run.join("checkpoints/step-00000004/state.json");
    let new: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    assert_eq!((&new["version"], &new["optimizer"], &new["step"]), (&2.into(), &"adamw".into(), &4.into()));
    assert!(new.get("config_hash").is_none());
    // a later format is refused; the checkpoint before it, which could be read, is not taken instead
    let text = fs::read_to_string(&state).unwrap().replace("\"version\": 2", "\"version\": 3");
    fs::write(&state, text).unwrap();
    failed(
        &train(&["--config", "old.toml", "--resume"]),
        2,
        &["step-00000004", "format version 3", "reads versions 1 to 2"],
    );
    failed(&train(&["eval", "--model", "runs/old"]), 2, &["format version 3"]);
}

#[test]
fn wrong_requests_are_told_before_any_work() {
    let s = Sandbox::new();
    let cases: [(&[&str], &[&str]); 9] = [
        (&["optim.learning_rate=1"], &["unknown field `learning_rate`", "did you mean `lr`?"]),
        (&["run.steps=many"], &["invalid type", "expected u64"]),
        (&["model.kv_heads=3"], &["model.kv_heads: 3 does not divide heads = 4"]),
        (&["model.head_dim=7"], &["model.head_dim: 7 is odd"]),
        (&["model.attention.chunk_size=48"], &["leaves nothing to route"]),
        (&["data.path=nowhere.txt"], &["nowhere.txt", "cannot be read"]),
        (&["data.path=empty.txt"], &["empty.txt", "no text found"]),
        (&["data.path=latin1.txt"], &["latin1.txt", "byte 3 is not valid UTF-8"]),
        (&["data.vocab_size=5000"], &["the text gives only"]),
    ];
    fs::write(s.path("empty.txt"), "\n").unwrap();
    fs::write(s.path("latin1.txt"), b"caf\xe9 and so on").unwrap();
    for (set, parts) in cases {
        failed(&s.run(&[], set), 2, parts);
        assert!(!s.path("runs").exists(), "{set:?} left a run behind");
    }
    let o = Command::new(env!("CARGO_BIN_EXE_train")).args(["--config", "missing.toml"]).output().unwrap();
    failed(&o, 2, &["missing.toml", "cannot be read"]);
    let o = Command::new(env!("CARGO_BIN_EXE_train"))
        .args(["eval", "--model", "."])
        .current_dir(s.dir.path())
        .output()
        .unwrap();
    failed(&o, 2, &["holds no model"]);
}

#[test]
fn a_vocabulary_that_does_not_match_the_tokenizer_is_told() {
    let s = Sandbox::new();
    succeeded(&s.run(&["prepare"], &[]));
    let tokenizer = format!("data.tokenizer={}", s.data().join("tokenizer.json").display());
    failed(&s.run(&[], &[&tokenizer, "data.vocab_size=310"]), 2, &["has 300 entries, data.vocab_size is 310"]);
    succeeded(&s.run(&[], &[&tokenizer]));
}

#[test]
fn damaged_shards_are_found_at_the_start() {
    let s = Sandbox::new();
    succeeded(&s.run(&["prepare"], &[]));
    let shard = s.data().join("train-00000.shard");
    let good = fs::read(&shard).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 4;
    fs::write(&shard, flipped).unwrap();
    failed(&s.run(&[], &[]), 2, &["train-00000.shard", "does not match its checksum"]);
    fs::write(&shard, &good[..good.len() - 100]).unwrap();
    failed(&s.run(&[], &[]), 2, &["train-00000.shard", "its header announces"]);
    fs::write(&shard, good).unwrap();
    succeeded(&s.run(&[], &[]));
}

#[test]
fn a_full_disk_ends_the_run_and_the_last_checkpoint_survives() {
    let s = Sandbox::new();
    let set = ["run.name=full", "run.steps=10", "checkpoint.every=5"];
    succeeded(&s.run(&["prepare"], &set));
    let whole = s.train("whole", &set[1..], false);
    // A limit on file size that the small files pass and optimizer.safetensors does not acts as a full disk; it comes
    // after the first checkpoint.
    let mut c = s.command(&[], &set);
    let args: Vec<String> = c.get_args().map(|a| format!("'{}'", a.to_string_lossy())).collect();
    let train = env!("CARGO_BIN_EXE_train");
    let five = format!("'{train}' {} --set run.steps=5", args.join(" "));
    let rest = format!("trap '' XFSZ; ulimit -f 120; exec '{train}' {} --resume --allow-changes", args.join(" "));
    let shell = |script: &str| Command::new("bash").args(["-c", script]).current_dir(s.dir.path()).output().unwrap();
    succeeded(&shell(&five));
    let before = s.weights("full");
    failed(&shell(&rest), 1, &["optimizer.safetensors cannot be written", "earlier checkpoints are kept"]);
    assert_eq!(s.checkpoints("full").len(), 1);
    assert!(before == s.weights("full"));
    succeeded(&c.args(["--resume", "--allow-changes"]).output().unwrap());
    assert_eq!(s.weights("full").len(), whole.len());
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_the_place() {
    let s = Sandbox::new();
    let set = ["run.name=nan", "optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every=1"];
    let o = s.run(&[], &set);
    failed(&o, 1, &["step ", "is not finite", "the first non-finite value is", "model.", "optim.lr"]);
    let kept = s.newest("nan");
    let bytes = fs::read(kept.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let finite = file
        .tensors()
        .iter()
        .all(|(_, t)| t.data().chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()));
    assert!(finite, "the checkpoint that is kept is good");
}

#[test]
fn tensorboard_that_cannot_be_written_is_reported_once_and_the_run_goes_on() {
    let s = Sandbox::new();
    fs::create_dir_all(s.path("runs/test")).unwrap();
    fs::write(s.path("runs/test/tensorboard"), "in the way").unwrap();
    let o = s.run(&[], &[]);
    succeeded(&o);
    assert_eq!(String::from_utf8_lossy(&o.stderr).matches("TensorBoard").count(), 1);
    assert_eq!(s.metrics("test").len(), 7);
}

#[test]
fn a_probe_looks_on_and_changes_no_bit() {
    let s = Sandbox::new();
    let plain = s.train("plain", &[], false);
    assert_eq!(s.train("probed", &["probe.every=4"], false), plain);
    let lines = s.metrics("probed");
    let probes: Vec<&Value> = lines.iter().filter(|l| l["split"] == "probe").collect();
    assert_eq!(probes.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 4, 8, 12, 16, 20]);
    for layer in probes[5]["layers"].as_array().unwrap() {
        for key in
            ["score_grad_norm", "router_share_q", "router_share_k", "pairs_with_gradient", "entropy", "captured_mass"]
        {
            assert!(layer[key].as_f64().unwrap() > 0.0, "{key} in {layer}");
        }
        assert!(
            layer["solver_error"].as_f64().unwrap() <= 1e-5 && layer["captured_mass"].as_f64().unwrap() <= 1.0 + 1e-9
        );
        assert_eq!(layer["q_by_head"].as_array().unwrap().len(), 4);
    }
}

const RECALL: &str = "task={kind=\"recall\",pairs=3,eval_lengths=[96],eval_sequences=4}";

#[test]
fn a_task_trains_resumes_evaluates_and_exports_without_a_text() {
    let s = Sandbox::new();
    let set = [RECALL, "data.vocab_size=40", "data.path=nowhere.txt", "router.target_density=0.6"];
    let whole = s.train("whole", &set, false);
    let short: Vec<&str> = set.iter().copied().chain(["run.name=cut"]).collect();
    let mut child = s.command(&[], &short).stderr(Stdio::null()).spawn().unwrap();
    // until there is something to resume from; on a busy machine the run may be over by then, and resuming changes nothing
    let saved =
        || fs::read_dir(s.path("runs/cut/checkpoints")).is_ok_and(|d| d.flatten().any(|e| !is_hidden(&e.path())));
    while !saved() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let _ = child.kill();
    child.wait().unwrap();
    assert_eq!(s.train("cut", &set, true), whole, "the controller's gamma and the task's position resume");
    let lines = s.metrics("whole");
    let val = lines.iter().rfind(|l| l["split"] == "val").unwrap();
    let task = val["task"].as_array().unwrap();
    assert_eq!(task.iter().map(|r| r["length"].as_u64().unwrap()).collect::<Vec<_>>(), [48, 96]);
    for r in task {
        let share = |key: &str| r[key].as_f64().unwrap();
        assert!((share("accuracy") + share("router_missed") + share("reader_missed") - 1.0).abs() < 1e-12);
        assert_eq!(r["asked"].as_u64(), Some(12));
    }
    // the controller starts where a fresh model attends the target, and holds it
    let attended = val["attended_tokens"].as_f64().unwrap() / 24.5;
    assert!((attended - 0.6).abs() < 0.1, "{attended}");
    let bin = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_train")).args(args).current_dir(s.dir.path()).output().unwrap()
    };
    let eval = |args: &[&str]| -> Value {
        let o = bin(&[&["eval", "--model", "runs/whole", "--json"], args].concat());
        succeeded(&o);
        serde_json::from_slice(&o.stdout).unwrap()
    };
    assert_eq!(eval(&[])["loss"], val["loss"]);
    assert_eq!(eval(&["--as", "dense"])["density"].as_f64(), Some(1.0));
    assert_eq!(eval(&["--router", "oracle"])["task"][0]["unseen"].as_f64(), Some(0.0));
    let random = eval(&["--router", "random"]);
    assert!((random["attended_tokens"].as_f64().unwrap() / 24.5 - attended).abs() < 0.1);
    assert!(random["loss"] != val["loss"]);
    failed(&bin(&["eval", "--model", "runs/whole", "--as", "dense", "--router", "random"]), 2, &["no router"]);
    failed(&bin(&["eval", "--model", "runs/whole", "--as", "topk", "--top", "99"]), 2, &["--top: 99", "6 chunks"]);
    failed(&bin(&["eval", "--model", "runs/whole", "--as", "topk", "--chunk-size", "48"]), 2, &["nothing to route"]);
    failed(&bin(&["eval", "--model", "runs/whole", "--as", "nsa"]), 2, &["k_proj_compressed", "missing"]);
    succeeded(&bin(&["export", "--checkpoint", "runs/whole", "--out", "out"]));
    assert!(s.path("out/parity.safetensors").is_file() && !s.path("out/tokenizer.json").exists());
    failed(&bin(&["generate", "--model", "runs/whole", "--prompt", "x"]), 2, &["has no tokenizer"]);
}

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
    failed(&compare("dash", &["router.target_density=0.05"]), 2, &["router.target_density", "out of reach", "between"]);
    failed(&compare("dense", &["router.target_density=0.5", "model.attention.kind=dash"]), 2, &["arm \"dense\""]);
    let other = "compare={arm=[{name=\"a\"},{name=\"b\",set=[\"data.seq_len=40\"]}]}";
    failed(&s.run(&["compare"], &[other]), 2, &["arm \"b\"", "cannot be paired"]);
    assert!(!s.path("runs").exists() && !s.path("data").exists());
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

#[test]
fn verify_resume_proves_equal_bits() {
    let s = Sandbox::new();
    let o = s.run(&["verify-resume"], &[]);
    succeeded(&o);
    assert!(String::from_utf8_lossy(&o.stdout).contains("bit-equal"));
}

#[test]
fn the_memory_that_is_announced_is_what_a_step_takes() {
    if !Path::new("/proc/self/status").exists() {
        eprintln!("skipped: this system does not tell the memory of a process");
        return;
    }
    // in the last one, one layer and a long batch, what backward takes besides counts most
    for (kind, recompute, batch, layers) in [
        ("dense", false, 2, 3),
        ("dense", true, 2, 3),
        ("dash", false, 2, 3),
        ("token-entmax", false, 2, 3),
        ("nsa", false, 2, 3),
        ("dense", false, 32, 1),
    ] {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(["bench", "--steps", "1", "--json", "--config"]).arg(repository().join("configs/bench-cpu.toml"));
        for set in [format!("data.batch_size={batch}"), format!("model.layers={layers}"), "run.threads=2".to_string()] {
            c.args(["--set", &set]);
        }
        c.args(["--set", &format!("model.attention.kind={kind}"), "--set", &format!("model.recompute={recompute}")]);
        let o = c.output().unwrap();
        succeeded(&o);
        let line: Value = serde_json::from_slice(&o.stdout).unwrap();
        let ratio = line["peak_rss_mb"].as_f64().unwrap() / line["predicted_mb"].as_f64().unwrap();
        assert!((ratio - 1.0).abs() <= 0.15, "{kind}, recompute {recompute}, batch {batch}: {line}");
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
