//! Files that somebody damaged or made up: a reader answers with an error or with something usable, and never panics. Mutations are drawn
//! from a fixed seed; `fuzz/` draws them without end.

use std::fs;
use std::path::{Path, PathBuf};

use dash_data::{Settings, Shard, ShardWriter, Source, Tokenizer, Treatment, prepare};
use xxhash_rust::xxh3::xxh3_64;

/// A small generator: what it draws is no format.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        xxh3_64(&self.0.to_le_bytes())
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One to four changes: a flipped bit, a byte, eight bytes of an extreme number, a cut, a repeated stretch.
fn mutate(good: &[u8], draws: &mut Draws) -> Vec<u8> {
    let mut x = good.to_vec();
    for _ in 0..1 + draws.below(4) {
        if x.is_empty() {
            break;
        }
        let at = draws.below(x.len());
        match draws.below(5) {
            0 => x[at] ^= 1 << draws.below(8),
            1 => x[at] = draws.next() as u8,
            2 => {
                let extreme = [0, 1, u64::MAX, 1 << 63, 1 << 62, 1 << 61, 1 << 32, (1 << 63) + 5];
                let bytes = extreme[draws.below(extreme.len())].to_le_bytes();
                let n = bytes.len().min(x.len() - at);
                x[at..at + n].copy_from_slice(&bytes[..n]);
            }
            3 => x.truncate(at),
            _ => {
                let n = draws.below(64).min(x.len() - at);
                let stretch = x[at..at + n].to_vec();
                x.splice(at..at, stretch);
            }
        }
    }
    x
}

#[test]
fn shards() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.shard");
    let mut w = ShardWriter::create(&path, 300, 7, true).unwrap();
    for i in 0..20u32 {
        w.begin();
        w.append(&[i, 299, 5], &[1, 2, 3]).unwrap();
    }
    w.finish().unwrap();
    let good = fs::read(&path).unwrap();
    let mut draws = Draws(1);
    for i in 0..20_000 {
        let mut x = mutate(&good, &mut draws);
        // half of them with checksums that are right, as a forger would write them
        if i % 2 == 0 && x.len() >= 72 {
            let content = xxh3_64(&x[72..]);
            x[56..64].copy_from_slice(&content.to_le_bytes());
            let header = xxh3_64(&x[..64]);
            x[64..72].copy_from_slice(&header.to_le_bytes());
        }
        fs::write(&path, &x).unwrap();
        if let Ok(s) = Shard::open(&path) {
            let mut ids = Vec::new();
            s.read(0, s.len(), &mut ids);
            assert!(ids.iter().all(|&id| (id as usize) < s.vocab()));
            assert!(s.document_starts().iter().all(|&at| at <= s.len() as u64));
            s.text_bytes(0, s.len());
        }
    }
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
    let mut draws = Draws(2);
    let mut read = 0;
    for i in 0..150 {
        fs::write(&path, mutate(good.as_bytes(), &mut draws)).unwrap();
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

#[test]
fn tokenizers() {
    let text: String = (0..200).map(|i| format!("word {i} of {} in a text\n", i * 7)).collect();
    let learned = Tokenizer::learn([text.as_str()].into_iter(), 280, Treatment::default()).unwrap();
    let good = learned.json().as_bytes();
    let mut draws = Draws(3);
    let mut read = 0;
    for _ in 0..3000 {
        let x = mutate(good, &mut draws);
        let Ok(json) = String::from_utf8(x) else { continue };
        if let Ok(t) = Tokenizer::parse(&json, Path::new("hostile.json"), Treatment::default()) {
            read += 1;
            if let Ok(e) = t.encode_accounted("word 7 of \u{e4} <|endoftext|>\n", true) {
                assert!(e.ids.iter().all(|&id| (id as usize) < t.vocab_size()));
                let _ = t.decode(&e.ids);
            }
        }
    }
    assert!(read > 10, "{read}");
}
