//! Unknown and missing keys, all of them in one message: a file that was written from memory is put right at once, not key by key.

use toml::{Table, Value};

use super::reference::{Section, attention};

/// What other libraries call a key.
const ELSEWHERE: [(&str, &str); 27] = [
    ("d_model", "width"),
    ("hidden_size", "width"),
    ("n_embd", "width"),
    ("dim", "width"),
    ("n_layer", "layers"),
    ("n_layers", "layers"),
    ("num_layers", "layers"),
    ("num_hidden_layers", "layers"),
    ("n_head", "heads"),
    ("n_heads", "heads"),
    ("num_heads", "heads"),
    ("num_attention_heads", "heads"),
    ("n_kv_heads", "kv_heads"),
    ("num_kv_heads", "kv_heads"),
    ("num_key_value_heads", "kv_heads"),
    ("intermediate_size", "ffn"),
    ("d_ff", "ffn"),
    ("learning_rate", "lr"),
    ("warmup", "warmup_steps"),
    ("max_steps", "steps"),
    ("grad_clip", "clip"),
    ("max_grad_norm", "clip"),
    ("block_size", "seq_len"),
    ("context_length", "seq_len"),
    ("max_seq_len", "seq_len"),
    ("gradient_accumulation_steps", "grad_accum"),
    ("dtype", "compute"),
];

/// Tables that every file has.
const NEEDED: [&str; 4] = ["run", "data", "optim", "model"];

/// How alike two names have to be for one to be taken for a slip of the other (Jaro and Winkler).
const ALIKE: f64 = 0.7;

/// The name that another one was meant to be: what it is called elsewhere, or the nearest by spelling.
pub fn nearest<'a>(given: &str, names: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let own = ELSEWHERE.iter().find(|(other, _)| *other == given).map(|(_, own)| *own);
    if let Some(name) = own.and_then(|own| names.clone().find(|n| *n == own)) {
        return Some(name);
    }
    let alike = |name: &str| strsim::jaro_winkler(given, name);
    names.max_by(|a, b| alike(a).total_cmp(&alike(b))).filter(|name| alike(name) > ALIKE)
}

/// What stands at a table's name in a file, `eval` or `eval.stop`.
fn at<'a>(file: &'a Table, place: &str) -> Option<&'a Value> {
    match place.split_once('.') {
        Some((outer, inner)) => file.get(outer)?.as_table().and_then(|table| at(table, inner)),
        None => file.get(place),
    }
}

/// Where in a file a key stands, `line 7: ` or nothing.
fn line_of(text: &str, place: &str, name: &str) -> String {
    let mut table = String::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            table = header.trim_start_matches('[').split(']').next().unwrap_or_default().trim().to_string();
            if place.is_empty() && table == name {
                return format!("line {}: ", i + 1);
            }
        } else if table == place && line.split('=').next().is_some_and(|key| key.trim() == name) {
            return format!("line {}: ", i + 1);
        }
    }
    String::new()
}

struct Found<'a> {
    text: &'a str,
    lines: Vec<String>,
}

impl Found<'_> {
    /// A key that stands in no table: the tables that have one of this name, or of what it is called elsewhere.
    fn homeless(&mut self, sections: &[Section], given: &str) {
        let own = ELSEWHERE.iter().find(|(other, _)| *other == given).map_or(given, |(_, own)| own);
        let has = |s: &&Section| s.keys.iter().any(|k| k.name == own);
        let keys: Vec<String> = sections.iter().filter(has).map(|s| format!("`{}.{own}`", s.place)).collect();
        if keys.is_empty() {
            return self.unknown("", given, sections.iter().map(|s| s.place));
        }
        let at = line_of(self.text, "", given);
        self.lines.push(format!("{at}unknown field `{given}`; did you mean {}?", keys.join(", ")));
    }

    fn unknown<'n>(&mut self, place: &str, given: &str, names: impl Iterator<Item = &'n str> + Clone) {
        let at = line_of(self.text, place, given);
        let table = if place.is_empty() { "the file".to_string() } else { format!("[{place}]") };
        let meant = match nearest(given, names.clone()) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("{table} takes {}", names.collect::<Vec<_>>().join(", ")),
        };
        let inside = if place.is_empty() { String::new() } else { format!(" in {table}") };
        self.lines.push(format!("{at}unknown field `{given}`{inside}; {meant}"));
    }

    fn section(&mut self, section: &Section, file: &Table) {
        let empty = Table::new();
        let table = match at(file, section.place) {
            None if NEEDED.contains(&section.place) => &empty,
            Some(Value::Table(table)) => table,
            // left out, or of a wrong type, which the parser tells better
            _ => return,
        };
        let names = || section.keys.iter().map(|k| k.name.as_str());
        for given in table.keys().filter(|given| !names().any(|name| name == *given)) {
            self.unknown(section.place, given, names());
        }
        for key in section.keys.iter().filter(|k| k.required && !table.contains_key(&k.name)) {
            let range = if key.range.is_empty() { String::new() } else { format!(", {}", key.range) };
            let place = section.place;
            self.lines
                .push(format!("missing field `{}` in [{place}] ({}{range}): {}", key.name, key.takes, key.meaning));
        }
    }

    /// A key that another kind has is told by the model, which knows whose it is.
    fn attention(&mut self, file: &Table) {
        let Some(Value::Table(table)) = file.get("model").and_then(|m| m.get("attention")) else { return };
        let Some(kind) = table.get("kind").map_or(Some("dash"), Value::as_str) else { return };
        let Some((spec, _)) = dash_model::attention::find(kind) else { return };
        let all = attention();
        let known = |given: &str| given == "kind" || all.iter().any(|(_, keys)| keys.iter().any(|k| k.name == given));
        for given in table.keys().filter(|given| !known(given)) {
            self.unknown("model.attention", given, spec.keys.iter().map(|k| k.name));
        }
    }
}

/// Every unknown and every missing key of a file, a line each; nothing where there is none.
pub fn of(sections: &[Section], file: &Table, text: &str) -> Option<String> {
    let mut found = Found { text, lines: Vec::new() };
    let places = || sections.iter().map(|s| s.place);
    for given in file.keys().filter(|given| !places().any(|place| place == *given)) {
        found.homeless(sections, given);
    }
    sections.iter().for_each(|section| found.section(section, file));
    found.attention(file);
    let hint = "`train config KEY` explains a key, `train init` writes a file with all of them";
    match found.lines.as_slice() {
        [] => None,
        [one] => Some(format!("{one}\n({hint})")),
        all => Some(format!("{} keys are wrong:\n  {}\n({hint})", all.len(), all.join("\n  "))),
    }
}
