//! Cutting a long text into pieces that are encoded by themselves: the memory of an encoder is some 170 bytes a byte, and threads share
//! the pieces of one document.
//!
//! A cut is made between a letter or digit and a blank, where the patterns of GPT-2, cl100k, Llama 3 and their kin end a word in any
//! case, so that their tokens are those of the whole text. A tokenizer that puts a mark before every text (SentencePiece's `▁`) puts
//! one before every piece.

/// Bytes of a piece at most.
pub(crate) const PIECE: usize = 64 << 10;

/// The last character boundary that is not behind `at`.
pub(crate) fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// Bytes of the first piece of a text.
pub(crate) fn first(text: &str, most: usize) -> usize {
    if text.len() <= most {
        return text.len();
    }
    let most = floor(text, most);
    let from = floor(text, most / 2);
    let mut place = None;
    let mut next: Option<(usize, char)> = text[most..].chars().next().map(|c| (most, c));
    for (at, c) in text[from..most].char_indices().rev() {
        if let Some((i, n)) = next
            && n.is_whitespace()
            && !c.is_whitespace()
        {
            if c.is_alphanumeric() {
                return i;
            }
            place = place.or(Some(i));
        }
        next = Some((from + at, c));
    }
    place.unwrap_or(if most == 0 { text.chars().next().map_or(0, char::len_utf8) } else { most })
}

/// The pieces of a text and where they begin.
pub(crate) fn cut(text: &str) -> impl Iterator<Item = (usize, &str)> {
    cut_to(text, PIECE)
}

/// As [`cut`], with pieces of another size.
pub(crate) fn cut_to(text: &str, most: usize) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &text[at..];
        if rest.is_empty() {
            return None;
        }
        let start = at;
        at += first(rest, most);
        Some((start, &text[start..at]))
    })
}

/// A place to part a text near `at`, and before `limit`: behind a line break, else before a blank, else anywhere.
pub(crate) fn part(text: &str, at: usize, limit: usize) -> usize {
    let at = (at.min(text.len())..).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
    let limit = floor(text, limit).max(at);
    let range = &text[at..limit];
    let line = range.find('\n').map(|i| at + i + 1);
    line.or_else(|| range.find(char::is_whitespace).map(|i| at + i)).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text_and_no_larger_than_asked() {
        let texts =
            ["", "a", "one two\n\nthree.\n four", "ääää öööö 漢字漢字 🦀🦀🦀 end", &"x".repeat(100), &" ".repeat(100)];
        for text in texts {
            for most in [1, 2, 3, 5, 8, 50] {
                let all: Vec<(usize, &str)> = cut_to(text, most).collect();
                assert_eq!(all.iter().map(|p| p.1).collect::<String>(), text);
                assert!(all.iter().all(|(at, p)| !p.is_empty() && text[*at..].starts_with(p)));
                assert!(all.iter().all(|(_, p)| p.len() <= most || p.chars().count() == 1), "{all:?}");
            }
        }
    }

    #[test]
    fn cuts_fall_between_a_letter_and_a_blank() {
        assert_eq!(first("hello there hi. \n\nnext", 17), 11, "not behind the stop, which may take the line breaks");
        assert_eq!(first("hello, world; ;; ;;", 16), 16, "between a sign and a blank where no letter is left of one");
        assert_eq!(first("hellohellohello", 7), 7);
    }

    #[test]
    fn parts_prefer_lines_then_blanks() {
        assert_eq!(part("one two\nthree", 2, 13), 8);
        assert_eq!(part("one two\nthree", 2, 6), 3);
        assert_eq!(part("onetwothree", 2, 6), 2);
        assert_eq!(part("ääää", 3, 8), 4);
        assert_eq!(part("abc", 9, 20), 3);
    }
}
