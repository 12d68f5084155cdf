//! What processes have to have in common before they begin.

use serde::{Deserialize, Serialize};

/// What a process says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its number.
    pub rank: usize,
    /// Number of processes, as its launcher told it.
    pub world: usize,
    /// Name of its host, for messages.
    pub host: String,
    /// Version and commit of the program.
    pub build: String,
    /// Hash of the program's file.
    pub binary: String,
    /// Hash of the configuration.
    pub config: String,
    /// `DASHLAB_TOKEN`: what keeps strangers out.
    pub token: String,
}

impl Hello {
    /// Why a process cannot be of the same run as this one, the first, in words that name it and what to do; its token aside.
    pub fn refuses(&self, other: &Hello) -> Option<String> {
        let Hello { rank, host, .. } = other;
        let of = |what: String, remedy: &str| Some(format!("rank {rank} on {host} {what}; {remedy}"));
        if other.world != self.world {
            let what = format!("was told of {} processes, rank 0 of {}", other.world, self.world);
            return of(what, "start all of them by one launcher, with one number");
        }
        if other.rank >= self.world {
            return of(format!("is none of {} processes", self.world), "ranks count from 0");
        }
        if other.binary != self.binary {
            let what = match other.build == self.build {
                true => format!("runs another file of {}", self.build),
                false => format!("runs {}, rank 0 {}", other.build, self.build),
            };
            return of(what, "copy one program to all hosts");
        }
        if other.config != self.config {
            let remedy = "give all processes the same file, the same --set and the same environment";
            return of("has another configuration than rank 0".into(), remedy);
        }
        None
    }

    /// As [`Hello::refuses`] for the processes of all ranks in order.
    pub fn refuse_any(all: &[Hello]) -> Option<String> {
        let first = &all[0];
        all.iter().find_map(|other| first.refuses(other)).or_else(|| {
            let token = all.iter().find(|other| other.token != first.token)?;
            Some(format!("rank {} on {} has another DASHLAB_TOKEN than rank 0", token.rank, token.host))
        })
    }
}

#[cfg(test)]
pub(super) fn hello(rank: usize, world: usize) -> Hello {
    let text = |text: &str| text.to_string();
    Hello { rank, world, host: text("here"), build: text("b"), binary: text("x"), config: text("c"), token: text("t") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_named() {
        let first = hello(0, 4);
        assert_eq!(first.refuses(&hello(3, 4)), None);
        let told = |change: &dyn Fn(&mut Hello)| {
            let mut other = hello(3, 4);
            change(&mut other);
            first.refuses(&other).unwrap()
        };
        assert!(told(&|h| h.world = 2).contains("was told of 2 processes, rank 0 of 4"));
        assert!(told(&|h| h.rank = 4).contains("rank 4 on here is none of 4"));
        assert!(told(&|h| h.binary = "y".into()).contains("another file of b"));
        assert!(told(&|h| (h.binary, h.build) = ("y".into(), "b2".into())).contains("runs b2, rank 0 b"));
        assert!(told(&|h| h.config = "d".into()).contains("another configuration"));
        let mut all = [hello(0, 2), hello(1, 2)];
        assert_eq!(Hello::refuse_any(&all), None);
        all[1].token = "u".into();
        assert!(Hello::refuse_any(&all).unwrap().contains("rank 1 on here has another DASHLAB_TOKEN"));
    }
}
