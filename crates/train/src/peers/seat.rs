//! Which of how many processes this one is: read from what launchers put into the environment.
//!
//! | launcher | what it sets |
//! |---|---|
//! | torchrun, Kubeflow's PyTorchJob, `--processes` | `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` |
//! | Open MPI's mpirun | `OMPI_COMM_WORLD_RANK`, `..._SIZE`, `..._LOCAL_RANK`, `..._LOCAL_SIZE` |
//! | MPICH's and Intel's mpirun | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` |
//! | srun | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID`, `SLURM_STEP_TASKS_PER_NODE`, `SLURM_STEP_NODELIST` |
//! | Kubeflow's Trainer v2 | `PET_NNODES`, `PET_NPROC_PER_NODE`, `PET_NODE_RANK`, `PET_MASTER_ADDR`, `PET_MASTER_PORT`: one process a host, which starts the others |
//!
//! The first that is there counts; srun before PMI where it sets both. A job script of Slurm (the batch step) has `SLURM_NTASKS` of all steps and is one process: only
//! the variables of a step count.

use std::ops::Range;

use crate::failure::{Failure, Result};

/// What started the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Nothing: there is one process.
    None,
    /// torchrun, Kubeflow's PyTorchJob, or `--processes`.
    Ranks,
    /// mpirun of Open MPI.
    OpenMpi,
    /// mpirun of MPICH or Intel.
    Mpich,
    /// srun.
    Slurm,
}

impl Launcher {
    /// Whether MPI knows the processes that it started.
    pub fn starts_mpi(self) -> bool {
        match self {
            Launcher::OpenMpi | Launcher::Mpich | Launcher::Slurm => true,
            Launcher::None | Launcher::Ranks => false,
        }
    }
}

/// Where the first process is met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// A process among all of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Its number, from 0.
    pub rank: usize,
    /// Number of processes.
    pub world: usize,
    /// Its number among those of its host.
    pub local_rank: usize,
    /// Processes of its host.
    pub local_world: usize,
    /// What started it.
    pub launcher: Launcher,
    /// Where the first one is met; none where the launcher does not say.
    pub place: Option<Place>,
}

/// Processes that this one is asked to start on its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brood {
    /// Ranks of this host.
    pub ranks: Range<usize>,
    /// Number of processes on all hosts.
    pub world: usize,
    /// Where the first one is met.
    pub place: Place,
}

/// What the environment asks of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// To be one of some.
    Sit(Seat),
    /// To start some.
    Spawn(Brood),
}

/// Port where neither launcher nor user names one.
const PORT: u16 = 29_577;
/// Processes of a run at most.
const MOST: usize = u16::MAX as usize;

impl Seat {
    /// The only process.
    pub fn alone() -> Self {
        Seat { rank: 0, world: 1, local_rank: 0, local_world: 1, launcher: Launcher::None, place: None }
    }

    fn checked(self, names: &str) -> Result<Self> {
        let Seat { rank, world, local_rank, local_world, .. } = self;
        few_enough(names, Some(world))?;
        if world == 0 || rank >= world || local_rank >= local_world.max(1) || local_world > world {
            return Err(Failure::request(format!(
                "{names}: process {rank} of {world}, on this host {local_rank} of {local_world}, cannot be; ranks count from 0. Start all \
                 processes by one launcher, or unset these variables"
            )));
        }
        if world == 1 { Ok(Seat::alone()) } else { Ok(self) }
    }
}

/// What says that there are several processes. Whoever starts a process of its own, not one of these, leaves them out.
pub const VARIABLES: [&str; 9] = [
    "RANK",
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "PET_NNODES",
];

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A number of processes that some machine has; none where it does not fit a number.
fn few_enough(names: &str, world: Option<usize>) -> Result<usize> {
    world.filter(|&world| world <= MOST).ok_or_else(|| {
        Failure::request(format!("{names}: more than {MOST} processes; a launcher sets these, or unset them"))
    })
}

/// A variable that counts something.
fn number(env: Env, name: &str) -> Result<Option<usize>> {
    let Some(text) = env(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let wrong =
        || Failure::request(format!("{name}: {text:?} is no number from 0 on; a launcher sets it, or unset it"));
    text.trim().parse().map(Some).map_err(|_| wrong())
}

fn required(env: Env, name: &str, beside: &str) -> Result<usize> {
    number(env, name)?.ok_or_else(|| {
        Failure::request(format!(
            "{beside} is set and {name} is not; a launcher sets both. Unset {beside} for one process"
        ))
    })
}

fn port(env: Env, name: &str) -> Result<Option<u16>> {
    let Some(port) = number(env, name)? else { return Ok(None) };
    let wrong = |_| Failure::request(format!("{name}: {port} is no TCP port, which is at most 65535"));
    u16::try_from(port).map(Some).map_err(wrong)
}

/// Where the first process is met: `DASHLAB_PORT` before what the launcher says.
fn place(env: Env, host: Option<String>, by_launcher: Option<u16>) -> Result<Option<Place>> {
    let port = port(env, "DASHLAB_PORT")?.or(by_launcher).unwrap_or(PORT);
    Ok(host.filter(|host| !host.is_empty()).map(|host| Place { host, port }))
}

fn of_ranks(env: Env) -> Result<Seat> {
    let rank = required(env, "RANK", "WORLD_SIZE")?;
    let world = required(env, "WORLD_SIZE", "RANK")?;
    let mut by_launcher = port(env, "MASTER_PORT")?;
    if env("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|x| x == "True") {
        // torchrun itself listens there
        by_launcher = by_launcher.map(|port| port.checked_add(1).unwrap_or(port - 1));
    }
    let seat = Seat {
        rank,
        world,
        local_rank: number(env, "LOCAL_RANK")?.unwrap_or(0),
        local_world: number(env, "LOCAL_WORLD_SIZE")?.unwrap_or(1),
        launcher: Launcher::Ranks,
        place: place(env, env("MASTER_ADDR"), by_launcher)?,
    };
    seat.checked("RANK, WORLD_SIZE")
}

/// The address where the launcher names none: all processes on one host meet there.
fn of_one_host(env: Env, local_world: usize, world: usize) -> Option<String> {
    env("MASTER_ADDR").or_else(|| (local_world == world).then(|| "127.0.0.1".to_string()))
}

fn of_mpi(env: Env, launcher: Launcher, names: [&str; 4]) -> Result<Seat> {
    let [rank, world, local_rank, local_world] = names;
    let (rank_of, world_of) = (required(env, rank, world)?, required(env, world, rank)?);
    let local = number(env, local_world)?.unwrap_or(1);
    let host = of_one_host(env, local, world_of);
    let seat = Seat {
        rank: rank_of,
        world: world_of,
        local_rank: number(env, local_rank)?.unwrap_or(0),
        local_world: local,
        launcher,
        place: place(env, host, port(env, "MASTER_PORT")?)?,
    };
    seat.checked(&format!("{rank}, {world}"))
}

/// The first host of a list as Slurm writes it: `node[03-05,09],login` is `node03`.
fn first_host(list: &str) -> Option<String> {
    let end = |text: &str, stops: &[char]| text.find(stops).unwrap_or(text.len());
    let (name, rest) = list.split_at(end(list, &['[', ',']));
    let Some(inside) = rest.strip_prefix('[') else { return Some(name.to_string()).filter(|n| !n.is_empty()) };
    let (ranges, after) = inside.split_once(']')?;
    let suffix = &after[..end(after, &['[', ','])];
    Some(format!("{name}{}{suffix}", &ranges[..end(ranges, &['-', ','])]))
}

/// Tasks on the node of a step, from `8(x2),4`: of the node that has `node` nodes before it.
fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    for part in list.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        before += times;
        if node < before {
            return tasks.trim().parse().ok();
        }
    }
    None
}

fn of_slurm(env: Env) -> Result<Seat> {
    let rank = required(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")?;
    let world = required(env, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")?;
    let node = number(env, "SLURM_NODEID")?.unwrap_or(0);
    let local_rank = number(env, "SLURM_LOCALID")?.unwrap_or(0);
    let tasks = env("SLURM_STEP_TASKS_PER_NODE").and_then(|list| tasks_of_node(&list, node));
    let job = number(env, "SLURM_JOB_ID")?.unwrap_or(0);
    // where jax meets, too: in the range that no system gives to clients by itself
    let by_launcher = port(env, "MASTER_PORT")?.or(Some((job % 4096 + 61_440) as u16));
    let host = env("MASTER_ADDR").or_else(|| env("SLURM_STEP_NODELIST").and_then(|list| first_host(&list)));
    let seat = Seat {
        rank,
        world,
        local_rank,
        local_world: tasks.unwrap_or(local_rank + 1),
        launcher: Launcher::Slurm,
        place: place(env, host, by_launcher)?,
    };
    seat.checked("SLURM_PROCID, SLURM_STEP_NUM_TASKS")
}

fn of_trainer(env: Env) -> Result<Asked> {
    let nodes = env("PET_NNODES").unwrap_or_default();
    // an elastic range, `2:4`, starts with the least
    let nodes = nodes.split(':').next().unwrap_or_default().parse::<usize>();
    let nodes = nodes.map_err(|_| Failure::request("PET_NNODES is no number of hosts".to_string()))?;
    let each = env("PET_NPROC_PER_NODE").unwrap_or_else(|| "1".into());
    let each = each.parse::<usize>().ok().filter(|&n| n > 0).ok_or_else(|| {
        Failure::request(format!(
            "PET_NPROC_PER_NODE: {each:?}; give a number, as many as a host has GPUs (numProcPerNode)"
        ))
    })?;
    let node = number(env, "PET_NODE_RANK")?.unwrap_or(0);
    if node >= nodes {
        return Err(Failure::request(format!("PET_NODE_RANK: {node} of {nodes} hosts, counted from 0")));
    }
    let world = few_enough("PET_NNODES, PET_NPROC_PER_NODE", nodes.checked_mul(each))?;
    if world == 1 {
        return Ok(Asked::Sit(Seat::alone()));
    }
    let host = env("PET_MASTER_ADDR").or_else(|| (nodes == 1).then(|| "127.0.0.1".into()));
    let place = place(env, host, port(env, "PET_MASTER_PORT")?)?;
    let place = place.ok_or_else(|| Failure::request("PET_NNODES is above 1 and PET_MASTER_ADDR is not set"))?;
    Ok(Asked::Spawn(Brood { ranks: node * each..(node + 1) * each, world, place }))
}

/// Whether srun speaks PMI (`--mpi=pmi2`, on many clusters without being asked) to processes that it started itself: then its own
/// variables say the same and more, the number on the host and where all meet.
fn srun_sets_both(env: Env) -> bool {
    let same = |pmi: &str, slurm: &str| env(pmi).is_some_and(|text| !text.is_empty() && env(slurm) == Some(text));
    same("PMI_RANK", "SLURM_PROCID") && same("PMI_SIZE", "SLURM_STEP_NUM_TASKS") && env("MPI_LOCALRANKID").is_none()
}

/// What the environment asks of this process.
///
/// # Errors
/// A wrong request when it says what cannot be: which variable, and what to do.
pub fn asked(env: Env) -> Result<Asked> {
    let has = |name: &str| env(name).is_some_and(|text| !text.is_empty());
    let open_mpi = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"].map(|name| format!("OMPI_COMM_WORLD_{name}"));
    let open_mpi = open_mpi.each_ref().map(String::as_str);
    let mpich = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
    if has("RANK") || has("WORLD_SIZE") {
        of_ranks(env).map(Asked::Sit)
    } else if has(open_mpi[0]) || has(open_mpi[1]) {
        of_mpi(env, Launcher::OpenMpi, open_mpi).map(Asked::Sit)
    } else if srun_sets_both(env) {
        of_slurm(env).map(Asked::Sit)
    } else if has("PMI_RANK") || has("PMI_SIZE") {
        of_mpi(env, Launcher::Mpich, mpich).map(Asked::Sit)
    } else if has("SLURM_STEP_NUM_TASKS") && has("SLURM_STEP_NODELIST") {
        of_slurm(env).map(Asked::Sit)
    } else if has("PET_NNODES") {
        of_trainer(env)
    } else {
        Ok(Asked::Sit(Seat::alone()))
    }
}

#[cfg(test)]
mod tests;
