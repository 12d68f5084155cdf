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
/// What a process that was killed set aside is removed.
///
/// # Errors
/// When it cannot be written; what stood at `path` stays then.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let beside = |what: &str| path.with_file_name(format!("{}-{}", aside_name(path, what), std::process::id()));
    let (aside, old) = (beside("tmp"), beside("old"));
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("{} cannot be created", parent.display()))?;
    let lock = lock_folder(parent);
    if lock.is_some() {
        remove_set_aside(parent, path);
    }
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
        sync_folder(parent)
    };
    let done = run();
    let _ = std::fs::remove_dir_all(&aside);
    if done.is_err() && !path.exists() && old.exists() {
        let _ = std::fs::rename(&old, path);
    }
    let _ = std::fs::remove_dir_all(&old);
    done
}

/// How the names begin under which something for `path` is set aside.
fn aside_name(path: &Path, what: &str) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    format!(".{name}.{what}")
}

/// Holds a folder, against others that replace something in it. Nothing where the file system knows no locks.
fn lock_folder(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    file.lock().ok()?;
    Some(file)
}

/// Removes what was set aside for `path` by processes that are gone: whoever lives holds the lock. An old folder that was moved
/// away without a new one in its place goes back.
fn remove_set_aside(parent: &Path, path: &Path) {
    let (aside, old) = (aside_name(path, "tmp-"), aside_name(path, "old-"));
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&old) && !path.exists() {
            let _ = std::fs::rename(entry.path(), path);
        } else if name.starts_with(&old) || name.starts_with(&aside) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_set_aside_is_removed_and_an_old_folder_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("hf");
        let put = |name: &str| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("file"), name).unwrap();
        };
        [".hf.tmp-77", ".hf.old-77", ".other.tmp-77"].iter().for_each(|name| put(name));
        let failed = replace_folder(&out, |_| anyhow::bail!("no"));
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert_eq!(std::fs::read_to_string(out.join("file")).unwrap(), ".hf.old-77");
        replace_folder(&out, |folder| Ok(std::fs::write(folder.join("file"), "new")?)).unwrap();
        assert_eq!(std::fs::read_to_string(out.join("file")).unwrap(), "new");
        let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".other.tmp-77", "hf"]);
    }
}
