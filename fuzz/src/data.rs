//! What is fuzzed of `dash-data`: a function a format, over any bytes. It returns for every input, with an error or with something usable; a
//! panic is a fault. `crates/data/tests/fuzz.rs` runs the same functions over `corpus/` on a stable toolchain.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use dash_data::{Bos, Shard, SpecialTokens, Tokenizer, Treatment, json_line, token_ids, whole_text};
use xxhash_rust::xxh3::xxh3_64;

/// Reads any bytes; returns whether they were usable.
pub type Target = fn(&[u8]) -> bool;

/// Name and function of each; the seeds lie in `corpus/NAME/`.
pub const TARGETS: [(&str, Target); 6] = [
    ("shard", shard),
    ("tokenizer", tokenizer),
    ("text", text),
    ("jsonl", jsonl),
    ("compressed", compressed),
    ("tokens", tokens),
];

/// A token shard, as it is and with checksums that a forger would have corrected.
pub fn shard(data: &[u8]) -> bool {
    let whole = read_shard(data.to_vec());
    let mut forged = data.to_vec();
    if forged.len() >= 72 {
        let content = xxh3_64(&forged[72..]);
        forged[56..64].copy_from_slice(&content.to_le_bytes());
        let header = xxh3_64(&forged[..64]);
        forged[64..72].copy_from_slice(&header.to_le_bytes());
        return read_shard(forged) || whole;
    }
    whole
}

fn read_shard(bytes: Vec<u8>) -> bool {
    let Ok(shard) = Shard::parse(bytes, Path::new("fuzz.shard")) else { return false };
    let mut ids = Vec::new();
    shard.read(0, shard.len(), &mut ids);
    assert!(ids.iter().all(|&id| (id as usize) < shard.vocab()));
    assert!(shard.document_starts().iter().all(|&at| at <= shard.len() as u64));
    shard.text_bytes(0, shard.len());
    true
}

/// A `tokenizer.json`, and what it makes of a text.
pub fn tokenizer(data: &[u8]) -> bool {
    let Ok(json) = std::str::from_utf8(data) else { return false };
    let mut usable = false;
    let other = Treatment { bos: Bos::None, special_tokens: SpecialTokens::Parse };
    for treatment in [Treatment::default(), other] {
        let Ok(t) = Tokenizer::parse(json, Path::new("fuzz.json"), treatment) else { continue };
        if let Ok(e) = t.encode_accounted("word 7 of \u{e4}  <|endoftext|>\n", true) {
            assert!(e.ids.iter().all(|&id| (id as usize) < t.vocab_size()));
            assert_eq!(e.ids.len(), e.text_bytes.len());
            let _ = t.decode(&e.ids);
        }
        let _ = t.special(t.end_of_text());
        usable = true;
    }
    usable
}

static LEARNED: LazyLock<Tokenizer> = LazyLock::new(|| {
    let text: String = (0..200).map(|i| format!("word {i} of {} in a text\n", i * 7)).collect();
    Tokenizer::learn([text.as_str()].into_iter(), 280, Treatment::default()).expect("280 entries")
});

/// A text: every byte of it is counted, and the ids give it back.
pub fn text(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let encoded = LEARNED.encode_accounted(text, true).expect("all bytes have a token");
    assert_eq!(encoded.text_bytes.iter().map(|&n| n as usize).sum::<usize>(), text.len());
    assert_eq!(LEARNED.decode(&encoded.ids).expect("its own ids"), text);
    LEARNED.special_names(text);
    true
}

/// A line of JSON lines.
pub fn jsonl(data: &[u8]) -> bool {
    let Ok(Some(text)) = json_line(data, dash_data::FIELD) else { return false };
    assert!(!text.trim().is_empty());
    true
}

/// A folder of this process that goes with what is in it.
struct Folder(PathBuf);

impl Folder {
    fn with(files: &[(&str, &[u8])]) -> Self {
        let folder = Folder(std::env::temp_dir().join(format!("dash-fuzz-{}", std::process::id())));
        fs::create_dir_all(&folder.0).expect("a temporary folder");
        files.iter().for_each(|(name, bytes)| fs::write(folder.0.join(name), bytes).expect("a temporary file"));
        folder
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A file in gzip, in zstd, or as it is. What it takes decompressed is bounded whatever it announces.
pub fn compressed(data: &[u8]) -> bool {
    const MOST: u64 = 1 << 20;
    let folder = Folder::with(&[("a.txt", data)]);
    let Ok(text) = whole_text(&folder.0.join("a.txt"), MOST) else { return false };
    assert!(text.len() as u64 <= MOST);
    true
}

/// Token ids of another program: the number of bytes of an index in 32 bits (0: there is none), the index, the file.
pub fn tokens(data: &[u8]) -> bool {
    const MOST: u64 = 1 << 16;
    let Some((length, rest)) = data.split_first_chunk() else { return false };
    let (index, file) = rest.split_at(rest.len().min(u32::from_le_bytes(*length) as usize));
    let all = [("a.bin", file), ("a.idx", index)];
    let folder = Folder::with(if index.is_empty() { &all[..1] } else { &all });
    let Ok(found) = token_ids(&folder.0.join("a.bin"), 50257, MOST) else { return false };
    assert!(found.ids.iter().all(|&id| id < 50257));
    assert_eq!(found.ids.len() as u64, found.of.min(MOST));
    true
}
