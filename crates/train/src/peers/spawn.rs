//! The launcher of `--processes` and of Kubeflow's Trainer v2: starts the processes of one host and ends with them.

use std::ffi::OsString;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::seat::{Brood, Place};
use crate::failure::{Failure, Result};
use crate::signals::Interrupt;

/// How long the others have to end by themselves after one failed.
const GRACE: Duration = Duration::from_secs(8);

/// NVLink multicast stays off: nothing here uses it (only send and receive are called), NCCL reserves memory for it, and on shared hosts it has
/// put cards out of service.
const SETTING: (&str, &str) = ("NCCL_NVLS_ENABLE", "0");

/// Whether NCCL would start with settings that are not meant.
pub fn lacks_settings() -> bool {
    cfg!(unix) && std::env::var_os(SETTING.0).is_none()
}

/// This program again, in this process, with NCCL's settings: a program may not change its environment while it has threads.
///
/// # Errors
/// When the program cannot be started; otherwise it does not return.
pub fn again_with_settings() -> Result<()> {
    let program = std::env::current_exe().context("where this program lies")?;
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(1)).env(SETTING.0, SETTING.1);
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        Err(anyhow!("{}: {}", program.display(), command.exec()).into())
    }
    #[cfg(not(unix))]
    {
        Err(anyhow!("{} cannot be started again here", program.display()).into())
    }
}

/// So many processes of this host alone, which meet at a free port.
///
/// # Errors
/// When there is no free port.
pub fn of_this_host(processes: usize) -> Result<Brood> {
    let free = || TcpListener::bind(("127.0.0.1", 0))?.local_addr();
    let port = free().context("127.0.0.1 has no free port")?.port();
    Ok(Brood { ranks: 0..processes, world: processes, place: Place { host: "127.0.0.1".into(), port } })
}

/// The arguments of this process without `--processes`.
fn arguments(all: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::new();
    let mut all = all.skip(1);
    while let Some(word) = all.next() {
        if word == "--processes" {
            all.next();
        } else if !word.to_string_lossy().starts_with("--processes=") {
            out.push(word);
        }
    }
    out
}

/// What nobody guesses: 128 bits that the system has chosen.
fn random_token() -> String {
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

fn start(brood: &Brood, token: &str) -> anyhow::Result<Vec<Child>> {
    let program = std::env::current_exe().context("where this program lies")?;
    let words = arguments(std::env::args_os());
    let mut children = Vec::new();
    for (local, rank) in brood.ranks.clone().enumerate() {
        let mut command = Command::new(&program);
        command.args(&words).arg("--with-parent").arg(std::process::id().to_string());
        let numbers = [
            ("RANK", rank),
            ("WORLD_SIZE", brood.world),
            ("LOCAL_RANK", local),
            ("LOCAL_WORLD_SIZE", brood.ranks.len()),
        ];
        command.envs(numbers.map(|(name, value)| (name, value.to_string())));
        command.env("MASTER_ADDR", &brood.place.host).env("MASTER_PORT", brood.place.port.to_string());
        if lacks_settings() {
            command.env(SETTING.0, SETTING.1);
        }
        command.env("DASHLAB_TOKEN", token).env_remove("TORCHELASTIC_USE_AGENT_STORE");
        #[cfg(unix)]
        {
            // a key of the terminal reaches this process alone, which hands it on once
            use std::os::unix::process::CommandExt;
            command.process_group(0);
        }
        match command.spawn() {
            Ok(child) => children.push(child),
            Err(e) => {
                children.iter_mut().for_each(|c| _ = c.kill());
                return Err(e).with_context(|| format!("process {rank} could not be started"));
            }
        }
    }
    Ok(children)
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    use rustix::process::{Pid, Signal, kill_process};
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::TERM);
    }
}

#[cfg(not(unix))]
fn interrupt(_: &Child) {}

/// What an exit status means for the command that started the process.
fn failure(rank: usize, status: ExitStatus) -> Failure {
    match status.code().map(u8::try_from) {
        // the process has told
        Some(Ok(130)) => Failure::Interrupted,
        Some(Ok(code)) => Failure::Elsewhere(code),
        _ => Failure::Run(anyhow!(
            "rank {rank} ended by {status}; the others were ended, too. --resume=auto goes on from the last checkpoint"
        )),
    }
}

/// Starts them, waits for all, and ends the others where one fails.
///
/// # Errors
/// That of the first that failed.
pub fn run(brood: &Brood) -> Result<()> {
    let token = std::env::var("DASHLAB_TOKEN").ok().filter(|t| !t.is_empty());
    let several_hosts = brood.ranks.len() < brood.world;
    // hosts cannot know what another one draws
    let token = token.unwrap_or_else(|| if several_hosts { String::new() } else { random_token() });
    let signal = Interrupt::install()?;
    let mut running: Vec<(usize, Child)> = brood.ranks.clone().zip(start(brood, &token)?).collect();
    let (mut failed, mut told): (Option<(Failure, Instant)>, bool) = (None, false);
    while !running.is_empty() {
        std::thread::sleep(Duration::from_millis(50));
        if signal.requested() && !told {
            told = true;
            running.iter().for_each(|(_, child)| interrupt(child));
        }
        let mut still = Vec::new();
        for (rank, mut child) in running {
            match child.try_wait().context("waiting for a process")? {
                None => still.push((rank, child)),
                Some(status) if status.success() => {}
                Some(status) => {
                    failed.get_or_insert_with(|| (failure(rank, status), Instant::now()));
                }
            }
        }
        running = still;
        if failed.as_ref().is_some_and(|(_, since)| since.elapsed() > GRACE) {
            running.iter_mut().for_each(|(_, child)| _ = child.kill());
        }
    }
    failed.map_or(Ok(()), |(failure, _)| Err(failure))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_get_the_command_line_without_their_number() {
        let words = |line: &str| arguments(line.split(' ').map(OsString::from));
        assert_eq!(words("train --processes 2 --config c.toml"), ["--config", "c.toml"]);
        assert_eq!(words("train --config c.toml --processes=2 --resume=auto"), ["--config", "c.toml", "--resume=auto"]);
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(random_token(), random_token());
        assert_eq!(random_token().len(), 32);
    }
}
