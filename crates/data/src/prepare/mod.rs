//! Corpus -> tokenizer -> shards, in a folder named after the settings and the text.
//!
//! The text is read twice, piece by piece: once to know it ([`scan`]), once to encode it ([`make`]). Everything is written into a folder
//! of its own and renamed when complete ([`place`]): an interrupted preparation leaves no folder that could be taken for a finished one.

mod import;
mod key;
mod make;
mod place;
mod scan;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::files::write_synced;
use crate::intake::files::told_left_out;
use crate::intake::split::Split;
use crate::intake::tokens::Side;
use crate::intake::{Corpus, cargo};
use crate::report::Report;
use crate::shard::{Shard, shard_path};
use crate::threads;
use crate::tokenizer::{Tokenizer, Treatment, Unknown};
use key::Index;
use place::Place;

/// Where text comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The workspace's dependencies.
    Cargo,
    /// `data.path`.
    Text,
    /// `data.path`, which holds token ids of llm.c, nanoGPT or Megatron.
    Tokens,
}

/// Which of the corpus validates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Validation {
    /// `data.validation_share` of it.
    #[default]
    Share,
    /// The last file by name, and nothing else (nanochat).
    LastFile,
}

/// What to prepare.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where text comes from.
    pub source: Source,
    /// File or folder for `text` and `tokens`; a folder inside the workspace for `cargo`.
    pub path: PathBuf,
    /// Extensions, in small letters, of the files of a folder that are read.
    pub extensions: Vec<String>,
    /// The field of JSON lines that holds the text.
    pub field: String,
    /// Size of the vocabulary to learn, or that of `tokenizer`.
    pub vocab_size: usize,
    /// Bytes of text that a vocabulary is learned from, at most.
    pub vocab_bytes: usize,
    /// A `tokenizer.json` to use instead of learning one.
    pub tokenizer: Option<PathBuf>,
    /// Whether `vocab_size` may be more than `tokenizer` has, as the rows of a model that was padded are.
    pub padded: bool,
    /// For `tokens`: the id that parts documents, where the files do not say it.
    pub end_of_text: Option<u32>,
    /// How the tokenizer is used.
    pub treatment: Treatment,
    /// Which of the corpus validates.
    pub validation: Validation,
    /// Share of the bytes that validates, where a share does.
    pub validation_share: f64,
    /// Tokens of validation at most.
    pub validation_tokens: u64,
    /// Tokens to train on at most, the first of the corpus; 0: all.
    pub max_tokens: u64,
    /// Folder that holds prepared corpora.
    pub cache: PathBuf,
}

/// Where a preparation stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// Read bytes of all bytes.
    Reading(u64, u64),
    /// Learning merges from so many bytes of all bytes.
    Learning(u64, u64),
    /// Encoded bytes of all bytes.
    Encoding(u64, u64),
    /// Imported tokens of all tokens.
    Importing(u64, u64),
    /// Waiting for another process that prepares the same corpus.
    Waiting,
    /// Opening the shards, and checking those that are new.
    Verifying,
}

/// A prepared corpus, verified.
pub struct Prepared {
    /// The folder.
    pub folder: PathBuf,
    /// Its tokenizer; none where token ids were imported and none was given.
    pub tokenizer: Option<Tokenizer>,
    /// Training shards.
    pub train: Vec<Arc<Shard>>,
    /// Validation shards.
    pub validation: Vec<Arc<Shard>>,
    /// What was kept.
    pub report: Report,
    /// Whether this call made it.
    pub fresh: bool,
    /// What is worth knowing of the tokenizer and the text, a sentence each.
    pub notes: Vec<String>,
}

impl Prepared {
    /// Opens the folder of a prepared corpus; the text that it was made from is not needed.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn open(folder: &Path, treatment: Treatment) -> Result<Self> {
        let report_path = folder.join("report.json");
        let report = std::fs::read(&report_path).map_err(DataError::io(&report_path, "cannot be read"))?;
        let report: Report =
            serde_json::from_slice(&report).map_err(|e| DataError::content(&report_path, e.to_string()))?;
        let path = folder.join("tokenizer.json");
        let without = report.imported && !path.exists();
        let tokenizer = if without { None } else { Some(Tokenizer::load(&path, treatment)?) };
        let train = shards(folder, "train", report.train_shards, tokenizer.as_ref())?;
        let validation = shards(folder, "val", report.validation_shards, tokenizer.as_ref())?;
        Ok(Prepared {
            folder: folder.to_path_buf(),
            tokenizer,
            train,
            validation,
            notes: report.notes.clone(),
            report,
            fresh: false,
        })
    }

    /// On which side of a document the token stands that parts it from others: before a text whose tokenizer begins it with one, so that it is seen as a
    /// prompt is; else as [`Report::end_side`] has it.
    pub fn end_side(&self) -> Side {
        let begins = self.tokenizer.as_ref().is_some_and(|t| !t.bos().is_empty());
        if begins && !self.report.imported { Side::Before } else { self.report.end_side() }
    }

    /// The name of the folder, which identifies text and settings.
    pub fn key(&self) -> String {
        self.folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// The shards of one half: `told` by the report, or as many as there are.
fn shards(folder: &Path, name: &str, told: usize, tokenizer: Option<&Tokenizer>) -> Result<Vec<Arc<Shard>>> {
    let mut shards = Vec::new();
    loop {
        let path = shard_path(folder, name, shards.len());
        if told == shards.len() && told > 0 || told == 0 && !path.exists() {
            break;
        }
        let shard = Shard::open(&path)?;
        let hash = tokenizer.map_or(0, Tokenizer::hash);
        // imported ids are below the rows of a model, which may be padded
        if tokenizer.is_some_and(|t| t.vocab_size() > shard.vocab()) || shard.tokenizer() != hash {
            let what = "was made with another tokenizer than the one beside it; delete the folder";
            return Err(DataError::content(&path, what));
        }
        shards.push(Arc::new(shard));
    }
    if shards.is_empty() {
        return Err(DataError::content(folder, format!("holds no {name} shard; delete the folder")));
    }
    Ok(shards)
}

/// Opens the corpus of the settings, making it first if it is not there.
///
/// # Errors
/// When text cannot be found or read, the vocabulary does not fit, or a shard is damaged.
pub fn prepare(settings: &Settings, mut progress: impl FnMut(Progress)) -> Result<Prepared> {
    prepare_telling(settings, &mut progress)
}

/// Compiled once, not for each closure that is told where it stands.
fn prepare_telling(settings: &Settings, progress: &mut dyn FnMut(Progress)) -> Result<Prepared> {
    let given = settings.tokenizer.as_ref().map(|path| given(path, settings)).transpose()?;
    // of the file as it was given: what is prepared with one that differs in what is switched off has the same folder
    let notes = given.as_ref().map_or(Vec::new(), |t| t.notes().to_vec());
    if settings.source == Source::Tokens {
        let (folder, fresh) = import::import(settings, given.as_ref(), progress)?;
        return opened(&folder, fresh, notes, settings, progress);
    }
    let described = key::settings(settings, given.as_ref());
    let mut corpus = match settings.source {
        Source::Tokens => unreachable!("imported above"),
        Source::Text => Some(files(settings)?),
        Source::Cargo => None,
    };
    let index = Index::of(settings, &described, corpus.as_ref().and_then(Corpus::files))?;
    let known = index.look_up().map(|key| settings.cache.join(key)).filter(|f| place::is_complete(f));
    let (folder, fresh) = match known {
        Some(folder) => (folder, false),
        None => {
            let corpus = match corpus.take() {
                Some(corpus) => corpus,
                None => cargo::corpus(&settings.path, settings.validation_share)?,
            };
            let scan = scan::scan(&corpus, settings, &described, progress)?;
            let key = scan.key.clone();
            let place = Place::claim(&settings.cache, &key, &mut || progress(Progress::Waiting))?;
            let fresh = place.is_some();
            if let Some(place) = place {
                fill(place, &corpus, settings, given, scan, progress)?;
            }
            index.remember(&key);
            (settings.cache.join(key), fresh)
        }
    };
    opened(&folder, fresh, notes, settings, progress)
}

/// The files of a text, and which of them validates.
fn files(settings: &Settings) -> Result<Corpus> {
    let corpus = Corpus::text(&settings.path, &settings.extensions, &settings.field)?;
    match settings.validation {
        Validation::Share => Ok(corpus),
        Validation::LastFile => corpus.with_last_file_validating(&settings.path),
    }
}

/// A folder that is complete, with what is worth knowing of the tokenizer that was given.
fn opened(
    folder: &Path,
    fresh: bool,
    mut notes: Vec<String>,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared> {
    if !fresh {
        // of one that was killed after its folder had its name
        place::remove_leftovers(&settings.cache, None);
    }
    progress(Progress::Verifying);
    let prepared = Prepared::open(folder, settings.treatment)?;
    notes.extend_from_slice(&prepared.report.notes);
    Ok(Prepared { fresh, notes, ..prepared })
}

/// The tokenizer of the settings, which has to have the size that they say, or, for a model that was padded, no larger one.
fn given(path: &Path, settings: &Settings) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::load(path, settings.treatment)?;
    let (have, asked) = (tokenizer.vocab_size(), settings.vocab_size);
    if have > asked || have < asked && !settings.padded {
        let have_told = match tokenizer.tokens() {
            tokens if tokens == have => format!("has {have} entries"),
            tokens => format!("has {tokens} entries with ids up to {}", have.saturating_sub(1)),
        };
        let what = match settings.padded {
            true => format!(
                "{have_told}, the model that the run starts from has {asked} rows; give the tokenizer of that model"
            ),
            false => format!("{have_told}, data.vocab_size is {asked}; set it to {have}"),
        };
        return Err(DataError::content(path, what));
    }
    Ok(tokenizer)
}

/// Bytes of text that nothing is learned from, whatever the vocabulary: a share of a twentieth validates a single sequence at best.
const FEW: u64 = 4096;

fn too_small(settings: &Settings, report: &Report) -> DataError {
    let what = format!(
        "{} bytes of text are too few to learn a vocabulary of {} from, to train on and to validate on; bring more text: some \
         hundred thousand bytes are a start{}",
        report.bytes,
        settings.vocab_size,
        told_left_out(&report.left_out)
    );
    DataError::content(&settings.path, what)
}

/// Text that the size of a token and the fit of a vocabulary are estimated from.
const PROBE: usize = 1 << 20;

/// Prepares a corpus in its place.
fn fill(
    place: Place,
    corpus: &Corpus,
    settings: &Settings,
    given: Option<Tokenizer>,
    scan: scan::Scan,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    threads::start()?;
    let mut report = scan.report;
    let texts = scan.sample.texts(&scan.histogram.split(settings.validation_share));
    let tokenizer = match given {
        Some(tokenizer) => tokenizer,
        None => {
            report.vocabulary_bytes = texts.iter().map(|t| t.len() as u64).sum();
            progress(Progress::Learning(report.vocabulary_bytes, report.bytes));
            let learned = Tokenizer::learn(texts.iter().map(String::as_str), settings.vocab_size, settings.treatment);
            // a smaller vocabulary would not help: what is left then validates nothing
            learned.map_err(|e| match e {
                _ if report.bytes < FEW => too_small(settings, &report),
                DataError::Content { path, what } => {
                    DataError::Content { path, what: what + &told_left_out(&report.left_out) }
                }
                DataError::Io { .. } | DataError::Cargo(_) => e,
            })?
        }
    };
    let share = share(settings, &tokenizer, &texts, report.bytes)?;
    drop(texts);
    let split: Split = scan.histogram.split(share);
    write(&place.path().join("tokenizer.json"), tokenizer.json().as_bytes())?;
    make::make(place.path(), corpus, settings, &tokenizer, (split, scan.content), &mut report, progress)?;
    if report.train_tokens == 0 || report.validation_tokens == 0 {
        let raise = match settings.validation {
            Validation::Share => "data.validation_share or data.validation_tokens",
            Validation::LastFile => "data.validation_tokens",
        };
        let most = if settings.max_tokens > 0 { ", or data.max_tokens" } else { "" };
        let what = format!(
            "{} bytes of text gave {} training and {} validation tokens, too few; bring more text, or raise {raise}{most}{}",
            report.bytes,
            report.train_tokens,
            report.validation_tokens,
            told_left_out(&report.left_out)
        );
        return Err(DataError::content(&settings.path, what));
    }
    let json = serde_json::to_vec_pretty(&report).expect("a report is JSON");
    // last: it says that the rest is complete
    write(&place.path().join("report.json"), &json)?;
    place.finish()
}

/// The share that validates: what is asked for, or less where it would be more tokens than asked for. Refuses a vocabulary that is none
/// of this text before anything is written.
fn share(settings: &Settings, tokenizer: &Tokenizer, texts: &[String], all: u64) -> Result<f64> {
    let (mut bytes, mut tokens, mut unknown) = (0usize, 0usize, Unknown::default());
    let every = texts.iter().map(String::len).sum::<usize>().div_ceil(PROBE).max(1);
    for text in texts.iter().step_by(every) {
        let encoded = tokenizer.encode_accounted(text, false)?;
        bytes += text.len();
        tokens += encoded.ids.len();
        unknown.merge(&encoded.unknown);
    }
    make::check(settings, &unknown)?;
    let estimated = all as f64 * tokens as f64 / bytes.max(1) as f64;
    // the rest of a twentieth is the error of the estimate
    Ok(settings.validation_share.min(0.95 * settings.validation_tokens as f64 / estimated.max(1.0)))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_synced(path, bytes).map_err(DataError::io(path, "cannot be written"))
}
