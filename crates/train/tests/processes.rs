//! Several processes on CPUs, as a user starts them: `cargo test -p train --features mpi --test processes`. Needs mpirun.
#![cfg(feature = "mpi")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const CONFIG: &str = "[run]\nsteps = 240\n[data]\nvocab_size = 300\nseq_len = 128\nbatch_size = 2\ngrad_accum = 4\n\
    [optim]\nlr = 1e-3\nwarmup_steps = 2\n\
    [model]\nlayers = 2\nwidth = 32\nheads = 2\nkv_heads = 1\nffn = 48\n[model.attention]\nkind = \"dash\"\nchunk_size = 16\n\
    [task]\nkind = \"recall\"\n[eval]\nevery = 80\n[checkpoint]\nevery = 40\n[log]\nevery = 20\n";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        std::fs::write(place.0.path().join("c.toml"), CONFIG).unwrap();
        place
    }

    /// `train` with these words in so many processes; one is started as everybody does.
    fn command(&self, world: usize, words: &[&str]) -> Command {
        let train = env!("CARGO_BIN_EXE_train");
        let mut command = match world {
            1 => Command::new(train),
            _ => {
                let mut mpirun = Command::new("mpirun");
                mpirun.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n"]);
                mpirun.arg(world.to_string()).arg(train);
                mpirun
            }
        };
        command.args(["--config", "c.toml"]).args(words).current_dir(self.0.path());
        command
    }

    fn run(&self, world: usize, words: &[&str]) -> Output {
        self.command(world, words).output().expect("mpirun is there: Debian has it in openmpi-bin")
    }

    fn start(&self, world: usize, words: &[&str]) -> Child {
        self.command(world, words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn checkpoint(&self, run: &str, step: u64) -> PathBuf {
        self.0.path().join(run).join("c/checkpoints").join(format!("step-{step:08}"))
    }

    fn bytes(&self, run: &str, step: u64) -> Vec<Vec<u8>> {
        let folder = self.checkpoint(run, step);
        ["model.safetensors", "optimizer.safetensors"].map(|f| std::fs::read(folder.join(f)).unwrap()).into()
    }
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

fn wait_for(what: &str, mut is_there: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !is_there() {
        assert!(Instant::now() < until, "{what} did not come in a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Processes of the program below a process.
fn below(parent: u32) -> Vec<u32> {
    let status = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| status(pid).lines().any(|l| l == format!("PPid:\t{parent}"))).collect()
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

fn is_there(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // a zombie is none any more
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[test]
fn two_processes_have_the_bits_of_one_through_kills_and_other_numbers() {
    let place = Place::new();
    for (run, world) in [("one", 1), ("two", 2), ("four", 4)] {
        let output = place.run(world, &["--set", &format!("run.dir={run}")]);
        assert!(output.status.success(), "{}", told(&output));
        if world > 1 {
            let text = told(&output);
            assert!(text.contains(&format!("processes {world}; an update of 4 micro-batches, 1024 tokens")), "{text}");
            assert_eq!(text.matches("step 240/240").count(), 1, "one process tells: {text}");
            let log = std::fs::read_to_string(place.0.path().join(run).join("c/rank-1.log")).unwrap();
            assert!(log.contains("step 240/240"), "{log}");
        }
    }
    let metrics = |run: &str| -> Vec<String> {
        let text = std::fs::read_to_string(place.0.path().join(run).join("c/metrics.jsonl")).unwrap();
        let figures = |line: &str| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            // what depends on the clock
            let line = line.as_object_mut().unwrap();
            line.retain(|key, _| {
                !["tokens_per_s", "mfu", "seconds", "gflops", "memory_mb", "rss_mb"].contains(&key.as_str())
            });
            serde_json::to_string(line).unwrap()
        };
        text.lines().map(figures).collect()
    };
    assert_eq!(metrics("one"), metrics("two"));
    let whole = place.bytes("one", 240);
    assert!(place.bytes("two", 240) == whole && place.bytes("four", 240) == whole);

    // two processes, one of them killed; then one, killed; then two to the end
    let resume = ["--set", "run.dir=other", "--resume=auto"];
    let mut two = place.start(2, &resume);
    wait_for("the first checkpoint", || place.checkpoint("other", 40).exists());
    let ranks = below(two.id());
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    kill(ranks[1]);
    let killed = Instant::now();
    wait_for("the end of the other process", || !is_there(ranks[0]));
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    assert!(!two.wait().unwrap().success());
    let mut one = place.start(1, &resume);
    wait_for("a later checkpoint", || [80, 120, 160].iter().any(|&step| place.checkpoint("other", step).exists()));
    one.kill().unwrap();
    one.wait().unwrap();
    let output = place.run(2, &resume);
    assert!(output.status.success() && told(&output).contains("resuming from"), "{}", told(&output));
    assert!(place.bytes("other", 240) == whole, "2, 1, 2 processes");
}

#[test]
fn a_signal_saves_and_stops_all() {
    let place = Place::new();
    let set = ["--set", "run.dir=stopped", "--set", "run.steps=100000"];
    let two = place.start(2, &set);
    wait_for("the first checkpoint", || place.checkpoint("stopped", 40).exists());
    assert!(Command::new("kill").args(["-TERM", &two.id().to_string()]).status().unwrap().success());
    let output = two.wait_with_output().unwrap();
    assert!(!output.status.success());
    let log = std::fs::read_to_string(place.0.path().join("stopped/c/run.log")).unwrap();
    assert!(log.contains("interrupted at step") && log.contains("saved; continue with"), "{log}");
}

/// Status 2, and a word of the message.
fn refused(output: Output, word: &str) {
    assert_eq!(output.status.code(), Some(2), "{word}: {}", told(&output));
    assert!(told(&output).contains(word), "{word}: {}", told(&output));
}

#[test]
fn a_process_that_hangs_ends_all() {
    let place = Place::new();
    let ended = |mut all: Child, word: &str, status: i32| {
        let began = Instant::now();
        while all.try_wait().unwrap().is_none() {
            if began.elapsed() > Duration::from_secs(30) {
                let below = below(all.id());
                below.into_iter().for_each(kill);
                all.kill().unwrap();
                panic!("{word}: they wait for ever");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let output = all.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{word}: {}", told(&output));
        assert!(told(&output).contains(word), "{word}: {}", told(&output));
    };
    let set = ["--set", "run.dir=hangs", "--set", "run.steps=100000", "--set", "run.peer_timeout_s=2"];
    let two = place.start(2, &set);
    wait_for("the first checkpoint", || place.checkpoint("hangs", 40).exists());
    let ranks = below(two.id());
    let is_second = |rank: &&u32| {
        let environment = std::fs::read(format!("/proc/{rank}/environ")).unwrap();
        environment.split(|b| *b == 0).any(|word| word == b"OMPI_COMM_WORLD_RANK=1")
    };
    let second = ranks.iter().find(is_second).unwrap();
    // at once: the first one may be writing the checkpoint, and then tells that to all
    assert!(Command::new("kill").args(["-STOP", &second.to_string()]).status().unwrap().success());
    ended(two, "has waited for the others for 2 s", 1);
    assert!(ranks.into_iter().all(|rank| !is_there(rank)), "a stopped process is ended, too");
    // a process that never comes to MPI
    let mut alone = place.command(2, &[]);
    alone = {
        let mut mpirun = Command::new(alone.get_program());
        let words: Vec<_> = alone.get_args().map(|w| if w == "2" { "1".into() } else { w.to_owned() }).collect();
        mpirun.args(words).args(set).args([":", "-n", "1", "sleep", "60"]).current_dir(place.0.path());
        mpirun.stdout(Stdio::null()).stderr(Stdio::piped());
        mpirun
    };
    ended(alone.spawn().unwrap(), "another process did not come to it", 2);
}

#[test]
fn what_does_not_belong_together_is_refused_with_status_2() {
    let place = Place::new();
    let three = place.run(3, &["--set", "run.dir=three"]);
    refused(three, "are shared out with the same bits by 1, 2 or 4 processes");
    let train = env!("CARGO_BIN_EXE_train");
    let mut unequal = place.command(2, &["--set", "run.dir=unequal"]);
    // the words above are those of two processes; a third one with another configuration
    unequal.args([":", "-n", "2", train, "--config", "c.toml", "--set", "optim.lr=2e-3", "--set", "run.dir=unequal"]);
    refused(unequal.output().unwrap(), "has another configuration than rank 0");
    let mut by_ranks = place.command(1, &["--set", "run.dir=ranks"]);
    by_ranks.envs([("RANK", "0"), ("WORLD_SIZE", "2")]);
    refused(by_ranks.output().unwrap(), "mpirun -n 2");
    for run in ["three", "unequal", "ranks"] {
        assert!(!place.0.path().join(run).join("c/config.toml").exists(), "{run}: no run begins");
    }
    // what rank 0 alone finds ends all with its status
    let done = place.run(2, &["--set", "run.dir=small", "--set", "run.steps=4"]);
    assert!(done.status.success(), "{}", told(&done));
    refused(place.run(2, &["--set", "run.dir=small"]), "holds a run already");
    assert!(Path::new(&place.0.path().join("small/c")).is_dir());
}

#[test]
fn other_files_on_another_host_are_refused() {
    let (place, train) = (Place::new(), env!("CARGO_BIN_EXE_train"));
    // the same configuration, another text
    let folders = ["a", "b"].map(|name| place.0.path().join(name));
    for folder in &folders {
        std::fs::create_dir_all(folder).unwrap();
        let text = format!("{} writes another text than the other one. ", folder.display()).repeat(400);
        std::fs::write(folder.join("text.txt"), text).unwrap();
        let config = CONFIG
            .replace("[task]\nkind = \"recall\"\n", "")
            .replace("vocab_size = 300", "vocab_size = 264")
            .replace("[data]\n", "[data]\nsource = \"text\"\npath = \"text.txt\"\n");
        std::fs::write(folder.join("c.toml"), config).unwrap();
    }
    let [a, b] = folders.each_ref().map(|f| f.to_str().unwrap());
    let mut corpora = Command::new("mpirun");
    corpora.args([
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        "1",
        "-wdir",
        a,
        train,
        "--config",
        "c.toml",
    ]);
    corpora.args([":", "-n", "1", "-wdir", b, train, "--config", "c.toml"]);
    refused(corpora.output().unwrap(), "give all processes the same files");
    // a run whose folder one process does not see
    let begun =
        Command::new(train).args(["--config", "../c.toml", "--set", "run.steps=4"]).current_dir(a).output().unwrap();
    assert!(begun.status.success(), "{}", told(&begun));
    let mut unshared = Command::new("mpirun");
    let on = ["--config", "../c.toml", "--set", "run.steps=8", "--resume=auto", "--allow-changes"];
    unshared
        .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "1", "-wdir", a, train])
        .args(on);
    unshared.args([":", "-n", "1", "-wdir", b, train]).args(on);
    refused(unshared.output().unwrap(), "rank 1: ");
}
