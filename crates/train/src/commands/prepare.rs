//! `prepare`: corpus, tokenizer, shards.

use crate::config::Config;
use crate::console::print_line;
use crate::failure::Result;
use crate::training::material::prepared;

/// Runs the command.
///
/// # Errors
/// As [`prepared`].
pub fn run(config: &Config) -> Result<()> {
    let p = prepared(config)?;
    let tokens = |shards: &[std::sync::Arc<dash_data::Shard>]| shards.iter().map(|s| s.len()).sum::<usize>();
    print_line!("{} {}", if p.fresh { "prepared" } else { "already prepared:" }, p.folder.display())?;
    print_line!(
        "{} documents, {:.1} MB ({:.1} MB validation)",
        p.report.documents,
        p.report.bytes as f64 / 1e6,
        p.report.validation_bytes as f64 / 1e6
    )?;
    print_line!(
        "{} training and {} validation tokens, vocabulary {}",
        tokens(&p.train),
        tokens(&p.validation),
        p.tokenizer.vocab_size()
    )?;
    for (reason, n) in &p.report.left_out {
        print_line!("left out: {n} files ({reason})")?;
    }
    Ok(())
}
