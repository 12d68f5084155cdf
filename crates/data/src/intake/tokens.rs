//! Files of token ids that other programs wrote, as they are: never encoded again, with their own split and their own documents.
//!
//! | layout | is known by | tokens | documents |
//! |---|---|---|---|
//! | llm.c (`dev/data/data_common.py`) | i32 20240520, version 1, or 20240801, version 7; 256 of them | u16 or u32 from byte 1024 | each begins with the id of the end of text |
//! | Megatron (`indexed_dataset.py`) | a file of the same name in `.idx`, which begins with `MMIDIDX` | of the index's type, where its pointers say | the index counts sequences of each |
//! | nanoGPT (`data/*/prepare.py`) | nothing of the above | u16 | each ends with the id of the end of text |

mod megatron;

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::encoding;
use super::files::{self, Format, SourceFile};
use crate::error::{DataError, Result};

/// Tokens that are held at once.
const PART: usize = 1 << 18;
/// Bytes of llm.c's header: 256 numbers of 32 bits.
const HEADER: u64 = 1024;
/// Bytes of a file without a header from which on their look says for certain what they are not.
const SURE: usize = 256;
/// GPT-2's `<|endoftext|>`, which llm.c and nanoGPT write.
const GPT2_END: u32 = 50256;
/// Llama 3's `<|begin_of_text|>`, which llm.c writes before each document.
const LLAMA3_BEGIN: u32 = 128_000;

/// On which side of a document the token stands that parts documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Each document begins with it.
    Before,
    /// Each document ends with it.
    After,
}

/// The ids that part documents where a configuration or a tokenizer says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Parting {
    /// In files whose documents begin with it.
    pub before: Option<u32>,
    /// In files whose documents end with it.
    pub after: Option<u32>,
}

/// How the numbers of a file are written, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    U8,
    U16,
    I16,
    U32,
    I32,
    I64,
}

impl Number {
    fn width(self) -> usize {
        match self {
            Number::U8 => 1,
            Number::U16 | Number::I16 => 2,
            Number::U32 | Number::I32 => 4,
            Number::I64 => 8,
        }
    }

    /// A number of `width` bytes; negative ones become large, so that no vocabulary holds them.
    fn read(self, b: &[u8]) -> u64 {
        match self {
            Number::U8 => b[0].into(),
            Number::U16 => u16::from_le_bytes([b[0], b[1]]).into(),
            Number::I16 => i64::from(i16::from_le_bytes([b[0], b[1]])) as u64,
            Number::U32 => u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
            Number::I32 => i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])) as u64,
            Number::I64 => u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
        }
    }
}

/// Tokens that stand together.
struct Run {
    /// first byte
    at: u64,
    tokens: u64,
    /// whether they begin a document for certain
    begins: bool,
}

/// A file of token ids.
pub(crate) struct TokenFile {
    /// Where it is and when it was changed.
    pub file: SourceFile,
    /// The same of a Megatron index.
    pub index: Option<SourceFile>,
    /// What it is, for people.
    pub layout: &'static str,
    /// Whether its name says that it validates.
    pub validation: bool,
    /// Tokens.
    pub tokens: u64,
    /// The id that parts documents, and on which side; none where an index says where they begin, or none is known.
    pub end_of_text: Option<(u32, Side)>,
    number: Number,
    runs: Vec<Run>,
}

/// The files of a corpus of tokens.
pub(crate) struct TokenFiles {
    /// Those that are read, in the order of their names.
    pub files: Vec<TokenFile>,
    /// Reason to number of those left out.
    pub left_out: BTreeMap<String, usize>,
}

/// What a name says of the split that a file belongs to.
fn split(name: &str) -> Option<&'static str> {
    let lower = name.to_lowercase();
    let mut parts = lower.split(|c: char| !c.is_ascii_alphabetic());
    parts.find_map(|part| match part {
        "val" | "valid" | "validation" => Some("validation"),
        "test" => Some("test"),
        _ => None,
    })
}

impl TokenFiles {
    /// A `.bin` file, or those of a folder.
    ///
    /// # Errors
    /// When there is none, or one is damaged or of another kind.
    pub fn of(root: &Path, vocab: usize, parting: Parting) -> Result<Self> {
        let (sources, mut left_out) = files::list_tokens(root)?;
        // those belong to what is read
        left_out.remove("extension .idx");
        let mut files = Vec::new();
        for source in sources {
            if split(&source.name) == Some("test") {
                *left_out.entry("test split".into()).or_default() += 1;
                continue;
            }
            files.push(TokenFile::open(source, vocab, parting)?);
        }
        if files.is_empty() {
            let left = files::told_left_out(&left_out);
            let what = format!("no token ids found; expected .bin files of llm.c, nanoGPT or Megatron{left}");
            return Err(DataError::content(root, what));
        }
        Ok(TokenFiles { files, left_out })
    }

    /// The same, of which the last file validates and all others train.
    ///
    /// # Errors
    /// When there are not two files, or another one is called a validation file.
    pub fn with_last_file_validating(mut self, root: &Path) -> Result<Self> {
        files::check_last(root, self.files.len(), &self.left_out)?;
        let last = self.files.len() - 1;
        if let Some(named) = self.files[..last].iter().find(|f| f.validation) {
            let what = "is called a validation file, and data.validation = \"last-file\" would train on it; remove that key or rename the file";
            return Err(content(&named.file.path, what));
        }
        self.files[last].validation = true;
        Ok(self)
    }

    /// One file, whatever its name says of a split.
    ///
    /// # Errors
    /// As [`TokenFiles::of`].
    pub fn one(path: &Path, vocab: usize) -> Result<TokenFile> {
        let (sources, _) = files::list_tokens(path)?;
        let source = sources.into_iter().next();
        TokenFile::open(source.ok_or_else(|| content(path, "holds no token ids"))?, vocab, Parting::default())
    }
}

fn content(path: &Path, what: impl Into<String>) -> DataError {
    DataError::content(path, what)
}

impl TokenFile {
    /// A file that Megatron's index describes.
    fn indexed(file: SourceFile, index: &Path, metadata: &Metadata) -> Result<Self> {
        let (number, runs) = megatron::index(index, file.len)?;
        Ok(TokenFile {
            index: Some(SourceFile::new(index, format!("{} (index)", file.name), Format::Tokens, metadata)),
            layout: "Megatron",
            validation: split(&file.name) == Some("validation"),
            tokens: runs.iter().map(|r| r.tokens).sum(),
            end_of_text: None,
            file,
            number,
            runs,
        })
    }

    fn open(file: SourceFile, vocab: usize, parting: Parting) -> Result<Self> {
        let path = file.path.clone();
        let mut head = Vec::new();
        let opened = File::open(&path).map_err(DataError::io(&path, "cannot be read"))?;
        opened.take(HEADER).read_to_end(&mut head).map_err(DataError::io(&path, "cannot be read"))?;
        let word = |i: usize| head.get(4 * i..4 * i + 4).map_or(0, |b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let validation = split(&file.name) == Some("validation");
        let index = path.with_extension("idx");
        let own = |id: u32| Some(parting.before.unwrap_or(id));
        if index == path {
            return Err(content(&path, "is a Megatron index and holds no ids; name the .bin file beside it"));
        }
        if let Ok(metadata) = std::fs::metadata(&index) {
            return TokenFile::indexed(file, &index, &metadata);
        }
        let (layout, number, from, tokens, end) = match (word(0), word(1)) {
            (20240520, 1) => ("llm.c, version 1", Number::U16, HEADER, word(2) as i64, own(GPT2_END)),
            (20240801, 7) => ("llm.c, version 7", Number::U32, HEADER, word(2) as i64, own(LLAMA3_BEGIN)),
            (20240520 | 20240801, version) => {
                let what = format!(
                    "is of llm.c's version {version} behind the number {}; 20240520 with version 1 and 20240801 with version 7 are read",
                    word(0)
                );
                return Err(content(&path, what));
            }
            (20240522, _) => {
                return Err(content(
                    &path,
                    "holds llm.c's questions of an evaluation, no text to train on; move it away",
                ));
            }
            _ => {
                headerless(&path, &head, &file, vocab)?;
                let end = parting.after.or((vocab > GPT2_END as usize).then_some(GPT2_END));
                ("nanoGPT, 16 bits without a header", Number::U16, 0, (file.len / 2) as i64, end)
            }
        };
        let expected = u64::try_from(tokens).ok().and_then(|n| n.checked_mul(number.width() as u64)?.checked_add(from));
        if expected != Some(file.len) {
            let what = format!(
                "has {} bytes; {tokens} tokens, which its header announces, are {}: it was cut off or changed; bring the whole file",
                file.len,
                expected.map_or("none that a file can have".into(), |n| n.to_string())
            );
            return Err(content(&path, what));
        }
        let side = if from > 0 { Side::Before } else { Side::After };
        let runs = vec![Run { at: from, tokens: tokens as u64, begins: true }];
        let end_of_text = end.map(|id| (id, side));
        Ok(TokenFile { file, index: None, layout, validation, tokens: tokens as u64, end_of_text, number, runs })
    }

    /// Gives all tokens to `each`, in pieces of one document, with whether a piece begins one.
    ///
    /// # Errors
    /// When the file cannot be read, an id is not below `vocab`, and what `each` returns.
    pub fn for_each(&self, vocab: usize, mut each: impl FnMut(&[u32], bool) -> Result<()>) -> Result<()> {
        let path = &self.file.path;
        let mut file =
            BufReader::with_capacity(1 << 20, File::open(path).map_err(DataError::io(path, "cannot be read"))?);
        let (mut at, mut number, mut bytes, mut ids) = (0u64, 0u64, Vec::new(), Vec::new());
        for run in &self.runs {
            if at != run.at {
                file.seek(SeekFrom::Start(run.at)).map_err(DataError::io(path, "cannot be read"))?;
            }
            let (mut left, mut begins) = (run.tokens, run.begins);
            while left > 0 {
                let count = left.min(PART as u64) as usize;
                bytes.resize(count * self.number.width(), 0);
                file.read_exact(&mut bytes).map_err(DataError::io(path, "cannot be read"))?;
                ids.clear();
                for b in bytes.chunks_exact(self.number.width()) {
                    let id = self.number.read(b);
                    if id >= vocab as u64 {
                        let what = format!(
                            "token {number} is {}, not below data.vocab_size = {vocab}; set that to what the file was made with",
                            id as i64
                        );
                        return Err(content(path, what));
                    }
                    ids.push(id as u32);
                    number += 1;
                }
                begins = self.documents(&ids, begins, &mut each)?;
                left -= count as u64;
            }
            at = run.at + run.tokens * self.number.width() as u64;
        }
        Ok(())
    }

    /// Parts tokens at the ends of documents; whether the next token begins one.
    fn documents(
        &self,
        ids: &[u32],
        mut begins: bool,
        each: &mut impl FnMut(&[u32], bool) -> Result<()>,
    ) -> Result<bool> {
        let Some((end, side)) = self.end_of_text else {
            each(ids, begins)?;
            return Ok(false);
        };
        let mut from = 0;
        for (i, _) in ids.iter().enumerate().filter(|(_, id)| **id == end) {
            let to = if side == Side::Before { i } else { i + 1 };
            if to > from {
                each(&ids[from..to], begins)?;
                from = to;
            }
            begins = true;
        }
        if from < ids.len() {
            each(&ids[from..], begins)?;
            begins = false;
        }
        Ok(begins)
    }

    /// Leaves the first `most` tokens.
    pub fn truncate(&mut self, most: u64) {
        let mut left = most;
        for run in &mut self.runs {
            run.tokens = run.tokens.min(left);
            left -= run.tokens;
        }
        self.tokens = self.tokens.min(most);
    }

    /// All files that it is of.
    pub fn sources(&self) -> impl Iterator<Item = &SourceFile> {
        [&self.file].into_iter().chain(&self.index)
    }
}

/// Refuses what cannot be 16 bits a token.
fn headerless(path: &Path, head: &[u8], file: &SourceFile, vocab: usize) -> Result<()> {
    // what is something else here than in the place of a text
    let known = [
        (&b"PK\x03\x04"[..], "an archive, as PyTorch saves models", "name the file of ids"),
        (b"GGUF", "a model (GGUF)", "name the file of ids"),
        (b"MMIDIDX\0", "a Megatron index", "name the .bin file beside it"),
        (&b"DASHTOKS"[..], "a shard of a prepared corpus", "name the file that it was made from"),
        (&b"\x93NUMPY"[..], "an array with numpy's header", "write its uint16 alone, with tofile"),
    ];
    if let Some((_, what, instead)) = known.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return Err(content(path, format!("is {what}, no file of token ids; {instead}")));
    }
    if let Some((name, remedy)) = encoding::known(head) {
        return Err(content(path, format!("is {name}, no file of token ids; {remedy}")));
    }
    // a length of 64 bits, then so many bytes with the names of the tensors; the letters alone are an id
    let named = head.first_chunk().is_some_and(|n| u64::from_le_bytes(*n) < file.len);
    if named && head.get(8..10) == Some(b"{\"") {
        return Err(content(path, "is a safetensors file, no file of token ids; name the file of ids"));
    }
    if head.len() >= SURE && head.iter().all(|b| matches!(b, b' '..=b'~' | b'\t' | b'\r' | b'\n')) {
        let what = "holds text and no token ids; set data.source = \"text\" to have it encoded";
        return Err(content(path, what));
    }
    let halves = |at: usize| head.chunks_exact(4).all(|b| b[at] == 0 && b[at + 1] == 0);
    if head.len() >= SURE && halves(2) && !halves(0) {
        let what = "has no header, and every second of its numbers of 16 bits is 0: its ids have 32 bits or more; write them again as \
                    uint16, or with llm.c's header of version 7";
        return Err(content(path, what));
    }
    if file.len == 0 {
        return Err(content(path, "is empty; bring the whole file, or move it away"));
    }
    if !file.len.is_multiple_of(2) {
        return Err(content(
            path,
            format!("has {} bytes and no header; tokens of 16 bits are an even number", file.len),
        ));
    }
    if vocab > 1 << 16 {
        let what = format!("has no header, so its ids have 16 bits; data.vocab_size = {vocab} needs more");
        return Err(content(path, what));
    }
    Ok(())
}
