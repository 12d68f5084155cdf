//! Every key with type, default, range and meaning, made from the doc comments of the structs, the defaults that a file without the
//! key gets, and the ranges below: what `train init`, `train config` and docs/config.md say, and what unknown and missing keys are
//! measured by. One test fails when the page is behind (`DASHLAB_UPDATE=1 cargo test -p train config::reference` writes it), another
//! when a value outside its range is accepted.

use dash_model::VARIANTS;
use dash_model::attention::describe;
use toml::{Table, Value};

/// What a reader is told of a key.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As a file writes it inside its table.
    pub name: String,
    /// What it takes, in Markdown.
    pub takes: String,
    /// Whether a file has to have it.
    pub required: bool,
    /// What it is where it is left out; in words where that is no plain value.
    pub default: String,
    /// Which values of its type; empty: all.
    pub range: String,
    /// From the doc comment.
    pub meaning: String,
}

/// A table of the file with its keys.
#[derive(Debug, Clone)]
pub struct Section {
    /// Its name: `run`, `model`, ...
    pub place: &'static str,
    /// Its keys, in the order of the struct.
    pub keys: Vec<Entry>,
}

/// A table of the file, the struct that it is, and the source that declares the struct.
const TABLES: [(&str, &str, &str); 15] = [
    ("run", "Run", include_str!("run.rs")),
    ("data", "Data", include_str!("data.rs")),
    ("task", "Task", include_str!("../../../data/src/task/mod.rs")),
    ("optim", "Optim", include_str!("optim.rs")),
    ("eval", "Eval", include_str!("eval.rs")),
    ("eval.stop", "Stop", include_str!("eval.rs")),
    ("eval.far", "Far", include_str!("eval.rs")),
    ("checkpoint", "Checkpoint", include_str!("eval.rs")),
    ("log", "Log", include_str!("eval.rs")),
    ("init", "Init", include_str!("init.rs")),
    ("probe", "ProbePlan", include_str!("probe.rs")),
    ("router", "RouterPlan", include_str!("router.rs")),
    ("model", "ModelConfig", include_str!("../../../model/src/config.rs")),
    ("model.rope_scaling", "RopeScaling", include_str!("../../../model/src/rope.rs")),
    ("compare", "Compare", include_str!("compare.rs")),
];

/// Further structs that a key's value is made of.
#[cfg(test)]
const PARTS: [(&str, &str, &str); 2] = [
    ("A ramp, for `router.alpha` and `router.gamma`", "Ramp", include_str!("router.rs")),
    ("`[[compare.arm]]`", "Arm", include_str!("compare.rs")),
];

const ENUMS: [(&str, &str); 10] = [
    ("Bos", include_str!("../../../data/src/tokenizer/mod.rs")),
    ("SpecialTokens", include_str!("../../../data/src/tokenizer/mod.rs")),
    ("Validation", include_str!("../../../data/src/prepare/mod.rs")),
    ("Source", include_str!("../../../data/src/prepare/mod.rs")),
    ("Packing", include_str!("../../../data/src/loader/windows.rs")),
    ("TaskKind", include_str!("../../../data/src/task/mod.rs")),
    ("OptimKind", include_str!("optim.rs")),
    ("AdjustLr", include_str!("optim.rs")),
    ("Schedule", include_str!("optim.rs")),
    ("Compute", include_str!("../../../model/src/config.rs")),
];

/// What a key's value may be, and a value that is refused for it.
const RANGES: &[(&str, &str, &str)] = &[
    ("run.steps", "at least 1", "0"),
    ("run.threads", "at most 1024", "1025"),
    ("run.peer_timeout_s", "1 to 604800", "0"),
    ("run.device", "`cpu`, `cuda`, `cuda:N`", "\"tpu\""),
    ("data.vocab_size", "at least 2", "1"),
    ("data.extensions", "at least one, small letters without a dot", "[\"xz\"]"),
    ("data.field", "not empty", "\"\""),
    ("data.vocab_bytes", "1024 to 1073741824", "1023"),
    ("data.validation_share", "above 0, at most 0.5", "0.0"),
    ("data.validation_tokens", "at least 1", "0"),
    ("data.seq_len", "at least 1", "0"),
    ("data.batch_size", "at least 1", "0"),
    ("data.grad_accum", "at least 1", "0"),
    ("task.pairs", "at least 1", "0"),
    ("task.queries", "at most `pairs`", "9"),
    ("task.value_tokens", "at least 1", "0"),
    ("task.power", "above 0, at most 16", "0.0"),
    ("task.share", "above 0, at most 1", "0.0"),
    ("task.eval_sequences", "at least 1", "0"),
    ("optim.lr", "above 0", "0.0"),
    ("optim.min_lr_ratio", "0 to 1", "1.5"),
    ("optim.decay_fraction", "0 to 1", "1.5"),
    ("optim.weight_decay", "at least 0", "-0.1"),
    ("optim.embedding_lr", "at least 0", "-1.0"),
    ("optim.embedding_weight_decay", "at least 0", "-0.1"),
    ("optim.vector_lr", "at least 0", "-1.0"),
    ("optim.vector_weight_decay", "at least 0", "-0.1"),
    ("optim.clip", "at least 0", "-1.0"),
    ("optim.spike_guard", "above 1", "1.0"),
    ("optim.beta1", "0 to below 1", "1.0"),
    ("optim.beta2", "0 to below 1", "1.0"),
    ("optim.eps", "above 0", "0.0"),
    ("optim.momentum", "0 to below 1", "1.0"),
    ("eval.batches", "at least 1", "0"),
    ("eval.stop.accuracy", "above 0, at most 1", "0.0"),
    ("eval.stop.checks", "at least 1", "0"),
    ("eval.far.tokens", "at least 1, below `data.seq_len` - 1", "0"),
    ("checkpoint.keep_last", "at least 1", "0"),
    ("log.every", "at least 1", "0"),
    ("probe.sequences", "at least 1", "0"),
    ("router.target_share", "what a query's own chunk and one more are of what it sees, to 1", "1.5"),
    ("model.layers", "at least 1", "0"),
    ("model.width", "at least 1", "0"),
    ("model.heads", "at least 1", "0"),
    ("model.ffn", "at least 1", "0"),
    ("model.rope_theta", "above 0", "0.0"),
    ("model.norm_eps", "above 0", "0.0"),
    ("model.init_std", "above 0", "0.0"),
    ("model.kv_heads", "divides `heads`", "3"),
    ("model.head_dim", "even, or 0", "5"),
    ("model.rope_scaling.factor", "at least 1", "0.5"),
    ("model.rope_scaling.low_freq_factor", "above 0", "0.0"),
    ("model.rope_scaling.high_freq_factor", "above `low_freq_factor`", "1.0"),
    ("model.rope_scaling.original_positions", "at least 1", "0"),
    ("compare.seeds", "1 to 10000", "0"),
    ("compare.alpha", "above 0, at most 0.5", "0.0"),
    ("compare.margin", "above 0", "0.0"),
    ("compare.solved", "above 0, at most 1", "0.0"),
    ("compare.checks", "at least 1", "0"),
    ("compare.learning_rates", "each above 0", "[0.0]"),
];

/// What some of these keys mean something with.
#[cfg(test)]
const NEEDS: &[(&str, &str)] = &[
    ("task.power", "task.kind=\"mqar\""),
    ("optim.decay_fraction", "optim.schedule=\"warmup-stable-decay\""),
    ("optim.momentum", "optim.kind=\"muon\""),
    ("eval.stop.accuracy", "eval.stop.checks=1"),
    ("eval.stop.accuracy", "eval.stop.after=0"),
    ("eval.far.tokens", "eval.far.rare=9"),
    ("model.rope_scaling.factor", "model.rope_scaling.low_freq_factor=1.0"),
    ("model.rope_scaling.factor", "model.rope_scaling.high_freq_factor=4.0"),
    ("model.rope_scaling.factor", "model.rope_scaling.original_positions=64"),
    ("model.rope_scaling.low_freq_factor", "model.rope_scaling.factor=32.0"),
    ("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor=4.0"),
    ("model.rope_scaling.low_freq_factor", "model.rope_scaling.original_positions=64"),
    ("model.rope_scaling.high_freq_factor", "model.rope_scaling.factor=32.0"),
    ("model.rope_scaling.high_freq_factor", "model.rope_scaling.low_freq_factor=1.0"),
    ("model.rope_scaling.high_freq_factor", "model.rope_scaling.original_positions=64"),
    ("model.rope_scaling.original_positions", "model.rope_scaling.factor=32.0"),
    ("model.rope_scaling.original_positions", "model.rope_scaling.low_freq_factor=1.0"),
    ("model.rope_scaling.original_positions", "model.rope_scaling.high_freq_factor=4.0"),
    ("eval.stop.checks", "eval.stop.accuracy=0.9"),
    ("eval.stop.checks", "eval.stop.after=0"),
];

/// A smallest file, with a task.
pub const SMALLEST: &str = "[run]\nsteps = 3\n[data]\nvocab_size = 300\nseq_len = 256\nbatch_size = 2\n[optim]\nlr = 1e-3\n\
    [model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
    [task]\nkind = \"recall\"\n[compare]\n";

struct Field {
    name: String,
    kind: String,
    meaning: String,
    required: bool,
}

/// Fields of a struct in a source text.
fn fields(name: &str, source: &str) -> Vec<Field> {
    let at = source.find(&format!("pub struct {name} {{")).unwrap_or_else(|| panic!("no struct {name}"));
    let container = source[..at].rsplit("\n\n").next().unwrap_or("");
    let all_default = container.lines().any(|l| l.starts_with("#[serde(") && l.contains("default"));
    let (mut out, mut meaning, mut has_default) = (Vec::new(), String::new(), false);
    for line in source[at..].lines().skip(1).take_while(|l| *l != "}").map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            meaning += text;
        } else if line.starts_with("#[serde(") {
            has_default |= line.contains("default");
        } else if let Some((name, kind)) =
            line.strip_prefix("pub ").and_then(|l| l.trim_end_matches(',').split_once(": "))
        {
            let required = !all_default && !has_default && !kind.starts_with("Option<");
            out.push(Field { name: name.into(), kind: kind.into(), meaning: meaning.trim().into(), required });
            (meaning, has_default) = (String::new(), false);
        }
    }
    assert!(!out.is_empty(), "{name} has no fields");
    out
}

/// Names of an enum's values as a file writes them.
fn values(name: &str, source: &str) -> Vec<String> {
    let at = source.find(&format!("pub enum {name} {{")).unwrap_or_else(|| panic!("no enum {name}"));
    let kebab = |variant: &str| {
        let lower = variant.chars().enumerate().flat_map(|(i, c)| {
            let dash = (i > 0 && c.is_uppercase()).then_some('-');
            dash.into_iter().chain(c.to_lowercase())
        });
        lower.collect::<String>()
    };
    let lines = source[at..].lines().skip(1).take_while(|l| *l != "}").map(str::trim);
    lines.filter(|l| l.starts_with(char::is_uppercase)).map(|l| kebab(l.trim_end_matches(','))).collect()
}

fn type_of(kind: &str) -> String {
    let inner = |s: &str| s.split_once('<').map(|(_, t)| t.trim_end_matches('>').to_string());
    match kind {
        "usize" | "u64" | "u32" => "integer".into(),
        "f64" => "number".into(),
        "bool" => "boolean".into(),
        "String" => "text".into(),
        "PathBuf" => "path".into(),
        "Ramp" => kind.to_lowercase(),
        "Attention" | "Stop" | "Far" | "RopeScaling" => "table, see below".into(),
        _ if kind.starts_with("Option<") => type_of(&inner(kind).unwrap()),
        _ if kind.starts_with("Vec<") => format!("list of {}", type_of(&inner(kind).unwrap())),
        _ => match ENUMS.iter().find(|(name, _)| *name == kind) {
            Some((name, source)) => {
                values(name, source).iter().map(|v| format!("`\"{v}\"`")).collect::<Vec<_>>().join(", ")
            }
            None => kind.to_lowercase(),
        },
    }
}

fn entries(place: &str, fields: Vec<Field>, defaults: Option<&Value>) -> Vec<Entry> {
    let entry = |f: Field| {
        let value = defaults.and_then(|d| d.get(&f.name)).filter(|v| !v.is_table());
        let default = match (f.required, value) {
            (true, _) => "required".into(),
            (false, _) if f.name == "head_dim" => "`width / heads`".into(),
            (false, _) if f.name == "attention" => "`dash`".into(),
            (false, _) if place == "run" && f.name == "name" => "`\"FILE\"`".into(),
            (false, Some(v)) => format!("`{v}`"),
            (false, None) => "none".into(),
        };
        let key = format!("{place}.{}", f.name);
        let range = RANGES.iter().find(|(k, ..)| *k == key).map_or("", |(_, range, _)| range).to_string();
        Entry { takes: type_of(&f.kind), name: f.name, required: f.required, default, range, meaning: f.meaning }
    };
    fields.into_iter().map(entry).collect()
}

/// Every table but `[model.attention]`, in the order of a file, with the defaults of a file like [`SMALLEST`].
pub fn sections(defaults: &Table) -> Vec<Section> {
    let section = |(place, name, source): (&'static str, &str, &str)| Section {
        place,
        keys: entries(place, fields(name, source), defaults.get(place)),
    };
    TABLES.map(section).into()
}

/// The keys of `[model.attention]` for each kind.
pub fn attention() -> Vec<(&'static str, Vec<Entry>)> {
    let keys = |spec: &dash_model::attention::Spec| {
        let default = spec.with(&[]);
        let entry = |key: &dash_model::attention::keys::Key| {
            let w = describe(spec, key, &default);
            let (takes, default, range) = (w.takes, w.default, w.range);
            Entry { name: key.name.into(), takes, required: false, default, range, meaning: w.meaning.into() }
        };
        spec.keys.iter().map(entry).collect()
    };
    VARIANTS.iter().map(|spec| (spec.kind, keys(spec))).collect()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::Path;

    use super::super::Config;
    use super::*;

    fn table(out: &mut String, keys: &[Entry]) {
        _ = writeln!(out, "| key | type | default | range | meaning |\n|---|---|---|---|---|");
        for k in keys {
            _ = writeln!(out, "| `{}` | {} | {} | {} | {} |", k.name, k.takes, k.default, k.range, k.meaning);
        }
        out.push('\n');
    }

    fn page() -> String {
        let mut out = String::from(
            "# Configuration\n\n<!-- Made by `DASHLAB_UPDATE=1 cargo test -p train config::reference`; a test holds it to the code. -->\n\n\
         One TOML file a run; `--set table.key=value` replaces or adds a key. Unknown keys are refused with the nearest known one. \
         Every default is written into the run folder's `config.toml`. `FILE` stands for the name of the \
         configuration file.\n\n",
        );
        for section in super::super::sections() {
            _ = writeln!(out, "## `[{}]`\n", section.place);
            table(&mut out, &section.keys);
        }
        _ = writeln!(out, "## `[model.attention]`\n\n{}", dash_model::attention::reference());
        for (title, name, source) in PARTS {
            out.truncate(out.trim_end().len());
            _ = writeln!(out, "\n\n## {title}\n");
            table(&mut out, &entries(name, fields(name, source), None));
        }
        format!("{}\n", out.trim_end())
    }

    #[test]
    fn the_reference_of_all_keys_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/config.md");
        let page = page();
        if std::env::var_os("DASHLAB_UPDATE").is_some() {
            std::fs::write(&path, &page).unwrap();
        }
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = page.lines().zip(stored.lines()).find(|(new, old)| new != old);
        assert!(
            page == stored,
            "docs/config.md is behind the code; DASHLAB_UPDATE=1 cargo test -p train config::reference writes it; first difference: {differs:?}"
        );
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        for (key, range, bad) in RANGES {
            let mut set = vec![format!("{key}={bad}")];
            set.extend(NEEDS.iter().filter(|(k, _)| k == key).map(|(_, with)| with.to_string()));
            let told = resolved(SMALLEST, &set).expect_err(&format!("{key} = {bad} is not {range}"));
            assert!(told.contains(key) && !told.contains("means nothing"), "{key} = {bad}: {told}");
        }
    }

    fn resolved(text: &str, set: &[String]) -> Result<Config, String> {
        Config::from_text(text, set, Path::new("FILE.toml")).map_err(|e| e.to_string())
    }
}
