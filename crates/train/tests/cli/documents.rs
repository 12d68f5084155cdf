//! Documents that do not see each other, and how they are laid out.

use std::fs;

use crate::sandbox::{Sandbox, error_of, failed, succeeded};

/// With `own.jsonl`: documents of 5 to 200 words.
fn with_documents() -> Sandbox {
    let s = Sandbox::with_verses();
    let text = fs::read_to_string(s.path("own.txt")).unwrap();
    let (words, mut at, mut lines) = (text.split(' ').collect::<Vec<_>>(), 0, String::new());
    while at < words.len() {
        let end = (at + 5 + at * 7 % 196).min(words.len());
        lines += &format!("{}\n", serde_json::json!({ "text": words[at..end].join(" ") }));
        at = end;
    }
    fs::write(s.path("own.jsonl"), lines).unwrap();
    s
}

const TEXT: [&str; 3] = ["data.path=own.jsonl", "run.steps=12", "checkpoint.every=4"];

#[test]
fn a_run_over_documents_resumes_with_equal_bits_and_no_other_layout() {
    let s = with_documents();
    let mut all = Vec::new();
    for (name, set) in [
        ("plain", &[][..]),
        ("mask", &["data.document_mask=true"]),
        ("fit", &["data.packing=best-fit"]),
        ("both", &["data.packing=best-fit", "data.document_mask=true"]),
    ] {
        let set: Vec<&str> = TEXT.iter().chain(set).copied().collect();
        let whole = s.train(name, &set, false);
        fs::remove_dir_all(s.newest(name)).unwrap();
        let threads: Vec<&str> = set.iter().copied().chain(["run.threads=1"]).collect();
        assert!(whole == s.train(name, &threads, true), "{name}: resumed");
        all.push(whole);
    }
    for (i, a) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|b| a != b), "layout {i} trains as another");
    }
    fs::remove_dir_all(s.newest("both")).unwrap();
    let other: Vec<&str> = TEXT.iter().copied().chain(["run.name=both", "data.document_mask=true"]).collect();
    failed(&s.run(&["--resume"], &other), 2, &["data.packing: \"best-fit\" -> \"stream\""]);
}

#[test]
fn a_run_tells_its_padding_and_is_evaluated_as_it_was_trained() {
    let s = with_documents();
    let documents = ["data.packing=best-fit", "data.document_mask=true", "data.validation_share=0.3"];
    let set: Vec<&str> = TEXT.iter().copied().chain(documents).collect();
    let o = s.run(&[], &set);
    succeeded(&o);
    let told = error_of(&o, 0);
    assert!(told.contains(" at most, were all documents as long as a sequence; "), "{told}");
    let line = told.lines().find(|line| line.starts_with("packing: ")).expect(&told);
    assert!(line.contains("sequences of") && line.contains("% of the tokens are padding"), "{line}");
    let all = s.metrics("test");
    let last = all.iter().rev().find(|line| line["split"] == "val").unwrap()["loss"].as_f64().unwrap();
    let trained = fs::read_to_string(s.path("runs/test/config.toml")).unwrap();
    assert!(trained.contains("document_mask = true"), "{trained}");
    fs::write(s.path("whole.toml"), trained.replace("document_mask = true", "document_mask = false")).unwrap();
    let eval = |set: &[&str]| -> f64 {
        let args = ["eval", "--model", "runs/test", "--json"].iter().chain(set).copied().collect::<Vec<_>>();
        serde_json::from_str::<serde_json::Value>(&s.out(&args)).unwrap()["loss"].as_f64().unwrap()
    };
    assert_eq!(eval(&[]), last);
    // the same weights, which see across documents
    assert!(eval(&["--config", "whole.toml"]) != last);
    let told = s.told(2, &["eval", "--model", "runs/test", "--router", "random"]);
    let way = "add --config runs/test --set data.document_mask=false to evaluate those";
    assert!(told.contains("another router knows whole sequences only") && told.contains(way), "{told}");
    // and so it goes
    let args = ["eval", "--model", "runs/test", "--router", "random", "--config", "runs/test", "--set"];
    s.out(&[&args[..], &["data.document_mask=false"]].concat());
    assert!(!s.path("runs/test/budget.json").exists(), "positions in a sequence say nothing of documents");
}

#[test]
fn what_knows_whole_sequences_only_is_refused() {
    let s = Sandbox::new();
    let mask = "data.document_mask=true";
    let task = "task={kind=\"recall\",pairs=3}";
    let cases: [(&[&str], &[&str]); 6] = [
        (&[mask, task], &["data.document_mask", "means nothing to a task"]),
        (&["data.packing=best-fit", task], &["data.packing", "means nothing to a task"]),
        (&[mask, "probe.every=5"], &["probe.every", "whole sequences"]),
        (&[mask, "eval.far={tokens=9,rare=9}"], &["eval.far", "whole sequences"]),
        (
            &[mask, "router.budget_from=runs/other", "model.attention.kind=topk"],
            &["router.budget_from", "whole sequences"],
        ),
        (&["data.packing=tight"], &["data.packing", "best-fit"]),
    ];
    for (set, parts) in cases {
        failed(&s.run(&[], set), 2, parts);
    }
}

#[test]
fn an_arm_over_documents_has_no_budget_for_another_one() {
    let s = with_documents();
    let arms = "compare={arm=[{name=\"a\",set=[\"model.attention.kind=dash\"]},\
                {name=\"b\",budget_of=\"a\",set=[\"model.attention={kind=\\\"topk\\\",chunk_size=8,top=2}\"]}]}";
    let set = [&TEXT[..], &["model.attention.chunk_size=8", "data.document_mask=true", arms]].concat();
    failed(&s.run(&["compare"], &set), 2, &["arm \"b\"", "budget_of", "router.budget_from", "sees whole sequences"]);
    assert!(!s.path("runs").exists());
}

#[test]
fn a_fork_tells_where_in_the_text_it_goes_on() {
    let s = with_documents();
    let set: Vec<&str> = TEXT.iter().copied().chain(["optim.schedule=constant"]).collect();
    s.train("whole", &set, false);
    let forked = |more: &'static str| {
        let from = ["run.name=fork", "run.steps=14", "init.from=runs/whole", "init.moments=true", more];
        let o = s.run(&[], &set.iter().copied().chain(from).collect::<Vec<_>>());
        let told = error_of(&o, 0);
        let state: serde_json::Value =
            serde_json::from_slice(&fs::read(s.newest("fork").join("state.json")).unwrap()).unwrap();
        fs::remove_dir_all(s.path("runs/fork")).unwrap();
        (told.lines().find_map(|line| Some(line.split_once("the corpus ")?.1.to_string())).expect(&told), state)
    };
    let drawn = |state: &serde_json::Value| state["data"]["drawn"].as_u64().unwrap();
    // 12 updates of the run before, then 2
    let (told, mask) = forked("data.document_mask=true");
    assert_eq!(told, "goes on where it stood");
    for (more, key) in [("data.packing=best-fit", "data.packing"), ("data.seq_len=40", "data.seq_len")] {
        let (told, state) = forked(more);
        assert_eq!(told, format!("is cut into other sequences ({key}), read from the beginning of their order"));
        assert_eq!((7 * drawn(&state), &state["data_hash"]), (drawn(&mask), &mask["data_hash"]));
    }
    // longer sequences than the weights know are told once, with moments and without
    for moments in ["init.moments=true", "init={from=\"runs/whole\"}"] {
        let longer = ["run.name=fork", "run.steps=14", "init.from=runs/whole", moments, "data.seq_len=49"];
        let o = s.run(&[], &set.iter().copied().chain(longer).collect::<Vec<_>>());
        let told = error_of(&o, 0);
        assert_eq!(told.matches("was made for 48 tokens, this run reads 49").count(), 1, "{told}");
        fs::remove_dir_all(s.path("runs/fork")).unwrap();
    }
    let (told, state) = forked("run.seed=5");
    assert_eq!((told.as_str(), drawn(&state)), ("goes on at that place of another order (run.seed)", drawn(&mask)));
}
