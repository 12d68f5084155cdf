//! Corpus -> tokenizer -> shards, cached by a hash of the settings and of what they point to.
//!
//! Everything is written into a folder of its own and renamed when complete: an interrupted preparation leaves no folder
//! that could be taken for a finished one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::corpus::{self, Document, Report};
use crate::error::{DataError, Result};
use crate::shard::{Shard, ShardWriter};
use crate::tokenizer::Tokenizer;

/// Where text comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The workspace's dependencies.
    Cargo,
    /// `data.path`.
    Text,
}

/// What to prepare.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where text comes from.
    pub source: Source,
    /// File or folder for `text`; a folder inside the workspace for `cargo`.
    pub path: PathBuf,
    /// Size of the vocabulary to learn, or that of `tokenizer`.
    pub vocab_size: usize,
    /// A `tokenizer.json` to use instead of learning one.
    pub tokenizer: Option<PathBuf>,
    /// Folder that holds prepared corpora.
    pub cache: PathBuf,
}

/// Where a preparation stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Looking for text.
    Reading,
    /// Learning merges from so many bytes.
    Training(usize),
    /// Tokenised bytes of all bytes.
    Encoding(usize, usize),
    /// Checking the shards.
    Verifying,
}

/// A prepared corpus, verified.
pub struct Prepared {
    /// The folder.
    pub folder: PathBuf,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Training shards.
    pub train: Vec<Arc<Shard>>,
    /// Validation shards.
    pub validation: Vec<Arc<Shard>>,
    /// What was kept.
    pub report: Report,
    /// Whether this call made it.
    pub fresh: bool,
}

/// Tokens of a shard at most; a reader maps shards one by one.
const SHARD_TOKENS: u64 = 1 << 27;
/// A new format or a new way to choose text is a new number.
const VERSION: u32 = 1;
/// Documents encoded between two progress reports.
const ENCODE_BATCH: usize = 256;

impl Settings {
    /// Identifies the corpus: settings, tokenizer and the bytes that they point to.
    fn key(&self) -> Result<String> {
        let mut hash = Xxh3::new();
        hash.update(format!("{VERSION} {:?} {}", self.source, self.vocab_size).as_bytes());
        let mut file = |path: &Path| -> Result<()> {
            let bytes = std::fs::read(path).map_err(DataError::io(path, "cannot be read"))?;
            hash.update(&xxh3_128(&bytes).to_le_bytes());
            Ok(())
        };
        if let Some(tokenizer) = &self.tokenizer {
            file(tokenizer)?;
        }
        match self.source {
            Source::Cargo => {
                let lock = self.path.ancestors().map(|p| p.join("Cargo.lock")).find(|p| p.exists());
                let missing = || {
                    DataError::Cargo(format!(
                        "data.source = \"cargo\": no Cargo.lock in or above {}; run inside a checkout of the workspace, or set \
                         data.source = \"text\" and data.path",
                        self.path.display()
                    ))
                };
                file(&lock.ok_or_else(missing)?)?;
            }
            Source::Text if self.path.is_dir() => {
                let mut paths: Vec<_> = walkdir::WalkDir::new(&self.path)
                    .sort_by_file_name()
                    .into_iter()
                    .filter_map(|e| e.ok().filter(|e| e.file_type().is_file()).map(|e| e.into_path()))
                    .collect();
                paths.sort();
                for path in paths {
                    file(&path)?;
                }
            }
            Source::Text => file(&self.path)?,
        }
        Ok(format!("{:032x}", hash.digest128()))
    }
}

/// Opens the corpus of the settings, making it first if it is not there.
///
/// # Errors
/// When text cannot be found or read, the vocabulary does not fit, or a shard is damaged.
pub fn prepare(settings: &Settings, mut progress: impl FnMut(Progress)) -> Result<Prepared> {
    progress(Progress::Reading);
    let key = settings.key()?;
    let folder = settings.cache.join(&key);
    let fresh = !folder.join("report.json").exists();
    if fresh {
        make(settings, &folder, &key, &mut progress)?;
    }
    progress(Progress::Verifying);
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
    let open = |split: &str| -> Result<Vec<Arc<Shard>>> {
        let mut shards = Vec::new();
        loop {
            let path = folder.join(format!("{split}-{:05}.shard", shards.len()));
            if !path.exists() {
                return Ok(shards);
            }
            let shard = Shard::open(&path)?;
            if shard.vocab() != tokenizer.vocab_size() || shard.tokenizer() != tokenizer.hash() {
                return Err(DataError::content(
                    &path,
                    "was made with another tokenizer than the one beside it; delete the folder",
                ));
            }
            shards.push(Arc::new(shard));
        }
    };
    let report_path = folder.join("report.json");
    let report = std::fs::read(&report_path).map_err(DataError::io(&report_path, "cannot be read"))?;
    let report = serde_json::from_slice(&report).map_err(|e| DataError::content(&report_path, e.to_string()))?;
    let (train, validation) = (open("train")?, open("val")?);
    if train.is_empty() || validation.is_empty() {
        return Err(DataError::content(&folder, "holds no training or no validation shard; delete the folder"));
    }
    Ok(Prepared { folder, tokenizer, train, validation, report, fresh })
}

fn make(settings: &Settings, folder: &Path, key: &str, progress: &mut impl FnMut(Progress)) -> Result<()> {
    let cache = &settings.cache;
    std::fs::create_dir_all(cache).map_err(DataError::io(cache, "cannot be created"))?;
    let aside = cache.join(format!(".tmp-{key}-{}", std::process::id()));
    // Leftovers of an interrupted preparation of the same corpus.
    for entry in std::fs::read_dir(cache).map_err(DataError::io(cache, "cannot be listed"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!(".tmp-{key}-")) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    std::fs::create_dir_all(&aside).map_err(DataError::io(&aside, "cannot be created"))?;
    let (documents, report) = match settings.source {
        Source::Cargo => corpus::cargo(&settings.path)?,
        Source::Text => corpus::text(&settings.path)?,
    };
    let tokenizer = match &settings.tokenizer {
        Some(path) => {
            let tokenizer = Tokenizer::load(path)?;
            if tokenizer.vocab_size() != settings.vocab_size {
                let (have, asked) = (tokenizer.vocab_size(), settings.vocab_size);
                return Err(DataError::content(
                    path,
                    format!("has {have} entries, data.vocab_size is {asked}; set it to {have}"),
                ));
            }
            tokenizer
        }
        None => {
            let texts: Vec<&str> = documents.iter().filter(|d| !d.validation).map(|d| d.text.as_str()).collect();
            progress(Progress::Training(texts.iter().map(|t| t.len()).sum()));
            Tokenizer::train(&texts, settings.vocab_size)?
        }
    };
    write(&aside.join("tokenizer.json"), tokenizer.json().as_bytes())?;
    let mut done = 0;
    for (split, validation) in [("train", false), ("val", true)] {
        let chosen: Vec<&Document> = documents.iter().filter(|d| d.validation == validation).collect();
        let path = |i: usize| aside.join(format!("{split}-{i:05}.shard"));
        let create = |i: usize| ShardWriter::create(&path(i), tokenizer.vocab_size(), tokenizer.hash(), false);
        let (mut writer, mut count) = (create(0)?, 1);
        for batch in chosen.chunks(ENCODE_BATCH) {
            let encoded: Vec<Vec<u32>> = batch
                .par_iter()
                .map(|d| {
                    let mut ids = tokenizer.encode(&d.text);
                    ids.push(tokenizer.end_of_text());
                    ids
                })
                .collect();
            for ids in &encoded {
                if !writer.is_empty() && writer.len() + ids.len() as u64 > SHARD_TOKENS {
                    std::mem::replace(&mut writer, create(count)?).finish()?;
                    count += 1;
                }
                writer.begin();
                writer.append(ids, &[])?;
            }
            done += batch.iter().map(|d| d.text.len()).sum::<usize>();
            progress(Progress::Encoding(done, report.bytes));
        }
        writer.finish()?;
    }
    let json = serde_json::to_vec_pretty(&report).expect("a report is JSON");
    write(&aside.join("report.json"), &json)?;
    if let Err(e) = std::fs::rename(&aside, folder) {
        let _ = std::fs::remove_dir_all(&aside);
        // Another process may have prepared the same corpus meanwhile: the same settings give the same bytes.
        if !folder.join("report.json").exists() {
            return Err(DataError::io(folder, "cannot be renamed into place")(e));
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let run = || {
        let mut file = std::fs::File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    run().map_err(DataError::io(path, "cannot be written"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        let path = dir.join("corpus.txt");
        let text: String = (0..2000).map(|i| format!("{i} sheep jump over the {}. fence\n", i * i % 97)).collect();
        std::fs::write(&path, text).unwrap();
        Settings { source: Source::Text, path, vocab_size: 300, tokenizer: None, cache: dir.join("cache") }
    }

    #[test]
    fn a_second_call_reads_the_cache_and_a_changed_file_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let s = settings(dir.path());
        let first = prepare(&s, |_| {}).unwrap();
        let second = prepare(&s, |_| {}).unwrap();
        assert!(first.fresh && !second.fresh && first.folder == second.folder);
        std::fs::write(&s.path, std::fs::read_to_string(&s.path).unwrap() + "one more\n").unwrap();
        assert!(prepare(&s, |_| {}).unwrap().fresh);
    }

    #[test]
    fn shards_decode_to_the_text() {
        let dir = tempfile::tempdir().unwrap();
        let s = settings(dir.path());
        let p = prepare(&s, |_| {}).unwrap();
        let text = std::fs::read_to_string(&s.path).unwrap();
        let mut ids = Vec::new();
        let mut decoded = String::new();
        for shard in p.train.iter().chain(&p.validation) {
            shard.read(0, shard.len(), &mut ids);
            decoded += &p.tokenizer.decode(&ids);
        }
        assert_eq!(decoded, text);
    }

    #[test]
    fn leftovers_are_removed_and_a_wrong_vocabulary_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = settings(dir.path());
        let stale = s.cache.join(format!(".tmp-{}-1", s.key().unwrap()));
        std::fs::create_dir_all(&stale).unwrap();
        let p = prepare(&s, |_| {}).unwrap();
        assert!(!stale.exists());
        s.tokenizer = Some(p.folder.join("tokenizer.json"));
        s.vocab_size = 999;
        let err = prepare(&s, |_| {}).err().unwrap().to_string();
        assert!(err.contains("has 300 entries, data.vocab_size is 999"), "{err}");
    }
}
