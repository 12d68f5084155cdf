//! Plain text: a file is a document.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{Document, Documents, Found, SourceFile, Text, pieces};
use crate::error::{DataError, Result};

/// Larger files are read piece by piece.
pub(super) const WHOLE: u64 = 4 << 20;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The document of a file. In a folder, a file that is no text, or none in UTF-8, is left out.
pub(super) fn documents(file: &SourceFile, folder: bool) -> Documents<'_> {
    Box::new(std::iter::once_with(move || {
        let head = head(&file.path)?;
        if folder
            && head.contains(&0)
            && !is_utf16(&head)
            && std::str::from_utf8(&head).is_err_and(|e| e.error_len().is_some())
        {
            return Ok(Found::LeftOut("binary".into()));
        }
        let mark = if head.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() as u64 } else { 0 };
        let text = if file.len > WHOLE {
            // one pass more, so that a bad byte far behind is known before anything of the file is taken
            if folder && !is_utf8(&file.path)? {
                return Ok(other_encoding(&head));
            }
            Text::File(file.path.clone(), file.len - mark)
        } else {
            let bytes = std::fs::read(&file.path).map_err(DataError::io(&file.path, "cannot be read"))?;
            let text = match String::from_utf8(bytes) {
                Ok(text) => text,
                Err(_) if folder => return Ok(other_encoding(&head)),
                Err(e) => return Err(not_utf8(&file.path, e.utf8_error().valid_up_to() as u64, &head)),
            };
            let text = text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text);
            if text.trim().is_empty() {
                return Ok(Found::LeftOut("empty".into()));
            }
            Text::Whole(Cow::Owned(text))
        };
        Ok(Found::Document(Document { source: Cow::Borrowed(&file.name), text, validation: None }))
    }))
}

/// Why a file of a folder is left out whose bytes are no UTF-8.
fn other_encoding(head: &[u8]) -> Found<'static> {
    Found::LeftOut(if is_utf16(head) { "UTF-16, not UTF-8" } else { "not UTF-8" }.into())
}

/// Whether a large file is UTF-8 to its end.
fn is_utf8(path: &Path) -> Result<bool> {
    match for_each_piece(path, |_, _| Ok(())) {
        Ok(()) => Ok(true),
        Err(DataError::Content { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The first bytes of a file.
fn head(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(DataError::io(path, "cannot be read"))?;
    let mut head = Vec::new();
    file.take(8 << 10).read_to_end(&mut head).map_err(DataError::io(path, "cannot be read"))?;
    Ok(head)
}

fn is_utf16(head: &[u8]) -> bool {
    head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff")
}

/// What bytes that are no UTF-8 may be, and what to do.
fn not_utf8(path: &Path, at: u64, head: &[u8]) -> DataError {
    let what = match head {
        [0x1f, 0x8b, ..] => "is compressed with gzip; decompress it first (gunzip)".to_string(),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "is compressed with zstd; decompress it first (unzstd)".to_string(),
        h if is_utf16(h) => "is UTF-16; convert it (iconv -f UTF-16 -t UTF-8)".to_string(),
        _ => format!(
            "byte {at} is not valid UTF-8; convert the file to UTF-8 (iconv -f ISO-8859-1 -t UTF-8, with the encoding that it has)"
        ),
    };
    DataError::content(path, what)
}

/// Gives a file to `each` in pieces and their first bytes, without ever holding more than a few.
pub(super) fn for_each_piece(path: &Path, mut each: impl FnMut(u64, String) -> Result<()>) -> Result<()> {
    let mut file = File::open(path).map_err(DataError::io(path, "cannot be read"))?;
    let (mut buffer, mut at, mut read, mut end) = (Vec::new(), 0, 0u64, false);
    let mut head: Option<Vec<u8>> = None;
    while !end || !buffer.is_empty() {
        while !end && buffer.len() < 8 * pieces::PIECE {
            let n =
                (&mut file).take(1 << 20).read_to_end(&mut buffer).map_err(DataError::io(path, "cannot be read"))?;
            (read, end) = (read + n as u64, n == 0);
        }
        if head.is_none() {
            head = Some(buffer[..buffer.len().min(8)].to_vec());
            if buffer.starts_with(BYTE_ORDER_MARK) {
                buffer.drain(..BYTE_ORDER_MARK.len());
            }
        }
        let valid = match std::str::from_utf8(&buffer) {
            Ok(text) => text.len(),
            // a character that ends behind the buffer
            Err(e) if e.error_len().is_none() && !end => e.valid_up_to(),
            Err(e) => {
                let bad = read - buffer.len() as u64 + e.valid_up_to() as u64;
                return Err(not_utf8(path, bad, head.as_deref().unwrap_or_default()));
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
