//! Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and a supervisor's warning (SIGUSR1, as Slurm sends it) ask the run to save
//! and stop; a second one of them ends it at once.

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
        Ok(Interrupt(flag))
    }

    /// Whether to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
