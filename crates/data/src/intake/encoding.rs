//! Which encoding bytes are in that are no text in UTF-8, though they may be valid UTF-8.

/// What the first bytes of a file say that it is, where that is no text in UTF-8: `UTF-16`, `UTF-32` or `binary`. A byte order mark says it, or
/// control characters do: each second byte of UTF-16 is one in Latin, Greek and Cyrillic letters, and a text has hardly any.
pub(super) fn named(head: &[u8]) -> Option<&'static str> {
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
