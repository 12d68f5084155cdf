//! A file as one sequence: for whoever evaluates all of it and prepares nothing.

use std::io::Read;
use std::path::Path;

use super::tokens::TokenFiles;
use super::{encoding, open, text};
use crate::error::{DataError, Result};

/// Ids that another program wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds {
    /// The first of the file.
    pub ids: Vec<u32>,
    /// How many the file has.
    pub of: u64,
    /// What the file is, for people.
    pub layout: &'static str,
}

/// The first `most` ids of a file of llm.c, nanoGPT or Megatron.
///
/// # Errors
/// When it is none, it is damaged, or an id is not below `vocab`.
pub fn token_ids(path: &Path, vocab: usize, most: u64) -> Result<TokenIds> {
    if path.is_dir() {
        return Err(DataError::content(path, "is a folder; name one file of token ids"));
    }
    let mut found = TokenFiles::one(path, vocab)?;
    let of = found.tokens;
    found.truncate(most);
    let mut ids = Vec::new();
    found.for_each(vocab, |part, _| {
        ids.extend_from_slice(part);
        Ok(())
    })?;
    Ok(TokenIds { ids, of, layout: found.layout })
}

/// The text of a file in UTF-8, decompressed, of up to `most` bytes.
///
/// # Errors
/// When it cannot be read, is damaged, is in another encoding, or has more bytes.
pub fn whole_text(path: &Path, most: u64) -> Result<String> {
    if path.is_dir() {
        return Err(DataError::content(path, "is a folder; name a file"));
    }
    let (mut content, mut bytes) = (open::open(path)?, Vec::new());
    (&mut content).take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(open::failed(path))?;
    if bytes.len() as u64 > most {
        return Err(DataError::content(path, format!("has more than {most} bytes of text; cut it into several files")));
    }
    if bytes.starts_with(encoding::PARQUET) {
        let what = "is parquet, of which nothing is read here; write it as JSON lines, or its texts to a file (Python: \
                    pandas.read_parquet(FILE).to_json(OUT, orient=\"records\", lines=True))";
        return Err(DataError::content(path, what));
    }
    let head = &bytes[..bytes.len().min(8 << 10)];
    if let Some(what) = encoding::named(head) {
        return Err(text::other(path, head, what));
    }
    let text = String::from_utf8(bytes).map_err(|e| text::not_utf8(path, e.utf8_error().valid_up_to() as u64))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    #[test]
    fn ids_are_those_of_the_file_up_to_the_number_that_is_asked_for() {
        for (name, from, layout) in [
            ("llmc/fineweb_val_000000.bin", 1024, "llm.c, version 1"),
            ("nanogpt/val.bin", 0, "nanoGPT, 16 bits without a header"),
        ] {
            let path = fixture(name);
            let bytes = std::fs::read(&path).unwrap();
            let ids =
                |b: &[u8]| b.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect::<Vec<_>>();
            let all = token_ids(&path, 50257, u64::MAX).unwrap();
            assert_eq!(all, TokenIds { ids: ids(&bytes[from..]), of: all.ids.len() as u64, layout });
            for most in [0, 1, 7] {
                let first = token_ids(&path, 50257, most).unwrap();
                assert_eq!((&first.ids[..], first.of), (&all.ids[..most as usize], all.of));
            }
        }
        // an index parts the file into runs
        let path = fixture("megatron/pile_text_document.bin");
        let all = token_ids(&path, 50257, u64::MAX).unwrap().ids;
        assert_eq!(token_ids(&path, 50257, 20).unwrap().ids, all[..20]);
        let told = token_ids(&fixture("llmc/fineweb_val_000000.bin"), 300, 9).unwrap_err().to_string();
        assert!(told.contains("fineweb_val_000000.bin") && told.contains("not below"), "{told}");
        assert!(token_ids(&fixture("llmc"), 50257, 9).unwrap_err().to_string().contains("is a folder"));
    }

    #[test]
    fn a_text_is_decompressed_and_bounded() {
        let path = fixture("page.txt.gz");
        let text = whole_text(&path, 1 << 20).unwrap();
        assert!(!text.is_empty());
        assert_eq!(whole_text(&path, text.len() as u64).unwrap(), text);
        assert!(whole_text(&path, text.len() as u64 - 1).unwrap_err().to_string().contains("more than"));
        let dir = tempfile::tempdir().unwrap();
        let latin = dir.path().join("a.txt");
        std::fs::write(&latin, b"abc\xe4def").unwrap();
        assert!(whole_text(&latin, 99).unwrap_err().to_string().contains("byte 3 is not valid UTF-8"));
    }
}
