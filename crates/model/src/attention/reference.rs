//! The reference of `[model.attention]`, from the registry.

use std::fmt::Write;

use super::keys::{Key, Type};
use super::{Attention, Spec, VARIANTS};

/// Markdown: for every variant its kind and presets, and each key with type, default, range and meaning.
pub fn reference() -> String {
    let mut out = String::from(
        "`kind` names a variant or one of its presets; without it, it is `\"dash\"`. A variant takes the keys of its table; a key of \
         another one is refused.\n\n",
    );
    for spec in VARIANTS {
        let default = spec.with(&[]);
        _ = writeln!(out, "### `kind = \"{}\"`\n\n{}\n", spec.kind, spec.about);
        for preset in spec.presets {
            let values = preset.values.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>();
            _ = writeln!(out, "Preset `{}` (`{}`): {}\n", preset.name, values.join(", "), preset.about);
        }
        if spec.keys.is_empty() {
            _ = writeln!(out, "No further keys.\n");
            continue;
        }
        _ = writeln!(out, "| key | type | default | range | meaning |\n|---|---|---|---|---|");
        for key in spec.keys {
            let KeyDoc { takes, default, range, meaning } = describe(spec, key, &default);
            _ = writeln!(out, "| `{}` | {takes} | {default} | {range} | {meaning} |", key.name);
        }
        out.push('\n');
    }
    out
}

/// What a reader is told of a key, in Markdown.
pub struct KeyDoc {
    /// What it takes.
    pub takes: String,
    /// What it is where it is left out.
    pub default: String,
    /// Which values of its type.
    pub range: String,
    /// One sentence.
    pub meaning: &'static str,
}

/// Of a key of a variant; `default` is the variant as a file without keys of it has it.
pub fn describe(spec: &Spec, key: &Key, default: &Attention) -> KeyDoc {
    let (takes, range) = (type_of(key), key.range.to_string());
    KeyDoc { takes, default: default_of(spec, key, default), range, meaning: key.meaning.trim() }
}

fn type_of(key: &Key) -> String {
    match key.takes {
        Type::Size => "integer".into(),
        Type::Number => "number".into(),
        Type::Flag => "boolean".into(),
        Type::Choice(names) => names.iter().map(|n| format!("`\"{n}\"`")).collect::<Vec<_>>().join(", "),
    }
}

/// The value, with the expression where it follows from other keys.
fn default_of(spec: &Spec, key: &Key, default: &Attention) -> String {
    let value = default.value(key.name).map_or(String::new(), |v| v.to_string());
    let follows = spec.keys.iter().any(|k| k.name != key.name && key.default.contains(k.name));
    if !follows {
        return format!("`{value}`");
    }
    let (formula, least) = in_words(key.default);
    format!("`{formula}`{least}; here {value}")
}

/// The expression of a default as a formula, and what bounds it from below.
fn in_words(expression: &str) -> (String, &'static str) {
    let bounded = expression.strip_prefix('(').and_then(|inner| inner.strip_suffix(").max(1)"));
    let (inner, least) = bounded.map_or((expression, ""), |inner| (inner, ", at least 1"));
    let product = inner.split_once(".saturating_mul(").and_then(|(a, rest)| Some((a, rest.split_once(')')?)));
    (product.map_or(inner.to_string(), |(a, (b, rest))| format!("{a} * {b}{rest}")), least)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who reads the reference need not know Rust.
    #[test]
    fn defaults_that_follow_from_other_keys_are_formulas() {
        assert_eq!(in_words("(chunk_size / 2).max(1)"), ("chunk_size / 2".into(), ", at least 1"));
        assert_eq!(
            in_words("(top.saturating_mul(chunk_size) / 2).max(1)"),
            ("top * chunk_size / 2".into(), ", at least 1")
        );
        assert_eq!(in_words("chunk_size"), ("chunk_size".into(), ""));
        let reference = reference();
        assert!(reference.contains("`chunk_size / 2`, at least 1; here 32"), "{reference}");
        assert!(!reference.contains(".max(") && !reference.contains("_mul("), "{reference}");
    }
}
