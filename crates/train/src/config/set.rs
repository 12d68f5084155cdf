//! `--set key=value`, and what a misspelt key was meant to be.

use dash_model::Attention;
use toml::{Table, Value};

use super::error::LoadError;
use super::problems::nearest;

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

/// What the parser says of a value, in words for people: what stands there, what is taken, and which name was meant.
pub fn explained(message: &str) -> String {
    let (message, key) = match message.rsplit_once("\nin `") {
        Some((what, key)) => (what.to_string(), key.trim_end().trim_end_matches('`')),
        None => (message.to_string(), ""),
    };
    let told = with_suggestion(&of_type(&message));
    // in a list of the command line quotes are lost, and so is what makes it one
    let told = match told.strip_suffix(" is text, where a list is taken") {
        Some(given) if !key.is_empty() => {
            let quoted = |item: &str| match item.trim() {
                number if number.parse::<f64>().is_ok() => number.to_string(),
                text => format!("{text:?}"),
            };
            let items = given.trim_matches(['"', '[', ']']).split(',').map(quoted).collect::<Vec<_>>();
            format!("{told}; in a shell: --set '{key}=[{}]'", items.join(","))
        }
        _ => told,
    };
    // a message that begins with a key names a finer one
    if key.is_empty() || told.starts_with(key) { told } else { format!("{key}: {told}") }
}

/// `invalid type: string "fast", expected f64` in the words of the configuration's reference.
fn of_type(message: &str) -> String {
    let Some(at) = ["invalid type: ", "invalid value: "].iter().find_map(|start| message.find(start)) else {
        return message.to_string();
    };
    let (before, what) = message.split_at(at);
    let Some((given, wanted)) = what.split_once(": ").and_then(|(_, rest)| rest.rsplit_once(", expected ")) else {
        return message.to_string();
    };
    let wanted = match wanted {
        "f64" => "a number",
        "u64" | "usize" | "u32" => "an integer, 0 or above",
        "a boolean" => "true or false",
        "a string" | "path string" => "text",
        "a sequence" => "a list",
        other => other,
    };
    let given = match given.split_once(' ').unwrap_or((given, "")) {
        ("string", text) => format!("{text} is text"),
        ("integer" | "boolean", value) => format!("{} is", value.trim_matches('`')),
        ("floating", value) => format!("{} is", value.trim_start_matches("point ").trim_matches('`')),
        _ => format!("a {given} is"),
    };
    let instead = if given.ends_with("text") { ", where " } else { " not " };
    let end = if instead == " not " { "" } else { " is taken" };
    format!("{before}{given}{instead}{wanted}{end}")
}

/// Adds the name that was meant to a complaint about one that is none of those that are taken.
fn with_suggestion(message: &str) -> String {
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
    let (given, known) = match message.find("unknown field").or_else(|| message.find("unknown variant")) {
        Some(at) => match quoted(&message[at..]).split_first() {
            Some((given, known)) => (given.clone(), known.to_vec()),
            None => return message.to_string(),
        },
        // `model.attention.kind: "dahs" is none of dense, topk`
        None => match message.split_once("\" is none of ") {
            Some((before, known)) if !known.contains('"') => {
                let given = before.rsplit('"').next().unwrap_or_default();
                (given.to_string(), known.lines().next().unwrap_or_default().split(", ").map(str::to_string).collect())
            }
            _ => return message.to_string(),
        },
    };
    match nearest(&given, known.iter().map(String::as_str)) {
        Some(name) => format!("{message}; did you mean `{name}`?"),
        None => message.to_string(),
    }
}
