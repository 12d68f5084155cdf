//! One process a run folder: two that wrote into one would lose each other's records and checkpoints.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use anyhow::Context;
use dash_data::files::{open_lock, try_lock};

use crate::failure::{Failure, Result};

/// Holds a run folder. The operating system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the folder, which is made if it is not there.
    ///
    /// # Errors
    /// A wrong request when another process holds it; a failed run when the folder cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("{} cannot be created", folder.display()))?;
        let path = folder.join("run.lock");
        let mut file = open_lock(&path).with_context(|| format!("{} cannot be opened", path.display()))?;
        if !try_lock(&file).with_context(|| format!("{} cannot be locked", path.display()))? {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let holder = holder.trim();
            let holder = if holder.is_empty() { "another process" } else { holder };
            return Err(Failure::request(format!(
                "{}: {holder} works in this folder; wait for its end, or choose another name with --set run.name=NAME",
                folder.display()
            )));
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let note = format!("process {} on {}\n", std::process::id(), host.trim());
        // for the message above alone
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(note.as_bytes()));
        Ok(RunLock { _file: file })
    }

    /// Takes a folder that was worked in before, as soon as nobody holds it; `told` is called once if somebody does. Nothing where no
    /// process ever worked, or where the file system has no locks.
    pub fn wait(folder: &Path, told: impl FnOnce()) -> Option<Self> {
        let file = File::open(folder.join("run.lock")).ok()?;
        if matches!(try_lock(&file), Ok(false)) {
            told();
        }
        file.lock().ok()?;
        Some(RunLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_held_by_one_and_free_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let held = RunLock::take(&dir.path().join("run")).unwrap();
        let refused = RunLock::take(&dir.path().join("run")).unwrap_err();
        assert_eq!(refused.status(), 2);
        let Failure::Request(e) = refused else { panic!("a wrong request") };
        assert!(e.to_string().contains(&format!("process {}", std::process::id())), "{e}");
        let (told, hears) = std::sync::mpsc::channel();
        let folder = dir.path().join("run");
        let waits = std::thread::spawn(move || RunLock::wait(&folder, || told.send(()).unwrap()).is_some());
        hears.recv().unwrap();
        drop(held);
        assert!(waits.join().unwrap());
        RunLock::take(&dir.path().join("run")).unwrap();
        assert!(RunLock::wait(&dir.path().join("none"), || panic!("nobody holds it")).is_none());
    }
}
