//! MPI moves bytes between processes on CPUs, and adds nothing.
//!
//! One thread calls MPI, from its start to its end: implementations need not allow more (`MPI_THREAD_FUNNELED`), and the ops of an update
//! run on workers of a pool. It is asked through a channel, so whoever asks can also stop waiting.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::anyhow;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Root, Source};

use super::bytes::{Coming, Sent};
use crate::console::tell_error;
use crate::failure::{Failure, Result};

/// Bytes of one message: MPI counts in 32 bits.
const PIECE: usize = 1 << 30;
/// How long a process lets another one tell why all end.
const FAREWELL: Duration = Duration::from_secs(4);

enum Ask {
    /// What every process says, by rank.
    Agree(Vec<u8>),
    /// Bytes to send, and from whom how many are to come.
    Exchange(Sent, Coming),
    /// Ends all processes with this status.
    Abort(i32),
}

/// The thread that calls MPI.
pub struct Mpi {
    rank: usize,
    world: usize,
    ask: Option<Sender<Ask>>,
    answers: Receiver<Vec<Vec<u8>>>,
    patience: Duration,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Whether the thread waits inside MPI for a process that does not answer: nobody gets it out of there.
    stuck: AtomicBool,
}

/// Tells why this process ends.
fn tell(rank: usize, failure: &Failure) {
    match rank {
        0 => tell_error(format_args!("error: {failure}")),
        rank => tell_error(format_args!("error: rank {rank}: {failure}")),
    }
}

/// Ends the process although its thread waits inside MPI, which an orderly end would wait for. MPI's launcher then ends the others.
fn end(rank: usize, failure: &Failure) -> ! {
    tell(rank, failure);
    signal_hook::low_level::exit(failure.status().into())
}

impl Mpi {
    /// Joins the processes that MPI's launcher started; `rank` is this one's, for messages. Ends the process where another one does not come.
    ///
    /// # Errors
    /// When MPI does not start.
    pub fn join(rank: usize, patience: Duration) -> Result<Self> {
        let ((ask, asked), (answer, answers), (ready, is_ready)) = (channel(), channel(), channel());
        let thread = std::thread::spawn(move || {
            let started = mpi::initialize_with_threading(mpi::Threading::Funneled);
            let Some((universe, _)) = started else { return };
            let world = universe.world();
            if ready.send((world.rank() as usize, world.size() as usize)).is_ok() {
                serve(&world, &asked, &answer);
            }
            // dropping the universe ends MPI, on the thread that began it
        });
        let (rank, world) = is_ready.recv_timeout(patience).map_err(|e| match e {
            RecvTimeoutError::Disconnected => {
                Failure::Run(anyhow!("MPI did not start; was this process started by mpirun or srun?"))
            }
            RecvTimeoutError::Timeout => {
                let waited = patience.as_secs();
                let why = format!(
                    "MPI has not started for {waited} s: another process did not come to it, or hangs. Start all with one program and one launcher; \
                     where that is no fault, raise run.peer_timeout_s"
                );
                end(rank, &Failure::request(why))
            }
        })?;
        let stuck = AtomicBool::new(false);
        Ok(Mpi { rank, world, ask: Some(ask), answers, patience, thread: Some(thread), stuck })
    }

    /// Rank and number of processes, as MPI has them.
    pub fn place(&self) -> (usize, usize) {
        (self.rank, self.world)
    }

    fn answer(&self, ask: Ask, patient: bool) -> Result<Vec<Vec<u8>>> {
        let gone = || Failure::Run(anyhow!("MPI has ended on rank {}", self.rank));
        self.ask.as_ref().ok_or_else(gone)?.send(ask).map_err(|_| gone())?;
        if patient {
            return self.answers.recv().map_err(|_| gone());
        }
        self.answers.recv_timeout(self.patience).map_err(|e| match e {
            RecvTimeoutError::Disconnected => gone(),
            RecvTimeoutError::Timeout => {
                self.stuck.store(true, Ordering::Relaxed);
                Failure::Run(anyhow!(
                    "rank {} has waited for the others for {} s: one of them hangs, one that says nothing like this. All processes end; \
                     --resume=auto goes on from the last checkpoint. Where that is no fault, raise run.peer_timeout_s",
                    self.rank,
                    self.patience.as_secs()
                ))
            }
        })
    }

    /// What all processes say, by rank. `patient` waits as long as it takes.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn agree(&self, own: Vec<u8>, patient: bool) -> Result<Vec<Vec<u8>>> {
        self.answer(Ask::Agree(own), patient)
    }

    /// Sends bytes to other processes and receives what they send to this one: between two processes in the order of both lists.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn exchange(&self, sends: Sent, receives: Coming) -> Result<Vec<Vec<u8>>> {
        self.answer(Ask::Exchange(sends, receives), false)
    }

    /// Ends as the run ended. Where it did not end alike everywhere, all processes are ended, because the others may wait for this one; and
    /// that is told before, because it does not return.
    pub fn leave(&self, failure: Option<&Failure>) {
        if let Some(failure) = failure.filter(|_| self.stuck.load(Ordering::Relaxed)) {
            end(self.rank, failure);
        }
        let status = match failure {
            None | Some(Failure::Interrupted) => return,
            // the first one tells, and ends this one
            Some(Failure::Elsewhere(_)) => return std::thread::sleep(FAREWELL),
            Some(failure) => failure.status(),
        };
        failure.iter().for_each(|failure| tell(self.rank, failure));
        if self.rank != 0 {
            // the first one may be about to say the same
            std::thread::sleep(FAREWELL / 2);
        }
        if let Some(ask) = &self.ask {
            let _ = ask.send(Ask::Abort(status.into()));
            std::thread::sleep(FAREWELL);
        }
    }
}

impl Drop for Mpi {
    /// Ends MPI in order: all processes do, after the last agreement. One that panics does not wait for the others, and its launcher ends them.
    fn drop(&mut self) {
        if self.stuck.load(Ordering::Relaxed) || std::thread::panicking() {
            return std::mem::forget(self.ask.take());
        }
        self.ask = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(world: &mpi::topology::SimpleCommunicator, asked: &Receiver<Ask>, answer: &Sender<Vec<Vec<u8>>>) {
    while let Ok(ask) = asked.recv() {
        let got = match ask {
            Ask::Agree(own) => agree(world, &own),
            Ask::Exchange(sends, receives) => exchange(world, &sends, &receives),
            Ask::Abort(status) => world.abort(status),
        };
        if answer.send(got).is_err() {
            return;
        }
    }
}

/// Each process in turn tells the length and the bytes.
fn agree(world: &mpi::topology::SimpleCommunicator, own: &[u8]) -> Vec<Vec<u8>> {
    let mut lengths = vec![0u64; world.size() as usize];
    world.all_gather_into(&(own.len() as u64), &mut lengths[..]);
    let mut all = Vec::with_capacity(lengths.len());
    for (rank, length) in lengths.into_iter().enumerate() {
        let mut bytes = if rank == world.rank() as usize { own.to_vec() } else { vec![0; length as usize] };
        for piece in bytes.chunks_mut(PIECE) {
            world.process_at_rank(rank as i32).broadcast_into(piece);
        }
        all.push(bytes);
    }
    all
}

fn exchange(
    world: &mpi::topology::SimpleCommunicator,
    sends: &[(usize, Vec<u8>)],
    receives: &[(usize, usize)],
) -> Vec<Vec<u8>> {
    let mut got: Vec<Vec<u8>> = receives.iter().map(|(_, length)| vec![0; *length]).collect();
    let pieces = |n: usize| n.div_ceil(PIECE);
    let count =
        got.iter().map(|b| pieces(b.len())).sum::<usize>() + sends.iter().map(|(_, b)| pieces(b.len())).sum::<usize>();
    mpi::request::multiple_scope(count, |scope, requests| {
        for ((from, _), bytes) in receives.iter().zip(&mut got) {
            for piece in bytes.chunks_mut(PIECE) {
                requests.add(world.process_at_rank(*from as i32).immediate_receive_into(scope, piece));
            }
        }
        for (to, bytes) in sends {
            for piece in bytes.chunks(PIECE) {
                requests.add(world.process_at_rank(*to as i32).immediate_send(scope, piece));
            }
        }
        let mut done = Vec::with_capacity(count);
        requests.wait_all(&mut done);
    });
    got
}
