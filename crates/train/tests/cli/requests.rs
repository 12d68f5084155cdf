//! What a wrong request is told.

use std::fs;
use std::process::{Command, Output, Stdio};

use crate::sandbox::{Sandbox, error_of, failed, succeeded};

#[test]
fn wrong_requests_are_told_before_any_work() {
    let s = Sandbox::new();
    let cases: [(&[&str], &[&str]); 9] = [
        (&["optim.learning_rate=1"], &["unknown field `learning_rate`", "did you mean `lr`?"]),
        (&["run.steps=many"], &["run.steps: \"many\" is text, where an integer"]),
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
    // no machine has that many: on one without a GPU the driver is missing, on one with a GPU the number is too large
    failed(&s.run(&[], &["run.device=cuda:63"]), 2, &["run.device = \"cuda:63\"", "run.device = \"cpu\" needs no GPU"]);
    assert!(!s.path("runs").exists(), "a GPU is looked for before a run begins");
    // before processes are started that each say so
    let told = error_of(&s.run(&["--processes", "3"], &["run.device=cuda"]), 2);
    assert_eq!(told.matches("3 processes: data.grad_accum").count(), 1, "{told}");
    fs::write(s.path("tiny.txt"), "hello world\n").unwrap();
    let tiny = error_of(&s.run(&[], &["data.path=tiny.txt"]), 2);
    assert!(tiny.contains("12 bytes of text are too few") && !tiny.contains("ask for"), "{tiny}");
    failed(&s.bin(&["--config", "missing.toml"]), 2, &["missing.toml", "cannot be read"]);
    failed(&s.bin(&["eval", "--model", "."]), 2, &["holds no model"]);
    failed(&s.bin(&["eval", "--model", "runs/none"]), 2, &["runs/none: is no folder here; expected"]);
    let hub = "hf download meta-llama/Llama-3.2-1B --local-dir FOLDER";
    failed(&s.bin(&["eval", "--model", "meta-llama/Llama-3.2-1B"]), 2, &["is no folder here", hub]);
}

#[test]
fn more_threads_than_a_machine_has_are_refused_wherever_they_are_asked_for() {
    let s = Sandbox::new();
    for name in ["RAYON_NUM_THREADS", "RAYON_RS_NUM_CPUS"] {
        let told = s.command(&["prepare"], &[]).env(name, "100000").output().unwrap();
        failed(&told, 2, &[name, "100000", "above 1024", "run.threads"]);
        assert!(!s.path("cache").exists());
    }
    failed(&s.run(&[], &["run.threads=100000"]), 2, &["run.threads", "above 1024"]);
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
fn arguments_that_are_keys_and_commands_that_are_none_are_told_what_to_do() {
    let s = Sandbox::new();
    let seed = s.told(2, &["--seed", "3"]);
    assert!(seed.contains("--set run.seed=VALUE") && !seed.contains("--extend'"), "{seed}");
    assert!(s.told(2, &["compare", "--seed", "3"]).contains("'--seeds'"));
    assert!(s.told(2, &["evla"]).contains("'eval'"));
    let none = s.told(2, &["trian"]);
    assert!(none.contains("train --config FILE") && none.contains("verify-resume"), "{none}");
    failed(&s.run(&["compare", "--arms", "dense,dahs"], &[]), 2, &["did you mean dash?"]);
    failed(&s.run(&[], &["model.attention.kind=dahs"]), 2, &["did you mean `dash`?"]);
    failed(&s.run(&[], &["steps=10"]), 2, &["did you mean `run.steps`?"]);
}

#[test]
fn all_keys_that_are_wrong_are_told_at_once() {
    let s = Sandbox::with_verses();
    let text = "[run]\nsteps = 3\n[data]\nseq_len = 64\n[optim]\nlearning_rate = 1e-3\n[model]\nd_model = 8\nn_layer = 2\n\
        [model.attention]\nchunksize = 8\n[trainer]\n\
        [eval.stop]\naccuracy = 0.9\ncheks = 2\n";
    fs::write(s.path("bad.toml"), text).unwrap();
    let told = s.told(2, &["--config", "bad.toml"]);
    for part in [
        "line 6: unknown field `learning_rate` in [optim]; did you mean `lr`?",
        "line 8: unknown field `d_model` in [model]; did you mean `width`?",
        "line 9: unknown field `n_layer` in [model]; did you mean `layers`?",
        "line 11: unknown field `chunksize` in [model.attention]; did you mean `chunk_size`?",
        "line 12: unknown field `trainer`",
        "line 15: unknown field `cheks` in [eval.stop]; did you mean `checks`?",
        "missing field `checks` in [eval.stop] (integer, at least 1)",
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

/// `train` with a limit on its address space, in kilobytes: a limit below what the machine has, so that the test's outcome does not
/// depend on the machine.
fn with_memory(s: &Sandbox, kilobytes: u64, set: &[&str], more: &[&str]) -> Output {
    let train = s.command(&[], set);
    let args: Vec<_> = train.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let script = format!("ulimit -v {kilobytes}; exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, env!("CARGO_BIN_EXE_train")]).args(args).args(more);
    shell.current_dir(s.dir.path()).stdin(Stdio::null()).output().unwrap()
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
        assert!(!s.path("runs/test").exists() && !s.path("data").exists(), "{set}: nothing is written");
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
fn numbers_and_names_at_the_ends_of_their_ranges() {
    let s = Sandbox::new();
    for steps in ["0", "-1", "9223372036854775807", "18446744073709551615", "x"] {
        error_of(&s.command(&[], &[]).args(["--extend", steps]).output().unwrap(), 2);
    }
    for (set, words) in [
        ("run.name=a\nb", "is no folder name"),
        ("optim.lr=1e308", "optim.lr: 1e308 is beyond f32"),
        ("probe.sequences=0", "probe.sequences: is 0; it must be at least 1"),
        ("router.gamma={from=1.0,to=2.0,steps=0}", "router.gamma.steps: is 0"),
        ("compare={seeds=10001}", "10001 is not 1 to 10000"),
        ("data.validation_tokens=1", "raise data.validation_share or data.validation_tokens"),
    ] {
        let command: &[&str] = if set.starts_with("compare") { &["compare"] } else { &[] };
        failed(&s.run(command, &[set]), 2, &[words]);
    }
    failed(&s.command(&["bench"], &[]).args(["--steps", "0"]).output().unwrap(), 2, &["--steps"]);
    let report =
        s.command(&["compare"], &[]).args(["--arms", "dense", "--out", "none", "--report-only"]).output().unwrap();
    failed(&report, 2, &["holds no comparison"]);
    succeeded(&s.run(&[], &[]));
    let onto_run = s.command(&["compare"], &[]).args(["--arms", "dense", "--out", "runs/test"]).output().unwrap();
    failed(&onto_run, 2, &["is a run or an export"]);
    let eval = ["eval", "--model", "runs/test", "--as", "topk", "--top", "2", "--chunk-size", "0"];
    failed(&s.bin(&eval), 2, &["a chunk has at least one token"]);
}
