//! What the variants share that score chunks by overlapping windows of keys.

use dash_core::ops::attention::{Span, WindowChoice};

use crate::error::ConfigError;

/// The windows as keys.
pub(super) fn span(w: &WindowChoice) -> Span {
    Span::Windows { length: w.length, stride: w.stride }
}

/// The tokens of every window, one window after the other.
pub(super) fn tokens(tokens: usize, w: &WindowChoice) -> Vec<usize> {
    (0..span(w).keys(tokens)).flat_map(|i| (0..w.length).map(move |j| i * w.stride + j)).collect()
}

/// Refuses windows that leave gaps, and more forced chunks than there is room for.
pub(super) fn check(w: &WindowChoice) -> Result<(), ConfigError> {
    if w.length < w.stride {
        let what = format!("{} is not between 1 and length = {}", w.stride, w.length);
        return Err(ConfigError::new("model.attention.stride", what));
    }
    if w.top < w.init + w.local {
        let what = format!(
            "{} is below init + local = {}, the chunks that are always attended; raise it or lower those",
            w.top,
            w.init + w.local
        );
        return Err(ConfigError::new("model.attention.top", what));
    }
    Ok(())
}
