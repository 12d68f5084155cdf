//! Where a corpus is prepared: a folder of its own, `.tmp-KEY`, which belongs to whoever holds the lock on `.lock-KEY` and is renamed
//! when it is complete. A lock is freed by the end of its process, however it ends: what lies there without a lock is a leftover.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};
use crate::files::{open_lock, sync_folder, try_lock};

/// A held lock.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // while it is held: whoever waits finds that it is not the file of that name any more, and starts anew
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether the file of this name is the one that was locked.
fn is_current(path: &Path, file: &File) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let ids = |m: std::io::Result<std::fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
        ids(std::fs::metadata(path)).is_some_and(|id| Some(id) == ids(file.metadata()))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

impl Lock {
    /// Takes a lock; `waiting` is called once if somebody else holds it.
    fn take(path: PathBuf, waiting: &mut dyn FnMut()) -> Result<Self> {
        let mut told = false;
        loop {
            let file = open_lock(&path).map_err(DataError::io(&path, "cannot be created"))?;
            let locked = try_lock(&file).and_then(|taken| {
                if taken {
                    return Ok(());
                }
                if !std::mem::replace(&mut told, true) {
                    waiting();
                }
                file.lock()
            });
            locked.map_err(DataError::io(&path, "cannot be locked"))?;
            if is_current(&path, &file) {
                return Ok(Lock { path, _file: file });
            }
        }
    }

    /// Takes a lock if nobody holds it. Without locks nobody can tell, and what may be another's is left alone.
    fn try_take(path: PathBuf) -> Option<Self> {
        let file = open_lock(&path).ok()?;
        file.try_lock().ok()?;
        is_current(&path, &file).then_some(Lock { path, _file: file })
    }
}

/// A folder that is being filled; removed unless it is finished.
pub(super) struct Place {
    aside: PathBuf,
    folder: PathBuf,
    finished: bool,
    _lock: Lock,
}

impl Place {
    /// The place to prepare `key` at, or nothing if it is there: prepared before, or by the process that was waited for.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn claim(cache: &Path, key: &str, waiting: &mut dyn FnMut()) -> Result<Option<Self>> {
        let folder = cache.join(key);
        if is_complete(&folder) {
            return Ok(None);
        }
        std::fs::create_dir_all(cache).map_err(DataError::io(cache, "cannot be created"))?;
        let lock = Lock::take(cache.join(format!(".lock-{key}")), waiting)?;
        if is_complete(&folder) {
            return Ok(None);
        }
        remove_leftovers(cache, Some(key));
        let aside = cache.join(format!(".tmp-{key}"));
        let _ = std::fs::remove_dir_all(&aside);
        std::fs::create_dir_all(&aside).map_err(DataError::io(&aside, "cannot be created"))?;
        Ok(Some(Place { aside, folder, finished: false, _lock: lock }))
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        &self.aside
    }

    /// Puts the folder where it belongs.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn finish(mut self) -> Result<()> {
        // what has the name without being complete was begun by nobody who still runs: the lock is held
        let _ = std::fs::remove_dir_all(&self.folder);
        sync_folder(&self.aside).map_err(DataError::io(&self.aside, "cannot be synced"))?;
        std::fs::rename(&self.aside, &self.folder)
            .map_err(DataError::io(&self.folder, "cannot be renamed into place"))?;
        self.finished = true;
        let cache = self.folder.parent().unwrap_or(Path::new(""));
        sync_folder(cache).map_err(DataError::io(cache, "cannot be synced"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_dir_all(&self.aside);
        }
    }
}

/// The report is written last.
pub(super) fn is_complete(folder: &Path) -> bool {
    folder.join("report.json").is_file()
}

/// Removes what preparations left that were killed; never what belongs to a running process, whose lock is held, nor what belongs to
/// the key `own`.
pub(super) fn remove_leftovers(cache: &Path, own: Option<&str>) {
    let Ok(entries) = std::fs::read_dir(cache) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let key = name.strip_prefix(".tmp-").or(name.strip_prefix(".lock-"));
        let Some(key) = key.filter(|key| Some(*key) != own) else { continue };
        if let Some(_lock) = Lock::try_take(cache.join(format!(".lock-{key}"))) {
            let _ = std::fs::remove_dir_all(cache.join(format!(".tmp-{key}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leftover_is_removed_and_the_folder_of_a_running_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (dead, alive) = (dir.path().join(".tmp-dead-77"), dir.path().join(".tmp-alive"));
        [&dead, &alive].iter().for_each(|d| std::fs::create_dir_all(d.join("x")).unwrap());
        let lock = Lock::take(dir.path().join(".lock-alive"), &mut || {}).unwrap();
        let place = Place::claim(dir.path(), "own", &mut || {}).unwrap().unwrap();
        assert!(!dead.exists() && alive.exists() && place.path().exists());
        drop(lock);
        drop(place);
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [".tmp-alive"], "locks and an unfinished folder are gone");
    }

    #[test]
    fn the_second_waits_for_the_first_and_finds_its_work() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::claim(dir.path(), "k", &mut || {}).unwrap().unwrap();
        let (told, hears) = std::sync::mpsc::channel();
        let cache = dir.path().to_path_buf();
        let second =
            std::thread::spawn(move || Place::claim(&cache, "k", &mut || told.send(()).unwrap()).unwrap().is_none());
        hears.recv().unwrap();
        std::fs::write(place.path().join("report.json"), "{}").unwrap();
        place.finish().unwrap();
        assert!(second.join().unwrap());
        assert!(is_complete(&dir.path().join("k")));
        assert!(!dir.path().join(".lock-k").exists());
    }

    #[test]
    fn two_at_once_never_hold_one_place() {
        let dir = tempfile::tempdir().unwrap();
        let inside = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    for _ in 0..50 {
                        let place = Place::claim(dir.path(), "k", &mut || {}).unwrap().unwrap();
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(place);
                    }
                });
            }
        });
    }
}
