//! Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and a supervisor's warning (SIGUSR1, as Slurm sends it) ask the run to save
//! and stop; a second one of them ends it at once. A limit on CPU time asks too (SIGXCPU), again and again until its hard end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

#[cfg(unix)]
const STOP: [i32; 4] = [SIGINT, SIGTERM, signal_hook::consts::SIGHUP, signal_hook::consts::SIGUSR1];
#[cfg(not(unix))]
const STOP: [i32; 2] = [SIGINT, SIGTERM];

/// A write beyond the limit on file sizes (`ulimit -f`, quotas of clusters) is an error of that write, with a message, and not
/// the end of the process.
pub fn survive_file_limits() {
    // where the handler cannot be installed the system's own behaviour is what there is
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}

/// Asks the system for SIGUSR2 when the process that started this one ends, however it ends: a run of a comparison that was
/// killed saves and stops, and is no stranger in its folder when the comparison goes on. Only Linux can; elsewhere the run goes on
/// to its end, and the comparison waits for it.
///
/// Linux sends it again for every thread of the parent that ends, so it is none of the signals of which a second one means "at once".
pub fn end_with_parent(parent: u32) {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal};
        let asked = set_parent_process_death_signal(Some(Signal::USR2));
        // it may have ended before it was asked for
        if asked.is_ok() && getppid().map(Pid::as_raw_pid) != i32::try_from(parent).ok() {
            let _ = kill_process(getpid(), Signal::USR2);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = parent;
}

/// Set once a signal arrived.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Installs the handlers.
    pub fn install() -> anyhow::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in STOP {
            // registered first, so that it sees the flag of an earlier signal only
            signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())?;
            signal_hook::flag::register(signal, flag.clone())?;
        }
        #[cfg(unix)]
        for again in [signal_hook::consts::SIGUSR2, signal_hook::consts::SIGXCPU] {
            signal_hook::flag::register(again, flag.clone())?;
        }
        Ok(Interrupt(flag))
    }

    /// Whether to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
