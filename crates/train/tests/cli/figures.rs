//! docs/metrics.md names every figure that a run logs, and none that no run logs.

use std::collections::BTreeSet;
use std::fs;

use protobuf::Message;
use serde_json::Value;
use tensorboard_proto::event::Event;

use crate::sandbox::{RECALL, Sandbox, repository, succeeded};

/// What a run on a CPU does not log.
const ON_A_GPU: [&str; 3] = ["train.mfu", "train.gpu_memory_bytes", "train/mfu"];

/// Every name in backquotes in the first column of the page's tables, by heading.
fn documented() -> (BTreeSet<String>, BTreeSet<String>) {
    let page = fs::read_to_string(repository().join("docs/metrics.md")).unwrap();
    let (mut place, mut keys, mut tags) = (String::new(), BTreeSet::new(), BTreeSet::new());
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            place = title.trim_matches('`').to_string();
        }
        let Some(cell) = line.strip_prefix("| `").and_then(|rest| rest.split(" | ").next()) else { continue };
        let names = format!("`{cell}");
        for name in names.split('`').skip(1).step_by(2) {
            match place.as_str() {
                "TensorBoard" => tags.insert(name.to_string()),
                "Every line" => ["train", "val", "probe"].iter().all(|split| keys.insert(format!("{split}.{name}"))),
                split => keys.insert(format!("{split}.{name}")),
            };
        }
    }
    (keys, tags)
}

/// Every path of keys in a value; arrays are `[]`, and the bounds of bins are one name.
fn paths(value: &Value, at: &str, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(all) => {
            for (key, value) in all {
                let key = if key.starts_with("edge_u<=") { "edge_u<=U" } else { key };
                paths(value, &format!("{at}.{key}"), out);
            }
        }
        Value::Array(all) if all.is_empty() => {}
        Value::Array(all) => all.iter().for_each(|value| paths(value, &format!("{at}[]"), out)),
        _ => _ = out.insert(at.to_string()),
    }
}

/// A tag with `N` for the number of a layer, a head or a length.
fn normal(tag: &str) -> String {
    let part = |part: &str| {
        let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        let name = ["layer", "head", "length", ""].into_iter().find(|n| part.strip_prefix(n).is_some_and(number));
        match name {
            Some(name) => format!("{name}N"),
            None if part.starts_with("edge_u<=") => "edge_u<=U".to_string(),
            None => part.to_string(),
        }
    };
    tag.split('/').map(part).collect::<Vec<_>>().join("/")
}

/// Tags of an event file: records are a length of 8 bytes, its checksum of 4, the event, and its checksum of 4.
fn tags(bytes: &[u8], out: &mut BTreeSet<String>) {
    let mut rest = bytes;
    while let Some((head, body)) = rest.split_first_chunk::<12>() {
        let length = u64::from_le_bytes(*head.first_chunk().unwrap()) as usize;
        let event = Event::parse_from_bytes(&body[..length]).unwrap();
        out.extend(event.get_summary().get_value().iter().map(|value| normal(value.get_tag())));
        rest = &body[length + 4..];
    }
}

#[test]
fn every_logged_figure_is_documented_and_every_documented_one_is_logged() {
    let s = Sandbox::new();
    let text = [
        "run.name=text",
        "run.steps=4",
        "probe.every=2",
        "eval.every=2",
        "eval.sample_tokens=4",
        "eval.far={tokens=16,rare=1000000}",
    ];
    let ramp = "router.alpha={from=1.25,to=1.5,steps=3}";
    let task = [RECALL, "data.vocab_size=40", "run.name=task", "run.steps=4", ramp, "router.target_share=0.6"];
    let indexer = [
        "run.name=indexer",
        "run.steps=2",
        "optim.spike_guard=8",
        "model.attention={kind=\"kl-indexer\",chunk_size=8,top=3}",
    ];
    let (mut keys, mut all) = (BTreeSet::new(), BTreeSet::new());
    for set in [&text[..], &task, &indexer] {
        succeeded(&s.run(&[], set));
    }
    for name in ["text", "task", "indexer"] {
        for line in s.metrics(name) {
            paths(&line, line["split"].as_str().unwrap(), &mut keys);
        }
        let events = fs::read_dir(s.path("runs").join(name).join("tensorboard")).unwrap();
        events.for_each(|file| tags(&fs::read(file.unwrap().path()).unwrap(), &mut all));
    }
    let (known_keys, known_tags) = documented();
    assert!(keys.len() > 80 && all.len() > 30, "{} keys, {} tags", keys.len(), all.len());
    for (what, logged, known) in [("key of metrics.jsonl", &keys, &known_keys), ("tag", &all, &known_tags)] {
        let missing: Vec<_> = logged.difference(known).collect();
        assert!(missing.is_empty(), "docs/metrics.md has no row for this {what}: {missing:?}");
        let never: Vec<_> = known.difference(logged).filter(|name| !ON_A_GPU.contains(&name.as_str())).collect();
        assert!(never.is_empty(), "docs/metrics.md has a {what} that these runs do not log: {never:?}");
    }
}
