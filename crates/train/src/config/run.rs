//! `[run]`

use std::path::PathBuf;

use dash_model::Compute;
use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, wrong};

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Folder of the run inside `dir`; empty: the name of the configuration file.
    #[serde(default)]
    pub name: String,
    /// Folder of all runs.
    #[serde(default = "runs")]
    pub dir: PathBuf,
    /// Updates.
    pub steps: u64,
    /// Decides initial weights and data order.
    #[serde(default)]
    pub seed: u64,
    /// What it computes on. A GPU is an NVIDIA GPU of compute capability 8.0 or later; `model.compute` is `bf16` there unless it is
    /// given.
    #[serde(default = "cpu")]
    pub device: String,
    /// Worker threads, 0 for one per logical core. The result does not depend on it.
    #[serde(default)]
    pub threads: usize,
    /// Where several processes train: seconds that one waits for another, at the start and at every update. A process that is gone is noticed at
    /// once; this is for one that hangs.
    #[serde(default = "ten_minutes")]
    pub peer_timeout_s: u64,
}

fn ten_minutes() -> u64 {
    600
}

fn runs() -> PathBuf {
    "runs".into()
}

fn cpu() -> String {
    "cpu".into()
}

/// Threads at most: more than any machine has cores, and few enough that a system which grants them all is not drowned.
pub const MOST_THREADS: usize = 1024;

/// Seconds that a process waits for another at most.
const MOST_WAITING: u64 = 7 * 24 * 3600;

/// GPUs of one machine at most.
const MOST_GPUS: usize = 64;

/// `run.device`, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// Host memory and threads.
    Cpu,
    /// An NVIDIA GPU, by the driver's number.
    Cuda(usize),
}

impl DeviceName {
    /// `model.compute` where it is not given: what the device multiplies fastest without another loss.
    pub fn default_compute(self) -> Compute {
        match self {
            DeviceName::Cpu => Compute::F32,
            DeviceName::Cuda(_) => Compute::Bf16,
        }
    }
}

impl Run {
    /// Says what cannot run.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        positive("run.steps", self.steps as usize)?;
        let odd = |c: char| matches!(c, '/' | '\\') || c.is_control();
        if self.name.is_empty() || self.name.contains(odd) || self.name.starts_with('.') {
            return wrong("run.name", format!("{:?} is no folder name", self.name));
        }
        if self.threads > MOST_THREADS {
            let what = format!("{} is above {MOST_THREADS}; 0 takes one thread a logical core", self.threads);
            return wrong("run.threads", what);
        }
        positive("run.peer_timeout_s", usize::try_from(self.peer_timeout_s).unwrap_or(usize::MAX))?;
        if self.peer_timeout_s > MOST_WAITING {
            return wrong("run.peer_timeout_s", format!("{} is above {MOST_WAITING}, a week", self.peer_timeout_s));
        }
        self.device_name().map(|_| ())
    }

    /// The device, read.
    ///
    /// # Errors
    /// Key and reason.
    pub fn device_name(&self) -> Result<DeviceName, ConfigError> {
        let number = self.device.strip_prefix("cuda:").map(|n| n.parse::<usize>().ok().filter(|&n| n < MOST_GPUS));
        match (self.device.as_str(), number) {
            ("cpu", _) => Ok(DeviceName::Cpu),
            ("cuda", _) => Ok(DeviceName::Cuda(0)),
            (_, Some(Some(n))) => Ok(DeviceName::Cuda(n)),
            (other, _) => {
                let what = "\"cpu\", \"cuda\" and \"cuda:N\", N the number of a GPU as the driver counts, below";
                wrong("run.device", format!("{other:?} is none of {what} {MOST_GPUS}"))
            }
        }
    }
}
