//! `--config FILE --set KEY=VALUE`

use std::path::PathBuf;

use clap::Args;

use crate::config::{Config, LoadError};

/// Where a configuration may be given.
#[derive(Args)]
pub struct OptionalConfig {
    /// Configuration file (TOML), or the folder of a run, which holds one
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Override one value, for example --set optim.lr=1e-3
    #[arg(long, value_name = "KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
}

/// Where one must be given.
#[derive(Args)]
pub struct ConfigArgs {
    /// Configuration file (TOML), or the folder of a run, which holds one
    #[arg(long)]
    pub config: PathBuf,
    /// Override one value, for example --set optim.lr=1e-3
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigArgs {
    /// Reads it.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load(&self) -> Result<Config, LoadError> {
        Config::load(&self.config, &self.set)
    }
}

impl OptionalConfig {
    /// Reads it, where it is given.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load(&self) -> Result<Option<Config>, LoadError> {
        self.config.as_ref().map(|path| Config::load(path, &self.set)).transpose()
    }
}
