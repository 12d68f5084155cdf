//! Files that a crash leaves whole: the old content or the new, never half of it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Writes a file that a power failure keeps.
///
/// # Errors
/// When it cannot be written.
pub fn write_synced(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let run = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    run().with_context(|| format!("{} cannot be written", path.display()))
}

/// Makes a rename or a new file in a folder survive a power failure.
///
/// # Errors
/// When the folder cannot be synced.
pub fn sync_folder(path: &Path) -> anyhow::Result<()> {
    // Only Unix can open a folder; elsewhere the rename itself is what there is.
    if cfg!(unix) {
        File::open(path).and_then(|f| f.sync_all()).with_context(|| format!("{} cannot be synced", path.display()))?;
    }
    Ok(())
}

/// Replaces a file by rename: a reader finds the old content or the new, never half of it.
///
/// # Errors
/// When it cannot be written.
pub fn replace_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = PathBuf::from(aside);
    write_synced(&aside, bytes)?;
    std::fs::rename(&aside, path).with_context(|| format!("{} cannot be renamed into place", aside.display()))
}
