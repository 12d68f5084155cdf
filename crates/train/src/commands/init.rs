//! `init`, `config` and `completions`: finding one's way.

use std::path::PathBuf;

use clap::Args;
use dash_data::extensions_for;
use dash_model::attention::find;

use crate::config::{about, nearest, sections, template};
use crate::console::{print_results, tell};
use crate::failure::{Failure, Result};

/// Arguments.
#[derive(Args)]
pub struct InitArgs {
    /// Attention: a kind or a preset
    #[arg(long, default_value = "dash")]
    pub kind: String,
    /// Train on this file or folder of text instead of the source code of this workspace's dependencies
    #[arg(long, value_name = "PATH")]
    pub text: Option<PathBuf>,
}

/// Arguments.
#[derive(Args)]
pub struct ConfigKeyArgs {
    /// A key (optim.lr, or lr alone) or a table (optim); all of them if left out
    pub key: Option<String>,
}

/// Prints a configuration to start from.
///
/// # Errors
/// When there is no such kind.
pub fn init(args: &InitArgs) -> Result<()> {
    let Some((spec, _)) = find(&args.kind) else {
        let known = dash_model::kinds().join(", ");
        let meant = nearest(&args.kind, dash_model::kinds().into_iter());
        let meant = meant.map_or(String::new(), |m| format!("; did you mean {m}?"));
        return Err(Failure::request(format!("--kind: {:?} is none of {known}{meant}", args.kind)));
    };
    let text = args.text.as_ref().map(|path| {
        path.to_str().ok_or_else(|| Failure::request(format!("--text {}: is no UTF-8 name", path.display())))
    });
    if let Some(path) = args.text.as_ref().filter(|path| !path.exists()) {
        tell!("warning: {} is not there yet; data.path names it all the same", path.display());
    }
    let extensions = args.text.as_ref().map_or(Vec::new(), |path| extensions_for(path));
    let text = text.transpose()?.map(|path| (path, extensions.as_slice()));
    print_results(format_args!("{}", template(&sections(), (spec, &args.kind), text)))
}

/// Prints what a key means.
///
/// # Errors
/// When there is no such key.
pub fn config(args: &ConfigKeyArgs) -> Result<()> {
    let told = about(&sections(), args.key.as_deref().unwrap_or_default()).map_err(Failure::request)?;
    print_results(format_args!("{told}"))
}
