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
    let (mb, share) =
        (|bytes: u64| bytes as f64 / 1e6, p.report.validation_bytes as f64 / p.report.bytes.max(1) as f64);
    print_line!("{} {}", if p.fresh { "prepared" } else { "already prepared:" }, p.folder.display())?;
    print_line!(
        "{} documents, {:.1} MB ({:.1} MB validation, {:.1} %)",
        p.report.documents,
        mb(p.report.bytes),
        mb(p.report.validation_bytes),
        100.0 * share
    )?;
    print_line!(
        "{} training and {} validation tokens, vocabulary {}",
        tokens(&p.train),
        tokens(&p.validation),
        p.tokenizer.vocab_size()
    )?;
    if p.report.vocabulary_bytes > 0 {
        print_line!("vocabulary learned from {:.1} MB of the text", mb(p.report.vocabulary_bytes))?;
    }
    for (reason, n) in &p.report.left_out {
        print_line!("left out: {n} ({reason})")?;
    }
    Ok(())
}
