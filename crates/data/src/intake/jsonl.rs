//! JSON lines: a line is an object, its field `text` a document.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use serde::{Deserialize, Deserializer};

use super::{Document, Documents, Found, SourceFile, Text};
use crate::error::{DataError, Result};

/// A longer line is left out: it and its text have to fit into memory.
const LINE: u64 = 128 << 20;

#[derive(Deserialize)]
struct Line {
    // without `deserialize_with` a missing field would count as null
    #[serde(deserialize_with = "given")]
    text: Option<String>,
}

fn given<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<String>, D::Error> {
    Option::deserialize(d)
}

/// The document of a line, or why there is none; `Ok(None)` for an empty line.
pub(super) fn parse(line: &[u8]) -> std::result::Result<Option<Found<'static>>, String> {
    let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line).trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    let wanted = "expected a JSON object with a field \"text\"";
    if line[0] != b'{' {
        return Err(wanted.into());
    }
    let line: Line = serde_json::from_slice(line).map_err(|e| {
        // serde_json counts lines of its own
        let (told, column) = (e.to_string(), e.column());
        let told = told.split(" at line ").next().unwrap_or_default();
        format!("{wanted}: {told}, column {column}")
    })?;
    Ok(Some(match line.text {
        None => Found::LeftOut("null".into()),
        Some(text) if text.trim().is_empty() => Found::LeftOut("empty".into()),
        Some(text) => {
            Found::Document(Document { source: "".into(), text: Text::Whole(Cow::Owned(text)), validation: None })
        }
    }))
}

/// The text of a line of a `.jsonl` corpus; nothing for a line that is empty or is left out.
///
/// # Errors
/// In words, without the line's number, when it is no JSON object with a field `text`.
pub fn json_line(line: &[u8]) -> std::result::Result<Option<String>, String> {
    Ok(match parse(line)? {
        Some(Found::Document(Document { text: Text::Whole(text), .. })) => Some(text.into_owned()),
        _ => None,
    })
}

/// Reads the lines of a file.
struct Lines<'a> {
    file: &'a SourceFile,
    reader: Option<BufReader<File>>,
    number: u64,
    buffer: Vec<u8>,
    failed: bool,
    /// whether a line in another encoding is passed over
    folder: bool,
}

impl<'a> Lines<'a> {
    /// The next line into the buffer; whether there is one, and whether it fitted.
    fn read(&mut self) -> Result<Option<bool>> {
        let path = &self.file.path;
        let failed = |e| DataError::io(path, "cannot be read")(e);
        if self.reader.is_none() {
            self.reader = Some(BufReader::with_capacity(1 << 20, File::open(path).map_err(failed)?));
        }
        let reader = self.reader.as_mut().expect("was just opened");
        self.buffer.clear();
        self.buffer.shrink_to(1 << 20);
        if reader.by_ref().take(LINE).read_until(b'\n', &mut self.buffer).map_err(failed)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        if self.buffer.len() as u64 == LINE && self.buffer.last() != Some(&b'\n') {
            reader.skip_until(b'\n').map_err(failed)?;
            return Ok(Some(false));
        }
        Ok(Some(true))
    }

    fn step(&mut self) -> Result<Option<Found<'a>>> {
        loop {
            match self.read()? {
                None => return Ok(None),
                Some(false) => return Ok(Some(Found::LeftOut(format!("line above {} MB", LINE >> 20)))),
                Some(true) => {}
            }
            let wrong = |what| DataError::content(&self.file.path, format!("line {}: {what}", self.number));
            if let Err(e) = std::str::from_utf8(&self.buffer) {
                if self.folder {
                    return Ok(Some(Found::LeftOut("line that is not UTF-8".into())));
                }
                let at = e.valid_up_to();
                let how = "convert the file to UTF-8 (iconv -f ISO-8859-1 -t UTF-8, with the encoding that it has)";
                return Err(wrong(format!("byte {at} of the line is not valid UTF-8; {how}")));
            }
            match parse(&self.buffer).map_err(wrong)? {
                None => {}
                Some(Found::Document(d)) => {
                    return Ok(Some(Found::Document(Document { source: Cow::Borrowed(&self.file.name), ..d })));
                }
                Some(left_out) => return Ok(Some(left_out)),
            }
        }
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = Result<Found<'a>>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}

/// The documents of a file. In a folder, a line that is not UTF-8 is left out.
pub(super) fn documents(file: &SourceFile, folder: bool) -> Documents<'_> {
    Box::new(Lines { file, reader: None, number: 0, buffer: Vec::new(), failed: false, folder })
}
