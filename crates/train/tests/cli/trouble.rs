//! Closed pipes, full disks, damaged or missing files, numbers that are not finite: none of it may lose work or end in a panic.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::sandbox::{SMALL, Sandbox, error_of, failed, succeeded};

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
    assert_eq!(s.saved().last().unwrap(), "step-00000020");
    // what the terminal lost is in the run's own log
    let log = fs::read_to_string(s.path("runs/test").join("run.log")).unwrap();
    assert!(log.contains("step 20/20") && log.contains("done: 20 steps"), "{log}");
    // from what was told before the run had a folder
    let line = |what: &str| log.lines().position(|l| l.starts_with(what)).unwrap_or_else(|| panic!("{what} in {log}"));
    assert!(line("taken: 1 document") < line("split: ") && line("split: ") < line("run       runs/test"), "{log}");
    assert_eq!(log.matches("taken: ").count(), 1, "{log}");

    let s = Sandbox::new();
    assert_eq!(s.command(&[], &[]).stderr(full()).status().unwrap().code(), Some(0));
    assert_eq!(s.saved().last().unwrap(), "step-00000020");
}

#[test]
fn results_that_cannot_be_printed_are_an_error_and_a_reader_that_has_gone_is_none() {
    let s = Sandbox::new();
    assert!(s.command(&[], &[]).output().unwrap().status.success());
    let eval = || {
        let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
        c.args(["eval", "--model", "runs/test"]).current_dir(s.dir.path()).stdin(Stdio::null());
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
fn a_limit_on_file_sizes_is_an_error_of_the_file() {
    let s = Sandbox::new();
    // the corpus is prepared first, so that the limit meets the checkpoint
    assert!(s.command(&["prepare"], &[]).output().unwrap().status.success());
    let train = s.command(&[], &["log.tensorboard=false"]);
    let args: Vec<_> = train.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -f 40; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_train")]).args(args);
    let text = error_of(&shell.current_dir(s.dir.path()).output().unwrap(), 1);
    assert!(text.contains("the checkpoint could not be saved; earlier checkpoints are kept"), "{text}");
    assert!(s.saved().is_empty(), "no half-written checkpoint stays: {:?}", s.saved());
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
fn a_model_outlives_its_corpus() {
    let s = Sandbox::with_verses();
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
    assert!(s.saved().is_empty());
}

#[test]
fn what_this_program_wrote_into_the_corpus_folder_is_no_text() {
    let s = Sandbox::new();
    let run = |name: &str| s.run(&[], &["data.path=.", "run.steps=3", &format!("run.name={name}")]);
    succeeded(&run("a"));
    let (first, key) = (s.weights("a"), s.data());
    succeeded(&s.run(&["compare"], &["data.path=.", "run.steps=3", "compare={arm=[{name=\"x\",set=[]}]}"]));
    succeeded(&s.bin(&["export", "--model", "runs/a", "--out", "hf"]));
    succeeded(&run("b"));
    assert_eq!(s.weights("b"), first, "the same corpus as before there were runs");
    assert_eq!(s.data(), key);
}

#[test]
fn a_device_without_an_end_is_no_configuration_and_no_tokenizer() {
    let s = Sandbox::new();
    assert!(s.told(2, &["--config", "/dev/zero"]).contains("larger than 16 MB"));
    // a tokenizer may be large; what is refused here is what a terminal would hang on
    failed(&s.run(&["prepare"], &["data.tokenizer=corpus.txt"]), 2, &["is no tokenizer.json"]);
    fs::write(s.path("pointer.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n").unwrap();
    let pointer = ["pointer.json: holds a pointer of Git LFS", "git lfs pull"];
    failed(&s.run(&["prepare"], &["data.tokenizer=pointer.json"]), 2, &pointer);
}

#[test]
fn a_run_that_lost_a_file_is_neither_started_over_nor_taken_for_a_task() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &[]));
    fs::rename(s.path("runs/test/tokenizer.json"), s.path("away")).unwrap();
    for command in [&["eval", "--model", "runs/test"][..], &["export", "--model", "runs/test", "--out", "hf"]] {
        let told = s.told(2, command);
        assert!(told.contains("tokenizer.json: is missing: the model was trained on text"), "{told}");
    }
    assert!(!s.path("hf").exists());
    // resuming writes it anew
    let resumed = s.command(&[], &[]).arg("--resume").output().unwrap();
    succeeded(&resumed);
    assert_eq!(fs::read(s.path("runs/test/tokenizer.json")).unwrap(), fs::read(s.path("away")).unwrap());

    fs::remove_file(s.path("runs/test/config.toml")).unwrap();
    let before = s.saved();
    for more in [&[][..], &["--resume"], &["--resume=auto"]] {
        let told = error_of(&s.command(&[], &[]).args(more).output().unwrap(), 2);
        assert!(told.contains("holds checkpoints of a run whose config.toml is gone"), "{told}");
    }
    assert_eq!(s.saved(), before);
    for checkpoint in s.checkpoints("test") {
        fs::write(checkpoint.join("model.safetensors"), "x").unwrap();
    }
    let told = s.told(2, &["eval", "--model", "runs/test"]);
    assert!(told.contains(&format!("none of its {} checkpoints is whole", before.len())), "{told}");
}

#[test]
fn a_record_with_bytes_that_are_no_text_loses_no_line() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &["run.steps=10"]));
    let path = s.path("runs/test/metrics.jsonl");
    let before = fs::read(&path).unwrap();
    fs::write(&path, [&before[..], b"\xff\xfe\0\n"].concat()).unwrap();
    succeeded(&s.command(&[], &["run.steps=15"]).arg("--resume").arg("--allow-changes").output().unwrap());
    let after = fs::read(&path).unwrap();
    assert!(after.starts_with(&before) && s.metrics("test").len() > before.split(|b| *b == b'\n').count() - 1);
}
