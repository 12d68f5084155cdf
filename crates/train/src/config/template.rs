//! `train init` and `train config`: the reference of keys as a file to start from, and key by key.

use std::fmt::Write as _;

use dash_model::attention::{Preset, Spec};

use super::problems::nearest;
use super::reference::{Entry, Section, attention};

/// What a new file sets: every required key, and those that a first run of a minute or two wants otherwise than the defaults.
const STARTER: [(&str, &str); 12] = [
    ("run.steps", "200"),
    ("data.vocab_size", "1024"),
    ("data.seq_len", "256"),
    ("data.batch_size", "8"),
    ("optim.lr", "3e-3"),
    ("optim.warmup_steps", "20"),
    ("eval.every", "50"),
    ("model.layers", "2"),
    ("model.width", "96"),
    ("model.heads", "4"),
    ("model.kv_heads", "2"),
    ("model.ffn", "256"),
];

/// Keys of the attention that a new file sets, where the kind has them: at the defaults (chunks of 64 and gamma 1) a sequence of 256
/// has 4 chunks and almost all of them are attended.
const STARTER_ATTENTION: [(&str, &str); 2] = [("chunk_size", "16"), ("gamma", "4.0")];

/// Tables that a file need not have and whose mere presence means something. So does that of every table with a required key that no
/// [`STARTER`] sets.
const OPTIONAL: [&str; 4] = ["eval.stop", "eval.far", "task", "compare"];

/// Whether a table stands in the file as a comment.
fn is_off(section: &Section) -> bool {
    let unset = |k: &Entry| {
        let full = format!("{}.{}", section.place, k.name);
        k.required && full != "model.attention" && !STARTER.iter().any(|(key, _)| *key == full)
    };
    OPTIONAL.contains(&section.place) || section.keys.iter().any(unset)
}

/// A sentence and what it is about, broken into comment lines.
fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + word.len() > 110 {
            _ = writeln!(out, "{line}");
            line = "#".into();
        }
        line.push(' ');
        line += word;
    }
    _ = writeln!(out, "{line}");
}

/// `at least 1; integer; default 3. What it means.`
fn sentence(k: &Entry) -> String {
    let plain = |s: &str| s.replace('`', "");
    let range = if k.range.is_empty() { String::new() } else { format!(", {}", plain(&k.range)) };
    let default = if k.required { "required".to_string() } else { format!("default {}", plain(&k.default)) };
    format!("{} ({}{range}; {default})", plain(&k.meaning), plain(&k.takes))
}

/// A value that a switched-off key can be shown with: its default where that is a plain value.
fn shown(k: &Entry) -> Option<&str> {
    let value = k.default.strip_prefix('`')?.split('`').next()?;
    format!("x = {value}").parse::<toml::Table>().is_ok().then_some(value)
}

fn key(out: &mut String, k: &Entry, value: Option<&str>, off: bool) {
    comment(out, &sentence(k));
    match (value, shown(k)) {
        (Some(value), _) => _ = writeln!(out, "{}{} = {value}", if off { "#" } else { "" }, k.name),
        (None, Some(value)) => _ = writeln!(out, "#{} = {value}", k.name),
        (None, None) => _ = writeln!(out, "#{} =", k.name),
    }
}

/// A file with every key: those of a first run set, the others as comments that show their defaults. `kind` is a kind or preset of
/// attention, `text` a file or folder to train on instead of the source code of this workspace's dependencies, with the extensions that its files are
/// read by, if not those by default.
pub fn template(sections: &[Section], (spec, kind): (&Spec, &str), text: Option<(&str, &[String])>) -> String {
    let mut out = String::from(
        "# A configuration of DashLab with every key. A line that begins with # and a key shows a default: take the # away to change it.\n\
         # Start it with: train --config FILE    What a key means: train config KEY\n",
    );
    let toml = |t: &str| toml::Value::String(t.into()).to_string();
    let text = text.map(|(path, extensions)| {
        let named = extensions.iter().map(|e| toml(e)).collect::<Vec<_>>().join(", ");
        (toml(path), if named.is_empty() { None } else { Some(format!("[{named}]")) })
    });
    for section in sections {
        let off = is_off(section);
        _ = writeln!(out, "\n{}[{}]", if off { "#" } else { "" }, section.place);
        for k in &section.keys {
            let full = format!("{}.{}", section.place, k.name);
            if full == "model.attention" || sections.iter().any(|s| s.place == full) {
                continue; // a table of its own
            }
            let starter = STARTER.iter().find(|(key, _)| *key == full).map(|(_, v)| *v);
            let value = match (full.as_str(), &text) {
                ("data.source", Some(_)) => Some("\"text\""),
                ("data.path", Some((path, _))) => Some(path.as_str()),
                ("data.extensions", Some((_, Some(extensions)))) => Some(extensions.as_str()),
                ("task.kind", _) => Some("\"recall\""),
                ("router.target_share", _) => None,
                _ => starter,
            };
            key(&mut out, k, value, off);
        }
        if section.place == "model" {
            model_attention(&mut out, spec, kind);
        }
    }
    out
}

fn model_attention(out: &mut String, spec: &Spec, kind: &str) {
    _ = writeln!(out, "\n[model.attention]");
    let preset: Option<&Preset> = spec.presets.iter().find(|p| p.name == kind);
    comment(out, preset.map_or(spec.about, |p| p.about));
    comment(out, &format!("One of {}.", dash_model::kinds().join(", ")));
    _ = writeln!(out, "kind = {kind:?}");
    let keys = attention().into_iter().find(|(k, _)| *k == spec.kind).map(|(_, keys)| keys).unwrap_or_default();
    for k in &keys {
        let by_preset = preset.is_some_and(|p| p.values.iter().any(|(name, _)| *name == k.name));
        let starter = STARTER_ATTENTION.iter().find(|(name, _)| *name == k.name).map(|(_, v)| *v);
        // what the preset sets is its own
        if !by_preset {
            key(out, k, starter, false);
        }
    }
}

/// What the reference says of a key (`optim.lr`, `lr`), a table (`optim`), or everything for an empty name.
///
/// # Errors
/// When there is no such key: the nearest one, or the tables.
pub fn about(sections: &[Section], name: &str) -> Result<String, String> {
    let mut all: Vec<(String, Entry)> = Vec::new();
    for section in sections {
        all.extend(section.keys.iter().map(|k| (section.place.to_string(), k.clone())));
    }
    for (kind, keys) in attention() {
        all.extend(keys.into_iter().map(|k| (format!("model.attention, kind = \"{kind}\""), k)));
    }
    let table = |place: &str| place.split(',').next().unwrap_or_default().to_string();
    let chosen = all.iter().filter(|(place, k)| {
        let place = table(place);
        name.is_empty() || name == place || name == k.name || name == format!("{place}.{}", k.name)
    });
    let mut out = String::new();
    let mut place = "";
    for (p, k) in chosen {
        if p != place {
            place = p;
            let shown = p.replacen(", kind", "] with kind", 1);
            let end = if shown.contains("] with") { "" } else { "]" };
            _ = writeln!(out, "{}[{shown}{end}", if out.is_empty() { "" } else { "\n" });
        }
        _ = writeln!(out, "{} - {}", k.name, sentence(k));
    }
    if !out.is_empty() {
        return Ok(out);
    }
    let names: Vec<String> = all.iter().flat_map(|(p, k)| [k.name.clone(), table(p)]).collect();
    let last = name.rsplit('.').next().unwrap_or(name);
    let near = nearest(last, names.iter().map(String::as_str));
    Err(match near {
        Some(near) => format!("{name:?} is no key; did you mean {near}? `train config` lists all of them"),
        None => format!("{name:?} is no key; `train config` lists all of them"),
    })
}
