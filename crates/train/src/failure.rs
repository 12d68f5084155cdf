//! How a command ends when it does not end well, and with which exit status.

/// Why a command stopped.
#[derive(Debug)]
pub enum Failure {
    /// The request is wrong: configuration, arguments or input files. Exit status 2.
    Request(anyhow::Error),
    /// The run failed. Exit status 1.
    Run(anyhow::Error),
    /// Stopped by a signal after saving. Exit status 130.
    Interrupted,
    /// Nobody reads standard output any more (`| head`). Exit status 0: the reader has what it wanted.
    ReaderGone,
    /// Another process of the run failed, and the first one says why. Exit status of that failure.
    Elsewhere(u8),
}

impl Failure {
    /// A wrong request.
    pub fn request(what: impl std::fmt::Display) -> Self {
        Failure::Request(anyhow::anyhow!("{what}"))
    }

    /// Exit status.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Run(_) => 1,
            Failure::Request(_) => 2,
            Failure::Interrupted => 130,
            Failure::ReaderGone => 0,
            Failure::Elsewhere(status) => *status,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Request(e) | Failure::Run(e) => write!(f, "{e:#}"),
            Failure::Interrupted => f.write_str("interrupted after saving"),
            Failure::ReaderGone => f.write_str("nobody reads standard output any more"),
            Failure::Elsewhere(_) => f.write_str("another process of the run failed"),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Self {
        Failure::Run(e)
    }
}

impl From<dash_core::Error> for Failure {
    fn from(e: dash_core::Error) -> Self {
        Failure::Run(e.into())
    }
}

impl From<crate::config::LoadError> for Failure {
    fn from(e: crate::config::LoadError) -> Self {
        Failure::Request(e.into())
    }
}

impl From<dash_data::DataError> for Failure {
    /// Data that cannot be read is an input file that is wrong; a full disk is not.
    fn from(e: dash_data::DataError) -> Self {
        if e.is_request() { Failure::Request(e.into()) } else { Failure::Run(e.into()) }
    }
}

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;
