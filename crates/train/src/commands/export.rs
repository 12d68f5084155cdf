//! `export`: a Hugging Face folder with a proof of parity.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::files::replace_folder;
use crate::training::export::export;
use crate::training::loaded::Loaded;
use crate::training::material::Material;

/// Arguments.
#[derive(Args)]
pub struct ExportArgs {
    /// A checkpoint folder or a run folder
    #[arg(long)]
    pub checkpoint: PathBuf,
    /// Folder to write
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be read or the folder cannot be written.
pub fn run(args: &ExportArgs) -> Result<()> {
    check_place(&args.out)?;
    let loaded = Loaded::open(&args.checkpoint, None)?;
    let set = Material::of(&loaded.config)?.validation(&loaded.config)?;
    // a name that ends in "/" or ".." has no file name to write beside
    let out = std::path::absolute(&args.out).map_err(anyhow::Error::from)?;
    replace_folder(&out, |folder| {
        export(&loaded.model, &loaded.config, loaded.tokenizer.as_ref(), set.first().0, folder)
    })?;
    print_line!("exported {} to {}", loaded.folder.display(), args.out.display())
}

/// Refuses a folder that an export would destroy or hide: only an older export, or an empty folder, makes way.
fn check_place(out: &Path) -> Result<()> {
    let taken = |what: &str| Failure::request(format!("--out {}: {what}; choose another folder", out.display()));
    if out.file_name().is_none() {
        return Err(taken("is no name for a folder"));
    }
    let has = |name: &str| out.join(name).exists();
    if has("checkpoints") || has("metrics.jsonl") {
        return Err(taken("is a run, and an export there would stand in for its later checkpoints"));
    }
    if has("state.json") || has("optimizer.safetensors") {
        return Err(taken("is a checkpoint"));
    }
    let Ok(mut entries) = std::fs::read_dir(out) else {
        return if out.exists() { Err(taken("is a file")) } else { Ok(()) };
    };
    let older_export = has("parity.safetensors") && has("model.safetensors");
    if entries.next().is_some() && !older_export { Err(taken("holds something else than an export")) } else { Ok(()) }
}
