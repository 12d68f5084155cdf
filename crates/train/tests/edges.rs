//! What surrounds a run: closed pipes, full disks, signals, a second process, weights that are not finite. None of it may lose
//! work or end in a panic.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

struct Sandbox(tempfile::TempDir);

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String =
            (0..700).map(|i| format!("line {} of {} the router picks chunk {}\n", i % 89, i % 7, i * i % 61)).collect();
        fs::write(dir.path().join("corpus.txt"), text).unwrap();
        Sandbox(dir)
    }

    /// `train ARGS --config configs/test.toml` with a run called `run`.
    fn command(&self, before: &[&str], set: &[&str]) -> Command {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/test.toml");
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(before).arg("--config").arg(config).current_dir(self.0.path()).stdin(Stdio::null());
        for s in ["data.path=corpus.txt", "run.name=run", "eval.sample_tokens=0"].iter().chain(set) {
            c.args(["--set", s]);
        }
        c
    }

    fn run_folder(&self) -> PathBuf {
        self.0.path().join("runs/run")
    }

    fn checkpoints(&self) -> Vec<String> {
        let names = fs::read_dir(self.run_folder().join("checkpoints")).into_iter().flatten().flatten();
        let mut names: Vec<String> = names.map(|e| e.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Starts a run that goes on for long, and returns once it has logged a few steps.
    fn started(&self, set: &[&str]) -> Child {
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
}

fn error_of(out: &Output, status: i32) -> String {
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(status), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn a_log_that_nobody_reads_or_that_is_full_does_not_end_a_run() {
    let s = Sandbox::new();
    let mut child = s.command(&[], &["log.every=1"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stderr.take().unwrap());
    reader.read_line(&mut String::new()).unwrap();
    drop(reader); // `2>&1 | head -1`
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(s.checkpoints().last().unwrap(), "step-00000020");
    // what the terminal lost is in the run's own log
    let log = fs::read_to_string(s.run_folder().join("run.log")).unwrap();
    assert!(log.contains("step 20/20") && log.contains("done: 20 steps"), "{log}");

    let s = Sandbox::new();
    assert_eq!(s.command(&[], &[]).stderr(full()).status().unwrap().code(), Some(0));
    assert_eq!(s.checkpoints().last().unwrap(), "step-00000020");
}

#[test]
fn results_that_cannot_be_printed_are_an_error_and_a_reader_that_has_gone_is_none() {
    let s = Sandbox::new();
    assert!(s.command(&[], &[]).output().unwrap().status.success());
    let eval = || {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(["eval", "--model", "runs/run"]).current_dir(s.0.path()).stdin(Stdio::null());
        c
    };
    let out = eval().stdout(full()).stderr(Stdio::piped()).output().unwrap();
    assert!(error_of(&out, 1).contains("standard output cannot be written"));
    let mut child = eval().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(!error_of(&out, 0).contains("error"));
}

#[test]
fn a_closed_terminal_and_a_supervisors_warning_save_like_an_interrupt() {
    for signal in ["-HUP", "-USR1", "-TERM", "-INT"] {
        let s = Sandbox::new();
        let mut child = s.started(&[]);
        assert!(Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
        assert_eq!(s.checkpoints().len(), 1, "{signal}");
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
    assert_eq!(s.checkpoints(), ["step-00000005"]);
}

#[test]
fn weights_that_are_not_finite_never_reach_a_checkpoint() {
    // finite gradients, and a learning rate that takes the weights beyond f32 in the last update
    let s = Sandbox::new();
    let out = s
        .command(&[], &["optim.lr=3e38", "optim.weight_decay=1e3", "optim.warmup_steps=0", "run.steps=1"])
        .output()
        .unwrap();
    let text = error_of(&out, 1);
    assert!(
        text.contains("is not finite after the update, so nothing was saved") && text.contains("no checkpoint yet"),
        "{text}"
    );
    assert!(s.checkpoints().is_empty());
}

#[test]
fn a_limit_on_file_sizes_is_an_error_of_the_file() {
    let s = Sandbox::new();
    // the corpus is prepared first, so that the limit meets the checkpoint
    assert!(s.command(&["prepare"], &[]).output().unwrap().status.success());
    let train = s.command(&[], &["log.tensorboard=false"]);
    let args: Vec<_> = train.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -f 40; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_train")]).args(args);
    let text = error_of(&shell.current_dir(s.0.path()).output().unwrap(), 1);
    assert!(text.contains("the checkpoint could not be saved; earlier checkpoints are kept"), "{text}");
    assert!(s.checkpoints().is_empty(), "no half-written checkpoint stays: {:?}", s.checkpoints());
}

/// Every file below a folder with its content, run.lock and logs aside.
fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
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

#[test]
fn a_comparison_never_takes_runs_of_another_configuration_or_corpus() {
    let s = Sandbox::new();
    let compare = |set: &[&str], more: &[&str]| {
        let mut c = s.command(&["compare"], &[&["run.steps=5", "log.tensorboard=false"], set].concat());
        c.args(["--arms", "dense,dash", "--seeds", "1", "--out", "cmp"]).args(more).output().unwrap()
    };
    error_of(&compare(&[], &[]), 0);
    let folder = s.0.path().join("cmp");
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
    fs::write(s.0.path().join("corpus.txt"), "another text. ".repeat(9000)).unwrap();
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
    let log = s.0.path().join("cmp/logs/dense-s0.log");
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

/// `train ARGS` in the sandbox, without a configuration.
fn plain(s: &Sandbox, args: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
    c.args(args).current_dir(s.0.path()).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn an_export_never_takes_the_place_of_anything_but_an_older_export() {
    let s = Sandbox::new();
    assert!(s.command(&[], &["log.tensorboard=false"]).output().unwrap().status.success());
    fs::create_dir(s.0.path().join("mine")).unwrap();
    fs::write(s.0.path().join("mine/notes.txt"), "precious").unwrap();
    let before = content(s.0.path());
    let export = |out: &str| plain(&s, &["export", "--checkpoint", "runs/run", "--out", out]);
    for (out, why) in [
        ("runs/run", "is a run"),
        ("runs/run/checkpoints/step-00000020", "is a checkpoint"),
        ("mine", "holds something else"),
        ("mine/notes.txt", "is a file"),
        ("..", "is no name"),
    ] {
        let text = error_of(&export(out), 2);
        assert!(text.contains(why), "{out}: {text}");
    }
    assert_eq!(content(s.0.path()), before, "a refused export changes nothing");
    error_of(&export("hf"), 0);
    let first = content(&s.0.path().join("hf"));
    fs::write(s.0.path().join("hf/left-over.json"), "{}").unwrap();
    error_of(&export("hf/"), 0);
    assert_eq!(content(&s.0.path().join("hf")), first, "the older export is replaced whole");
    // a server under another user reads the weights
    use std::os::unix::fs::PermissionsExt;
    let mode = |name: &str| fs::metadata(s.0.path().join("hf").join(name)).unwrap().permissions().mode();
    assert_eq!(mode("model.safetensors"), mode("config.json"));
}

#[test]
fn resume_auto_starts_or_continues_and_extend_says_what_happens_to_the_schedule() {
    let s = Sandbox::new();
    let run = |args: &[&str], set: &[&str]| s.command(&[], set).args(args).output().unwrap();
    error_of(&run(&["--resume=auto"], &["run.steps=10"]), 0);
    assert_eq!(s.checkpoints().last().unwrap(), "step-00000010");
    let text = error_of(&run(&["--resume=auto"], &["run.steps=10"]), 0);
    assert!(text.contains("resuming from") && text.contains("(step 10)"), "{text}");
    // the same command with another length is not silently another schedule
    assert!(error_of(&run(&["--resume"], &["run.steps=15"]), 2).contains("run.steps: 10 -> 15"));
    let text = error_of(&run(&["--extend", "10"], &[]), 2);
    assert!(text.contains("10 is not above the 10 updates"), "{text}");
    let text = error_of(&run(&["--extend", "15"], &[]), 0);
    // cosine from 3e-3 to a tenth of it: the tenth update had the lowest rate, the eleventh of fifteen has a higher one
    assert!(text.contains("the learning rate goes from 3.00e-4 to"), "{text}");
    assert_eq!(s.checkpoints().last().unwrap(), "step-00000015");
    // what else differs is refused as ever
    assert!(error_of(&run(&["--extend", "20"], &["optim.lr=1e-3"]), 2).contains("optim.lr"));
}

/// `train` with a limit on its address space, in kilobytes: a limit below what the machine has, so that the test's outcome does not
/// depend on the machine.
fn with_memory(s: &Sandbox, kilobytes: u64, set: &[&str], more: &[&str]) -> Output {
    let train = s.command(&[], set);
    let args: Vec<_> = train.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let script = format!("ulimit -v {kilobytes}; exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, env!("CARGO_BIN_EXE_train")]).args(args).args(more);
    shell.current_dir(s.0.path()).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn sizes_beyond_memory_or_beyond_an_integer_are_refused_with_what_fits() {
    let s = Sandbox::new();
    let max = i64::MAX;
    for (set, key) in [
        ("data.seq_len=1000000000".to_string(), "data.batch_size"),
        ("data.batch_size=100000".into(), "lower it to at most"),
        (format!("data.batch_size={max}"), "data.batch_size"),
        (format!("data.grad_accum={max}"), "data.batch_size"),
        (format!("data.vocab_size={max}"), "data.vocab_size"),
        (format!("model.ffn={max}"), "model."),
        (format!("model.width={max}"), "model."),
        (format!("model.layers={max}"), "model."),
        (format!("eval.batches={max}"), "eval.batches"),
        (format!("task={{kind=\"needle\",value_tokens={max}}}"), "task.value_tokens"),
        ("optim.eps=0".into(), "optim.eps"),
        ("optim.lr=1e40".into(), "optim.lr"),
    ] {
        let text = error_of(&with_memory(&s, 3_000_000, &[&set], &[]), 2);
        assert!(text.contains(key), "{set}: {text}");
        assert!(!s.run_folder().exists() && !s.0.path().join("data").exists(), "{set}: nothing is written");
    }
    // what is told to fit does fit
    let text =
        error_of(&with_memory(&s, 3_000_000, &["data.batch_size=100000", "run.steps=1", "run.threads=1"], &[]), 2);
    let (_, rest) = text.split_once("lower it to at most ").unwrap();
    let fits: usize = rest.split(',').next().unwrap().parse().unwrap();
    assert!(fits > 100, "{text}");
    // a warmup that never ends is told
    let text = error_of(&s.command(&[], &["optim.warmup_steps=2000", "log.tensorboard=false"]).output().unwrap(), 0);
    assert!(text.contains("the learning rate ends at 1.0 % of optim.lr"), "{text}");
}

#[test]
fn sequences_shorter_than_a_window_train() {
    let s = Sandbox::new();
    // no window of 64 fits into 48 tokens, and one that just fits
    for length in [64, 48] {
        for kind in ["nsa", "infllmv2"] {
            let window = if kind == "nsa" { ",window=16" } else { "" };
            let attention = format!(
                "model.attention={{kind=\"{kind}\",chunk_size=8,top=3,length={length},stride=4,init=1,local=1{window}}}"
            );
            let name = format!("run.name={kind}-{length}");
            let out = s.command(&[], &["run.steps=2", "log.tensorboard=false", &attention, &name]).output().unwrap();
            error_of(&out, 0);
        }
    }
}
