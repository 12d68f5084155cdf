//! Megatron's index (`megatron/core/datasets/indexed_dataset.py`), little-endian:
//!
//! | byte | holds |
//! |---|---|
//! | 0 | `MMIDIDX` and two zeros |
//! | 9 | u64 version, 1 |
//! | 17 | u8 type of a token: 1 u8, 3 i16, 4 i32, 5 i64, 8 u16 |
//! | 18 | u64 number of sequences s |
//! | 26 | u64 number of documents and one, d |
//! | 34 | s times i32 tokens of a sequence, s times i64 its first byte in the .bin file, d times i64 the first sequence of a document, and at last s |
//!
//! Its writer puts sequences one behind the other, so an index whose places are others belongs to another file or announces another type.

use std::path::Path;

use super::{Number, Run, content};
use crate::error::{DataError, Result};

/// Which sequences begin a document; one more place than there are sequences, for the end of the last one.
fn beginnings(starts: impl Iterator<Item = u64>, sequences: usize) -> std::result::Result<Vec<bool>, String> {
    let mut begins = vec![false; sequences + 1];
    let mut before = 0;
    for (i, first) in starts.enumerate() {
        let place = usize::try_from(first).ok().filter(|at| *at <= sequences);
        let place = place.ok_or(format!("document {i} begins at sequence {} of {sequences}", first as i64))?;
        if place < before {
            return Err(format!("document {i} begins at sequence {place}, the one before at {before}"));
        }
        (begins[place], before) = (true, place);
    }
    if sequences > 0 && !begins[0] {
        return Err("no document begins at the first sequence".into());
    }
    Ok(begins)
}

/// What a Megatron index says of a file of `len` bytes.
pub(super) fn index(path: &Path, len: u64) -> Result<(Number, Vec<Run>)> {
    let bytes = std::fs::read(path).map_err(DataError::io(path, "cannot be read"))?;
    let bad = |what: String| content(path, format!("{what}; bring the index that belongs to the .bin file beside it"));
    if bytes.starts_with(b"TNTIDX\0\0") {
        let what = "is an index of Megatron's old layout (TNTIDX); preprocess the text again with --dataset-impl mmap";
        return Err(content(path, what));
    }
    if !bytes.starts_with(b"MMIDIDX\0\0") || bytes.len() < 34 {
        return Err(bad("is no Megatron index (MMIDIDX)".into()));
    }
    // from byte 34 on nothing is aligned
    let word = |at: usize| bytes.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    let (version, sequences, documents) = (word(9).unwrap_or(0), word(18).unwrap_or(0), word(26).unwrap_or(0));
    let number = match (version, bytes[17]) {
        (1, 1) => Number::U8,
        (1, 3) => Number::I16,
        (1, 4) => Number::I32,
        (1, 5) => Number::I64,
        (1, 8) => Number::U16,
        (1, code) => return Err(content(path, format!("has numbers of type {code}, which are no token ids"))),
        (version, _) => return Err(content(path, format!("is of version {version}; version 1 is read"))),
    };
    let sizes = sequences.checked_mul(12).zip(documents.checked_mul(8));
    let needed = sizes.and_then(|(s, d)| s.checked_add(d)?.checked_add(34));
    if needed.is_none_or(|n| n > bytes.len() as u64) {
        return Err(bad(format!("announces {sequences} sequences and is cut off")));
    }
    let (sequences, documents) = (sequences as usize, documents as usize);
    let (pointers, starts) = (34 + 4 * sequences, 34 + 12 * sequences);
    let begins =
        beginnings((0..documents).map(|i| word(starts + 8 * i).unwrap_or(u64::MAX)), sequences).map_err(bad)?;
    let mut runs = Vec::with_capacity(sequences);
    // where the sequence before ends; an empty one hands the beginning of its document on
    let (mut expected, mut begun) = (0, false);
    for i in 0..sequences {
        let size = &bytes[34 + 4 * i..38 + 4 * i];
        let tokens = i32::from_le_bytes([size[0], size[1], size[2], size[3]]);
        let at = word(pointers + 8 * i).unwrap_or(u64::MAX);
        let tokens = u64::try_from(tokens).map_err(|_| bad(format!("sequence {i} has {tokens} tokens")))?;
        let end = tokens.checked_mul(number.width() as u64).and_then(|n| n.checked_add(at));
        if end.is_none_or(|end| end > len) {
            return Err(bad(format!("sequence {i} ends behind the {len} bytes of the .bin file")));
        }
        if at != expected {
            let width = number.width();
            return Err(bad(format!(
                "sequence {i} begins at byte {at}, expected {expected}, where the one before ends with {width} bytes a token"
            )));
        }
        begun |= begins[i];
        if tokens > 0 {
            runs.push(Run { at, tokens, begins: std::mem::take(&mut begun) });
        }
        expected = at + tokens * number.width() as u64;
    }
    if expected != len {
        return Err(bad(format!("its {sequences} sequences end at byte {expected} of the {len} of the .bin file")));
    }
    Ok((number, runs))
}
