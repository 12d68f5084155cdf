//! The fuzz targets of `fuzz/` over their saved inputs and over some thousands made of them: a damaged or made-up file is an error or something
//! usable, never a panic.

use std::fs;
use std::path::{Path, PathBuf};

use dash_data::{Settings, Source, Treatment, prepare};

#[path = "../../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../../fuzz/src/data.rs"]
mod targets;

#[test]
fn saved_and_made_up_inputs() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    targets::TARGETS.iter().for_each(|(name, target)| mutate::replay(&fuzz, name, *target, 5000));
}

fn settings(path: PathBuf, cache: PathBuf) -> Settings {
    Settings {
        source: Source::Text,
        path,
        vocab_size: 260,
        vocab_bytes: 1 << 16,
        tokenizer: None,
        treatment: Treatment::default(),
        validation_share: 0.05,
        validation_tokens: 1000,
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
