//! Which files belong to a corpus, and why the others do not.

use std::collections::{BTreeMap, HashSet};
use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use walkdir::{DirEntry, WalkDir};

use crate::error::{DataError, Result, is_circle_of_links};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// A document.
    Text,
    /// A document a line.
    Jsonl,
    /// A document a row.
    #[cfg(feature = "parquet")]
    Parquet,
    /// Ids of tokens, which [`super::tokens`] reads.
    Tokens,
}

/// A file of the corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its name below the corpus's folder.
    pub name: String,
    /// How it is read.
    pub format: Format,
    /// Bytes.
    pub len: u64,
    /// Nanoseconds since 1970 of the last change of content and, on Unix, of anything about it.
    pub changed: (u128, u128),
}

/// Extensions of what is certainly no text, and what to do with it.
const REFUSED: [(&str, &str); 11] = [
    ("xz", "decompress it first (unxz)"),
    ("bz2", "decompress it first (bunzip2)"),
    ("zip", "unpack it first"),
    ("tar", "unpack it first"),
    (
        "parquet",
        "build with `cargo build -p train --features parquet`, or write one object a line, with a field \"text\", to a .jsonl file",
    ),
    ("arrow", "write one object a line, with a field \"text\", to a .jsonl file"),
    ("csv", "write one object a line, with a field \"text\", to a .jsonl file"),
    ("tsv", "write one object a line, with a field \"text\", to a .jsonl file"),
    ("pdf", "extract its text to a .txt file"),
    ("bin", "where it holds token ids of llm.c, nanoGPT or Megatron, set data.source = \"tokens\""),
    ("npy", "write its text to a .txt file"),
];

/// Extensions of compressed files: the one before says what is in them. Whether a file is compressed its bytes say, not its name.
pub const COMPRESSED: [&str; 4] = ["gz", "gzip", "zst", "zstd"];

/// The extension of a file, or of what is compressed in it (`gz` and the like where there is no other), and whether it is called
/// compressed.
fn extension(path: &Path) -> (String, bool) {
    let of = |path: &Path| path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let outer = of(path);
    if !COMPRESSED.contains(&outer.as_str()) {
        return (outer, false);
    }
    match of(Path::new(path.file_stem().unwrap_or_default())) {
        inner if inner.is_empty() => (outer, true),
        inner => (inner, true),
    }
}

/// Whether a file of a folder is read. Lines of JSON that are compressed are often called `.json.gz` and `.json.zst` (Dolma); a
/// `.json` that is not compressed is mostly no text.
fn is_wanted((extension, compressed): &(String, bool), extensions: &[String]) -> bool {
    let named = |name: &str| extensions.iter().any(|e| e == name);
    named(extension) || *compressed && extension == "json" && named("jsonl")
}

/// The files of a folder that are read where nothing else is asked for.
pub const EXTENSIONS: [&str; 4] = ["txt", "md", "jsonl", "ndjson"];

/// What to do with files of an extension that is certainly no text; `None` for any other.
pub fn no_text(extension: &str) -> Option<&'static str> {
    if cfg!(feature = "parquet") && extension == "parquet" {
        return None;
    }
    REFUSED.iter().find(|(refused, _)| *refused == extension).map(|(_, remedy)| *remedy)
}

/// How a file with this extension is read: a document a line, or as one document.
fn format(extension: &str) -> Format {
    match extension {
        "jsonl" | "ndjson" | "json" => Format::Jsonl,
        "bin" => Format::Tokens,
        #[cfg(feature = "parquet")]
        "parquet" => Format::Parquet,
        _ => Format::Text,
    }
}

impl SourceFile {
    pub(super) fn new(path: &Path, name: String, format: Format, metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |d| d.as_nanos());
        #[cfg(unix)]
        let touched = {
            use std::os::unix::fs::MetadataExt;
            metadata.ctime() as u128 * 1_000_000_000 + metadata.ctime_nsec() as u128
        };
        #[cfg(not(unix))]
        let touched = 0;
        SourceFile { path: path.to_path_buf(), name, format, len: metadata.len(), changed: (modified, touched) }
    }
}

/// Identifies a file whatever it is called.
fn identity(path: &Path, metadata: &Metadata) -> (u64, u64, PathBuf) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let _ = path;
        (metadata.dev(), metadata.ino(), PathBuf::new())
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        (0, 0, path.canonicalize().unwrap_or_else(|_| path.to_path_buf()))
    }
}

/// The files of a corpus in the order of their names, and reason to number of those left out. Of a folder those with one of the
/// extensions count, in any case of their letters.
pub(super) fn list(root: &Path, extensions: &[String]) -> Result<(Vec<SourceFile>, BTreeMap<String, usize>)> {
    let metadata = std::fs::metadata(root).map_err(DataError::io(root, "cannot be read"))?;
    if metadata.is_dir() { folder(root, extensions) } else { Ok((vec![single(root, &metadata)?], BTreeMap::new())) }
}

/// The `.bin` files of a folder, or one file of any name, and reason to number of those left out.
pub(super) fn list_tokens(root: &Path) -> Result<(Vec<SourceFile>, BTreeMap<String, usize>)> {
    let metadata = std::fs::metadata(root).map_err(DataError::io(root, "cannot be read"))?;
    if metadata.is_dir() {
        return folder(root, &["bin".into()]);
    }
    check_regular(root, &metadata)?;
    let name = root.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((vec![SourceFile::new(root, name, Format::Tokens, &metadata)], BTreeMap::new()))
}

fn check_regular(path: &Path, metadata: &Metadata) -> Result<()> {
    let what = "is a pipe or a device, no file: a corpus is read more than once; write it to a file first";
    if metadata.is_file() { Ok(()) } else { Err(DataError::content(path, what)) }
}

fn single(path: &Path, metadata: &Metadata) -> Result<SourceFile> {
    check_regular(path, metadata)?;
    let (extension, _) = extension(path);
    if let Some(remedy) = no_text(&extension) {
        return Err(DataError::content(path, format!("is no .txt, .md or .jsonl file; {remedy}")));
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // whoever names one file of another extension means its text
    Ok(SourceFile::new(path, name, format(&extension), metadata))
}

fn folder(root: &Path, extensions: &[String]) -> Result<(Vec<SourceFile>, BTreeMap<String, usize>)> {
    let (mut files, mut left_out, mut seen) = (Vec::new(), BTreeMap::new(), HashSet::new());
    let mut walk = WalkDir::new(root).follow_links(true).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let reason = match entry {
            Err(e) => Err(link(root, e)?),
            Ok(e) if e.depth() > 0 && e.file_name().to_string_lossy().starts_with('.') => {
                if e.file_type().is_dir() {
                    walk.skip_current_dir();
                }
                Err("hidden".to_string())
            }
            Ok(e) if e.depth() > 0 && e.file_type().is_dir() && is_own(e.path()) => {
                walk.skip_current_dir();
                Err("folder that this program wrote".to_string())
            }
            Ok(e) if e.file_type().is_dir() => continue,
            Ok(e) => examine(root, &e, extensions, &mut seen)?,
        };
        match reason {
            Ok(file) => files.push(file),
            Err(reason) => *left_out.entry(reason).or_default() += 1,
        }
    }
    Ok((files, left_out))
}

/// `; left out: 2 (binary), 1 (empty)`, or nothing where nothing was: for a message that there is too little text.
pub(crate) fn told_left_out(left_out: &BTreeMap<String, usize>) -> String {
    let each: Vec<String> = left_out.iter().map(|(reason, n)| format!("{n} ({reason})")).collect();
    if each.is_empty() { String::new() } else { format!("; left out: {}", each.join(", ")) }
}

/// The extensions that a folder has to be read by where those by default find nothing in it: of parquet alone, whose files hold text for certain. Empty
/// where the default does, and where the folder cannot be read.
pub fn extensions_for(root: &Path) -> Vec<String> {
    let Ok((files, left_out)) = list(root, &EXTENSIONS.map(String::from)) else { return Vec::new() };
    let parquet = files.is_empty() && left_out.contains_key("extension .parquet");
    if parquet { vec!["parquet".into()] } else { Vec::new() }
}

/// What to do where nothing of a folder was read: the remedy of what is certainly no text, and for all else the key that reads it.
pub(crate) fn how_to_read(left_out: &BTreeMap<String, usize>) -> String {
    let of = |reason: &str| Some(reason.strip_prefix("extension .")?.split(',').next().unwrap_or_default().to_string());
    let (mut read, mut remedies) = (Vec::new(), Vec::new());
    for extension in left_out.keys().filter_map(|reason| of(reason)) {
        match no_text(&extension) {
            Some(remedy) => remedies.push(format!(". With .{extension}: {remedy}")),
            None => read.push(format!("{extension:?}")),
        }
    }
    // compressed ones have a reason of their own, behind that of the others
    read.dedup();
    remedies.dedup();
    let key = match read.is_empty() {
        true => String::new(),
        false => format!(". To read them: data.extensions = [{}]", read.join(", ")),
    };
    key + &remedies.concat()
}

/// Refuses fewer files than two where the last one validates.
pub(super) fn check_last(root: &Path, files: usize, left_out: &BTreeMap<String, usize>) -> Result<()> {
    if files >= 2 {
        return Ok(());
    }
    let (what, left) = (if files == 0 { "no file" } else { "one file" }, told_left_out(left_out));
    Err(DataError::content(
        root,
        format!(
            "holds {what} that is read; data.validation = \"last-file\" needs two at least: the last by name validates, the others \
             train. Bring more, or remove data.validation{left}"
        ),
    ))
}

/// Whether a folder is a run, a comparison, an export or a prepared corpus: its records and reports are no text that somebody wrote, and
/// would be another corpus after every run.
fn is_own(folder: &Path) -> bool {
    ["run.lock", "parity.safetensors", "train-00000.shard"].iter().any(|name| folder.join(name).is_file())
}

/// A link that leads nowhere or back is left out; whatever else cannot be listed is an error.
fn link(root: &Path, e: walkdir::Error) -> Result<String> {
    if e.loop_ancestor().is_some() {
        return Ok("link to a folder above it".into());
    }
    let nowhere = |e: &std::io::Error| {
        matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) || is_circle_of_links(e)
    };
    if e.path().is_some_and(|p| p.is_symlink()) && e.io_error().is_some_and(nowhere) {
        return Ok("broken link".into());
    }
    Err(DataError::content(root, format!("cannot be listed: {e}")))
}

/// A file, or why it is left out.
fn examine(
    root: &Path,
    entry: &DirEntry,
    extensions: &[String],
    seen: &mut HashSet<(u64, u64, PathBuf)>,
) -> Result<std::result::Result<SourceFile, String>> {
    let path = entry.path();
    let metadata = entry.metadata().map_err(|e| DataError::content(root, format!("cannot be listed: {e}")))?;
    if !metadata.is_file() {
        return Ok(Err("no regular file".into()));
    }
    let extension = extension(path);
    if !is_wanted(&extension, extensions) {
        let compressed = if extension.1 && !COMPRESSED.contains(&extension.0.as_str()) { ", compressed" } else { "" };
        let what = match extension.0.as_str() {
            "" => "no extension".to_string(),
            name => format!("extension .{name}{compressed}"),
        };
        return Ok(Err(what));
    }
    if !seen.insert(identity(path, &metadata)) {
        return Ok(Err("link to a file that is read already".into()));
    }
    let name = path.strip_prefix(root).unwrap_or(path).display().to_string();
    Ok(Ok(SourceFile::new(path, name, format(&extension.0), &metadata)))
}
