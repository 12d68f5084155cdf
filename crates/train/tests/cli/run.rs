//! What a run leaves behind, and what can be done with its model.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use crate::sandbox::{RECALL, Sandbox, error_of, failed, is_hidden, succeeded};

#[test]
fn a_run_leaves_what_the_interface_promises() {
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
}

#[test]
fn the_model_of_a_run_is_evaluated_continues_a_text_and_is_exported() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &[]));
    let eval = |model: &str| -> Value { serde_json::from_str(&s.out(&["eval", "--model", model, "--json"])).unwrap() };
    let of_run = eval("runs/test");
    let told = s.metrics("test");
    assert_eq!(of_run["loss"], told.iter().rfind(|l| l["split"] == "val").unwrap()["loss"]);
    assert_eq!(of_run["loss_by_position"].as_array().unwrap().len(), 48);
    // what was evaluated, and what it attends
    let told = s.out(&["eval", "--model", "runs/test"]);
    let first = told.lines().next().unwrap();
    assert!(first.starts_with("model runs/test/checkpoints/step-00000020, attention dash (chunk_size 8, "), "{told}");
    assert!(first.ends_with(", router own"), "{first}");
    let attended = of_run["attended_tokens"].as_f64().unwrap();
    assert!(told.contains(&format!("attended tokens {attended:.1} a query, ")), "{told}");
    let other = s.out(&["eval", "--model", "runs/test", "--as", "topk", "--top", "2", "--router", "random"]);
    assert!(
        other.starts_with("model runs/test/checkpoints/step-00000020, attention topk (chunk_size 8, top 2, "),
        "{other}"
    );
    assert!(other.contains(" in the place of dash (") && other.lines().next().unwrap().ends_with(", router random"));
    let text = |seed: &str| {
        let prompt = ["--prompt", "the router", "--max-tokens", "12", "--seed", seed];
        s.out(&[&["generate", "--model", "runs/test"], &prompt[..]].concat())
    };
    assert!(text("1").starts_with("the router") && text("1") == text("1") && text("1") != text("2"));

    succeeded(&s.bin(&["plot", "--run", "runs/test", "--out", "pictures"]));
    for (file, label) in [("loss.svg", "validation"), ("density.svg", "layer 1")] {
        assert!(fs::read_to_string(s.path("pictures").join(file)).unwrap().contains(label), "{file}");
    }

    succeeded(&s.bin(&["export", "--checkpoint", "runs/test", "--out", "out"]));
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
fn a_model_is_evaluated_and_resumed_from_any_folder_and_after_its_project_moved() {
    let s = Sandbox::new();
    let project = s.path("project");
    fs::create_dir(&project).unwrap();
    fs::rename(s.path("corpus.txt"), project.join("corpus.txt")).unwrap();
    let started = |set: &[&str]| s.command(&[], set).current_dir(&project).output().unwrap();
    succeeded(&started(&["run.steps=10"]));
    let told = fs::read_to_string(project.join("runs/test/metrics.jsonl")).unwrap();
    let told: Value = serde_json::from_str(told.lines().rfind(|l| l.contains("\"val\"")).unwrap()).unwrap();
    let eval = |model: &std::path::Path| -> Value {
        let o = s.bin(&["eval", "--model", model.to_str().unwrap(), "--json"]);
        succeeded(&o);
        serde_json::from_slice(&o.stdout).unwrap()
    };
    assert_eq!(eval(&project.join("runs/test"))["loss"], told["loss"]);
    assert!(!s.path("data").exists(), "nothing is prepared a second time");
    // the run alone has moved: its record has the folder it was started in
    fs::rename(project.join("runs/test"), s.path("taken")).unwrap();
    assert_eq!(eval(&s.path("taken"))["loss"], told["loss"]);
    fs::rename(s.path("taken"), project.join("runs/test")).unwrap();
    // everything has moved: it is found above the run
    let moved = s.path("moved");
    fs::rename(&project, &moved).unwrap();
    assert_eq!(eval(&moved.join("runs/test"))["loss"], told["loss"]);
    let dir = format!("run.dir={}", moved.join("runs").display());
    let longer = s.command(&[], &[&dir]).args(["--extend", "12"]).output().unwrap();
    succeeded(&longer);
    assert!(moved.join("runs/test/checkpoints/step-00000012").is_dir());
    // where nothing is found, what was looked for is told
    fs::rename(moved.join("data"), s.path("hidden")).unwrap();
    fs::remove_file(moved.join("corpus.txt")).unwrap();
    let lost = s.bin(&["eval", "--model", moved.join("runs/test").to_str().unwrap()]);
    failed(
        &lost,
        2,
        &["looked for from", s.dir.path().to_str().unwrap(), project.to_str().unwrap(), moved.to_str().unwrap()],
    );
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

#[test]
fn a_task_trains_resumes_evaluates_and_exports_without_a_text() {
    let s = Sandbox::new();
    let set = [RECALL, "data.vocab_size=40", "data.path=nowhere.txt", "router.target_share=0.6"];
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
    let eval = |args: &[&str]| -> Value {
        let o = s.bin(&[&["eval", "--model", "runs/whole", "--json"], args].concat());
        succeeded(&o);
        serde_json::from_slice(&o.stdout).unwrap()
    };
    assert_eq!(eval(&[])["loss"], val["loss"]);
    assert_eq!(eval(&["--as", "dense"])["density"].as_f64(), Some(1.0));
    assert_eq!(eval(&["--router", "oracle"])["task"][0]["unseen"].as_f64(), Some(0.0));
    let random = eval(&["--router", "random"]);
    assert!((random["attended_tokens"].as_f64().unwrap() / 24.5 - attended).abs() < 0.1);
    assert!(random["loss"] != val["loss"]);
    failed(&s.bin(&["eval", "--model", "runs/whole", "--as", "dense", "--router", "random"]), 2, &["no router"]);
    failed(&s.bin(&["eval", "--model", "runs/whole", "--as", "topk", "--top", "99"]), 2, &["--top: 99", "6 chunks"]);
    failed(&s.bin(&["eval", "--model", "runs/whole", "--as", "topk", "--chunk-size", "48"]), 2, &["nothing to route"]);
    failed(&s.bin(&["eval", "--model", "runs/whole", "--as", "nsa"]), 2, &["k_proj_compressed", "missing"]);
    succeeded(&s.bin(&["export", "--checkpoint", "runs/whole", "--out", "out"]));
    assert!(s.path("out/parity.safetensors").is_file() && !s.path("out/tokenizer.json").exists());
    failed(&s.bin(&["generate", "--model", "runs/whole", "--prompt", "x"]), 2, &["has no tokenizer"]);
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
fn a_run_that_is_hardly_sparse_is_told_and_tokens_are_not_chunks() {
    let s = Sandbox::with_verses();
    fs::write(s.path("mine.toml"), s.out(&["init", "--text", "own.txt"])).unwrap();
    let run = |name: &str, set: &[&str]| {
        let name = format!("run.name={name}");
        let mut args = vec!["--config", "mine.toml", "--set", &name];
        let small =
            ["data.vocab_size=300", "data.seq_len=128", "data.batch_size=2", "eval.batches=1", "eval.sample_tokens=0"];
        set.iter().chain(&small).for_each(|x| args.extend(["--set", x]));
        s.told(0, &args)
    };
    let learning = ["run.steps=60", "optim.warmup_steps=10", "optim.lr=1e-2", "log.every=5"];
    let dense = run("full", &[&learning[..], &["model.attention.gamma=0.01"]].concat());
    assert_eq!(dense.matches("hardly sparse").count(), 1, "{dense}");
    assert!(dense.contains("attends 100 % of chunks at step 50: hardly sparse"), "{dense}");
    assert!(dense.contains("raise model.attention.gamma"), "{dense}");
    // a fresh router attends everything, whatever it learns
    let fresh = run("fresh", &learning);
    assert!(fresh.contains("100 % of chunks") && !fresh.contains("hardly sparse"), "{fresh}");
    // the number of chunks is known from the first update on
    let hard = run("hard", &["run.steps=2", "model.attention={kind=\"topk\",chunk_size=16,top=8}"]);
    assert!(
        hard.contains("attends 100 % of chunks at step 1: hardly sparse") && hard.contains("lower model.attention.top"),
        "{hard}"
    );
    let sparse = run("sparse", &["run.steps=2", "model.attention.gamma=1e4"]);
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
    let tokens = record["attended_tokens"].as_f64().unwrap() / ((128.0 + 1.0) / 2.0);
    let chunks = record["density"].as_f64().unwrap();
    assert!((before(" % of tokens") - 100.0 * tokens).abs() <= 0.5 + 1e-9, "{line} {tokens}");
    assert!((before(" % of chunks") - 100.0 * chunks).abs() <= 0.5 + 1e-9, "{line} {chunks}");
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
