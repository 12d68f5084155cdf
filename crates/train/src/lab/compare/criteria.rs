//! What was declared before the first run, and whether it has changed since: `criteria.json` of a comparison.

use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::plan::Plan;
use super::run::Run;
use crate::config::Compare;
use crate::failure::{Failure, Result};
use crate::files::replace_file;

const FILE: &str = "criteria.json";

/// The declaration at the time of the first run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Declaration {
    /// `[compare]`, with the seeds and the baseline of the command line.
    pub rules: Compare,
    /// `run.seed`, from which the seeds count; none in a record of an earlier build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_seed: Option<u64>,
    /// Of the criteria file; none where none was named.
    pub hash: Option<String>,
    /// The last commit of the criteria file, if it was as committed: `1234567 of 2026-11-26`.
    pub committed: Option<String>,
    /// Runs lay in the folder already when this was written: nothing is known of what they knew.
    pub runs_before: bool,
}

/// What a report says of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Status {
    /// What has changed since the first run.
    pub changed: Vec<String>,
    /// The criteria file and its state, in a sentence.
    pub file: String,
}

fn hash(path: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(format!("{:032x}", xxh3_128(&bytes)))
}

/// What git says, where there is one.
fn git(file: &Path, args: &[&str]) -> Option<String> {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let out = Command::new("git").arg("-C").arg(folder).args(args).arg("--").arg(file.file_name()?).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_string())
}

/// The last commit of a file that is as it was committed.
fn committed(file: &Path) -> Option<String> {
    git(file, &["status", "--porcelain"]).filter(String::is_empty)?;
    git(file, &["log", "-1", "--format=%h of %cs"]).filter(|s| !s.is_empty())
}

/// Writes the declaration down before the first run; one that is there stays.
///
/// # Errors
/// When files cannot be read or written.
pub fn record(plan: &Plan, runs: &[Run]) -> Result<()> {
    let path = plan.out.join(FILE);
    if path.exists() {
        return Ok(());
    }
    let file = &plan.rules.criteria;
    let named = !file.as_os_str().is_empty();
    let declaration = Declaration {
        rules: plan.rules.clone(),
        first_seed: Some(plan.base().run.seed),
        hash: named.then(|| hash(file)).transpose()?,
        committed: if named { committed(file) } else { None },
        runs_before: runs.iter().any(|r| r.folder.join("config.toml").exists()),
    };
    replace_file(&path, serde_json::to_string_pretty(&declaration).context("no JSON")?.as_bytes())?;
    Ok(())
}

/// Keys of `[compare]` whose values differ: `margin 0.05 -> 0.1`.
fn differences(before: &Compare, now: &Compare) -> Vec<String> {
    let flat = |c: &Compare| serde_json::to_value(c).ok().and_then(|v| v.as_object().cloned()).unwrap_or_default();
    let (before, now) = (flat(before), flat(now));
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let text = |v: Option<&serde_json::Value>| match v {
        None => "nothing".to_string(),
        Some(serde_json::Value::String(s)) if s.is_empty() => "nothing".to_string(),
        Some(v) => v.to_string(),
    };
    let differ = keys.into_iter().filter(|k| before.get(*k) != now.get(*k));
    differ
        .map(|k| match k.as_str() {
            "arm" => "the arms".to_string(),
            _ => format!("compare.{k} {} -> {}", text(before.get(k)), text(now.get(k))),
        })
        .collect()
}

/// Compares what is declared now with what was before the first run, as `folder` has it on record.
///
/// # Errors
/// When files cannot be read, or the record is damaged.
pub fn status(plan: &Plan, folder: &Path) -> Result<Status> {
    let file = &plan.rules.criteria;
    let named = !file.as_os_str().is_empty();
    let now = named.then(|| hash(file)).transpose()?;
    let path = folder.join(FILE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Status {
                changed: Vec::new(),
                file: "What was declared before the first run is not recorded.".into(),
            });
        }
        Err(e) => return Err(anyhow::Error::new(e).context(format!("{} cannot be read", path.display())).into()),
    };
    let before = serde_json::from_str::<Declaration>(&text).map_err(|e| {
        Failure::request(format!(
            "{}: is damaged ({e}), so whether the criteria changed is not known. Without the file the report says that they are not recorded",
            path.display()
        ))
    })?;
    let mut changed = Vec::new();
    // what neither decided nor decides anything cannot have been bent
    if !(before.rules.primary.is_empty() && plan.rules.primary.is_empty()) {
        changed = differences(&before.rules, &plan.rules);
        let now = plan.base().run.seed;
        if let Some(then) = before.first_seed.filter(|then| *then != now) {
            changed.push(format!("run.seed {then} -> {now}"));
        }
    }
    if let (Some(then), Some(now)) = (&before.hash, &now)
        && then != now
    {
        changed.push(format!("the text of {}", file.display()));
    }
    let mut sentence = match &now {
        None => "No criteria file was named (compare.criteria).".to_string(),
        Some(now) => {
            let state = match &before.committed {
                Some(commit) => format!("committed before the first run ({commit})"),
                None => "not committed when the first run started".to_string(),
            };
            format!("Criteria: {}, XXH3 {now}, {state}.", file.display())
        }
    };
    if before.runs_before {
        sentence += " Runs were there before the declaration was recorded, so which came first is not known.";
    }
    Ok(Status { changed, file: sentence })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let before = Compare { primary: "accuracy".into(), ..Compare::default() };
        let now = Compare { margin: Some(0.1), seeds: 5, ..before.clone() };
        assert_eq!(differences(&before, &now), ["compare.margin nothing -> 0.1", "compare.seeds 3 -> 5"]);
        assert!(differences(&now, &now).is_empty());
    }

    #[test]
    fn a_file_without_a_repository_is_not_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("criteria.md");
        std::fs::write(&path, "dash is better").unwrap();
        assert_eq!(committed(&path), None);
        assert_eq!(hash(&path).unwrap().len(), 32);
    }
}
