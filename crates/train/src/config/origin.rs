//! The model that a run starts from (`[init]`). Its extents fill the keys that the file leaves out, before anything else is read.

use std::path::{Component, Path, PathBuf};

use dash_data::Tokenizer;
use dash_model::{Described, ModelConfig};
use toml::{Table, Value};

use super::data::Data;
use super::error::LoadError;
use super::file::Config;

/// A model that a run may start from, before its weights are read.
pub struct Origin {
    /// The file that describes it.
    pub described_by: PathBuf,
    /// Extents and attention.
    pub model: ModelConfig,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence that it was made for.
    pub positions: usize,
    /// Whether the attention is its own choice, and not what a plain Llama has.
    pub chosen: bool,
    /// The tokenizer beside it.
    pub tokenizer: Option<PathBuf>,
    /// `[data]` of the run that trained it, where it is one of ours.
    data: Option<Table>,
}

impl Origin {
    /// What a folder says of its model.
    ///
    /// # Errors
    /// When it holds no description of a model, or one that this program does not compute.
    pub fn of(from: &Path, place: &str) -> Result<Self, LoadError> {
        let tokenizer = |home: &Path| Some(home.join("tokenizer.json")).filter(|path| path.is_file());
        let path = from.join("config.json");
        let kinds = "expected the folder of a Hugging Face model, an exported model, a checkpoint or a run";
        if !from.is_dir() {
            let what = if from.exists() { "is a file" } else { "is no folder" };
            let (hub, from) = (on_the_hub(from), from.display().to_string());
            return Err(LoadError::new(place, format_args!("init.from: {from:?} {what}; {kinds}{hub}")));
        }
        if path.is_file() {
            let found = Described::of(from).map_err(|e| LoadError::new(place, format_args!("init.from: {e}")))?;
            let chosen = found.config.attention.kind() != "dense";
            let Described { config: model, vocab, positions } = found;
            return Ok(Origin {
                described_by: path,
                model,
                vocab,
                positions,
                chosen,
                tokenizer: tokenizer(from),
                data: None,
            });
        }
        // a checkpoint lies two levels below its run
        let home = [from.to_path_buf(), from.join("../..")].into_iter().find(|p| p.join("config.toml").is_file());
        let home = home.ok_or_else(|| {
            LoadError::new(
                place,
                format_args!("init.from: {} holds no config.json and no config.toml; {kinds}", from.display()),
            )
        })?;
        let own = Config::of_run(&home)?;
        let positions = own.positions();
        let data = Value::try_from(&own.data).ok().and_then(|v| v.as_table().cloned());
        Ok(Origin {
            data,
            described_by: home.join("config.toml"),
            vocab: own.data.vocab_size,
            model: own.model,
            positions,
            chosen: true,
            tokenizer: tokenizer(&home),
        })
    }

    /// The first key of `[data]` by which another run would cut other sequences from the same text, and so have another order of them.
    pub fn cut_otherwise(&self, data: &Data) -> Option<&'static str> {
        let own: Data = self.data.clone()?.try_into().ok()?;
        let keys = [("data.seq_len", own.seq_len != data.seq_len), ("data.packing", own.packing != data.packing)];
        keys.into_iter().find(|(_, other)| *other).map(|(key, _)| key)
    }

    /// What `[model]` has to say, all but the attention.
    fn keys(&self) -> Vec<(&'static str, Value)> {
        let m = &self.model;
        let whole = |n: usize| Value::Integer(n as i64);
        let mut keys = vec![
            ("layers", whole(m.layers)),
            ("width", whole(m.width)),
            ("heads", whole(m.heads)),
            ("kv_heads", whole(m.kv_heads)),
            ("head_dim", whole(m.head_dim)),
            ("ffn", whole(m.ffn)),
            ("rope_theta", Value::Float(m.rope_theta)),
            ("norm_eps", Value::Float(m.norm_eps)),
            ("tie_embeddings", Value::Boolean(m.tie_embeddings)),
            ("qkv_bias", Value::Boolean(m.qkv_bias)),
            ("qk_norm", Value::Boolean(m.qk_norm)),
        ];
        if let Some(s) = m.rope_scaling {
            let table = [
                ("factor", Value::Float(s.factor)),
                ("low_freq_factor", Value::Float(s.low_freq_factor)),
                ("high_freq_factor", Value::Float(s.high_freq_factor)),
                ("original_positions", whole(s.original_positions)),
            ];
            keys.push(("rope_scaling", Value::Table(table.into_iter().map(|(k, v)| (k.to_string(), v)).collect())));
        }
        keys
    }
}

/// What to do with `meta-llama/Llama-3.2-1B`, where there is no such folder: it may be the name of a model that has to be fetched first.
pub fn on_the_hub(path: &Path) -> String {
    let parts: Vec<_> = path.components().collect();
    let plain = |c: &Component<'_>| matches!(c, Component::Normal(name) if !name.is_empty());
    match parts.len() == 2 && parts.iter().all(plain) && !path.exists() && !path.parent().is_some_and(Path::exists) {
        true => format!(" (nothing is downloaded here: hf download {} --local-dir FOLDER does that)", path.display()),
        false => String::new(),
    }
}

/// Refuses to read a text with other tokens than the model's: its ids would mean something else to the weights.
///
/// # Errors
/// When the folder that a run starts from has no tokenizer and none is named, or another one is.
pub fn check_tokenizer(config: &Config, place: &str) -> Result<(), LoadError> {
    let Some(init) = config.init.as_ref().filter(|_| config.has_tokenizer()) else { return Ok(()) };
    let (from, named) = (init.from.display(), &config.data.tokenizer);
    let refused = |what: String| Err(LoadError::new(place, what));
    let Some(own) = Origin::of(&init.from, place)?.tokenizer else {
        return match named.as_os_str().is_empty() {
            true => refused(format!(
                "init.from: {from} has no tokenizer.json, and a vocabulary learned anew has other ids than its weights know; put its tokenizer \
                 there, or name it in data.tokenizer"
            )),
            false => Ok(()),
        };
    };
    // what cannot be read is told by who prepares the text
    let hash = |path: &Path| Tokenizer::load(path, config.treatment()).ok().map(|t| t.hash());
    match (hash(&own), hash(named)) {
        (Some(own), Some(named)) if own != named => refused(format!(
            "data.tokenizer: {} is another tokenizer than {from} has, whose ids its weights know; leave the key out",
            config.data.tokenizer.display()
        )),
        _ => Ok(()),
    }
}

/// Whether two values of a file are the same number, or else the same value.
fn equal(a: &Value, b: &Value) -> bool {
    let number = |v: &Value| v.as_float().or(v.as_integer().map(|n| n as f64));
    match (a, b) {
        (Value::Table(a), Value::Table(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b)))
        }
        _ => number(a).zip(number(b)).map_or(a == b, |(a, b)| a == b),
    }
}

/// A table of the file, made where there is none; nothing where something else stands there, which the parser tells.
fn table<'a>(file: &'a mut Table, name: &str) -> Option<&'a mut Table> {
    file.entry(name).or_insert_with(|| Value::Table(Table::new())).as_table_mut()
}

/// Takes from the data of the run that a file goes on from what the file leaves out, so that the same corpus stays the same prepared one. Of another
/// corpus the tokenizer is not taken: it is the one beside the weights.
fn go_on(data: &mut Table, own: &Table) {
    let no_corpus = ["seq_len", "packing", "document_mask", "batch_size", "grad_accum", "cache", "tokenizer"];
    let other = own
        .iter()
        .any(|(key, own)| !no_corpus.contains(&key.as_str()) && data.get(key).is_some_and(|given| !equal(given, own)));
    for (key, value) in own {
        if !(data.contains_key(key) || other && key == "tokenizer") {
            data.insert(key.clone(), value.clone());
        }
    }
}

/// Whether `[init]` says so.
fn asks(file: &Table, key: &str) -> bool {
    file.get("init").and_then(|init| init.get(key)) == Some(&Value::Boolean(true))
}

/// Keys of the rotary angles.
const ROPE: [&str; 2] = ["rope_theta", "rope_scaling"];

/// Whether the rotary angles of the file count, and not those of the folder.
fn rope_changes(file: &Table, place: &str) -> Result<bool, LoadError> {
    let model = file.get("model").and_then(Value::as_table);
    if asks(file, "change_rope") && !ROPE.iter().any(|key| model.is_some_and(|m| m.contains_key(*key))) {
        let what = "init.change_rope: true, and neither model.rope_theta nor model.rope_scaling says to what";
        return Err(LoadError::new(place, what));
    }
    Ok(asks(file, "change_rope"))
}

/// Takes from the model that a file starts from what it leaves out. Whether anything was taken.
///
/// A run folder's configuration says everything, so that it is read without that folder.
///
/// # Errors
/// When the folder gives no model, or the file contradicts it.
pub fn fill(file: &mut Table, place: &str) -> Result<bool, LoadError> {
    let from = file.get("init").and_then(|init| init.get("from")).and_then(Value::as_str).map(PathBuf::from);
    let Some(from) = from else { return Ok(false) };
    let says = |table: &str, key: &str| file.get(table).is_some_and(|t| t.get(key).is_some());
    let extents = ["layers", "width", "heads", "kv_heads", "head_dim", "ffn"];
    let says_all = says("data", "vocab_size") && extents.iter().all(|key| says("model", key));
    let origin = match Origin::of(&from, place) {
        Ok(origin) => origin,
        // a run that starts reads the folder again, and tells
        Err(_) if says_all => return Ok(false),
        Err(e) => return Err(e),
    };
    let described_by = origin.described_by.display().to_string();
    let contradicts = |key: &str, given: &Value, found: &Value| {
        let what =
            format!("{key}: {given}, but {described_by} has {found}; leave the key out, or start from another model");
        Err(LoadError::new(place, what))
    };
    let change_rope = rope_changes(file, place)?;
    let Some(model) = table(file, "model") else { return Ok(false) };
    for (key, found) in origin.keys() {
        match model.get(key) {
            Some(_) if change_rope && ROPE.contains(&key) => continue,
            // 0 is "width / heads"
            Some(Value::Integer(0)) if key == "head_dim" => {}
            Some(given) if !equal(given, &found) => return contradicts(&format!("model.{key}"), given, &found),
            Some(_) => continue,
            None => {}
        }
        model.insert(key.to_string(), found);
    }
    if origin.model.rope_scaling.is_none()
        && !change_rope
        && let Some(given) = model.get("rope_scaling")
    {
        return contradicts("model.rope_scaling", given, &Value::String("none".into()));
    }
    if origin.chosen && !model.contains_key("attention") {
        let attention = Value::try_from(origin.model.attention).expect("an attention is TOML");
        model.insert("attention".into(), attention);
    }
    let file_goes_on = asks(file, "moments");
    let Some(data) = table(file, "data") else { return Ok(false) };
    let vocab = Value::Integer(origin.vocab as i64);
    match data.get("vocab_size") {
        Some(given) if !equal(given, &vocab) => return contradicts("data.vocab_size", given, &vocab),
        _ => data.insert("vocab_size".into(), vocab),
    };
    if file_goes_on && let Some(own) = &origin.data {
        go_on(data, own);
    }
    // a text is read with the tokens that the model knows
    if let Some(tokenizer) = origin.tokenizer
        && !data.contains_key("tokenizer")
    {
        data.insert("tokenizer".into(), Value::String(tokenizer.to_string_lossy().into_owned()));
    }
    Ok(true)
}
