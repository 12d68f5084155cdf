//! The threads that tokenising shares.

use crate::error::{DataError, Result};

/// Starts them. rayon does it by itself at their first use, but panics where the system refuses.
pub fn start() -> Result<()> {
    match rayon::ThreadPoolBuilder::new().build_global() {
        Ok(()) => Ok(()),
        // the system's reason; without one, the threads are there already
        Err(e) if std::error::Error::source(&e).is_some() => {
            Err(DataError::io("tokenising", "its threads cannot be started")(std::io::Error::other(e.to_string())))
        }
        Err(_) => Ok(()),
    }
}
