//! Several processes that train one model: one a device, the same program and configuration in each.
//!
//! An engine moves bytes and adds nothing: NCCL between GPUs, MPI between CPUs. All sums are ops of this project in the tree of
//! [`crate::training::accumulate`], so 1, 2, 4 ... processes give the same bits.
//!
//! | file | what it holds |
//! |---|---|
//! | `seat.rs` | which of how many processes this one is, from the environment of launchers |
//! | `spawn.rs` | the launcher of `--processes` |
//! | `hello.rs` | what processes must have in common |
//! | `meeting.rs`, `star.rs`, `frame.rs` | sockets around the first process: how they meet, agree, and notice that one is gone |
//! | `together.rs` | steps that all make, or one for all, and their failures |
//! | `mpi.rs` | MPI, where it is compiled in (feature `mpi`) |
//! | `threads.rs` | threads in place of processes, for tests |

mod bytes;
mod frame;
pub mod hello;
mod meeting;
#[cfg(feature = "mpi")]
mod mpi;
pub mod seat;
pub mod spawn;
mod star;
#[cfg(test)]
mod threads;
mod together;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::anyhow;
use dash_core::communicator::{Communicator, Incoming, NcclId};
use dash_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::console::tell;
use crate::failure::{Failure, Result};
use hello::Hello;
use seat::Seat;
use star::{Star, lock};

/// This process among those of its run.
#[derive(Clone)]
pub enum Peers {
    /// The only one.
    Alone,
    /// On GPUs.
    Nccl(Arc<Nccl>),
    /// On CPUs.
    #[cfg(feature = "mpi")]
    Mpi(Arc<Mutex<mpi::Mpi>>),
    /// A thread of a test.
    #[cfg(test)]
    Threads(threads::Threads),
}

/// GPUs: tensors go by NCCL, all else by sockets.
pub struct Nccl {
    place: (usize, usize),
    star: Star,
    /// From when the device is there.
    communicator: Mutex<Option<Communicator>>,
}

impl Peers {
    /// Meets the other processes. GPUs are connected later, by [`Peers::connect`].
    ///
    /// # Errors
    /// A wrong request when nothing here can connect them, when they do not belong together, or when one does not come.
    pub fn join(seat: &Seat, hello: &Hello, on_gpu: bool, patience: Duration) -> Result<Self> {
        if seat.world == 1 {
            return Ok(Peers::Alone);
        }
        if !on_gpu {
            return Self::join_mpi(seat, hello, patience);
        }
        let place = seat.place.as_ref().ok_or_else(|| {
            Failure::request(format!(
                "{} processes on several hosts, and no address where they meet: set MASTER_ADDR to the host of rank 0 (mpirun -x MASTER_ADDR=...)",
                seat.world
            ))
        })?;
        let star = Star::meet(hello, place, (patience, patience))?;
        Ok(Peers::Nccl(Arc::new(Nccl { place: (seat.rank, seat.world), star, communicator: Mutex::new(None) })))
    }

    #[cfg(not(feature = "mpi"))]
    fn join_mpi(seat: &Seat, _: &Hello, _: Duration) -> Result<Self> {
        Err(Failure::request(format!(
            "{} processes on CPUs need MPI, which this program was built without: cargo build -p train --features mpi, then mpirun -n {} \
             --bind-to none. Threads (run.threads) use all cores of one host without it",
            seat.world, seat.world
        )))
    }

    #[cfg(feature = "mpi")]
    fn join_mpi(seat: &Seat, hello: &Hello, patience: Duration) -> Result<Self> {
        let n = seat.world;
        if !seat.launcher.starts_mpi() {
            return Err(Failure::request(format!(
                "{n} processes on CPUs are started by MPI: mpirun -n {n} --bind-to none train ..."
            )));
        }
        let mpi = mpi::Mpi::join(seat.rank, patience)?;
        if mpi.place() != (seat.rank, n) {
            let (rank, world) = mpi.place();
            return Err(Failure::request(format!(
                "the environment says process {} of {n}, MPI says {rank} of {world}; start with the mpirun or srun of the MPI that this program \
                 was built with",
                seat.rank
            )));
        }
        let peers = Peers::Mpi(Arc::new(Mutex::new(mpi)));
        let all: Vec<Hello> = match peers.agree(hello) {
            Ok(all) => all,
            Err(failure) => {
                let result = Err(failure);
                peers.leave(&result);
                return result.map(|()| peers);
            }
        };
        match Hello::refuse_any(&all) {
            None => Ok(peers),
            Some(why) => {
                let result = Err(peers.alike(Failure::request(why)));
                peers.leave(&result);
                result.map(|()| peers)
            }
        }
    }

    /// Rank, from 0, and number of processes.
    pub fn place(&self) -> (usize, usize) {
        match self {
            Peers::Alone => (0, 1),
            Peers::Nccl(n) => n.place,
            #[cfg(feature = "mpi")]
            Peers::Mpi(mpi) => lock(mpi).place(),
            #[cfg(test)]
            Peers::Threads(t) => t.place(),
        }
    }

    /// Number of this process.
    pub fn rank(&self) -> usize {
        self.place().0
    }

    /// Number of processes.
    pub fn world(&self) -> usize {
        self.place().1
    }

    /// Whether it is the one that writes files and tells of the run.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Which of `all` micro-batches are this one's: a contiguous block.
    pub fn block(&self, all: usize) -> Range<usize> {
        let (rank, world) = self.place();
        rank * all / world..(rank + 1) * all / world
    }

    /// Connects the devices, where they are GPUs; `folders` may hold NCCL.
    ///
    /// # Errors
    /// When NCCL is not there, or cannot connect them.
    pub fn connect(&self, device: &Device, folders: &[PathBuf]) -> Result<()> {
        let Peers::Nccl(nccl) = self else { return Ok(()) };
        let missing = |e: dash_core::Error| {
            Failure::request(format!(
                "{e}\nSeveral GPUs need NCCL (pip install nvidia-nccl-cu13, or libnccl2 of your system)"
            ))
        };
        let library = self.all(Communicator::library(folders).map_err(missing))?;
        let request = |e: dash_core::Error| {
            Failure::request(format!(
                "{e}\nEach process needs a GPU of its own: run.device = \"cuda\" takes the one with its number on the host"
            ))
        };
        let version = library
            .version()
            .ok()
            .map(|(v, path)| format!("{}.{}.{} ({})", v / 10_000, v / 100 % 100, v % 100, path.display()));
        let id = self.first(|| Ok(library.new_id().map_err(request)?.0.to_vec()))?;
        let id = NcclId(id.try_into().map_err(|_| anyhow!("an identity of NCCL has 128 bytes"))?);
        let made = Communicator::new(library, device, id, nccl.place).map_err(request);
        *lock(&nccl.communicator) = Some(self.all(made)?);
        if self.is_first()
            && let Some(version) = version
        {
            tell!("NCCL {version} connects {} GPUs", self.world());
        }
        Ok(())
    }

    /// What all processes say, by rank.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn agree<T: Serialize + for<'a> Deserialize<'a>>(&self, own: &T) -> Result<Vec<T>> {
        self.say(own, false)
    }

    fn say<T: Serialize + for<'a> Deserialize<'a>>(&self, own: &T, patient: bool) -> Result<Vec<T>> {
        let own = postcard::to_stdvec(own).map_err(anyhow::Error::from)?;
        let all = match self {
            Peers::Alone => vec![own],
            Peers::Nccl(n) => n.star.agree(own, patient)?,
            #[cfg(feature = "mpi")]
            Peers::Mpi(mpi) => lock(mpi).agree(own, patient)?,
            #[cfg(test)]
            Peers::Threads(t) => t.agree(own),
        };
        let read = |(rank, bytes): (usize, &Vec<u8>)| {
            postcard::from_bytes(bytes)
                .map_err(|e| Failure::Run(anyhow!("rank {rank} is at another place of the program: {e}")))
        };
        let all = all.iter().enumerate().map(read).collect::<Result<Vec<T>>>()?;
        if all.len() != self.world() {
            return Err(Failure::Run(anyhow!("{} of {} processes answered", all.len(), self.world())));
        }
        Ok(all)
    }

    /// What all processes have, in the order of the ranks.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn concat<T: Serialize + for<'a> Deserialize<'a>>(&self, own: Vec<T>) -> Result<Vec<T>> {
        match self {
            Peers::Alone => Ok(own),
            _ => Ok(self.agree(&own)?.into_iter().flatten().collect()),
        }
    }

    /// Whether one of them says so.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn any(&self, own: bool) -> Result<bool> {
        match self {
            Peers::Alone => Ok(own),
            _ => Ok(self.agree(&own)?.contains(&true)),
        }
    }

    /// Sends tensors to other processes and receives what they send to this one, on `device`: between two processes in the order of both
    /// lists.
    ///
    /// # Errors
    /// When one does not answer, or memory runs out.
    pub fn exchange(&self, device: &Device, sends: &[(usize, &Tensor)], receives: &[Incoming]) -> Result<Vec<Tensor>> {
        #[cfg(any(feature = "mpi", test))]
        let by_bytes = |way: &dyn Fn(bytes::Sent, bytes::Coming) -> Result<Vec<Vec<u8>>>| {
            let out = sends.iter().map(|(to, x)| Ok((*to, bytes::of(x)?))).collect::<Result<Vec<_>>>()?;
            let coming = receives.iter().map(|i| (i.from, bytes::length(i))).collect();
            let got = way(out, coming)?;
            receives.iter().zip(got).map(|(i, x)| Ok(bytes::tensor(device, i, &x)?)).collect::<Result<Vec<Tensor>>>()
        };
        match self {
            Peers::Alone => {
                let _ = device;
                assert!(sends.is_empty() && receives.is_empty(), "there is nobody else");
                Ok(Vec::new())
            }
            Peers::Nccl(n) => {
                let mut communicator = lock(&n.communicator);
                let communicator = communicator.as_mut().ok_or_else(|| anyhow!("the GPUs are not connected"))?;
                Ok(communicator.exchange(sends, receives)?)
            }
            #[cfg(feature = "mpi")]
            Peers::Mpi(mpi) => by_bytes(&|out, coming| lock(mpi).exchange(out, coming)),
            #[cfg(test)]
            Peers::Threads(t) => by_bytes(&|out, coming| Ok(t.exchange(out, &coming))),
        }
    }

    /// From now on (or no longer) all agree once an update: where none ends for long, the process ends.
    pub fn expect_updates(&self, training: bool) {
        if let Peers::Nccl(n) = self {
            n.star.expect_updates(training);
        }
    }

    /// A step that takes as long as it takes, while training too.
    fn patiently<T>(&self, step: impl FnOnce() -> T) -> T {
        match self {
            Peers::Nccl(n) => n.star.patiently(step),
            _ => step(),
        }
    }

    /// Ends it: in order where the run ended in the same way everywhere, else the others hear why.
    pub fn leave(&self, result: &Result<()>) {
        match self {
            Peers::Alone => {}
            Peers::Nccl(n) => {
                if result.is_ok()
                    && let Some(communicator) = lock(&n.communicator).take()
                {
                    // what the run has made is on disk already
                    let _ = communicator.finish();
                }
                match result {
                    Ok(()) | Err(Failure::Interrupted | Failure::Elsewhere(_)) => n.star.leave(),
                    Err(e) => n.star.fail(&e.to_string()),
                }
            }
            #[cfg(feature = "mpi")]
            Peers::Mpi(mpi) => lock(mpi).leave(result.as_ref().err()),
            #[cfg(test)]
            Peers::Threads(_) => {}
        }
    }
}

#[cfg(test)]
impl Peers {
    /// Threads of a test that behave as so many processes.
    pub fn threads(world: usize) -> Vec<Peers> {
        threads::Threads::group(world).into_iter().map(Peers::Threads).collect()
    }
}

#[cfg(test)]
mod tests;
