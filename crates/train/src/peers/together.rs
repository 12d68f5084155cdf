//! Steps that all processes make, or the first for all. Where one fails, all end with its status, and the first process says why.

use anyhow::anyhow;
use serde::{Deserialize, Serialize};

use super::Peers;
use crate::failure::{Failure, Result};

/// How a step of one process ended, as it tells the others.
#[derive(Serialize, Deserialize)]
struct Ended<T> {
    value: Option<T>,
    /// Exit status and message.
    failure: Option<(u8, String)>,
}

impl<T> Ended<T> {
    fn of(result: Result<T>) -> (Self, Option<Failure>) {
        match result {
            Ok(value) => (Ended { value: Some(value), failure: None }, None),
            Err(failure) => {
                let told = (failure.status(), failure.to_string());
                (Ended { value: None, failure: Some(told) }, Some(failure))
            }
        }
    }
}

/// What a failure of another process is in this one.
fn elsewhere(rank: usize, (status, text): (u8, String), own_rank: usize) -> Failure {
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
        let (value, own) = match own {
            Ok(value) => (Some(value), Ok(())),
            Err(e) => (None, Err(e)),
        };
        let (told, own) = Ended::of(own);
        let all = self.say(&told, patient)?;
        let failed = all.into_iter().enumerate().find_map(|(rank, ended)| Some((rank, ended.failure?)));
        match (failed, own, value) {
            (None, _, Some(value)) => Ok(value),
            // the first process tells its own words, another one leaves that to it
            (Some((0, _)), Some(own), _) if self.is_first() => Err(own),
            (Some((rank, failure)), ..) => Err(elsewhere(rank, failure, self.rank())),
            (None, _, None) => Err(Failure::Run(anyhow!("a step of this process failed and was not told"))),
        }
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
            let (told, own) =
                if self.is_first() { Ended::of(step()) } else { (Ended { value: None, failure: None }, None) };
            // the others came here before the step was done, or they hang
            Result::Ok((self.say(&told, !self.is_first())?, own))
        })?;
        match (all.swap_remove(0), own) {
            (_, Some(own)) => Err(own),
            (Ended { value: Some(value), .. }, _) => Ok(value),
            (Ended { failure, .. }, _) => Err(elsewhere(0, failure.unwrap_or((1, "nothing".into())), self.rank())),
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
