//! What this machine has left for a process: memory, disk and threads.

use std::path::Path;

use crate::config::MOST_THREADS;
use crate::failure::{Failure, Result};

/// Refuses numbers of threads in the environment that rayon, which reads them by itself, would try to start.
///
/// # Errors
/// Names the variable, its value and what to do.
pub fn check_environment() -> Result<()> {
    for name in ["RAYON_NUM_THREADS", "RAYON_RS_NUM_CPUS"] {
        let asked = std::env::var(name).ok().and_then(|value| value.parse::<usize>().ok());
        if let Some(asked) = asked.filter(|&n| n > MOST_THREADS) {
            return Err(Failure::request(format!(
                "{name} = {asked} in the environment: is above {MOST_THREADS} threads; unset it (one thread a logical core), or set \
                 run.threads"
            )));
        }
    }
    Ok(())
}

/// Bytes that a process can take before the system refuses or ends it: what the machine has free, what its control group may
/// still take, and what `ulimit -v` leaves. `None` where the system does not tell.
pub fn memory() -> Option<f64> {
    [free_memory(), group_memory(), address_space()].into_iter().flatten().min_by(f64::total_cmp)
}

/// Linux's estimate of what new work can take without swapping.
fn free_memory() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
}

/// The limit of the process's control group (version 2), as containers and batch systems set it.
fn group_memory() -> Option<f64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|l| l.strip_prefix("0::"))?.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let number = |folder: &Path, name: &str| -> Option<f64> {
        std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
    };
    // a group is held to the limits of all groups around it
    let groups = root.join(own);
    let groups = groups.ancestors().take_while(|g| g.starts_with(root));
    groups
        .filter_map(|g| Some(number(g, "memory.max")? - number(g, "memory.current").unwrap_or(0.0)))
        .min_by(f64::total_cmp)
}

/// What `ulimit -v` leaves.
fn address_space() -> Option<f64> {
    #[cfg(target_os = "linux")]
    {
        let limit = rustix::process::getrlimit(rustix::process::Resource::As).current?;
        let text = std::fs::read_to_string("/proc/self/statm").ok()?;
        let pages: f64 = text.split_whitespace().next()?.parse().ok()?;
        Some(limit as f64 - pages * rustix::param::page_size() as f64)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Bytes free for this user on the file system of the nearest folder of `path` that exists.
pub fn disk(path: &Path) -> Option<f64> {
    #[cfg(unix)]
    {
        let path = std::path::absolute(path).ok()?;
        let found = path.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
        Some(found.f_bavail as f64 * found.f_frsize as f64)
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_memory_and_disk() {
        assert!(memory().is_some_and(|bytes| bytes > 1e6));
        assert!(disk(Path::new("not/there/yet")).is_some_and(|bytes| bytes > 0.0));
    }
}
