//! One error for everything that touches files: what, where, and what to do.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Result of a data operation.
pub type Result<T> = std::result::Result<T, DataError>;

/// Why data could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused.
    // the cause is part of the message and no `source`: a chain of errors would print it twice
    #[error("{}: {what}: {cause}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Its answer.
        cause: std::io::Error,
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
        move |cause| DataError::Io { path, what, cause }
    }

    pub(crate) fn content(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        DataError::Content { path: path.as_ref().to_path_buf(), what: what.into() }
    }

    /// Whether another request would help: another path, other text, other settings. A full disk, a failing device or a limit of the
    /// system is no fault of the request.
    pub fn is_request(&self) -> bool {
        use ErrorKind::*;
        match self {
            DataError::Io { cause, .. } => {
                is_circle_of_links(cause)
                    || matches!(
                        cause.kind(),
                        NotFound
                            | PermissionDenied
                            | NotADirectory
                            | IsADirectory
                            | ReadOnlyFilesystem
                            | InvalidInput
                            | InvalidFilename
                            | AlreadyExists
                    )
            }
            DataError::Content { .. } | DataError::Cargo(_) => true,
        }
    }
}

/// Links that lead to each other (ELOOP). The standard library's name for it is not stable yet.
pub(crate) fn is_circle_of_links(e: &std::io::Error) -> bool {
    e.raw_os_error() == Some(if cfg!(target_os = "linux") { 40 } else { 62 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_no_wrong_request_and_the_cause_is_told_once() {
        let of = |kind: ErrorKind| DataError::io("a", "cannot be written")(kind.into());
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::Other, ErrorKind::OutOfMemory] {
            assert!(!of(kind).is_request(), "{kind:?}");
        }
        for kind in [ErrorKind::NotFound, ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem] {
            assert!(of(kind).is_request(), "{kind:?}");
        }
        #[cfg(target_os = "linux")]
        assert!(DataError::io("a", "cannot be read")(std::io::Error::from_raw_os_error(40)).is_request());
        let e = of(ErrorKind::NotFound);
        assert!(std::error::Error::source(&e).is_none());
        assert_eq!(e.to_string(), format!("a: cannot be written: {}", std::io::Error::from(ErrorKind::NotFound)));
    }
}
