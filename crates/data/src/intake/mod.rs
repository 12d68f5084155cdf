//! Where text comes from: an iterator of documents, read again for every pass, so that a corpus never has to fit into memory.
//!
//! A new format is a new arm of [`Format`] and a file that gives its documents.

pub(crate) mod cargo;
mod encoding;
pub(crate) mod files;
mod jsonl;
mod open;
#[cfg(feature = "parquet")]
mod parquet;
pub(crate) mod pieces;
pub(crate) mod sample;
pub(crate) mod split;
#[cfg(test)]
mod tests;
mod text;
pub(crate) mod tokens;
pub(crate) mod whole;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::Result;
pub use files::{COMPRESSED, EXTENSIONS, extensions_for, no_text};
pub(crate) use files::{Format, SourceFile};
pub use jsonl::json_line;

/// The field of JSON lines that holds the text, where nothing else is said.
pub const FIELD: &str = "text";

/// A text of the corpus.
#[derive(Debug)]
pub(crate) struct Document<'a> {
    /// Package or file, for the report.
    pub source: Cow<'a, str>,
    /// The text.
    pub text: Text<'a>,
    /// The half that the corpus itself assigns; most leave it to a hash of the content.
    pub validation: Option<bool>,
}

/// The text of a document.
#[derive(Debug)]
pub(crate) enum Text<'a> {
    /// In memory.
    Whole(Cow<'a, str>),
    /// A file of so many bytes, too large to be held: it is read piece by piece.
    File(PathBuf, u64),
}

impl Text<'_> {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Text::Whole(text) => text.len() as u64,
            Text::File(_, len) => *len,
        }
    }
}

/// A step of the iterator.
#[derive(Debug)]
pub(crate) enum Found<'a> {
    /// A document.
    Document(Document<'a>),
    /// Something that is no text, and why.
    LeftOut(String),
    /// A file was read to its end, and as what.
    Read(String),
}

impl Found<'_> {
    /// The same, with the half that a document's file is assigned to, if it is.
    fn assigned(self, validation: Option<bool>) -> Self {
        match self {
            Found::Document(document) if validation.is_some() => Found::Document(Document { validation, ..document }),
            other => other,
        }
    }
}

/// An iterator of documents.
pub(crate) type Documents<'a> = Box<dyn Iterator<Item = Result<Found<'a>>> + Send + 'a>;

/// What a file gives step by step, until it says that nothing is left; an error is the last.
fn steps<'a>(mut step: impl FnMut() -> Option<Result<Found<'a>>> + Send + 'a) -> Documents<'a> {
    let mut failed = false;
    Box::new(std::iter::from_fn(move || {
        let found = if failed { None } else { step() };
        failed |= matches!(found, Some(Err(_)));
        found
    }))
}

/// A corpus: what was found, and how to read it.
pub(crate) enum Corpus {
    /// Files, in the order of their names.
    Files {
        /// The files.
        files: Vec<SourceFile>,
        /// Reason to number of files that are left out for it.
        left_out: BTreeMap<String, usize>,
        /// Whether a file that is no text, or none in UTF-8, is passed over.
        folder: bool,
        /// The field of JSON lines that holds the text.
        field: String,
        /// Whether the last file validates and all others train.
        last_validates: bool,
    },
    /// Documents in memory: the dependencies.
    Memory {
        /// The documents.
        documents: Vec<Document<'static>>,
        /// Reason to number of files that are left out for it.
        left_out: BTreeMap<String, usize>,
    },
}

impl Corpus {
    /// A file, or the files of a folder that have one of the extensions; the text of JSON lines is in this field.
    ///
    /// # Errors
    /// When there is none, or it is no regular file.
    pub fn text(path: &Path, extensions: &[String], field: &str) -> Result<Self> {
        let (files, left_out) = files::list(path, extensions)?;
        Ok(Corpus::Files { files, left_out, folder: path.is_dir(), field: field.to_string(), last_validates: false })
    }

    /// The same, of which the last file validates and all others train.
    ///
    /// # Errors
    /// When there are not two files.
    pub fn with_last_file_validating(mut self, path: &Path) -> Result<Self> {
        if let Corpus::Files { files, left_out, last_validates, .. } = &mut self {
            files::check_last(path, files.len(), left_out)?;
            *last_validates = true;
        }
        Ok(self)
    }

    /// The name of the file that validates, where one does by its place.
    pub fn validation_file(&self) -> Option<&str> {
        match self {
            Corpus::Files { files, last_validates: true, .. } => files.last().map(|f| f.name.as_str()),
            Corpus::Files { .. } | Corpus::Memory { .. } => None,
        }
    }

    /// Its files, where it has any, and what was left out beside them.
    pub fn files(&self) -> Option<(&[SourceFile], &BTreeMap<String, usize>)> {
        match self {
            Corpus::Files { files, left_out, .. } => Some((files, left_out)),
            Corpus::Memory { .. } => None,
        }
    }

    /// What was left out before anything was read.
    pub fn left_out(&self) -> &BTreeMap<String, usize> {
        match self {
            Corpus::Files { left_out, .. } | Corpus::Memory { left_out, .. } => left_out,
        }
    }

    /// Bytes to read, for a progress bar.
    pub fn bytes(&self) -> u64 {
        match self {
            Corpus::Files { files, .. } => files.iter().map(|f| f.len).sum(),
            Corpus::Memory { documents, .. } => documents.iter().map(|d| d.text.len()).sum(),
        }
    }

    /// The documents, from the beginning.
    pub fn documents(&self) -> Documents<'_> {
        match self {
            Corpus::Files { files, folder, field, last_validates, .. } => {
                let last = files.len().saturating_sub(1);
                Box::new(files.iter().enumerate().flat_map(move |(i, file)| {
                    let assigned = last_validates.then_some(i == last);
                    documents_of(file, field, *folder).map(move |found| Ok(found?.assigned(assigned)))
                }))
            }
            Corpus::Memory { documents, .. } => Box::new(documents.iter().map(|d| {
                let Text::Whole(text) = &d.text else { unreachable!("documents in memory are whole") };
                let text = Text::Whole(Cow::Borrowed(text.as_ref()));
                Ok(Found::Document(Document {
                    source: Cow::Borrowed(d.source.as_ref()),
                    text,
                    validation: d.validation,
                }))
            })),
        }
    }
}

/// The documents of a file.
fn documents_of<'a>(file: &'a SourceFile, field: &'a str, folder: bool) -> Documents<'a> {
    match file.format {
        Format::Text => text::documents(file, folder),
        Format::Jsonl => jsonl::documents(file, field, folder),
        #[cfg(feature = "parquet")]
        Format::Parquet => parquet::documents(file, field, folder),
        Format::Tokens => unreachable!("extensions of token files are refused for text"),
    }
}

/// A piece of a document.
pub(crate) struct Piece<'a> {
    /// Its first byte in the document.
    pub at: u64,
    /// Its text.
    pub text: Cow<'a, str>,
}

impl<'a> Document<'a> {
    /// Gives the text in pieces of [`pieces::PIECE`] bytes at most to `each`, and returns the hash of all of it.
    ///
    /// # Errors
    /// When the file cannot be read or is not UTF-8, and what `each` returns.
    pub fn for_each_piece(self, mut each: impl FnMut(Piece<'a>) -> Result<()>) -> Result<u64> {
        match self.text {
            Text::Whole(text) => {
                let hash = xxh3_64(text.as_bytes());
                if text.len() <= pieces::PIECE {
                    each(Piece { at: 0, text })?;
                } else {
                    for (at, piece) in pieces::cut(&text) {
                        each(Piece { at: at as u64, text: Cow::Owned(piece.to_string()) })?;
                    }
                }
                Ok(hash)
            }
            Text::File(path, _) => {
                let mut hash = Xxh3::new();
                text::for_each_piece(&path, |at, piece| {
                    hash.update(piece.as_bytes());
                    each(Piece { at, text: Cow::Owned(piece) })
                })?;
                Ok(hash.digest())
            }
        }
    }
}
