//! The one error of this crate: which op, what was wrong, what it expected.

/// Result of a tensor operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an op could not be carried out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// Shapes, element types or settings that do not fit; the message names both sides.
    #[error("{op}: {what}")]
    Invalid {
        /// The op that refused.
        op: &'static str,
        /// What it got and what it expected.
        what: String,
    },
    /// A value that is NaN or infinite, found by a checking tape ([`crate::Tape::checking`]).
    #[error("the {what} of {op} in {at} is not finite")]
    NonFinite {
        /// The scope the tape was in, for example `model.layers.3.mlp`.
        at: String,
        /// The op it belongs to.
        op: &'static str,
        /// `output`, or `gradient of the output`.
        what: &'static str,
    },
    /// A device, its driver or one of its libraries is not there, refused, or ran out of memory.
    #[error("{op}: {what}")]
    Device {
        /// The op that asked, or the device.
        op: &'static str,
        /// What failed and what to do about it.
        what: String,
    },
}

impl Error {
    /// A failure of the device under `op`.
    pub fn device(op: &'static str, what: impl Into<String>) -> Self {
        Error::Device { op, what: what.into() }
    }

    /// A refusal by `op`.
    pub fn invalid(op: &'static str, what: impl Into<String>) -> Self {
        Error::Invalid { op, what: what.into() }
    }
}

/// Returns `Error::Invalid` from the enclosing function unless the condition holds.
macro_rules! ensure {
    ($cond:expr, $op:expr, $($fmt:tt)+) => {
        if !$cond {
            return Err($crate::Error::invalid($op, format!($($fmt)+)));
        }
    };
}
pub(crate) use ensure;
