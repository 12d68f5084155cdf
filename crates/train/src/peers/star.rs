//! Sockets between the first process and each other one: by them processes agree, and notice that one is gone.
//!
//! What they carry is small: a record an update, the figures of a validation. A process that ends without a word closes its socket, and
//! the system tells the other side at once; so every other process ends within a second, whatever it waits for. Nothing here is encrypted.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::frame::{self, Kind};
use super::hello::Hello;
use super::meeting::{go, receive};
use super::seat::Place;
use crate::console::tell_error;
use crate::failure::{Failure, Result};

/// What a process that failed has for its own words before another one ends it.
const GRACE: Duration = Duration::from_secs(3);

/// The sockets of one process.
pub struct Star {
    rank: usize,
    links: Arc<Vec<Link>>,
    /// What each link hears.
    heard: Mutex<Vec<Receiver<Vec<u8>>>>,
    patience: Duration,
    /// Seconds from `began` to the last agreement; the watch looks at it while training.
    last: Arc<AtomicU64>,
    began: Instant,
    /// Whether the processes agree once an update.
    training: Arc<AtomicBool>,
    /// Whether this process is about to end by itself: what others say then does not matter any more.
    leaving: Arc<AtomicBool>,
}

/// A socket to another process.
struct Link {
    rank: usize,
    stream: Mutex<TcpStream>,
}

impl Link {
    fn send(&self, kind: Kind, bytes: &[u8]) -> std::io::Result<()> {
        let mut stream = lock(&self.stream);
        frame::write(&mut *stream, kind, bytes)?;
        stream.flush()
    }
}

/// What a mutex guards; a thread that panicked while it held it left nothing half done that matters here.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process at once, without destructors: those of libraries may wait for a process that is gone.
fn end(links: &[Link], text: &str) -> ! {
    tell_error(format_args!("error: {text}"));
    for link in links {
        // whoever holds it may wait for a process that takes nothing
        let Ok(mut stream) = link.stream.try_lock() else { continue };
        let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
        let _ = frame::write(&mut *stream, Kind::Failed, text.as_bytes());
    }
    signal_hook::low_level::exit(1)
}

/// Hands what a link hears to whoever waits for it, until one of both sides leaves.
fn listen(links: &[Link], at: usize, mut stream: TcpStream, (to, leaving): (&Sender<Vec<u8>>, &AtomicBool)) {
    let rank = links[at].rank;
    let end = |links: &[Link], text: &str| {
        if !leaving.load(Ordering::Relaxed) {
            end(links, text)
        }
    };
    loop {
        match frame::read(&mut stream, usize::MAX) {
            Ok((Kind::Agree, bytes)) => {
                if to.send(bytes).is_err() {
                    return;
                }
            }
            Ok((Kind::Bye, _)) => return,
            Ok((Kind::Failed, text)) => {
                if leaving.load(Ordering::Relaxed) {
                    return;
                }
                // this process may be about to say the same
                std::thread::sleep(GRACE);
                let text = String::from_utf8_lossy(&text);
                let told = text.starts_with("rank ");
                return end(links, &if told { text.into_owned() } else { format!("rank {rank} failed: {text}") });
            }
            Ok((kind, _)) => return end(links, &format!("rank {rank} said {kind:?} in the middle of a run")),
            Err(_) => {
                let text = format!(
                    "rank {rank} is gone: killed, out of memory, or its host is not reached any more. All processes end; the last \
                     checkpoint is whole, and --resume=auto goes on from it"
                );
                return end(links, &text);
            }
        }
    }
}

/// A dead host says nothing; the system asks for it.
fn keep_alive(stream: &TcpStream) {
    #[cfg(unix)]
    {
        use rustix::net::sockopt;
        let _ = sockopt::set_socket_keepalive(stream, true);
        #[cfg(target_os = "linux")]
        {
            let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(10));
            let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5));
            let _ = sockopt::set_tcp_keepcnt(stream, 4);
        }
    }
    let _ = stream.set_nodelay(true);
}

impl Star {
    /// Meets the others: the first process waits for them at `place`, the others go there. `meeting` is how long that may take, `patience`
    /// how long one may wait for another afterwards.
    ///
    /// # Errors
    /// A wrong request when processes do not belong together, the place cannot be had, or somebody does not come.
    pub fn meet(hello: &Hello, place: &Place, (meeting, patience): (Duration, Duration)) -> Result<Self> {
        let until = Instant::now() + meeting;
        let streams = match hello.rank {
            0 => receive(hello, place, until)?,
            _ => vec![(0, go(hello, place, until)?)],
        };
        let cannot = |e: std::io::Error| Failure::Run(anyhow!("a socket to another process: {e}"));
        let (mut links, mut readers) = (Vec::new(), Vec::new());
        for (rank, stream) in streams {
            keep_alive(&stream);
            stream.set_read_timeout(None).map_err(cannot)?;
            stream.set_write_timeout(Some(patience)).map_err(cannot)?;
            readers.push(stream.try_clone().map_err(cannot)?);
            links.push(Link { rank, stream: Mutex::new(stream) });
        }
        let links = Arc::new(links);
        let (mut heard, leaving) = (Vec::new(), Arc::new(AtomicBool::new(false)));
        for (at, stream) in readers.into_iter().enumerate() {
            let (to, from) = channel();
            heard.push(from);
            let (links, leaving) = (links.clone(), leaving.clone());
            std::thread::spawn(move || listen(&links, at, stream, (&to, &leaving)));
        }
        let star = Star {
            rank: hello.rank,
            links,
            heard: Mutex::new(heard),
            patience,
            last: Arc::default(),
            began: Instant::now(),
            training: Arc::default(),
            leaving,
        };
        star.watch();
        Ok(star)
    }

    /// Whoever waits in an agreement sees that another one is silent. A process whose GPU waits for one that hangs waits nowhere else:
    /// this ends it.
    fn watch(&self) {
        let (last, training, links) = (self.last.clone(), self.training.clone(), self.links.clone());
        let (began, most) = (self.began, 2 * self.patience + GRACE);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let silent = began.elapsed().saturating_sub(Duration::from_secs(last.load(Ordering::Relaxed)));
                if training.load(Ordering::Relaxed) && silent > most {
                    let text = format!(
                        "no update ended for {} s: a process or its GPU hangs. Where that is no fault, raise run.peer_timeout_s",
                        silent.as_secs()
                    );
                    end(&links, &text);
                }
            }
        });
    }

    /// Between updates nothing is expected at a certain time.
    pub fn expect_updates(&self, training: bool) {
        self.touch();
        self.training.store(training, Ordering::Relaxed);
    }

    /// A step that takes as long as it takes.
    pub fn patiently<T>(&self, step: impl FnOnce() -> T) -> T {
        let training = self.training.swap(false, Ordering::Relaxed);
        let made = step();
        self.expect_updates(training);
        made
    }

    fn touch(&self) {
        self.last.store(self.began.elapsed().as_secs(), Ordering::Relaxed);
    }

    fn hear(&self, at: usize, waits: Option<Duration>) -> Result<Vec<u8>> {
        let (link, heard) = (&self.links[at], lock(&self.heard));
        let got = match waits {
            Some(waits) => heard[at].recv_timeout(waits),
            None => heard[at].recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        got.map_err(|e| {
            let (own, rank) = (self.rank, link.rank);
            Failure::Run(match e {
                RecvTimeoutError::Timeout => anyhow!(
                    "rank {rank} has not answered rank {own} for {} s; look at what it does. Where that is no fault, raise run.peer_timeout_s",
                    waits.unwrap_or_default().as_secs()
                ),
                RecvTimeoutError::Disconnected => anyhow!("rank {rank} has left while rank {own} waited for it"),
            })
        })
    }

    /// What all processes say, by rank. `patient` waits as long as it takes.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn agree(&self, own: Vec<u8>, patient: bool) -> Result<Vec<Vec<u8>>> {
        let waits = (!patient).then_some(self.patience);
        let gone = |link: &Link, e: std::io::Error| {
            let (own, rank, waited) = (self.rank, link.rank, self.patience.as_secs());
            Failure::Run(match e.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => anyhow!(
                    "rank {rank} has taken nothing from rank {own} for {waited} s; look at what it does. Where that is no fault, raise run.peer_timeout_s"
                ),
                _ => anyhow!("rank {rank} is gone: {e}"),
            })
        };
        let all = if self.rank == 0 {
            let mut all = vec![own];
            for at in 0..self.links.len() {
                all.push(self.hear(at, waits)?);
            }
            let bytes = frame::pack(&all);
            for link in self.links.iter() {
                link.send(Kind::Agree, &bytes).map_err(|e| gone(link, e))?;
            }
            all
        } else {
            let link = &self.links[0];
            link.send(Kind::Agree, &own).map_err(|e| gone(link, e))?;
            frame::unpack(&self.hear(0, waits)?).unwrap_or_default()
        };
        self.touch();
        Ok(all)
    }

    /// Leaves in order, after the last agreement.
    pub fn leave(&self) {
        self.go_away();
        for link in self.links.iter() {
            let _ = link.send(Kind::Bye, &[]);
        }
        if self.rank == 0 {
            return;
        }
        // the first one ends first: a launcher that sees an end kills the others
        self.until_the_first_has_gone();
    }

    /// Tells the others why this process ends.
    pub fn fail(&self, text: &str) {
        self.go_away();
        for link in self.links.iter() {
            let _ = link.send(Kind::Failed, text.as_bytes());
        }
        if self.rank != 0 {
            self.until_the_first_has_gone();
        }
    }

    fn go_away(&self) {
        self.expect_updates(false);
        self.leaving.store(true, Ordering::Relaxed);
    }

    fn until_the_first_has_gone(&self) {
        let heard = lock(&self.heard);
        let until = Instant::now() + 3 * GRACE;
        // the reader ends with the first one's farewell
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            match heard[0].recv_timeout(left) {
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

impl Drop for Star {
    fn drop(&mut self) {
        self.go_away();
        for link in self.links.iter() {
            let _ = lock(&link.stream).shutdown(Shutdown::Write);
        }
    }
}

#[cfg(test)]
mod tests;
