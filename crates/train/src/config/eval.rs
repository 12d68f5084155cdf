//! `[eval]`, `[checkpoint]` and `[log]`: what a run looks at, keeps and writes down.

use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, wrong};

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Updates between validations; 0: only at the end.
    pub every: u64,
    /// Batches of a validation.
    pub batches: usize,
    /// Tokens of the text generated at each validation; 0: none.
    pub sample_tokens: usize,
    /// What that text continues; empty: the first tokens of the validation text.
    pub sample_prompt: String,
    /// Ends a run before `run.steps`, once its task is solved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// Also tells the loss of text targets that only far tokens predict, beside a control; see docs/metrics.md.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub far: Option<Far>,
}

/// Which targets are far and rare.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Far {
    /// Tokens: the target and the token before it stood together in the sequence, last more than so many before. 8 chunks are usual.
    pub tokens: usize,
    /// Times that the two stand together in the training text, at most.
    pub rare: u64,
}

impl Far {
    /// 8 chunks of so many tokens, and 20 times: of two million tokens one in a hundred thousand.
    pub fn of_chunks(chunk_size: usize) -> Self {
        Far { tokens: chunk_size.saturating_mul(8), rare: 20 }
    }
}

/// When a run has done enough.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Accuracy at the training length that counts as solved, above 0 and at most 1.
    pub accuracy: f64,
    /// Validations in a row that have to reach it, at least 1.
    pub checks: u64,
    /// Validations after the last of these, before the run stops.
    pub after: u64,
}

impl Default for Eval {
    fn default() -> Self {
        Eval { every: 100, batches: 8, sample_tokens: 48, sample_prompt: String::new(), stop: None, far: None }
    }
}

impl Eval {
    /// Says what cannot be.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        positive("eval.batches", self.batches)?;
        if self.batches > u32::MAX as usize {
            let what =
                format!("{} is above 2^32 - 1; a number above the batches of the text means all of it", self.batches);
            return wrong("eval.batches", what);
        }
        if self.far.is_some_and(|far| far.tokens == 0) {
            return wrong("eval.far.tokens", "is 0; 8 chunks are usual");
        }
        match self.stop {
            Some(s) if !(s.accuracy > 0.0 && s.accuracy <= 1.0) => {
                wrong("eval.stop.accuracy", format!("{} is not above 0 and at most 1", s.accuracy))
            }
            Some(Stop { checks: 0, .. }) => {
                wrong("eval.stop.checks", "is 0; at least one validation shows that a task is solved")
            }
            _ => Ok(()),
        }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Updates between checkpoints; 0: only at the end.
    pub every: u64,
    /// Newest ones to keep.
    pub keep_last: usize,
    /// Ones with the lowest validation loss to keep besides.
    pub keep_best: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 100, keep_last: 2, keep_best: 1 }
    }
}

impl Checkpoint {
    /// Says what cannot be.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        positive("checkpoint.keep_last", self.keep_last)
    }
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Updates between train lines.
    pub every: u64,
    /// Also write TensorBoard event files.
    pub tensorboard: bool,
}

impl Default for Log {
    fn default() -> Self {
        Log { every: 10, tensorboard: true }
    }
}

impl Log {
    /// Says what cannot be.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        positive("log.every", self.every as usize)
    }
}
