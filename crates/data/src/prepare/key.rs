//! What identifies a prepared corpus.
//!
//! The folder is named after the settings and the text itself. To know the text, all of it has to be read; so a small file in
//! `.index` remembers under the names, sizes and times of change of the files (of Cargo.lock, for `cargo`) which folder they led to. A
//! file that was only copied or touched is read once more and leads to the same folder; a file that was changed within the last two
//! seconds is not remembered, because it may change again without another time.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{Settings, Validation};
use crate::error::{DataError, Result};
use crate::files::write_hint;
use crate::intake::{FIELD, SourceFile, cargo};
use crate::tokenizer::Tokenizer;

/// A new format or a new way to choose text is a new number.
const VERSION: u32 = 3;

const SETTLED: Duration = Duration::from_secs(2);

/// The settings that decide what is written, as text.
pub(super) fn settings(s: &Settings, tokenizer: Option<&Tokenizer>) -> String {
    let vocabulary = match tokenizer {
        Some(t) => format!("given {:032x}", t.hash()),
        None => format!("{} learned from {} bytes", s.vocab_size, s.vocab_bytes),
    };
    let Settings { source, treatment, validation_share, validation_tokens, .. } = s;
    let mut text = format!("{VERSION} {source:?} {vocabulary} {treatment:?} {validation_share} {validation_tokens}");
    // only where they say something: what was prepared before there were these keys keeps its name
    if s.field != FIELD {
        let _ = write!(text, " field {:?}", s.field);
    }
    if s.validation == Validation::LastFile {
        text += " the last file validates";
    }
    if s.max_tokens > 0 {
        let _ = write!(text, " at most {}", s.max_tokens);
    }
    text
}

/// Where it is remembered which folder these files led to, and whether it may be.
pub(super) struct Index {
    path: PathBuf,
    settled: bool,
}

impl Index {
    /// The entry of the files as they are now. For `cargo` there is no need to list them.
    ///
    /// # Errors
    /// When Cargo.lock cannot be read.
    pub fn of(s: &Settings, given: &str, found: Option<(&[SourceFile], &BTreeMap<String, usize>)>) -> Result<Self> {
        let (mut text, mut newest) = (given.to_string(), 0);
        match found {
            Some((files, left_out)) => {
                for f in files {
                    let (changed, touched) = f.changed;
                    newest = newest.max(changed).max(touched);
                    let _ = write!(text, "\n{} {} {:?} {} {changed} {touched}", f.name.len(), f.name, f.format, f.len);
                }
                // a file that is left out may be listed for another reason the next time: its count is told
                let _ = write!(text, "\n{left_out:?}");
            }
            None => {
                let lock = cargo::lock(&s.path)?;
                let bytes = std::fs::read(&lock).map_err(DataError::io(&lock, "cannot be read"))?;
                let _ = write!(text, "\n{:016x}", xxh3_64(&bytes));
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = format!("{:032x}", xxh3_128(text.as_bytes()));
        Ok(Index { path: s.cache.join(".index").join(name), settled: newest + SETTLED.as_nanos() <= now })
    }

    /// The folder's name, if it is known.
    pub fn look_up(&self) -> Option<String> {
        let key = std::fs::read_to_string(&self.path).ok()?;
        let key = key.trim();
        (key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit())).then(|| key.to_string())
    }

    /// Remembers it. An index only saves time: a folder that cannot be written has none.
    pub fn remember(&self, key: &str) {
        let parent = self.path.parent().unwrap_or(Path::new("."));
        if self.settled && std::fs::create_dir_all(parent).is_ok() {
            write_hint(&self.path, &self.path.with_extension("new"), key);
        }
    }
}
