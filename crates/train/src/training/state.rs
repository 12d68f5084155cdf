//! `state.json` of a checkpoint: everything that is not a tensor, with the version of its format.
//!
//! | version | what changed |
//! |---|---|
//! | 1 | no `version`; `config_hash`, which nothing read; `knobs` of plain numbers; the oldest have no `data.drawn` |
//! | 2 | `version`, `build` and `optimizer`; unknown keys are an error |
//! | 3 | `spikes` |

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, anyhow};
use dash_data::LoaderState;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::knobs::Knobs;
use super::spikes::Spikes;
use crate::program::build;

/// The version that this build writes; it reads this one and all before.
pub const VERSION: u64 = 3;

/// Everything that is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`VERSION`].
    pub version: u64,
    /// The program that wrote it, with its commit.
    pub build: String,
    /// Updates made.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Seed of the run: with the cursor it is the state of every generator, since orders are drawn from (seed, epoch).
    pub seed: u64,
    /// Position in the data.
    pub data: LoaderState,
    /// Folder name of the prepared corpus: the hash of its content and settings.
    pub data_hash: String,
    /// Kind of the optimiser whose state lies beside.
    pub optimizer: String,
    /// alpha and gamma in force, where the attention has them.
    pub knobs: Option<Knobs>,
    /// What the spike guard has seen, where `optim.spike_guard` is set.
    pub spikes: Option<Spikes>,
    /// Validation loss at this step, where one was taken.
    pub validation_loss: Option<f64>,
    /// File name to hash.
    pub files: HashMap<String, String>,
}

impl State {
    /// From the text of a `state.json`, of this version or an earlier one.
    ///
    /// # Errors
    /// When it is no state; [`Newer`] where a later format wrote it.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        parse(bytes)
    }

    /// At `step`, before anything is saved: hashes, knobs and the optimiser's kind are filled in by
    /// [`super::checkpoint::Checkpoints::save`].
    pub fn new(step: u64, tokens: u64, seed: u64, data: LoaderState, data_hash: String) -> Self {
        State {
            version: VERSION,
            build: build(),
            step,
            tokens,
            seed,
            data,
            data_hash,
            optimizer: String::new(),
            knobs: None,
            spikes: None,
            validation_loss: None,
            files: HashMap::new(),
        }
    }
}

/// A checkpoint of a format that came later. It is whole, so it must not be passed over like a damaged one.
#[derive(Debug)]
pub struct Newer {
    version: u64,
    build: String,
}

impl fmt::Display for Newer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the checkpoint has format version {}, written by {}; this build ({}) reads versions 1 to {VERSION}. Use a newer build",
            self.version,
            self.build,
            build()
        )
    }
}

impl std::error::Error for Newer {}

/// Version 1 as version 2.
fn from_version_1(state: &mut Map<String, Value>) {
    state.remove("config_hash");
    state.insert("version".into(), json!(2));
    state.insert("build".into(), json!("a build before format version 2"));
    state.insert("optimizer".into(), json!("adamw"));
    if let Some(Value::Object(data)) = state.get_mut("data") {
        data.entry("drawn").or_insert(json!(0));
    }
}

/// Version 2 as version 3.
fn from_version_2(state: &mut Map<String, Value>) {
    state.insert("version".into(), json!(3));
    state.insert("spikes".into(), Value::Null);
}

fn parse(bytes: &[u8]) -> anyhow::Result<State> {
    let mut state: Map<String, Value> = serde_json::from_slice(bytes)?;
    let version = match state.get("version") {
        None => 1,
        Some(v) => v.as_u64().filter(|v| *v > 0).ok_or_else(|| anyhow!("version: {v} is not a positive integer"))?,
    };
    if version > VERSION {
        let build = state.get("build").and_then(Value::as_str).unwrap_or("an unnamed build").to_string();
        return Err(Newer { version, build }.into());
    }
    if version <= 1 {
        from_version_1(&mut state);
    }
    if version <= 2 {
        from_version_2(&mut state);
    }
    Ok(serde_json::from_value(Value::Object(state))?)
}

/// Reads `state.json`, of this version or an earlier one.
///
/// # Errors
/// When it is missing or no state; [`Newer`] where a later format wrote it.
pub fn read_state(folder: &Path) -> anyhow::Result<State> {
    let path = folder.join("state.json");
    let bytes = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    parse(&bytes).map_err(|e| {
        let what = if e.is::<Newer>() { path.display().to_string() } else { format!("{} is damaged", path.display()) };
        e.context(what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = r#"{"step": 2, "tokens": 128, "seed": 0, "data": {"epoch": 0, "cursor": 3}, "config_hash": "a6",
        "data_hash": "task-96", "knobs": {"alpha": 1.5, "gamma": 4.0}, "validation_loss": null, "files": {}}"#;

    #[test]
    fn the_first_version_is_migrated_and_written_as_this_one() {
        let state = parse(OLD.as_bytes()).unwrap();
        assert_eq!((state.version, state.step, state.data.cursor, state.data.drawn), (VERSION, 2, 3, 0));
        assert_eq!(state.knobs, Some(Knobs { alpha: Some(1.5), gamma: Some(4.0) }));
        assert_eq!(state.optimizer, "adamw");
        assert_eq!(parse(&serde_json::to_vec(&state).unwrap()).unwrap(), state);
    }

    #[test]
    fn later_versions_and_unknown_keys_are_refused_in_words() {
        let new = serde_json::to_value(State::new(1, 2, 3, LoaderState::default(), "x".into())).unwrap();
        let told = |key: &[&str], value: Value| {
            let mut changed = new.clone();
            *key.iter().fold(&mut changed, |at, key| &mut at[*key]) = value;
            parse(changed.to_string().as_bytes()).unwrap_err()
        };
        let newer = told(&["version"], json!(VERSION + 1));
        assert!(newer.is::<Newer>());
        let text = newer.to_string();
        assert!(
            text.contains("format version 4, written by train 0.1.0") && text.contains("reads versions 1 to 3"),
            "{text}"
        );
        assert!(told(&["version"], json!(0)).to_string().contains("not a positive integer"));
        assert!(told(&["config_hash"], json!("a")).to_string().contains("unknown field `config_hash`"));
        assert!(told(&["data", "window"], json!(1)).to_string().contains("unknown field `window`"));
        assert!(told(&["knobs"], json!({"beta": 1})).to_string().contains("unknown field `beta`"));
    }
}
