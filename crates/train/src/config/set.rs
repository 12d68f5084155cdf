//! `--set key=value`, and what a misspelt key was meant to be.

use dash_model::Attention;
use toml::{Table, Value};

use super::error::LoadError;

/// Keys that hold text: `--set run.name=7` and `--set run.name=nan` mean what they say.
const TEXT_KEYS: [&str; 7] =
    ["run.name", "run.dir", "run.device", "data.path", "data.tokenizer", "data.cache", "eval.sample_prompt"];

/// Writes `a.b = value` into the table; another attention kind drops the keys that it does not have. The value is read as
/// TOML and, failing that or where the key holds text, as a string.
///
/// # Errors
/// When the assignment is none.
pub fn apply(table: &mut Table, assignment: &str) -> Result<(), LoadError> {
    let wrong = |what: &str| {
        LoadError::new(
            format!("--set {assignment}"),
            format!("{what}; write --set key=value, for example --set optim.lr=1e-3"),
        )
    };
    let (key, value) = assignment.split_once('=').ok_or_else(|| wrong("has no ="))?;
    let (key, value) = (key.trim(), value.trim());
    let parsed: Option<Table> = format!("x = {value}").parse().ok();
    let parsed = parsed.and_then(|mut t| t.remove("x")).filter(|v| v.is_str() || !TEXT_KEYS.contains(&key));
    let value = parsed.unwrap_or_else(|| Value::String(value.to_string()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().filter(|k| !k.is_empty()).ok_or_else(|| wrong("has no key"))?;
    let mut place = table;
    for part in parts {
        let next = place.entry(part).or_insert_with(|| Value::Table(Table::new()));
        place = next.as_table_mut().ok_or_else(|| wrong("names a table that is a value"))?;
    }
    if key == "model.attention.kind"
        && let Some(kind) = value.as_str()
    {
        // keys of another kind in the file would be refused; the numbers that both kinds have stay
        let kept = Attention::kept_keys(kind);
        place.retain(|key, _| kept.contains(&key));
    }
    place.insert(last.to_string(), value);
    Ok(())
}

/// Adds the nearest expected key to serde's complaint about an unknown one.
pub fn with_suggestion(message: &str) -> String {
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
    let Some(at) = message.find("unknown field").or_else(|| message.find("unknown variant")) else {
        return message.to_string();
    };
    let names = quoted(&message[at..]);
    let Some((given, expected)) = names.split_first() else { return message.to_string() };
    let nearest =
        expected.iter().max_by(|a, b| strsim::jaro_winkler(given, a).total_cmp(&strsim::jaro_winkler(given, b)));
    match nearest {
        Some(key) if strsim::jaro_winkler(given, key) > 0.7 => format!("{message}; did you mean `{key}`?"),
        _ => message.to_string(),
    }
}
