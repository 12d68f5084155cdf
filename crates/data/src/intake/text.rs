//! Plain text: a file is a document.

use std::borrow::Cow;
use std::io::Read;
use std::path::Path;

use super::{Document, Documents, Found, SourceFile, Text, encoding, open, pieces};
use crate::error::{DataError, Result};

/// Larger files are read piece by piece.
pub(super) const WHOLE: u64 = 4 << 20;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The document of a file. In a folder, a file that is no text, or none in UTF-8, is left out.
pub(super) fn documents(file: &SourceFile, folder: bool) -> Documents<'_> {
    let found = std::iter::once_with(move || document(file, folder));
    Box::new(found.flat_map(|found| match found {
        Ok((found, compression)) => vec![Ok(found), Ok(Found::Read(format!("text{compression}")))],
        Err(e) => vec![Err(e)],
    }))
}

/// The document, and how the file is compressed.
fn document(file: &SourceFile, folder: bool) -> Result<(Found<'_>, &'static str)> {
    let (path, mut bytes) = (&file.path, Vec::new());
    let mut content = open::open(path)?;
    (&mut content).take(WHOLE + 1).read_to_end(&mut bytes).map_err(open::failed(path))?;
    let head = bytes[..bytes.len().min(8 << 10)].to_vec();
    let compression = content.compression();
    let leave = |found| Ok((found, compression));
    if let Some(what) = encoding::named(&head) {
        return if folder { leave(other_encoding(&head)) } else { Err(other(path, &head, what)) };
    }
    if folder && head.contains(&0) && std::str::from_utf8(&head).is_err_and(|e| e.error_len().is_some()) {
        return leave(Found::LeftOut("binary".into()));
    }
    let text = if bytes.len() as u64 > WHOLE {
        drop(bytes);
        // one pass more, so that a bad byte far behind, and the size of what is compressed, are known before anything is taken
        let len = match folder || content.is_compressed() {
            true => measure(path)?,
            false => Some(file.len - if head.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() as u64 } else { 0 }),
        };
        match len {
            Some(len) => Text::File(path.clone(), len),
            None if folder => return leave(other_encoding(&head)),
            // with the place of the byte
            None => return Err(for_each_piece(path, |_, _| Ok(())).err().unwrap_or_else(|| not_utf8(path, 0))),
        }
    } else {
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(_) if folder => return leave(other_encoding(&head)),
            Err(e) => return Err(not_utf8(path, e.utf8_error().valid_up_to() as u64)),
        };
        let text = text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text);
        if text.trim().is_empty() {
            return leave(Found::LeftOut("empty".into()));
        }
        Text::Whole(Cow::Owned(text))
    };
    leave(Found::Document(Document { source: Cow::Borrowed(&file.name), text, validation: None }))
}

/// Why a file of a folder is left out whose bytes are no text in UTF-8.
pub(super) fn other_encoding(head: &[u8]) -> Found<'static> {
    Found::LeftOut(match encoding::named(head) {
        Some("binary") => "binary".into(),
        Some(name) if encoding::known(head).is_some() => format!("{name}, no text"),
        Some(wide) => format!("{wide}, not UTF-8"),
        None => "not UTF-8".into(),
    })
}

/// Bytes of a large file's text; `None` where it is not UTF-8 to its end.
fn measure(path: &Path) -> Result<Option<u64>> {
    let mut content = open::open(path)?;
    let (mut buffer, mut len, mut first) = (Vec::new(), 0, true);
    loop {
        let n = (&mut content).take(1 << 20).read_to_end(&mut buffer).map_err(open::failed(path))?;
        if std::mem::take(&mut first) && buffer.starts_with(BYTE_ORDER_MARK) {
            buffer.drain(..BYTE_ORDER_MARK.len());
        }
        let valid = match std::str::from_utf8(&buffer) {
            Ok(text) => text.len(),
            // a character that ends behind the buffer
            Err(e) if e.error_len().is_none() && n > 0 => e.valid_up_to(),
            Err(_) => return Ok(None),
        };
        if n == 0 {
            return Ok(Some(len));
        }
        len += valid as u64;
        buffer.drain(..valid);
    }
}

/// What to do with a file of another encoding, or of none; `what` its first bytes are.
pub(super) fn other(path: &Path, head: &[u8], what: &str) -> DataError {
    if let Some((name, remedy)) = encoding::known(head) {
        return DataError::content(path, format!("is {name}, no text; {remedy}"));
    }
    DataError::content(
        path,
        match what {
            "binary" => {
                "is binary: a quarter of its first bytes and more are control characters; give its text".to_string()
            }
            wide => format!(
                "is {wide}; convert it (iconv -f {wide} -t UTF-8, or {wide}LE, {wide}BE where it has no byte order mark)"
            ),
        },
    )
}

/// Which byte is no UTF-8, and what to do.
pub(super) fn not_utf8(path: &Path, at: u64) -> DataError {
    let what = format!(
        "byte {at} is not valid UTF-8; convert the file to UTF-8 (iconv -f ISO-8859-1 -t UTF-8, with the encoding that it has)"
    );
    DataError::content(path, what)
}

/// Gives a file to `each` in pieces and their first bytes, without ever holding more than a few.
pub(super) fn for_each_piece(path: &Path, mut each: impl FnMut(u64, String) -> Result<()>) -> Result<()> {
    let mut file = open::open(path)?;
    let (mut buffer, mut at, mut read, mut end) = (Vec::new(), 0, 0u64, false);
    let mut first = true;
    while !end || !buffer.is_empty() {
        while !end && buffer.len() < 8 * pieces::PIECE {
            let n = (&mut file).take(1 << 20).read_to_end(&mut buffer).map_err(open::failed(path))?;
            (read, end) = (read + n as u64, n == 0);
        }
        if std::mem::take(&mut first) && buffer.starts_with(BYTE_ORDER_MARK) {
            buffer.drain(..BYTE_ORDER_MARK.len());
        }
        let valid = match std::str::from_utf8(&buffer) {
            Ok(text) => text.len(),
            // a character that ends behind the buffer
            Err(e) if e.error_len().is_none() && !end => e.valid_up_to(),
            Err(e) => {
                let bad = read - buffer.len() as u64 + e.valid_up_to() as u64;
                return Err(not_utf8(path, bad));
            }
        };
        let text = std::str::from_utf8(&buffer[..valid]).expect("was just checked");
        let mut used = 0;
        while used < valid && (end || valid - used > pieces::PIECE) {
            let n = pieces::first(&text[used..], pieces::PIECE);
            each(at, text[used..used + n].to_string())?;
            (at, used) = (at + n as u64, used + n);
        }
        buffer.drain(..used);
    }
    Ok(())
}
