//! Files and locks that a crash leaves whole, with errors of the system's own: whoever calls names the file.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Result, Write};
use std::path::Path;

/// Writes a file that a power failure keeps.
///
/// # Errors
/// When it cannot be written.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Writes a file that only saves time: whole or not at all, first under the name `aside`. There is one such name for all, so that what a
/// kill leaves is written over. A folder that cannot be written has none.
pub fn write_hint(path: &Path, aside: &Path, text: &str) {
    if std::fs::write(aside, text).and_then(|()| std::fs::rename(aside, path)).is_err() {
        let _ = std::fs::remove_file(aside);
    }
}

/// Makes a rename or a new file in a folder survive a power failure. Only Unix can open a folder; elsewhere the rename itself is what
/// there is. The empty path is the current folder, as the parent of a relative name is.
///
/// # Errors
/// When the folder cannot be synced.
pub fn sync_folder(path: &Path) -> Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// A file that is open to be locked; made where there is none.
///
/// # Errors
/// When it cannot be opened for reading and writing.
pub fn open_lock(path: &Path) -> Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

/// Takes the lock of a file unless another process holds it. The system frees it at the end of this process, however that ends. On
/// a file system without locks, working without one is what there is: it counts as taken.
///
/// # Errors
/// When the system cannot tell.
pub fn try_lock(file: &File) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(true),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_one_holders_and_free_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let (first, second) = (open_lock(&path).unwrap(), open_lock(&path).unwrap());
        assert!(try_lock(&first).unwrap() && !try_lock(&second).unwrap());
        drop(first);
        assert!(try_lock(&second).unwrap());
    }

    #[test]
    fn the_parent_of_a_relative_name_is_the_current_folder() {
        sync_folder(Path::new("name").parent().unwrap()).unwrap();
        assert!(sync_folder(Path::new("no such folder")).is_err() || !cfg!(unix));
    }
}
