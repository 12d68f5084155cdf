//! Processes of a test: threads that share memory.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};

use super::bytes::{Coming, Sent};

type Wire = (Mutex<Sender<Vec<u8>>>, Mutex<Receiver<Vec<u8>>>);

/// What the members of a group share.
struct Group {
    barrier: Barrier,
    said: Mutex<Vec<Vec<u8>>>,
    /// Between two members: from, to.
    wires: Vec<Vec<Wire>>,
}

/// One of some threads that behave as processes.
#[derive(Clone)]
pub struct Threads {
    rank: usize,
    group: Arc<Group>,
}

impl Threads {
    /// A group of so many.
    pub fn group(world: usize) -> Vec<Threads> {
        let wire = || {
            let (to, from) = channel();
            (Mutex::new(to), Mutex::new(from))
        };
        let wires = (0..world).map(|_| (0..world).map(|_| wire()).collect()).collect();
        let group = Arc::new(Group { barrier: Barrier::new(world), said: Mutex::new(vec![Vec::new(); world]), wires });
        (0..world).map(|rank| Threads { rank, group: group.clone() }).collect()
    }

    pub fn place(&self) -> (usize, usize) {
        (self.rank, self.group.wires.len())
    }

    pub fn agree(&self, own: Vec<u8>) -> Vec<Vec<u8>> {
        self.group.said.lock().unwrap()[self.rank] = own;
        self.group.barrier.wait();
        let all = self.group.said.lock().unwrap().clone();
        self.group.barrier.wait();
        all
    }

    pub fn exchange(&self, sends: Sent, receives: &Coming) -> Vec<Vec<u8>> {
        for (to, bytes) in sends {
            self.group.wires[self.rank][to].0.lock().unwrap().send(bytes).unwrap();
        }
        let receive = |&(from, length): &(usize, usize)| {
            let bytes = self.group.wires[from][self.rank].1.lock().unwrap().recv().unwrap();
            assert_eq!(bytes.len(), length, "from {from} to {}", self.rank);
            bytes
        };
        receives.iter().map(receive).collect()
    }
}
