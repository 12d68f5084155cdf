//! The last pass: text to shards, in batches that all cores encode while the next one is read.

use std::borrow::Cow;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use rayon::prelude::*;

use super::scan::ContentHash;
use super::{Progress, Settings, Validation};
use crate::error::{DataError, Result};
use crate::intake::split::{Half, Split};
use crate::intake::{Corpus, Document, Found, Text, pieces};
use crate::report::Report;
use crate::shard::ShardSeries;
use crate::tokenizer::{Encoded, SpecialTokens, Tokenizer, Unknown};

/// A piece to encode.
struct Work {
    text: String,
    validation: bool,
    /// Begins a document.
    begins: bool,
}

/// The shards of one half, with the beginnings and ends of documents.
struct HalfWriter<'a> {
    tokenizer: &'a Tokenizer,
    shards: ShardSeries<'a>,
    /// whether a document waits for its end
    open: bool,
}

impl<'a> HalfWriter<'a> {
    fn new(folder: &'a Path, validation: bool, tokenizer: &'a Tokenizer) -> Result<Self> {
        let name = if validation { "val" } else { "train" };
        let shards = ShardSeries::create(folder, name, tokenizer.vocab_size(), tokenizer.hash(), validation)?;
        Ok(HalfWriter { tokenizer, shards, open: false })
    }

    /// Ends the document before and begins one.
    fn begin(&mut self) -> Result<()> {
        self.end()?;
        self.shards.begin()?;
        self.open = true;
        let bos = self.tokenizer.bos();
        self.shards.append(bos, &vec![0; bos.len()])
    }

    /// Tokens of text that still fit into `most`, with the beginning and ends of documents.
    fn room(&self, most: u64) -> usize {
        let frame = self.tokenizer.bos().len() as u64 + 2;
        most.saturating_sub(self.shards.tokens() + frame).try_into().unwrap_or(usize::MAX)
    }

    /// Appends text, of the document before unless it begins one.
    fn add(&mut self, ids: &[u32], text_bytes: &[u32], begins: bool) -> Result<()> {
        if begins || !self.open {
            self.begin()?;
        }
        self.shards.append(ids, text_bytes)
    }

    fn end(&mut self) -> Result<()> {
        if self.open {
            self.shards.append(&[self.tokenizer.end_of_text()], &[0])?;
            self.open = false;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(u64, usize)> {
        self.end()?;
        self.shards.finish()
    }
}

/// Cuts a document into work; returns its hash.
fn cut(document: Document<'_>, split: &Split, send: &mut dyn FnMut(Work) -> Result<()>) -> Result<u64> {
    let (len, assigned) = (document.text.len(), document.validation);
    let hash = match &document.text {
        Text::Whole(text) => xxhash_rust::xxh3::xxh3_64(text.as_bytes()),
        // parted whatever it holds
        Text::File(..) => 0,
    };
    let half = split.half(hash, len, assigned);
    let (mut validation, mut begins) = (half == Half::Validation, true);
    document.for_each_piece(|piece| {
        let mut text = piece.text;
        if let Half::Parted(wanted) = half
            && !validation
            && piece.at + text.len() as u64 > wanted
        {
            let (from, limit) = (wanted.saturating_sub(piece.at), wanted + (len - wanted) / 2);
            let at = pieces::part(&text, from as usize, limit.saturating_sub(piece.at) as usize);
            if at > 0 {
                send(Work { text: text[..at].to_string(), validation: false, begins })?;
            }
            text = Cow::Owned(text[at..].to_string());
            (validation, begins) = (true, true);
        }
        if !text.is_empty() {
            send(Work { text: text.into_owned(), validation, begins })?;
            begins = false;
        }
        Ok(())
    })
}

/// Reads the corpus and sends batches of `size` bytes; returns what identifies the content. Ends early where nobody listens.
fn read(corpus: &Corpus, split: &Split, size: usize, to: &SyncSender<Vec<Work>>) -> Result<u128> {
    let (mut content, mut batch, mut bytes) = (ContentHash::default(), Vec::new(), 0);
    let gone = || DataError::content("shards", "the encoder stopped");
    for found in corpus.documents() {
        let Found::Document(document) = found? else { continue };
        let (source, assigned, len) = (document.source.to_string(), document.validation, document.text.len());
        let hash = cut(document, split, &mut |work| {
            bytes += work.text.len();
            batch.push(work);
            if bytes >= size {
                bytes = 0;
                to.send(std::mem::take(&mut batch)).map_err(|_| gone())?;
            }
            Ok(())
        })?;
        content.add(&source, hash, len, assigned);
    }
    to.send(batch).map_err(|_| gone())?;
    Ok(content.digest())
}

/// What the encoder counted.
#[derive(Default)]
struct Counts {
    validation_bytes: u64,
    special_names: u64,
    unknown: Unknown,
    /// bytes of text that `max_tokens` left no room for, in whole pieces
    beyond: u64,
    /// bytes of the last file that `validation_tokens` left no room for, where that file alone validates
    beyond_validation: u64,
}

/// The shards that are being written, and what was counted on the way.
struct Halves<'a> {
    settings: &'a Settings,
    train: HalfWriter<'a>,
    validation: HalfWriter<'a>,
    counts: Counts,
    /// whether the text before, of the same document, trains
    continues: bool,
}

impl Halves<'_> {
    /// Tokens of text that still train.
    fn train_room(&self) -> usize {
        match self.settings.max_tokens {
            0 => usize::MAX,
            most => self.train.room(most),
        }
    }

    /// Whether text that validates never trains, room or not.
    fn is_held_out(&self) -> bool {
        self.settings.validation == Validation::LastFile
    }

    /// A piece of text and how often it names a special token: to validation as far as there is room, the rest to training as far as
    /// there is, unless it is held out.
    fn add(&mut self, work: &Work, (encoded, names): (Encoded, u64)) -> Result<()> {
        self.counts.special_names += names;
        self.counts.unknown.merge(&encoded.unknown);
        let room = if work.validation { self.validation.room(self.settings.validation_tokens) } else { 0 };
        let (validates, trains) = encoded.ids.split_at(room.min(encoded.ids.len()));
        if !validates.is_empty() {
            let text_bytes = &encoded.text_bytes[..validates.len()];
            self.validation.add(validates, text_bytes, work.begins)?;
            self.continues = false;
            self.counts.validation_bytes += text_bytes.iter().map(|&n| n as u64).sum::<u64>();
        }
        if work.validation && self.is_held_out() {
            let beyond = &encoded.text_bytes[validates.len()..];
            self.counts.beyond_validation += beyond.iter().map(|&n| n as u64).sum::<u64>();
            return Ok(());
        }
        let trains = &trains[..trains.len().min(self.train_room())];
        if !trains.is_empty() {
            // what validation has no room for begins a text of its own
            self.train.add(trains, &[], work.begins || !self.continues)?;
            self.continues = true;
        }
        Ok(())
    }

    /// Encodes a batch on all cores and adds it.
    fn add_all(&mut self, batch: &[Work], tokenizer: &Tokenizer) -> Result<()> {
        // where nothing more trains, what trains is not encoded
        let full = self.train_room() == 0;
        let (skipped, wanted): (Vec<&Work>, Vec<&Work>) = batch.iter().partition(|w| full && !w.validation);
        self.counts.beyond += skipped.iter().map(|w| w.text.len() as u64).sum::<u64>();
        let encoded: Vec<Result<(Encoded, u64)>> = wanted
            .par_iter()
            .map(|w| Ok((tokenizer.encode_accounted(&w.text, w.validation)?, tokenizer.special_names(&w.text))))
            .collect();
        wanted.into_iter().zip(encoded).try_for_each(|(work, encoded)| self.add(work, encoded?))
    }
}

/// Writes the shards of a corpus into a folder and fills in the report.
pub(super) fn make(
    folder: &Path,
    corpus: &Corpus,
    settings: &Settings,
    tokenizer: &Tokenizer,
    (split, content): (Split, u128),
    report: &mut Report,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let size = (4 * pieces::PIECE * rayon::current_num_threads()).max(1 << 20);
    let (to, batches) = sync_channel::<Vec<Work>>(1);
    let mut halves = Halves {
        settings,
        train: HalfWriter::new(folder, false, tokenizer)?,
        validation: HalfWriter::new(folder, true, tokenizer)?,
        counts: Counts::default(),
        continues: false,
    };
    let (all, mut done) = (report.bytes, 0);
    progress(Progress::Encoding(0, all));
    let seen = std::thread::scope(|scope| {
        let reader = std::thread::Builder::new().name("reader".into());
        let reader = reader.spawn_scoped(scope, || {
            let to = to;
            read(corpus, &split, size, &to)
        });
        let reader = reader.map_err(DataError::io("reader", "thread cannot be started"))?;
        let written = batches.iter().try_for_each(|batch| {
            halves.add_all(&batch, tokenizer)?;
            done += batch.iter().map(|work| work.text.len() as u64).sum::<u64>();
            progress(Progress::Encoding(done, all));
            Ok(())
        });
        // a reader that waits for room has to find out that nobody reads
        drop(batches);
        let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(read)
    })?;
    if seen != content {
        return Err(DataError::content(&settings.path, "changed while it was being prepared; start again"));
    }
    let Halves { train, validation, counts, .. } = halves;
    (report.train_tokens, report.train_shards) = train.finish()?;
    (report.validation_tokens, report.validation_shards) = validation.finish()?;
    report.validation_bytes = counts.validation_bytes;
    report.special_names = counts.special_names;
    report.unknown_characters = counts.unknown.characters;
    check(settings, &counts.unknown)?;
    note(settings, &counts, report);
    Ok(())
}

/// Above this share of unknown characters a text is of another language than its vocabulary.
const UNKNOWN: f64 = 0.05;

/// Refuses a vocabulary that is none of this text.
pub(super) fn check(settings: &Settings, unknown: &Unknown) -> Result<()> {
    if unknown.characters as f64 <= UNKNOWN * unknown.of as f64 {
        return Ok(());
    }
    let path = settings.tokenizer.as_deref().unwrap_or(Path::new("data.tokenizer"));
    let what = format!("its vocabulary cannot express {} of the text; use another tokenizer", unknown.describe());
    Err(DataError::content(path, what))
}

/// What is worth knowing.
fn note(settings: &Settings, counts: &Counts, report: &mut Report) {
    if counts.beyond > 0 {
        let (most, beyond) = (settings.max_tokens, counts.beyond);
        report
            .notes
            .push(format!("data.max_tokens = {most} leaves out the last {beyond} bytes of the text that trains"));
    }
    if counts.beyond_validation > 0 {
        let (most, beyond) = (settings.validation_tokens, counts.beyond_validation);
        let last = report.validation_file.as_deref().unwrap_or("the last file");
        report.notes.push(format!("data.validation_tokens = {most} leaves out the last {beyond} bytes of {last}"));
    }
    if counts.unknown.characters > 0 {
        report.notes.push(format!("the vocabulary cannot express {}", counts.unknown.describe()));
    }
    if counts.special_names > 0 {
        let what = match settings.treatment.special_tokens {
            SpecialTokens::Text => "are encoded as text (data.special_tokens = \"parse\" makes them tokens)",
            SpecialTokens::Parse => "are encoded as tokens",
        };
        report.notes.push(format!("{} names of special tokens in the text {what}", counts.special_names));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{settings, tokens};
    use super::*;

    /// The first piece of a document takes all of the room that validation has, to the token.
    #[test]
    fn what_validation_has_no_room_for_does_not_go_on_with_another_document() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::learn(["a b a b"].into_iter(), 258, crate::Treatment::default()).unwrap();
        let settings = Settings { validation_tokens: 12, ..settings(dir.path()) };
        let mut halves = Halves {
            settings: &settings,
            train: HalfWriter::new(dir.path(), false, &tokenizer).unwrap(),
            validation: HalfWriter::new(dir.path(), true, &tokenizer).unwrap(),
            counts: Counts::default(),
            continues: false,
        };
        for (validation, begins, ids) in
            [(false, true, vec![5, 6]), (true, true, vec![8; 10]), (true, false, vec![7; 3]), (true, false, vec![9])]
        {
            let text_bytes = vec![1; ids.len()];
            let work = Work { text: String::new(), validation, begins };
            halves.add(&work, (Encoded { ids, text_bytes, ..Encoded::default() }, 0)).unwrap();
        }
        halves.train.finish().unwrap();
        halves.validation.finish().unwrap();
        let of = |name: &str| {
            let path = dir.path().join(format!("{name}-00000.shard"));
            std::sync::Arc::new(crate::Shard::open(&path).unwrap())
        };
        let (end, train) = (tokenizer.end_of_text(), of("train"));
        assert_eq!(train.document_starts(), [0, 3]);
        assert_eq!(tokens(&[train]), [5, 6, end, 7, 7, 7, 9, end]);
        assert_eq!(tokens(&[of("val")]), [vec![8; 10], vec![end]].concat());
    }
}
