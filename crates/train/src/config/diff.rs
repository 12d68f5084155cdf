//! In what two configurations differ, and what the difference can change.

use toml::Value;

use super::file::Config;

/// What a difference between two configurations can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Neither weights nor figures: threads, places, how often something is told.
    Nothing,
    /// What is measured, not what is trained.
    Figures,
    /// The weights.
    Weights,
}

/// A key in which two configurations differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `key: one -> other`
    pub text: String,
    /// What it can change.
    pub effect: Effect,
}

/// Keys that start with one of these change less than the weights; all others may change them.
const EFFECTS: [(&str, Effect); 11] = [
    ("run.threads", Effect::Nothing),
    ("run.peer_timeout_s", Effect::Nothing),
    ("run.dir", Effect::Nothing),
    ("run.name", Effect::Nothing),
    ("data.cache", Effect::Nothing),
    ("log.", Effect::Nothing),
    ("checkpoint.", Effect::Nothing),
    ("model.recompute", Effect::Nothing),
    ("eval.stop", Effect::Weights),
    ("eval.", Effect::Figures),
    ("probe.", Effect::Figures),
];

impl Config {
    /// Keys in which two configurations differ.
    pub fn differences(&self, other: &Config) -> Vec<Difference> {
        let flat = |c: &Config| {
            let mut out = std::collections::BTreeMap::new();
            // through the text, so that settings are compiled for one serialiser
            flatten("", &Value::Table(c.to_toml().parse().expect("a configuration is TOML")), &mut out);
            out.retain(|k, _| !k.starts_with("compare"));
            out
        };
        let (a, b) = (flat(self), flat(other));
        let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
        let text = |v: Option<&String>| v.map_or("nothing".to_string(), Clone::clone);
        keys.into_iter()
            .filter(|k| a.get(*k) != b.get(*k))
            .map(|k| Difference {
                text: format!("{k}: {} -> {}", text(a.get(k)), text(b.get(k))),
                effect: EFFECTS.iter().find(|(start, _)| k.starts_with(start)).map_or(Effect::Weights, |e| e.1),
            })
            .collect()
    }
}

fn flatten(prefix: &str, value: &Value, out: &mut std::collections::BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, out);
            }
        }
        other => {
            out.insert(prefix.to_string(), other.to_string());
        }
    }
}
