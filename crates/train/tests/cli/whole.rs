//! `eval --tokens`, `--text`, `--blimp` and `--hellaswag`.

use std::fs;

use serde_json::Value;

use crate::sandbox::{Sandbox, failed, repository, succeeded};

fn json(s: &Sandbox, args: &[&str]) -> Value {
    serde_json::from_str(&s.out(&[&["eval", "--model", "runs/test", "--json"], args].concat())).unwrap()
}

#[test]
fn a_file_of_token_ids_gives_the_loss_that_a_validation_on_all_of_it_gives() {
    let s = Sandbox::new();
    let fixtures = repository().join("crates/data/tests/fixtures");
    fs::create_dir(s.path("ids")).unwrap();
    for name in ["fineweb_train_000001.bin", "fineweb_val_000000.bin"] {
        fs::copy(fixtures.join("llmc").join(name), s.path("ids").join(name)).unwrap();
    }
    // 51 ids validate: two windows of 25 targets
    succeeded(&s.run(
        &[],
        &[
            "data.source=tokens",
            "data.path=ids",
            "data.vocab_size=50257",
            "data.seq_len=25",
            "run.steps=2",
            "eval.batches=99",
            "eval.sample_tokens=0",
        ],
    ));
    let validated = json(&s, &[]);
    assert_eq!(validated["tokens"], 50);
    let file = "ids/fineweb_val_000000.bin";
    let whole = json(&s, &["--tokens", file]);
    assert_eq!((&whole["tokens"], &whole["windows"], &whole["stride"]), (&50.into(), &2.into(), &25.into()));
    assert_eq!(whole["bits_per_byte"], Value::Null);
    let (a, b) = (whole["loss"].as_f64().unwrap(), validated["loss"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-12 * b, "{a} {b}");
    let first = json(&s, &["--tokens", file, "--max-tokens", "25"]);
    assert_eq!((&first["tokens"], &first["windows"]), (&25.into(), &1.into()));
    let told = |most: &str| s.out(&["eval", "--model", "runs/test", "--tokens", file, "--max-tokens", most]);
    assert!(told("25").contains("\n1 window of at most 25 tokens"), "{}", told("25"));
    assert!(told("50").contains("\n2 windows of 25 tokens, 25 further each"), "{}", told("50"));
    let strided = json(&s, &["--tokens", file, "--stride", "5"]);
    assert_eq!((&strided["tokens"], &strided["windows"]), (&50.into(), &6.into()));
    assert_ne!(strided["loss"], whole["loss"]);

    let eval = |args: &[&str]| s.bin(&[&["eval", "--model", "runs/test"], args].concat());
    failed(&eval(&["--text", "corpus.txt"]), 2, &["no tokenizer belongs to the model", "--tokens FILE"]);
    failed(&eval(&["--tokens", "nowhere.bin"]), 2, &["nowhere.bin"]);
    failed(&eval(&["--tokens", "ids"]), 2, &["is a folder"]);
    failed(&eval(&["--tokens", file, "--stride", "26"]), 2, &["--stride", "26", "25"]);
    failed(&eval(&["--stride", "2"]), 2, &["--stride"]);
    failed(&eval(&["--tokens", file, "--as", "dense"]), 2, &["cannot be used with"]);
    let whole = fs::read(s.path(file)).unwrap();
    fs::write(s.path("cut.bin"), &whole[..whole.len() - 2]).unwrap();
    failed(&eval(&["--tokens", "cut.bin"]), 2, &["cut.bin", "cut off"]);
}

#[test]
fn texts_are_evaluated_from_their_first_token_to_their_last() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &["run.steps=2", "eval.sample_tokens=0"]));
    fs::write(s.path("a.txt"), "the router of the query attends a chunk.\n".repeat(9)).unwrap();
    fs::write(s.path("b.txt"), "key").unwrap();
    let of = |args: &[&str]| {
        let v = json(&s, args);
        let nats = |v: &Value| v["loss"].as_f64().unwrap() * v["tokens"].as_f64().unwrap();
        (nats(&v), v["bits_per_byte"].as_f64().unwrap(), v["tokens"].as_u64().unwrap())
    };
    let (a, b, both) = (of(&["--text", "a.txt"]), of(&["--text", "b.txt"]), of(&["--text", "a.txt", "b.txt"]));
    assert_eq!(both.2, a.2 + b.2);
    assert!((both.0 - a.0 - b.0).abs() < 1e-6 * both.0);
    assert!((a.1 - a.0 / std::f64::consts::LN_2 / (41.0 * 9.0)).abs() < 1e-9);
    let told = s.out(&["eval", "--model", "runs/test", "--text", "a.txt"]);
    assert!(told.contains("on a.txt") && told.contains("bits per byte"), "{told}");

    fs::write(s.path("empty.txt"), "").unwrap();
    fs::write(s.path("latin.txt"), b"abc\xe4def").unwrap();
    let eval = |file: &str| s.bin(&["eval", "--model", "runs/test", "--text", file]);
    failed(&eval("empty.txt"), 2, &["empty.txt", "holds no text"]);
    failed(&eval("latin.txt"), 2, &["latin.txt", "byte 3 is not valid UTF-8"]);
    failed(&eval("gone.txt"), 2, &["gone.txt"]);
    fs::write(s.path("a.parquet"), b"PAR1\x15\x04\xffPAR1").unwrap();
    failed(&eval("a.parquet"), 2, &["a.parquet: is parquet", "to_json"]);
    failed(&eval("."), 2, &["is a folder"]);
    let records = [
        ("a.jsonl", "cat"),
        ("a.json", "cat"),
        ("a.json.gz", "gzip -dc"),
        ("a.jsonl.zstd", "zstd -dc"),
        ("a.ndjson.gzip", "gzip -dc"),
    ];
    for (name, open) in records {
        fs::write(s.path(name), "{\"text\": \"key\"}\n").unwrap();
        failed(&eval(name), 2, &[name, "holds records", &format!("{open} < {name} | jq -r .text")]);
    }
    let both = ["eval", "--model", "runs/test", "--text", "a.txt", "--max-tokens", "5"];
    failed(&s.bin(&both), 2, &["--max-tokens", "--tokens FILE"]);
}

/// A folder as Hugging Face has it: the weights of an export, without what is ours beside them.
#[test]
fn a_model_of_hugging_face_is_evaluated_as_the_run_that_it_came_from() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &["run.steps=2", "eval.sample_tokens=0", "model.attention={kind=\"dense\"}", "router={}"]));
    succeeded(&s.bin(&["export", "--model", "runs/test", "--out", "hf"]));
    ["config.toml", "parity.safetensors", "README.md"]
        .iter()
        .for_each(|name| fs::remove_file(s.path("hf").join(name)).unwrap());
    fs::write(s.path("a.txt"), "the router of the query attends a chunk.\n".repeat(40)).unwrap();
    let eval = |model: &str, args: &[&str]| -> Value {
        serde_json::from_str(&s.out(&[&["eval", "--model", model, "--json"], args].concat())).unwrap()
    };
    let (own, theirs) = (eval("runs/test", &["--text", "a.txt"]), eval("hf", &["--text", "a.txt"]));
    for key in ["attention", "tokens", "windows", "seq_len", "bits_per_byte"] {
        assert_eq!(own[key], theirs[key], "{key}");
    }
    let loss = |v: &Value| v["loss"].as_f64().unwrap();
    assert!((loss(&own) - loss(&theirs)).abs() < 1e-6, "{own} {theirs}");
    let data = ["--config", "runs/test", "--set", "data.tokenizer=hf/tokenizer.json"];
    assert!((loss(&eval("hf", &data)) - loss(&eval("runs/test", &[]))).abs() < 1e-6);
    let short = eval("hf", &["--text", "a.txt", "--seq-len", "9"]);
    assert_eq!((&short["seq_len"], &short["stride"]), (&9.into(), &9.into()));
    assert_ne!(short["loss"], own["loss"]);
    let longer = format!("data.seq_len={}", own["seq_len"].as_u64().unwrap() + 1);
    let longer = s.bin(&[&["eval", "--model", "hf"], &data[..], &["--set", &longer]].concat());
    succeeded(&longer);
    let told = String::from_utf8_lossy(&longer.stderr);
    assert!(told.contains("warning: hf was made for ") && told.contains(" tokens, this evaluation reads "), "{told}");

    let asked = |args: &[&str]| s.bin(args);
    failed(&asked(&["eval", "--model", "hf"]), 2, &["no validation text of its own", "--text FILE", "--config"]);
    failed(
        &asked(&["eval", "--model", "hf", "--text", "a.txt", "--seq-len", "9999"]),
        2,
        &["--seq-len: 9999 is above"],
    );
    failed(&asked(&["eval", "--model", "runs/test", "--seq-len", "9"]), 2, &["--seq-len: what is evaluated"]);
    failed(&asked(&["export", "--model", "hf", "--out", "again"]), 2, &["is a folder of Hugging Face already"]);
    let other = ["eval", "--model", "hf", "--config", "runs/test", "--set", "data.vocab_size=77"];
    failed(&asked(&other), 2, &["data.vocab_size: 77, but hf has"]);
    assert!(s.out(&["generate", "--model", "hf", "--prompt", "the", "--max-tokens", "2"]).starts_with("the"));
    // a token more than the embedding has rows
    let path = s.path("hf/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(s.path("hf/config.json")).unwrap()).unwrap();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
        "id": config["vocab_size"], "content": "<more>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true
    }));
    fs::write(&path, tokenizer.to_string()).unwrap();
    let told = ["tokenizer.json: has ", " entries, the model beside it has ", "give the tokenizer of that model"];
    failed(&asked(&["eval", "--model", "hf", "--text", "a.txt"]), 2, &told);
}

#[test]
fn tests_of_choices_are_read_scored_and_told() {
    let s = Sandbox::new();
    succeeded(&s.run(&[], &["eval.sample_tokens=0"]));
    let pair = |good: &str, bad: &str| serde_json::json!({"sentence_good": good, "sentence_bad": bad}).to_string();
    // a sentence is more probable than the same with more behind it
    let easy = [pair("chunk", "chunk query key value"), pair("the router", "the router %%%% 99 @@@@")].join("\n");
    let reversed = [pair("the router 77 %%%%", "the router"), pair("chunk", "chunk")].join("\n\n");
    fs::write(s.path("easy.jsonl"), easy).unwrap();
    fs::write(s.path("reversed.jsonl"), reversed).unwrap();
    let both = json(&s, &["--blimp", "easy.jsonl", "reversed.jsonl"]);
    assert_eq!((&both["pairs"], &both["accuracy"]), (&4.into(), &0.5.into()));
    assert_eq!((&both["files"][0]["accuracy"], &both["files"][1]["accuracy"]), (&1.0.into(), &0.0.into()));
    let told = s.out(&["eval", "--model", "runs/test", "--blimp", "easy.jsonl"]);
    assert!(told.contains("BLiMP: accuracy 1.0000") && told.contains("2 pairs"), "{told}");

    let question = |label: &str| {
        format!(
            "{{\"ctx\": \"the router\", \"endings\": [\"of the query\", \"%% 99 @@ %% 99 @@\"], \"label\": {label}}}\n"
        )
    };
    fs::write(s.path("swag.jsonl"), question("0") + &question("\"0\"") + &question("1")).unwrap();
    let swag = json(&s, &["--hellaswag", "swag.jsonl"]);
    assert_eq!((&swag["questions"], &swag["style"]), (&3.into(), &"llm.c".into()));
    assert!((swag["accuracy"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-9);
    assert!(s.out(&["eval", "--model", "runs/test", "--hellaswag", "swag.jsonl"]).contains("in the style of llm.c"));

    let eval = |args: &[&str]| s.bin(&[&["eval", "--model", "runs/test"], args].concat());
    fs::write(s.path("label.jsonl"), question("7")).unwrap();
    failed(&eval(&["--hellaswag", "label.jsonl"]), 2, &["label.jsonl", "question 1", "label 7"]);
    failed(&eval(&["--blimp", "label.jsonl"]), 2, &["label.jsonl", "line 1", "sentence_good"]);
    fs::write(s.path("empty.jsonl"), "\n").unwrap();
    failed(&eval(&["--blimp", "empty.jsonl"]), 2, &["empty.jsonl", "holds no pair"]);
    fs::write(s.path("blank.jsonl"), pair("", "a")).unwrap();
    failed(&eval(&["--blimp", "blank.jsonl"]), 2, &["blank.jsonl", "pair 1 holds an empty text"]);
    failed(&eval(&["--blimp", "easy.jsonl", "--stride", "2"]), 2, &["--stride"]);
    failed(&eval(&["--hellaswag", "swag.jsonl", "--max-tokens", "2"]), 2, &["--max-tokens", "--tokens FILE"]);
    failed(&eval(&["--blimp", "."]), 2, &["is a folder"]);
    fs::write(s.path("few.jsonl"), "{\"ctx\": \"the\", \"endings\": [\"chunk\"], \"label\": 0}\n").unwrap();
    failed(&eval(&["--hellaswag", "few.jsonl"]), 2, &["few.jsonl", "question 1 has one ending"]);
    fs::write(s.path("none.jsonl"), question("0").replace("of the query", "")).unwrap();
    failed(&eval(&["--hellaswag", "none.jsonl"]), 2, &["none.jsonl", "question 1 holds an empty text"]);
    failed(&eval(&["--blimp", "gone.jsonl"]), 2, &["gone.jsonl"]);
}
