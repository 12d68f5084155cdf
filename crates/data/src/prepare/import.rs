//! Token ids of other programs to shards: the same ids in the same order, checked and with a checksum, with their own split.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::key::Index;
use super::place::{self, Place};
use super::{Progress, Settings, Validation, write};
use crate::error::{DataError, Result};
use crate::intake::tokens::{Parting, Side, TokenFile, TokenFiles};
use crate::report::{EndOfText, Report};
use crate::shard::ShardSeries;
use crate::tokenizer::Tokenizer;

/// Where the tokens of files without a split of their own begin to validate.
struct Cut {
    /// token of all
    at: u64,
    /// a document that begins up to here is waited for
    until: u64,
}

impl Cut {
    /// How many of `len` tokens still train that stand together from token `at` of all on, and begin a document or not.
    fn training(&self, at: u64, len: usize, begins: bool) -> usize {
        if at >= self.at && begins {
            return 0;
        }
        len.min(self.until.saturating_sub(at).try_into().unwrap_or(usize::MAX))
    }
}

/// The folder of an import, made if it is not there, and whether it was made now.
pub(super) fn import(
    settings: &Settings,
    tokenizer: Option<&Tokenizer>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(PathBuf, bool)> {
    let parting = parting(settings, tokenizer);
    let found = TokenFiles::of(&settings.path, settings.vocab_size, parting)?;
    let found = match settings.validation {
        Validation::Share => found,
        Validation::LastFile => found.with_last_file_validating(&settings.path)?,
    };
    let described = described(settings, tokenizer, parting, &found);
    let sources: Vec<_> = found.files.iter().flat_map(|f| f.sources().cloned()).collect();
    let index = Index::of(settings, &described, Some((&sources, &found.left_out)))?;
    if let Some(folder) = index.look_up().map(|key| settings.cache.join(key)).filter(|f| place::is_complete(f)) {
        return Ok((folder, false));
    }
    let content = hash(&found, progress)?;
    let mut key = Xxh3::new();
    key.update(described.as_bytes());
    key.update(&content.to_le_bytes());
    let key = format!("{:032x}", key.digest128());
    let claimed = Place::claim(&settings.cache, &key, &mut || progress(Progress::Waiting))?;
    let fresh = claimed.is_some();
    if let Some(place) = claimed {
        let report = fill(place.path(), settings, tokenizer, &found, progress)?;
        if hash(&found, &mut |_| {})? != content {
            return Err(DataError::content(&settings.path, "changed while it was being imported; start again"));
        }
        let json = serde_json::to_vec_pretty(&report).expect("a report is JSON");
        // last: it says that the rest is complete
        write(&place.path().join("report.json"), &json)?;
        place.finish()?;
    }
    index.remember(&key);
    Ok((settings.cache.join(key), fresh))
}

/// What parts documents: what the configuration says, or the tokenizer. llm.c takes the first token that a tokenizer makes of an empty text, which for
/// Llama 3's is the one that begins a text and not the one that ends it.
fn parting(s: &Settings, tokenizer: Option<&Tokenizer>) -> Parting {
    let after = s.end_of_text.or(tokenizer.map(Tokenizer::end_of_text));
    let begin = tokenizer.and_then(|t| t.bos().last().copied());
    Parting { before: s.end_of_text.or(begin).or(after), after }
}

/// The settings that decide what is written, as text.
fn described(s: &Settings, tokenizer: Option<&Tokenizer>, parting: Parting, found: &TokenFiles) -> String {
    let given = tokenizer.map_or("none".into(), |t| format!("{:032x}", t.hash()));
    let (vocab, share, validation, most) = (s.vocab_size, s.validation_share, s.validation_tokens, s.max_tokens);
    // only where it says something: what was imported before there was the key keeps its name
    let last = if s.validation == Validation::LastFile { " the last file validates" } else { "" };
    // how the end of a corpus is cut off that names no validation; one that names it keeps its name
    let cut = if found.files.iter().any(|f| f.validation) { "" } else { " cut within a document" };
    let Parting { before, after } = parting;
    let begin = if before == after { String::new() } else { format!(" {before:?} before") };
    format!("1 tokens {vocab} {given} {after:?} {share} {validation} {most}{last}{cut}{begin}")
}

/// Identifies names and content of all files.
fn hash(found: &TokenFiles, progress: &mut dyn FnMut(Progress)) -> Result<u128> {
    use std::io::Read;
    let all: u64 = found.files.iter().map(|f| f.file.len).sum();
    let (mut hash, mut buffer, mut done) = (Xxh3::new(), vec![0; 4 << 20], 0u64);
    for file in &found.files {
        hash.update(&(file.file.name.len() as u64).to_le_bytes());
        hash.update(file.file.name.as_bytes());
        for source in file.sources() {
            let path = &source.path;
            let mut opened = std::fs::File::open(path).map_err(DataError::io(path, "cannot be read"))?;
            loop {
                let n = opened.read(&mut buffer).map_err(DataError::io(path, "cannot be read"))?;
                if n == 0 {
                    break;
                }
                hash.update(&buffer[..n]);
                done += n as u64;
                progress(Progress::Reading(done.min(all), all));
            }
            hash.update(&done.to_le_bytes());
        }
    }
    Ok(hash.digest128())
}

/// Where validation begins, if no file is called so.
fn cut(settings: &Settings, found: &TokenFiles) -> Option<Cut> {
    if found.files.iter().any(|f| f.validation) {
        return None;
    }
    let all: u64 = found.files.iter().map(|f| f.tokens).sum();
    let wanted = ((all as f64 * settings.validation_share) as u64).min(settings.validation_tokens);
    Some(Cut { at: all - wanted, until: all - wanted / 2 })
}

/// The halves that are being written.
struct Halves<'a> {
    train: ShardSeries<'a>,
    validation: ShardSeries<'a>,
    /// tokens to train on at most
    most: u64,
    /// tokens behind those
    beyond: u64,
}

impl Halves<'_> {
    /// Appends tokens of one document to a half.
    fn add(&mut self, ids: &[u32], begins: bool, validates: bool) -> Result<()> {
        let half = if validates { &mut self.validation } else { &mut self.train };
        let room = if validates { u64::MAX } else { self.most.saturating_sub(half.tokens()) };
        let kept = &ids[..ids.len().min(room.try_into().unwrap_or(usize::MAX))];
        self.beyond += (ids.len() - kept.len()) as u64;
        if kept.is_empty() {
            return Ok(());
        }
        if begins || half.tokens() == 0 {
            half.begin()?;
        }
        half.append(kept, &[])
    }
}

/// Writes the shards of an import.
fn fill(
    folder: &Path,
    settings: &Settings,
    tokenizer: Option<&Tokenizer>,
    found: &TokenFiles,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    let (vocab, made_by) = (settings.vocab_size, tokenizer.map_or(0, Tokenizer::hash));
    let last = found.files.last().filter(|_| settings.validation == Validation::LastFile);
    let validation_file = last.map(|f| f.file.name.clone());
    let mut report = Report { imported: true, left_out: found.left_out.clone(), validation_file, ..Report::default() };
    let most = if settings.max_tokens == 0 { u64::MAX } else { settings.max_tokens };
    let train = ShardSeries::create(folder, "train", vocab, made_by, false)?;
    let validation = ShardSeries::create(folder, "val", vocab, made_by, false)?;
    let mut halves = Halves { train, validation, most, beyond: 0 };
    let (cut, all) = (cut(settings, found), found.files.iter().map(|f| f.tokens).sum::<u64>());
    let (mut at, mut validates, mut told, mut documents, mut parted) = (0u64, false, 0u64, 0u64, false);
    for file in &found.files {
        report.keep(&file.file.name, file.file.len);
        *report.read_as.entry(format!("token ids, {}", file.layout)).or_default() += 1;
        note_end(&mut report, file.end_of_text);
        file.for_each(vocab, |ids, begins| {
            let trains = match &cut {
                _ if file.validation || validates => 0,
                Some(cut) => cut.training(at, ids.len(), begins),
                None => ids.len(),
            };
            validates |= cut.is_some() && trains < ids.len();
            documents += u64::from(begins);
            parted |= parts(file, ids);
            at += ids.len() as u64;
            if at - told >= 1 << 24 {
                progress(Progress::Importing(at, all));
                told = at;
            }
            halves.add(&ids[..trains], begins, false)?;
            halves.add(&ids[trains..], begins, true)
        })?;
    }
    report.documents = documents;
    if !parted {
        note_unparted(&mut report);
    }
    finish(halves, settings, &mut report)?;
    if let Some(tokenizer) = tokenizer {
        write(&folder.join("tokenizer.json"), tokenizer.json().as_bytes())?;
    }
    Ok(report)
}

/// Finishes both halves, which have to hold something.
fn finish(halves: Halves<'_>, settings: &Settings, report: &mut Report) -> Result<()> {
    if halves.beyond > 0 {
        let (most, beyond) = (halves.most, halves.beyond);
        report.notes.push(format!("data.max_tokens = {most} leaves out the last {beyond} tokens that train"));
    }
    (report.train_tokens, report.train_shards) = halves.train.finish()?;
    (report.validation_tokens, report.validation_shards) = halves.validation.finish()?;
    if report.train_tokens > 0 && report.validation_tokens > 0 {
        return Ok(());
    }
    let what = format!(
        "gave {} training and {} validation tokens; both are needed: a file validates whose name has val, valid or validation in it, \
         where none has, the last data.validation_share of all tokens does, at most data.validation_tokens",
        report.train_tokens, report.validation_tokens
    );
    Err(DataError::content(&settings.path, what))
}

/// Whether documents end at a piece of a file because the file says so: by its index, or by the token that parts them.
fn parts(file: &TokenFile, piece: &[u32]) -> bool {
    match file.end_of_text {
        Some((end, Side::Before)) => piece.first() == Some(&end),
        Some((end, Side::After)) => piece.last() == Some(&end),
        None => file.index.is_some(),
    }
}

/// Says that nothing parts the documents: a mask of documents would mask nothing, and packing would pack whole files.
fn note_unparted(report: &mut Report) {
    let what = match report.end_of_text.take() {
        Some(end) => format!("no token {}, which would part documents, stands in the files", end.id),
        None => "no token is known that parts the documents of the files".into(),
    };
    report.notes.push(format!(
        "{what}: each file is one document; set data.end_of_text to the id that parts them, or data.tokenizer"
    ));
}

/// Records the token that parts documents.
fn note_end(report: &mut Report, end: Option<(u32, Side)>) {
    let Some((id, side)) = end else { return };
    let end = EndOfText { id, side };
    if report.end_of_text.is_some_and(|known| known != end) {
        let what = "the files part their documents by different tokens or on different sides";
        if !report.notes.iter().any(|n| n == what) {
            report.notes.push(what.into());
        }
    }
    report.end_of_text.get_or_insert(end);
}

#[cfg(test)]
mod tests;
