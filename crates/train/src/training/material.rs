//! What a run reads.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dash_data::{
    COMPRESSED, Loader, LoaderState, PackedEpoch, Prepared, Progress, Report, Shard, Side, Source, Tokenizer, prepare,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::eval::{ValidationSet, layout};
use super::places::Found;
use super::preflight::{count, size};
use crate::config::Config;
use crate::console::tell;
use crate::failure::{Failure, Result};

/// Prepares the corpus of a configuration, telling on standard error where it stands.
///
/// # Errors
/// As [`dash_data::prepare`].
pub fn prepare_corpus(config: &Config) -> Result<Prepared> {
    let mut stages = Stages::new(config.data.vocab_size);
    let prepared = prepare(&config.data_settings(), |p| stages.show(p));
    stages.bar.finish_and_clear();
    let prepared = prepared?;
    // at every start: they are about what the run trains on
    prepared.notes.iter().for_each(|note| tell!("note: {note}"));
    Ok(prepared)
}

/// The same, and tells what was taken of a corpus that was not prepared before.
fn prepared(config: &Config) -> Result<Prepared> {
    let prepared = prepare_corpus(config)?;
    if prepared.fresh {
        taken(config, &prepared).iter().for_each(|line| tell!("{line}"));
    }
    Ok(prepared)
}

/// `.txt`, and `.json.gz` for what is compressed.
fn extension(name: &Path) -> String {
    let of = |path: &Path| path.extension().map(|e| e.to_string_lossy().to_lowercase());
    match of(name) {
        None => "without extension".into(),
        Some(outer) if COMPRESSED.contains(&outer.as_str()) => {
            let inner = of(Path::new(name.file_stem().unwrap_or_default()));
            inner.map_or(format!(".{outer}"), |inner| format!(".{inner}.{outer}"))
        }
        Some(extension) => format!(".{extension}"),
    }
}

/// Files of a text by their extension, or packages: `3 .txt (40.1 kB), 1 .jsonl (11.2 kB)`.
fn kinds(source: Source, report: &Report) -> String {
    let mut kinds = BTreeMap::<String, (usize, u64)>::new();
    for (name, bytes) in &report.sources {
        let kind = match source {
            Source::Cargo => "packages".to_string(),
            Source::Text | Source::Tokens => extension(Path::new(name)),
        };
        let (n, sum) = kinds.entry(kind).or_default();
        (*n, *sum) = (*n + 1, *sum + bytes);
    }
    kinds.into_iter().map(|(kind, (n, bytes))| format!("{n} {kind} ({})", size(bytes))).collect::<Vec<_>>().join(", ")
}

/// What was taken of a corpus, how it was split, and what was left out, a line each.
pub fn taken(config: &Config, p: &Prepared) -> Vec<String> {
    let (d, r) = (&config.data, &p.report);
    let tokens = |shards: &[Arc<Shard>]| count(shards.iter().map(|s| s.len()).sum::<usize>() as f64);
    let share = 100.0 * r.validation_bytes as f64 / r.bytes.max(1) as f64;
    let by_share = match d.source {
        Source::Cargo => "whole packages",
        Source::Text => "small documents by a hash of their content, and the end of each large one",
        Source::Tokens => return taken_tokens(config, p),
    };
    let rule = match &r.validation_file {
        Some(last) => format!("the last file, {last} (data.validation = \"last-file\""),
        None => format!("{by_share} (data.validation_share = {}", d.validation_share),
    };
    let learned = match r.vocabulary_bytes {
        0 => "given by data.tokenizer".to_string(),
        bytes => format!("learned from {}", size(bytes)),
    };
    let mut lines = vec![
        match r.documents {
            1 => format!("taken: 1 document, {}, from {}", size(r.bytes), kinds(d.source, r)),
            n => format!("taken: {n} documents, {}, from {}", size(r.bytes), kinds(d.source, r)),
        },
        format!(
            "split: {} of text ({share:.1} %) for validation, {rule}, at most {} tokens)",
            size(r.validation_bytes),
            d.validation_tokens
        ),
        format!(
            "tokens: {} for training, {} for validation; vocabulary of {}, {learned}",
            tokens(&p.train),
            tokens(&p.validation),
            d.vocab_size
        ),
    ];
    // plain files are what their names say
    let told = r.read_as.iter().filter(|(what, _)| !["text", "JSON lines"].contains(&what.as_str()));
    lines.extend(told.map(|(what, n)| format!("read: {n} {} as {what}", if *n == 1 { "file" } else { "files" })));
    lines.extend(r.left_out.iter().map(|(reason, n)| format!("left out: {n} ({reason})")));
    lines
}

/// The same of imported token ids.
fn taken_tokens(config: &Config, p: &Prepared) -> Vec<String> {
    let (d, r) = (&config.data, &p.report);
    let end = match r.end_of_text {
        Some(end) => {
            format!("; id {} stands {} each", end.id, if end.side == Side::Before { "before" } else { "behind" })
        }
        None => String::new(),
    };
    let tokenizer = match p.tokenizer {
        Some(_) => "given by data.tokenizer",
        None => "no tokenizer: the model writes no text",
    };
    let mut lines = vec![
        format!("taken: {} documents, {}, from {}{end}", r.documents, size(r.bytes), kinds(d.source, r)),
        format!(
            "tokens: {} for training, {} for validation",
            count(r.train_tokens as f64),
            count(r.validation_tokens as f64)
        ),
        format!("vocabulary of {}, {tokenizer}", d.vocab_size),
    ];
    lines.extend(r.validation_file.iter().map(|last| format!("split: {last}, the last file, validates")));
    lines.extend(
        r.read_as.iter().map(|(what, n)| format!("read: {n} {} as {what}", if *n == 1 { "file" } else { "files" })),
    );
    lines.extend(r.left_out.iter().map(|(reason, n)| format!("left out: {n} ({reason})")));
    lines
}

/// What packing made of the documents, a line.
pub fn packing(config: &Config, packed: &PackedEpoch) -> String {
    let PackedEpoch { sequences, pieces, padding } = *packed;
    format!(
        "packing: {} documents and pieces of long ones in {} sequences of {} tokens; {:.1} % of the tokens are padding, whose targets do not count",
        count(pieces as f64),
        count(f64::from(sequences)),
        config.data.seq_len,
        100.0 * padding
    )
}

/// Shows a preparation: a bar on a terminal, elsewhere a line a stage and one every ten seconds.
struct Stages {
    bar: ProgressBar,
    vocab_size: usize,
    stage: Option<std::mem::Discriminant<Progress>>,
    told: Instant,
}

impl Stages {
    fn new(vocab_size: usize) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a valid template"));
        Stages { bar, vocab_size, stage: None, told: Instant::now() }
    }

    fn show(&mut self, progress: Progress) {
        let (message, share) = match progress {
            Progress::Reading(done, all) => ("reading the corpus".to_string(), Some((done, all))),
            Progress::Learning(bytes, all) => {
                let (bytes, all, n) = (size(bytes), size(all), self.vocab_size);
                (format!("learning a vocabulary of {n} from {bytes} of {all}"), None)
            }
            Progress::Encoding(done, all) => ("encoding".to_string(), Some((done, all))),
            Progress::Importing(done, all) => ("importing tokens".to_string(), Some((done, all))),
            Progress::Waiting => ("waiting for another process that prepares the same corpus".to_string(), None),
            Progress::Verifying => ("checking the shards".to_string(), None),
        };
        let stage = std::mem::discriminant(&progress);
        let new = self.stage.replace(stage) != Some(stage);
        if new {
            self.bar.reset();
            let template =
                if share.is_some() { "{bar:24} {msg} {bytes} of {total_bytes}, eta {eta}" } else { "{spinner} {msg}" };
            self.bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
            self.bar.set_message(message.clone());
            // no steady tick: it takes a thread, and one that the system refuses ends the program
            self.bar.tick();
        }
        if let Some((done, all)) = share {
            self.bar.set_length(all);
            self.bar.set_position(done);
        }
        if self.bar.is_hidden() && (new || self.told.elapsed() >= Duration::from_secs(10)) {
            match share.filter(|(done, _)| *done > 0) {
                Some((done, all)) => tell!("{message}, {} of {}", size(done), size(all)),
                None => tell!("{message}"),
            }
            self.told = Instant::now();
        }
    }
}

/// What a run reads: text, a task, or both.
pub struct Material {
    /// Training shards; none where the task is alone.
    pub train: Vec<Arc<Shard>>,
    /// Validation shards.
    pub validation: Vec<Arc<Shard>>,
    /// The text's tokenizer; none for token ids that came without one.
    pub tokenizer: Option<Tokenizer>,
    /// On which side of a document the token stands that parts it from others.
    pub end: Side,
    /// What identifies it, for resuming and for pairing runs.
    pub hash: String,
}

/// Identifies the task of a configuration, where it has one.
fn task_hash(config: &Config) -> Option<String> {
    let task = config.task.as_ref()?.identity();
    Some(format!("task-{:016x}", xxhash_rust::xxh3::xxh3_64(task.as_bytes())))
}

impl Material {
    /// Prepares the text of a configuration, where it reads any.
    ///
    /// # Errors
    /// As [`prepare_corpus`], or when the tokenizer has another size than the configuration.
    pub fn of(config: &Config) -> Result<Self> {
        if !config.reads_text() {
            let hash = task_hash(config).unwrap_or_default();
            let (train, validation, end) = (Vec::new(), Vec::new(), Side::After);
            return Ok(Material { train, validation, tokenizer: None, end, hash });
        }
        Material::of_text(config, prepared(config)?)
    }

    /// As [`Material::of`] for a model that was trained on the material called `trained`, from where its data were found: where the text
    /// or the tokenizer that the configuration names is gone, its shards in `data.cache` take their place.
    ///
    /// # Errors
    /// As [`Material::of`]; where the shards are gone, too, the error says where they were looked for.
    pub fn of_trained(found: &Found, trained: Option<&str>) -> Result<Self> {
        let config = &found.config;
        let d = &config.data;
        let lost = |path: &std::path::Path| !path.as_os_str().is_empty() && !path.exists();
        let gone = d.source == Source::Cargo || lost(&d.path) || lost(&d.tokenizer);
        let failure = match Material::of(config) {
            Err(failure) if gone && config.reads_text() => failure,
            other => return other,
        };
        if let Some(trained) = trained
            && let Some(material) = Material::stored(config, trained)?
        {
            tell!("the text is gone; using what was prepared from it: {}", d.cache.join(&material.hash).display());
            return Ok(material);
        }
        let (Failure::Request(e) | Failure::Run(e)) = failure else { return Err(failure) };
        let looked =
            if found.looked.is_empty() { String::new() } else { format!(", looked for from {}", found.looked) };
        let what = format!(
            "neither the text of the run nor what was prepared from it is there ({}{looked}); restore one of them, or start the command \
             where the run was started",
            d.cache.display()
        );
        Err(Failure::Request(e.context(what)))
    }

    /// The material called `hash`, from the shards in `data.cache` alone; nothing where they are not there.
    ///
    /// # Errors
    /// When a shard is damaged.
    pub fn stored(config: &Config, hash: &str) -> Result<Option<Self>> {
        let key = hash.split('+').next().unwrap_or_default();
        let folder = config.data.cache.join(key);
        if key.is_empty() || !folder.join("report.json").is_file() {
            return Ok(None);
        }
        Material::of_text(config, Prepared::open(&folder, config.treatment())?).map(Some)
    }

    fn of_text(config: &Config, p: Prepared) -> Result<Self> {
        let asked = config.data.vocab_size;
        if let Some(have) = p.tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|have| !config.fits_tokenizer(*have))
        {
            return Err(Failure::request(format!(
                "data.vocab_size: {asked}, but the tokenizer has {have} entries; set it to {have}"
            )));
        }
        let hash = task_hash(config).map_or(p.key(), |task| format!("{}+{task}", p.key()));
        let end = p.end_side();
        Ok(Material { train: p.train, validation: p.validation, tokenizer: p.tokenizer, end, hash })
    }

    /// Training batches from `state` on.
    ///
    /// # Errors
    /// When the text holds no window.
    pub fn loader(&self, config: &Config, state: LoaderState) -> Result<Loader> {
        let d = &config.data;
        Ok(match config.mixture() {
            Some(mixture) => Loader::with_task(&self.train, mixture, d.batch_size, config.run.seed, state)?,
            None => Loader::new(&self.train, layout(config, self.end), d.batch_size, config.run.seed, state)?,
        })
    }

    /// What validations look at.
    ///
    /// # Errors
    /// When the text holds no window.
    pub fn validation(&self, config: &Config) -> Result<ValidationSet> {
        let set = ValidationSet::new(config, &self.validation, self.end)?;
        Ok(match config.eval.far {
            Some(far) => set.looking_far(far, &self.train),
            None => set,
        })
    }
}
