//! `export`: a Hugging Face folder with a proof of parity.

use std::path::PathBuf;

use clap::Args;

use crate::console::print_line;
use crate::failure::Result;
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
    let loaded = Loaded::open(&args.checkpoint, None)?;
    let set = Material::of(&loaded.config)?.validation(&loaded.config)?;
    export(&loaded.model, &loaded.config, loaded.tokenizer.as_ref(), set.first().0, &args.out)?;
    print_line!("exported {} to {}", loaded.folder.display(), args.out.display())?;
    Ok(())
}
