//! What bytes are that are no text in UTF-8, though they may be valid UTF-8: another encoding, or a file of another kind.

/// What the first bytes of a file say that it is, where that is no text in UTF-8: something [`known`], `UTF-16`, `UTF-32` or `binary`. A byte order mark says it, or
/// control characters do: each second byte of UTF-16 is one in Latin, Greek and Cyrillic letters, and a text has hardly any.
pub(super) fn named(head: &[u8]) -> Option<&'static str> {
    if let Some((name, _)) = known(head) {
        return Some(name);
    }
    match head {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => return Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => return Some("UTF-16"),
        _ => {}
    }
    // NUL to BEL, at each of four places in turn
    let mut controls = [0; 4];
    head.iter().enumerate().filter(|(_, byte)| **byte < 8).for_each(|(i, _)| controls[i % 4] += 1);
    let [a, b, c, d] = controls;
    if head.len() < 16 || 4 * (a + b + c + d) < head.len() {
        return None;
    }
    let few = |n: usize| 8 * n < head.len() / 4;
    Some(match controls.iter().filter(|n| few(**n)).count() {
        1 => "UTF-32",
        2 if few(a + c) || few(b + d) => "UTF-16",
        _ => "binary",
    })
}

/// What a parquet file begins with.
pub(super) const PARQUET: &[u8] = b"PAR1";

/// First bytes of files that are no text, what they are, and what to do. What is compressed is decompressed before it is looked at, so that
/// a compression found here is a second one or one that is not read.
const KNOWN: [(&[u8], &str, &str); 12] = [
    (PARQUET, "parquet", "name it so that it ends in .parquet, alone or with data.extensions = [\"parquet\"]"),
    (b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS", "bring the file itself with git lfs pull"),
    (b"\x1f\x8b\x08", "compressed (gzip)", "decompress it once (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", "decompress it once (unzstd)"),
    (b"\xfd7zXZ\0", "compressed by xz", "decompress it first (unxz)"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it first (unlz4)"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"ARROW1\0\0", "arrow", "write one object a line, with a field \"text\", to a .jsonl file"),
    (b"\x93NUMPY", "an array of numpy", "write its text to a .txt file"),
    (b"\x89HDF\r\n", "HDF5", "write its text to a .txt file"),
    (b"%PDF-1.", "PDF", "extract its text to a .txt file"),
];

/// What a file is whose first bytes say that it is no text at all, and what to do with it.
pub(super) fn known(head: &[u8]) -> Option<(&'static str, &'static str)> {
    // the number is the size of a block, then a magic number of the first one
    if head.starts_with(b"BZh") && head.get(4..10) == Some(b"1AY&SY") {
        return Some(("compressed by bzip2", "decompress it first (bunzip2)"));
    }
    // with what stands behind it: the letters alone are in custard, too
    if head.get(257..).is_some_and(|h| h.starts_with(b"ustar\0") || h.starts_with(b"ustar  \0")) {
        return Some(("a tar archive", "unpack it first"));
    }
    KNOWN.iter().find(|(magic, ..)| head.starts_with(magic)).map(|(_, name, remedy)| (*name, *remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<const N: usize>(text: &str, of: impl Fn(char) -> [u8; N]) -> Vec<u8> {
        text.chars().flat_map(of).collect()
    }

    #[test]
    fn wide_encodings_are_known_without_their_mark() {
        for text in [
            "The river runs, and the bridge stands.\n",
            "\u{420}\u{435}\u{43a}\u{430} \u{442}\u{435}\u{447}\u{435}\u{442}, \u{438} \u{43c}\u{43e}\u{441}\u{442}.\n",
        ] {
            assert_eq!(named(text.as_bytes()), None);
            for wide in [bytes(text, |c| (c as u16).to_le_bytes()), bytes(text, |c| (c as u16).to_be_bytes())] {
                assert_eq!(named(&wide), Some("UTF-16"), "{text}");
                assert!(std::str::from_utf8(&wide).is_ok(), "valid UTF-8 all the same");
            }
        }
        let text = "The river runs, and the bridge stands.";
        assert_eq!(named(&bytes(text, |c| (c as u32).to_le_bytes())), Some("UTF-32"));
        assert_eq!(named(&bytes(text, |c| (c as u32).to_be_bytes())), Some("UTF-32"));
    }

    #[test]
    fn marks_binary_files_and_texts_with_some_control_characters() {
        assert_eq!(named(b"\xff\xfea\x00"), Some("UTF-16"));
        assert_eq!(named(b"\xff\xfe\x00\x00a\x00\x00\x00"), Some("UTF-32"));
        assert_eq!(named(&[0; 100]), Some("binary"));
        assert_eq!(named(b"\x01\x02ab\x03\x00\x05cd\x04\x07\x06e\x00\x01f\x02\x03"), Some("binary"));
        // a word in five that begins with NUL, escapes of colours, and next to nothing
        assert_eq!(named(b"\x00word and \x00others, of which some begin so"), None);
        assert_eq!(named(b"\x1b[31mred\x1b[0m \x1b[32mgreen\x1b[0m"), None);
        assert_eq!(named(b"\x00"), None);
        assert_eq!(named(b""), None);
    }
}
