//! A configuration that cannot be used.

use std::fmt;

pub use dash_model::ConfigError;

/// Refuses the value of a key.
pub fn wrong<T>(key: &str, what: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError { key: key.into(), what: what.into() })
}

/// Refuses zero.
pub fn positive(key: &str, n: usize) -> Result<(), ConfigError> {
    if n == 0 { wrong(key, "is 0; it must be at least 1") } else { Ok(()) }
}

/// Why a configuration could not be read: the file and the settings on top of it, and what is wrong there.
#[derive(Debug)]
pub struct LoadError {
    /// File, and `--set` where there was any.
    pub place: String,
    /// The key at fault with a reason, or the parser's words.
    pub what: String,
}

impl LoadError {
    /// `place: what`
    pub fn new(place: impl fmt::Display, what: impl fmt::Display) -> Self {
        LoadError { place: place.to_string(), what: what.to_string() }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

impl std::error::Error for LoadError {}
