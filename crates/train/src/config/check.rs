//! What no run can be started with, section by section, in the order of the file.

use super::compare::Compare;
use super::error::{ConfigError, positive, wrong};
use super::file::Config;
use dash_data::Packing;

impl Config {
    /// Says what cannot run.
    ///
    /// # Errors
    /// The first key at fault, and why.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.run.check()?;
        self.data.check(self.reads_text())?;
        self.optim.check()?;
        self.eval.check()?;
        self.checkpoint.check()?;
        self.log.check()?;
        self.model.check()?;
        dash_model::parameters(&self.model, self.data.vocab_size)?;
        positive("probe.sequences", self.probe.sequences)?;
        self.check_chunks()?;
        self.check_documents()?;
        self.check_task()?;
        self.compare.iter().try_for_each(Compare::check)?;
        self.router.check(&self.model.attention, self.data.seq_len)
    }

    fn check_chunks(&self) -> Result<(), ConfigError> {
        let chunks = self.model.attention.chunk_size().map(|s| self.data.seq_len.div_ceil(s));
        if let (Some(s), Some(1)) = (self.model.attention.chunk_size(), chunks) {
            let t = self.data.seq_len;
            let smaller = if t > 1 { format!("a chunk_size below {t} or ") } else { String::new() };
            let what = format!(
                "seq_len {t} with chunk_size {s} leaves nothing to route: every query attends its own chunk only; use {smaller}kind = \
                 \"dense\""
            );
            return wrong("model.attention.chunk_size", what);
        }
        if let (Some(top), Some(n)) = (self.model.attention.top(), chunks)
            && top > n
        {
            return wrong("model.attention.top", format!("{top} is above the {n} chunks of a sequence; use 1 to {n}"));
        }
        Ok(())
    }

    /// Refuses what knows whole sequences only, where documents do not see each other.
    fn check_documents(&self) -> Result<(), ConfigError> {
        let (mask, packing) = ("data.document_mask", "data.packing");
        let has_mask = self.data.document_mask;
        if self.task.is_some() && (has_mask || self.data.packing != Packing::default()) {
            let what = "means nothing to a task, whose sequences are no documents; remove it, or remove [task]";
            return wrong(if has_mask { mask } else { packing }, what);
        }
        if has_mask && self.probe.every > 0 {
            return wrong("probe.every", "looks at whole sequences; set it to 0, or data.document_mask = false");
        }
        if has_mask && self.eval.far.is_some() {
            let what = "looks for tokens far back in whole sequences; remove it, or set data.document_mask = false";
            return wrong("eval.far", what);
        }
        if has_mask && self.router.budget_from.is_some() {
            let what = "is of a run that sees whole sequences; remove it, or set data.document_mask = false";
            return wrong("router.budget_from", what);
        }
        Ok(())
    }

    fn check_far(&self) -> Result<(), ConfigError> {
        match self.eval.far {
            Some(_) if !self.reads_text() => {
                wrong("eval.far", "means nothing without a text; a task tells accuracy by distance")
            }
            Some(far) if far.tokens.saturating_add(1) >= self.data.seq_len => wrong(
                "eval.far.tokens",
                format!(
                    "{} is not 1 to {}: in sequences of {} tokens nothing lies farther back",
                    far.tokens,
                    self.data.seq_len.saturating_sub(2),
                    self.data.seq_len
                ),
            ),
            _ => Ok(()),
        }
    }

    fn check_task(&self) -> Result<(), ConfigError> {
        self.check_far()?;
        if self.router.oracle && (self.task.is_none() || self.model.attention.chunk_size().is_none()) {
            let what = "attends the chunk that holds the answer: it needs a [task], which knows it, and an attention that chooses chunks";
            return wrong("router.oracle", what);
        }
        let Some(task) = &self.task else {
            return match self.eval.stop {
                Some(_) => wrong("eval.stop", "means nothing without [task]; a text is never solved"),
                None => Ok(()),
            };
        };
        if self.eval.stop.is_some() && self.eval.every == 0 {
            return wrong("eval.stop", "means nothing without validations on the way; set eval.every");
        }
        for &length in task.eval_lengths.iter().chain([&self.data.seq_len]) {
            task.check(length, self.data.vocab_size).or_else(|(key, what)| wrong(&format!("task.{key}"), what))?;
        }
        Ok(())
    }
}
