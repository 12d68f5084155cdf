//! In what two configurations differ, and whether it matters.

use toml::Value;

use super::Config;

impl Config {
    /// Keys in which two configurations differ, as `key: this, that`, and whether the difference can change the weights.
    pub fn differences(&self, other: &Config) -> Vec<(String, bool)> {
        let flat = |c: &Config| {
            let mut out = std::collections::BTreeMap::new();
            // through the text, so that settings are compiled for one serialiser
            flatten("", &Value::Table(c.to_toml().parse().expect("a configuration is TOML")), &mut out);
            out
        };
        let (mut a, mut b) = (flat(self), flat(other));
        a.retain(|k, _| !k.starts_with("compare"));
        b.retain(|k, _| !k.starts_with("compare"));
        let neutral = [
            "run.threads",
            "run.dir",
            "run.name",
            "data.cache",
            "log.",
            "eval.",
            "checkpoint.",
            "probe.",
            "model.recompute",
        ];
        let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
        let text = |v: Option<&String>| v.map_or("nothing".to_string(), Clone::clone);
        keys.into_iter()
            .filter(|k| a.get(*k) != b.get(*k))
            .map(|k| {
                let matters = !neutral.iter().any(|n| k.starts_with(n));
                (format!("{k}: {} -> {}", text(a.get(k)), text(b.get(k))), matters)
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
