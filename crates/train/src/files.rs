//! Files that a crash leaves whole: the old content or the new, never half of it.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use dash_data::files;

/// Writes a file that a power failure keeps.
///
/// # Errors
/// When it cannot be written.
pub fn write_synced(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    files::write_synced(path, bytes).with_context(|| format!("{} cannot be written", path.display()))
}

/// Makes a rename or a new file in a folder survive a power failure.
///
/// # Errors
/// When the folder cannot be synced.
pub fn sync_folder(path: &Path) -> anyhow::Result<()> {
    files::sync_folder(path).with_context(|| format!("{} cannot be synced", path.display()))
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
    std::fs::rename(&aside, path).with_context(|| format!("{} cannot be renamed into place", aside.display()))?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Puts a folder in the place of `path` by rename: `write` fills it aside, and a reader finds the old folder or the new one. (Where
/// the system cannot exchange two folders, a reader between two renames finds none, and the old one is beside, as `.NAME.old-PID`.)
///
/// # Errors
/// When it cannot be written; what stood at `path` stays then.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let beside = |what: &str| {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        path.with_file_name(format!(".{name}.{what}-{}", std::process::id()))
    };
    let (aside, old) = (beside("tmp"), beside("old"));
    let run = || -> anyhow::Result<()> {
        // numbers of processes repeat, in containers at each start
        let _ = std::fs::remove_dir_all(&aside);
        std::fs::create_dir_all(&aside).with_context(|| format!("{} cannot be created", aside.display()))?;
        write(&aside)?;
        for entry in std::fs::read_dir(&aside)? {
            File::open(entry?.path())?.sync_all()?;
        }
        sync_folder(&aside)?;
        if !(path.exists() && exchange(&aside, path)) {
            if path.exists() {
                std::fs::rename(path, &old).with_context(|| format!("{} cannot be moved aside", path.display()))?;
            }
            std::fs::rename(&aside, path)
                .with_context(|| format!("{} cannot be renamed into place", aside.display()))?;
        }
        path.parent().map_or(Ok(()), sync_folder)
    };
    let done = run();
    let _ = std::fs::remove_dir_all(&aside);
    if done.is_err() && !path.exists() && old.exists() {
        let _ = std::fs::rename(&old, path);
    }
    let _ = std::fs::remove_dir_all(&old);
    done
}

/// Lets two folders change places in one step. False where the system cannot.
fn exchange(a: &Path, b: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        false
    }
}
