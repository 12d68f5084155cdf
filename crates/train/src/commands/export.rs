//! `export`: a Hugging Face folder with a proof of parity.

use std::path::{Path, PathBuf};

use clap::Args;
use dash_core::rng::Rng;

use crate::console::{print_line, tell};
use crate::failure::{Failure, Result};
use crate::files::replace_folder;
use crate::training::export::{Sample, export};
use crate::training::loaded::Loaded;
use crate::training::material::Material;

/// Arguments.
#[derive(Args)]
pub struct ExportArgs {
    /// A checkpoint folder or a run folder
    #[arg(long, alias = "checkpoint")]
    pub model: PathBuf,
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
    // no GPU is needed for one sequence
    let loaded = Loaded::open(&args.model, None, Some("cpu"))?;
    if !loaded.own {
        let what = "is a folder of Hugging Face already; export a run that began with it (init.from)";
        return Err(Failure::request(format!("{}: {what}", args.model.display())));
    }
    if loaded.model.budget().is_some() {
        return Err(Failure::request(format!(
            "{}: attends as many chunks as another run by layer and position (router.budget_from), and an export has no place for that \
             table; evaluate the run itself with `train eval`",
            args.model.display()
        )));
    }
    let sample = sample(&loaded);
    // a name that ends in "/" or ".." has no file name to write beside
    let out = match args.out.is_symlink() {
        // the folder that a link leads to is replaced, not the link
        true => std::fs::canonicalize(&args.out),
        false => std::path::absolute(&args.out),
    };
    let out = out.map_err(|e| Failure::request(format!("--out {}: {e}", args.out.display())))?;
    replace_folder(&out, |folder| export(&loaded, &sample, folder))?;
    print_line!("exported {} to {}", loaded.folder.display(), args.out.display())
}

/// What the proof of parity is computed on: a validation window, or any ids where the corpus is gone; the proof holds for both.
fn sample(loaded: &Loaded) -> Sample {
    let config = &loaded.config;
    let window = Material::of_trained(&loaded.places(), loaded.data_hash()).and_then(|m| m.validation(config));
    match window {
        Ok(set) => Sample { ids: set.first().0.to_vec(), validates: true },
        Err(_) => {
            tell!("the corpus cannot be read: the proof of parity is computed on random ids");
            let mut rng = Rng::new(0);
            let ids = (0..config.data.seq_len).map(|_| rng.below(config.data.vocab_size) as u32).collect();
            Sample { ids, validates: false }
        }
    }
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
