//! What every kind of chart ends with.

use super::svg::{Picture, width_of};

/// A picture that is done.
#[derive(Debug, Clone)]
pub struct Drawn {
    /// Without a style sheet, for a page that has [`style`].
    pub inline: String,
    /// A file of its own.
    pub file: String,
}

impl From<Picture> for Drawn {
    fn from(picture: Picture) -> Self {
        Drawn { inline: picture.inline(), file: picture.file() }
    }
}

/// A text that fits into a width.
pub fn clipped(text: &str, width: f64) -> String {
    if width_of(text) <= width {
        return text.into();
    }
    let mut out = text.to_string();
    while !out.is_empty() && width_of(&out) + 7.0 > width {
        out.pop();
    }
    out + "…"
}
