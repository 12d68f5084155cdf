//! `prepare`: corpus, tokenizer, shards.

use crate::config::Config;
use crate::console::print_line;
use crate::failure::Result;
use crate::training::material::{prepare_corpus, taken};

/// Runs the command.
///
/// # Errors
/// As [`prepare_corpus`].
pub fn run(config: &Config) -> Result<()> {
    let p = prepare_corpus(config)?;
    print_line!("{} {}", if p.fresh { "prepared" } else { "already prepared:" }, p.folder.display())?;
    taken(config, &p).iter().try_for_each(|line| print_line!("{line}"))
}
