//! JSON lines: a line is an object, one of its fields a document.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufRead, BufReader, Read};

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::open::{self, Content};
use super::{Document, Documents, Found, SourceFile, Text, encoding, steps, text};
use crate::error::{DataError, Result};

/// A longer line is left out: it and its text have to fit into memory.
const LINE: u64 = 128 << 20;

/// A field's name, or not; without a copy of each name.
struct Name<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = bool;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<bool, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = bool;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }
    fn visit_str<E: Error>(self, name: &str) -> std::result::Result<bool, E> {
        Ok(name == self.0)
    }
}

/// The text in the field of an object, which may be null.
struct Field<'a>(&'a str);

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<String>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Option<String>, A::Error> {
        let mut found = None;
        while let Some(wanted) = map.next_key_seed(Name(self.0))? {
            match (wanted, found.is_some()) {
                (true, true) => return Err(A::Error::custom(format!("duplicate field `{}`", self.0))),
                (true, false) => found = Some(map.next_value::<Option<String>>()?),
                (false, _) => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        found.ok_or_else(|| A::Error::custom(format!("missing field `{}`", self.0)))
    }
}

/// What an object has in the place of the field that was looked for.
fn others(line: &[u8]) -> String {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line).unwrap_or_default();
    let names: Vec<&str> = object.keys().take(12).map(String::as_str).collect();
    match names.is_empty() {
        true => "it has none".into(),
        false => format!("it has {}; data.field names the one that holds the text", names.join(", ")),
    }
}

/// Whether what a parser stumbled over at this column is what Python's json writes for numbers that JSON does not have.
fn is_no_number(line: &[u8], column: usize) -> bool {
    // at the first letter, or behind it or a sign
    (column.saturating_sub(2)..=column)
        .filter_map(|at| line.get(at..))
        .any(|rest| rest.starts_with(b"NaN") || rest.starts_with(b"Infinity"))
}

/// The document of a line, or why there is none; `Ok(None)` for an empty line.
pub(super) fn parse(line: &[u8], field: &str) -> std::result::Result<Option<Found<'static>>, String> {
    let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line).trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    let wanted = format!("expected a JSON object with a field {field:?}");
    match line[0] {
        b'{' => {}
        b'[' => return Err(format!("{wanted}, not an array: write one object a line (jq -c '.[]' FILE > FILE.jsonl)")),
        _ => return Err(wanted),
    }
    let mut reader = serde_json::Deserializer::from_slice(line);
    let text = reader.deserialize_map(Field(field)).and_then(|text| reader.end().map(|()| text));
    let text = text.map_err(|e| {
        // serde_json counts lines of its own
        let (told, column) = (e.to_string(), e.column());
        let told = told.split(" at line ").next().unwrap_or_default();
        if told.starts_with("missing field") {
            return format!("{wanted}: {told}; {}", others(line));
        }
        let remedy = match told {
            // what Python's json writes of a text that is no Unicode
            _ if told.contains("surrogate") || told.contains("hex escape") => {
                "; half of a surrogate pair is no character: write the line again without it (Python: text.encode(\"utf-8\", \"ignore\"))"
            }
            _ if is_no_number(line, column) => {
                "; NaN and Infinity are no JSON: write null in their place"
            }
            _ => "",
        };
        format!("{wanted}: {told}, column {column}{remedy}")
    })?;
    Ok(Some(match text {
        None => Found::LeftOut("null".into()),
        Some(text) if text.trim().is_empty() => Found::LeftOut("empty".into()),
        Some(text) => {
            Found::Document(Document { source: "".into(), text: Text::Whole(Cow::Owned(text)), validation: None })
        }
    }))
}

/// The text in the field of a line of a `.jsonl` corpus; nothing for a line that is empty or is left out.
///
/// # Errors
/// In words, without the line's number, when it is no JSON object with such a field.
pub fn json_line(line: &[u8], field: &str) -> std::result::Result<Option<String>, String> {
    Ok(match parse(line, field)? {
        Some(Found::Document(Document { text: Text::Whole(text), .. })) => Some(text.into_owned()),
        _ => None,
    })
}

/// Reads the lines of a file.
struct Lines<'a> {
    file: &'a SourceFile,
    field: &'a str,
    reader: Option<BufReader<Content>>,
    number: u64,
    buffer: Vec<u8>,
    ended: bool,
    /// whether a line in another encoding is passed over
    folder: bool,
}

impl<'a> Lines<'a> {
    /// The next line into the buffer; whether there is one, and whether it fitted.
    fn read(&mut self) -> Result<Option<bool>> {
        let path = &self.file.path;
        let reader = self.reader.as_mut().expect("is opened before the first line");
        self.buffer.clear();
        self.buffer.shrink_to(1 << 20);
        if reader.by_ref().take(LINE).read_until(b'\n', &mut self.buffer).map_err(open::failed(path))? == 0 {
            return Ok(None);
        }
        self.number += 1;
        if self.buffer.len() as u64 == LINE && self.buffer.last() != Some(&b'\n') {
            reader.skip_until(b'\n').map_err(open::failed(path))?;
            return Ok(Some(false));
        }
        Ok(Some(true))
    }

    /// What is told of the file behind its last line.
    fn end(&mut self) -> Found<'a> {
        self.ended = true;
        let compression = self.reader.as_ref().map_or("", |r| r.get_ref().compression());
        Found::Read(format!("JSON lines{compression}"))
    }

    /// Opens the file; whether it is of another encoding than its lines could be in.
    fn begin(&mut self) -> Result<Option<Found<'a>>> {
        let (path, mut head) = (&self.file.path, Vec::new());
        open::open(path)?.take(8 << 10).read_to_end(&mut head).map_err(open::failed(path))?;
        if let Some(what) = encoding::named(&head) {
            self.ended = true;
            return if self.folder {
                Ok(Some(text::other_encoding(&head)))
            } else {
                Err(text::other(path, &head, what))
            };
        }
        self.reader = Some(BufReader::with_capacity(1 << 20, open::open(path)?));
        Ok(None)
    }

    fn step(&mut self) -> Result<Found<'a>> {
        if self.reader.is_none()
            && let Some(other) = self.begin()?
        {
            return Ok(other);
        }
        loop {
            match self.read()? {
                None => return Ok(self.end()),
                Some(false) => return Ok(Found::LeftOut(format!("line above {} MB", LINE >> 20))),
                Some(true) => {}
            }
            let wrong = |what| DataError::content(&self.file.path, format!("line {}: {what}", self.number));
            if let Err(e) = std::str::from_utf8(&self.buffer) {
                if self.folder {
                    return Ok(Found::LeftOut("line that is not UTF-8".into()));
                }
                let at = e.valid_up_to();
                let how = "convert the file to UTF-8 (iconv -f ISO-8859-1 -t UTF-8, with the encoding that it has)";
                return Err(wrong(format!("byte {at} of the line is not valid UTF-8; {how}")));
            }
            match parse(&self.buffer, self.field).map_err(wrong)? {
                None => {}
                Some(Found::Document(d)) => {
                    return Ok(Found::Document(Document { source: Cow::Borrowed(&self.file.name), ..d }));
                }
                Some(left_out) => return Ok(left_out),
            }
        }
    }
}

/// The documents of a file, from this field of its lines. In a folder, a line that is not UTF-8 is left out.
pub(super) fn documents<'a>(file: &'a SourceFile, field: &'a str, folder: bool) -> Documents<'a> {
    let mut lines = Lines { file, field, reader: None, number: 0, buffer: Vec::new(), ended: false, folder };
    steps(move || (!lines.ended).then(|| lines.step()))
}
