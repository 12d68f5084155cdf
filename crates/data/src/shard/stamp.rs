//! A shard is read in full once. What was found whole is remembered beside it by size, time of change and header checksum, so that
//! later starts take no time that grows with the corpus. A disk that flips a bit later goes unnoticed: delete the stamps to check again.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::files::write_hint;

/// A file changed this recently may be changed again within one tick of the file system's clock, without another time.
const SETTLED: Duration = Duration::from_secs(2);

fn place(shard: &Path) -> PathBuf {
    let mut name = shard.as_os_str().to_owned();
    name.push(".verified");
    name.into()
}

fn content(metadata: &Metadata, header: u64) -> Option<String> {
    let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!(
        "{} bytes, changed {}.{:09}, header {header:016x}\n",
        metadata.len(),
        changed.as_secs(),
        changed.subsec_nanos()
    ))
}

/// Whether the stamp of a shard is of this very file.
pub(super) fn holds(shard: &Path, metadata: &Metadata, header: u64) -> bool {
    let told = std::fs::read_to_string(place(shard)).ok();
    told.is_some() && told == content(metadata, header)
}

/// Leaves a stamp, if the file has settled and the folder can be written.
pub(super) fn leave(shard: &Path, metadata: &Metadata, header: u64) {
    let settled = metadata.modified().is_ok_and(|t| SystemTime::now().duration_since(t).is_ok_and(|d| d >= SETTLED));
    let Some(text) = content(metadata, header).filter(|_| settled) else { return };
    write_hint(&place(shard), &shard.with_extension("verified-new"), &text);
}
