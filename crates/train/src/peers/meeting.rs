//! How processes meet: the first one waits at a place, the others go there, and who does not belong to them is refused in words.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::frame::{self, Kind};
use super::hello::Hello;
use super::seat::Place;
use crate::console::tell;
use crate::failure::{Failure, Result};

/// Bytes of a first message at most.
const HELLO: usize = 1 << 16;
/// How long a connection may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// The first process: waits for all others.
pub fn receive(own: &Hello, place: &Place, until: Instant) -> Result<Vec<(usize, TcpStream)>> {
    let Place { host, port } = place;
    let listener = TcpListener::bind((host.as_str(), *port)).map_err(|e| {
        let remedy = match e.kind() {
            ErrorKind::AddrInUse => "another program has the port; choose one with MASTER_PORT or DASHLAB_PORT",
            _ => "MASTER_ADDR has to be a name or an address of the host of rank 0",
        };
        Failure::request(format!("rank 0 cannot wait for the others at {host}:{port}: {e}; {remedy}"))
    })?;
    listener.set_nonblocking(true).map_err(anyhow::Error::from)?;
    let mut there: Vec<Option<TcpStream>> = (1..own.world).map(|_| None).collect();
    let refuse_all = |there: &mut [Option<TcpStream>], why: &str| {
        there.iter_mut().flatten().for_each(|s| _ = frame::write(s, Kind::Refused, why.as_bytes()));
        Failure::request(why)
    };
    while there.iter().any(Option::is_none) {
        if Instant::now() > until {
            let missing: Vec<String> =
                there.iter().enumerate().filter(|(_, s)| s.is_none()).map(|(i, _)| (i + 1).to_string()).collect();
            let why = format!(
                "of {} processes rank {} did not come to {host}:{port} in time; were all started, and does a firewall let them through?",
                own.world,
                missing.join(", ")
            );
            return Err(refuse_all(&mut there, &why));
        }
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            Err(e) => return Err(refuse_all(&mut there, &format!("rank 0 cannot wait at {host}:{port}: {e}"))),
        };
        let Some(other) = introduced(own, &mut stream) else { continue };
        if let Some(why) = own.refuses(&other) {
            let _ = frame::write(&mut stream, Kind::Refused, why.as_bytes());
            return Err(refuse_all(&mut there, &why));
        }
        if other.rank == 0 || there[other.rank - 1].is_some() {
            let why = format!(
                "two processes are rank {}, one of them on {}; a launcher gives each a number",
                other.rank, other.host
            );
            let _ = frame::write(&mut stream, Kind::Refused, why.as_bytes());
            return Err(refuse_all(&mut there, &why));
        }
        there[other.rank - 1] = Some(stream);
    }
    let mut streams: Vec<(usize, TcpStream)> =
        there.into_iter().flatten().enumerate().map(|(i, s)| (i + 1, s)).collect();
    for (rank, stream) in &mut streams {
        let gone = |e| Failure::Run(anyhow!("rank {rank} is gone: {e}"));
        frame::write(stream, Kind::Welcome, &[]).map_err(gone)?;
    }
    Ok(streams)
}

/// Who connected; none where it is a stranger, which is told and sent away.
fn introduced(own: &Hello, stream: &mut TcpStream) -> Option<Hello> {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(INTRODUCTION));
    let _ = stream.set_write_timeout(Some(INTRODUCTION));
    let from = stream.peer_addr().map_or_else(|_| "an address".into(), |a| a.ip().to_string());
    let Ok((Kind::Hello, bytes)) = frame::read(stream, HELLO) else {
        tell!("warning: a connection from {from} said nothing of DashLab and was closed");
        return None;
    };
    let Ok(hello) = serde_json::from_slice::<Hello>(&bytes) else {
        let why =
            format!("rank 0 runs {}, which does not understand this process; copy one program to all hosts", own.build);
        let _ = frame::write(stream, Kind::Refused, why.as_bytes());
        return None;
    };
    if hello.token != own.token {
        let why = format!(
            "rank {} on {}: DASHLAB_TOKEN is not the one of rank 0; give all processes the same",
            hello.rank, hello.host
        );
        let _ = frame::write(stream, Kind::Refused, why.as_bytes());
        tell!("warning: a process on {} with another DASHLAB_TOKEN was refused", hello.host);
        return None;
    }
    Some(hello)
}

/// The other processes: go to the first.
pub fn go(own: &Hello, place: &Place, until: Instant) -> Result<TcpStream> {
    let Place { host, port } = place;
    let mut stream = loop {
        let tried = (host.as_str(), *port).to_socket_addrs().and_then(|mut all| {
            let mut last = Err(ErrorKind::NotFound.into());
            // a name may have addresses of both kinds, and the first process waits at one
            all.find_map(|address| {
                last = TcpStream::connect_timeout(&address, INTRODUCTION);
                last.as_ref().is_ok().then_some(())
            });
            last
        });
        match tried {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > until => {
                let rank = own.rank;
                return Err(Failure::request(format!(
                    "rank {rank} found no rank 0 at {host}:{port}: {e}; was it started, did it begin without this process, and does a firewall let it through?"
                )));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    let gone =
        |e: std::io::Error| Failure::request(format!("rank 0 at {host}:{port} does not answer as DashLab does: {e}"));
    let hello = serde_json::to_vec(own).expect("plain data");
    frame::write(&mut stream, Kind::Hello, &hello).map_err(gone)?;
    // rank 0 speaks when all are there, or at its own deadline
    let left = until.saturating_duration_since(Instant::now()) + INTRODUCTION;
    stream.set_read_timeout(Some(left)).map_err(gone)?;
    match frame::read(&mut stream, HELLO).map_err(gone)? {
        (Kind::Welcome, _) => Ok(stream),
        (Kind::Refused, why) => Err(Failure::request(String::from_utf8_lossy(&why))),
        (kind, _) => Err(Failure::request(format!("rank 0 at {host}:{port} answered {kind:?}"))),
    }
}
