//! Steps that all processes make, or the first for all. Where one fails, all end with its status, and the first process says why.

use anyhow::anyhow;
use serde::{Deserialize, Serialize};

use super::Peers;
use crate::failure::{Failure, Result};

/// Exit status and message of a failure, as a process tells the others.
type Told = (u8, String);

fn told(failure: &Failure) -> Told {
    (failure.status(), failure.to_string())
}

/// What a failure of another process is in this one.
fn elsewhere(rank: usize, (status, text): Told, own_rank: usize) -> Failure {
    match (status, own_rank) {
        (130, _) => Failure::Interrupted,
        // one process tells; the others end with the same status
        (status, 1..) => Failure::Elsewhere(status),
        (2, 0) => Failure::request(format!("rank {rank}: {text}")),
        (_, 0) => Failure::Run(anyhow!("rank {rank}: {text}")),
    }
}

impl Peers {
    /// The result of a step that all have made: where it failed in one, all fail, and the first process says where and why.
    ///
    /// # Errors
    /// Those of the step, here or elsewhere.
    pub fn all<T>(&self, own: Result<T>) -> Result<T> {
        self.together(own, false)
    }

    fn together<T>(&self, own: Result<T>, patient: bool) -> Result<T> {
        if let Peers::Alone = self {
            return own;
        }
        let all = self.say(&own.as_ref().err().map(told), patient)?;
        match all.into_iter().enumerate().find_map(|(rank, failure)| Some((rank, failure?))) {
            None => own,
            // in its own words; another process leaves that to it
            Some((0, _)) if self.is_first() => own,
            Some((rank, failure)) => Err(elsewhere(rank, failure, self.rank())),
        }
    }

    /// A failure that all processes have in the same way: the first one tells, the others end with its status.
    pub fn alike(&self, failure: Failure) -> Failure {
        if self.is_first() { failure } else { Failure::Elsewhere(failure.status()) }
    }

    /// The first process whose value is not that of the first process: its rank, its value, the first's. All get the same answer.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn odd_one<T: PartialEq + Serialize + for<'a> Deserialize<'a>>(&self, own: T) -> Result<Option<(usize, T, T)>> {
        let mut all = self.concat(vec![own])?;
        let odd = all.iter().position(|other| *other != all[0]);
        Ok(odd.map(|rank| (rank, all.swap_remove(rank), all.swap_remove(0))))
    }

    /// A step that the first process makes for all. The others wait as long as it takes; the first does not wait for them as long.
    ///
    /// # Errors
    /// Those of the step.
    pub fn first<T: Serialize + for<'a> Deserialize<'a>>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Peers::Alone = self {
            return step();
        }
        let (mut all, own) = self.patiently(|| {
            let (told, own) = match self.is_first().then(step) {
                None => (None, None),
                Some(Ok(value)) => (Some(Ok(value)), None),
                Some(Err(failure)) => (Some(Err(told(&failure))), Some(failure)),
            };
            // the others came here before the step was done, or they hang
            Result::Ok((self.say(&told, !self.is_first())?, own))
        })?;
        match (all.swap_remove(0), own) {
            (_, Some(own)) => Err(own),
            (Some(Ok(value)), _) => Ok(value),
            (Some(Err(failure)), _) => Err(elsewhere(0, failure, self.rank())),
            (None, _) => Err(Failure::Run(anyhow!("rank 0 is at another place of the program"))),
        }
    }

    /// A step that the first process makes before the others: what it leaves on disk they find. They wait as long as it takes.
    ///
    /// # Errors
    /// Those of the step, here or elsewhere.
    pub fn in_turn<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut step = Some(step);
        let mut make = || (step.take().expect("it is made once"))();
        let own = if self.is_first() { make().map(Some) } else { Ok(None) };
        let own = self.together(own, true)?;
        let own = match own {
            Some(made) => Ok(made),
            None => make(),
        };
        self.together(own, true)
    }
}
