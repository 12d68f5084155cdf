//! One error for everything that touches files: what, where, and what to do.

use std::path::{Path, PathBuf};

/// Result of a data operation.
pub type Result<T> = std::result::Result<T, DataError>;

/// Why data could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The content is not what it has to be.
    #[error("{}: {what}", path.display())]
    Content {
        /// File or folder.
        path: PathBuf,
        /// What is wrong, what was expected, what to do.
        what: String,
    },
    /// The default corpus could not be found.
    #[error("{0}")]
    Cargo(String),
}

impl DataError {
    pub(crate) fn io(path: impl AsRef<Path>, what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| DataError::Io { path, what, source }
    }

    pub(crate) fn content(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        DataError::Content { path: path.as_ref().to_path_buf(), what: what.into() }
    }
}
