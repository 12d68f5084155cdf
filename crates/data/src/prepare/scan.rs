//! The first pass over a corpus: what it holds, what identifies it, what is needed to split it and to learn a vocabulary.

use xxhash_rust::xxh3::Xxh3;

use super::{Progress, Settings};
use crate::error::{DataError, Result};
use crate::intake::files::{how_to_read, told_left_out};
use crate::intake::sample::Sample;
use crate::intake::split::Histogram;
use crate::intake::{Corpus, Document, Found};
use crate::report::Report;

/// Bytes between two progress reports.
pub(super) const TELL: u64 = 4 << 20;

/// What the first pass found.
pub(super) struct Scan {
    /// Identifies settings and content: the folder's name.
    pub key: String,
    /// Identifies the content alone.
    pub content: u128,
    /// Bytes by hash.
    pub histogram: Histogram,
    /// What a vocabulary is learned from, where one is.
    pub sample: Sample,
    /// Documents, bytes, sources and what was left out.
    pub report: Report,
}

/// The hash of all documents in their order.
#[derive(Default)]
pub(super) struct ContentHash(Xxh3);

impl ContentHash {
    /// Adds a document.
    pub fn add(&mut self, source: &str, hash: u64, len: u64, assigned: Option<bool>) {
        let assigned = assigned.map_or(2, u8::from);
        self.0.update(&(source.len() as u64).to_le_bytes());
        self.0.update(source.as_bytes());
        self.0.update(&hash.to_le_bytes());
        self.0.update(&len.to_le_bytes());
        self.0.update(&[assigned]);
    }

    pub fn digest(&self) -> u128 {
        self.0.digest128()
    }
}

/// What is wrong where the last file, which validates, or all before it hold no text.
fn one_sided(last: &str, [_, validation]: [u64; 2], report: &Report) -> String {
    let left = told_left_out(&report.left_out);
    match validation {
        0 => format!(
            "its last file, {last}, which validates (data.validation = \"last-file\"), holds no text; replace or remove it{left}"
        ),
        _ => format!(
            "the files before {last}, the last one, which validates (data.validation = \"last-file\"), hold no text to train on; \
             bring more{left}"
        ),
    }
}

/// Refuses a corpus without text, and one whose halves are not both there.
fn check(settings: &Settings, report: &Report, halves: [u64; 2]) -> Result<()> {
    if report.documents == 0 {
        let (left, remedy) = (told_left_out(&report.left_out), how_to_read(&report.left_out));
        return Err(DataError::content(
            &settings.path,
            format!(
                "no text found; expected a .txt, .md or .jsonl file, also in .gz or .zst, or a folder that holds some{left}{remedy}"
            ),
        ));
    }
    if let Some(last) = report.validation_file.as_ref().filter(|_| halves.contains(&0)) {
        return Err(DataError::content(&settings.path, one_sided(last, halves, report)));
    }
    Ok(())
}

/// Reads everything once.
pub(super) fn scan(
    corpus: &Corpus,
    settings: &Settings,
    given: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<Scan> {
    let mut report = Report {
        left_out: corpus.left_out().clone(),
        validation_file: corpus.validation_file().map(str::to_string),
        ..Report::default()
    };
    let (mut content, mut histogram, mut sample) =
        (ContentHash::default(), Histogram::new(), Sample::new(settings.vocab_bytes));
    let (all, mut done, mut told, mut halves) = (corpus.bytes(), 0, 0, [0; 2]);
    progress(Progress::Reading(0, all));
    for found in corpus.documents() {
        let document = match found? {
            Found::Document(document) => document,
            Found::LeftOut(reason) => {
                report.leave(reason);
                continue;
            }
            Found::Read(what) => {
                *report.read_as.entry(what).or_default() += 1;
                continue;
            }
        };
        let (source, assigned) = (document.source.to_string(), document.validation);
        let mut len = 0;
        sample.begin();
        let hash = Document::for_each_piece(document, |piece| {
            sample.offer(piece.at, &piece.text);
            len += piece.text.len() as u64;
            done += piece.text.len() as u64;
            if done - told >= TELL {
                progress(Progress::Reading(done.min(all), all));
                told = done;
            }
            Ok(())
        })?;
        sample.end(hash, len, assigned);
        histogram.add(hash, len);
        content.add(&source, hash, len, assigned);
        report.keep(&source, len);
        halves[usize::from(assigned == Some(true))] += len;
    }
    check(settings, &report, halves)?;
    let content = content.digest();
    let mut key = Xxh3::new();
    key.update(given.as_bytes());
    key.update(&content.to_le_bytes());
    Ok(Scan { key: format!("{:032x}", key.digest128()), content, histogram, sample, report })
}
