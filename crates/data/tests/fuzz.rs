//! The fuzz targets of `fuzz/` over their saved inputs and over some thousands made of them: a damaged or made-up file is an error or something
//! usable, never a panic.

use std::fs;
use std::path::{Path, PathBuf};

use dash_data::{Settings, Shard, ShardWriter, Source, Treatment, prepare};

#[path = "../../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../../fuzz/src/data.rs"]
mod targets;

#[test]
fn saved_and_made_up_inputs() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    for (name, target) in targets::TARGETS {
        mutate::replay(&fuzz, name, target, if name == "shard" { 20_000 } else { 5000 });
    }
}

/// A shard that is opened as a run opens it, with the stamp of a whole one beside it.
#[test]
fn shards_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.shard");
    let mut w = ShardWriter::create(&path, 300, 7, true).unwrap();
    for i in 0..20u32 {
        w.begin();
        w.append(&[i, 299, 5], &[1, 2, 3]).unwrap();
    }
    w.finish().unwrap();
    Shard::open(&path).unwrap();
    let good = [fs::read(&path).unwrap()];
    let mut opened = 0;
    for i in 0..2000 {
        let input = mutate::mutate(&good, &mut mutate::Draws::of(3, i));
        fs::write(&path, &input).unwrap();
        if let Ok(s) = Shard::open(&path) {
            opened += 1;
            let mut ids = Vec::new();
            s.read(0, s.len(), &mut ids);
            assert!(ids.iter().all(|&id| (id as usize) < s.vocab()), "input {i}");
            assert!(s.document_starts().iter().all(|&at| at <= s.len() as u64), "input {i}");
        }
    }
    assert!(opened < 200, "{opened} of 2000 damaged files were taken for whole");
}

fn settings(path: PathBuf, cache: PathBuf) -> Settings {
    Settings {
        source: Source::Text,
        path,
        extensions: dash_data::EXTENSIONS.map(String::from).into(),
        field: dash_data::FIELD.into(),
        vocab_size: 260,
        vocab_bytes: 1 << 16,
        tokenizer: None,
        padded: false,
        end_of_text: None,
        treatment: Treatment::default(),
        validation: Default::default(),
        validation_share: 0.05,
        validation_tokens: 1000,
        max_tokens: 0,
        cache,
    }
}

#[test]
fn json_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let good: String =
        (0..60).map(|i| format!("{{\"id\": {i}, \"text\": \"line {i} \\u00e4 of the text\"}}\n")).collect();
    let good = [good.into_bytes()];
    let mut read = 0;
    for i in 0..150 {
        fs::write(&path, mutate::mutate(&good, &mut mutate::Draws::of(2, i))).unwrap();
        let cache = dir.path().join(format!("cache{i}"));
        match prepare(&settings(path.clone(), cache.clone()), |_| {}) {
            Ok(p) => {
                read += 1;
                assert!(p.report.train_tokens > 0);
            }
            Err(e) => assert!(e.is_request(), "{e}"),
        }
        let _ = fs::remove_dir_all(cache);
    }
    assert!(read > 0, "{read}");
}
