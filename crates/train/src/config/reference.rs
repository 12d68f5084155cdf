//! docs/config.md: every key with type, default, range and meaning, made from the doc comments of the structs, the defaults that a
//! file without the key gets, and the ranges below. One test fails when the page is behind
//! (`DASHLAB_UPDATE=1 cargo test -p train config::reference` writes it), another when a value outside its range is accepted.

use std::fmt::Write as _;
use std::path::Path;

use toml::{Table, Value};

use super::Config;

/// A table of the file, the struct that it is, and the source that declares the struct.
const TABLES: [(&str, &str, &str); 11] = [
    ("run", "Run", include_str!("run.rs")),
    ("data", "Data", include_str!("data.rs")),
    ("task", "Task", include_str!("../../../data/src/task/mod.rs")),
    ("optim", "Optim", include_str!("optim.rs")),
    ("eval", "Eval", include_str!("eval.rs")),
    ("checkpoint", "Checkpoint", include_str!("eval.rs")),
    ("log", "Log", include_str!("eval.rs")),
    ("probe", "ProbePlan", include_str!("probe.rs")),
    ("router", "RouterPlan", include_str!("router.rs")),
    ("model", "ModelConfig", include_str!("../../../model/src/config.rs")),
    ("compare", "Compare", include_str!("compare.rs")),
];

/// Further structs that a key's value is made of.
const PARTS: [(&str, &str, &str); 2] = [
    ("A ramp, for `router.alpha` and `router.gamma`", "Ramp", include_str!("router.rs")),
    ("`[[compare.arm]]`", "Arm", include_str!("compare.rs")),
];

const ENUMS: [(&str, &str); 6] = [
    ("Bos", include_str!("../../../data/src/tokenizer/mod.rs")),
    ("SpecialTokens", include_str!("../../../data/src/tokenizer/mod.rs")),
    ("Source", include_str!("../../../data/src/prepare/mod.rs")),
    ("TaskKind", include_str!("../../../data/src/task/mod.rs")),
    ("Schedule", include_str!("optim.rs")),
    ("Compute", include_str!("../../../model/src/config.rs")),
];

/// What a key's value may be, and a value that is refused for it.
const RANGES: &[(&str, &str, &str)] = &[
    ("run.steps", "at least 1", "0"),
    ("run.threads", "at most 1024", "1025"),
    ("run.device", "`cpu`", "\"tpu\""),
    ("data.vocab_size", "at least 2", "1"),
    ("data.vocab_bytes", "1024 to 1073741824", "1023"),
    ("data.validation_share", "above 0, at most 0.5", "0.0"),
    ("data.validation_tokens", "at least 1", "0"),
    ("data.seq_len", "at least 1", "0"),
    ("data.batch_size", "at least 1", "0"),
    ("data.grad_accum", "at least 1", "0"),
    ("task.pairs", "at least 1", "0"),
    ("task.share", "above 0, at most 1", "0.0"),
    ("optim.lr", "above 0", "0.0"),
    ("optim.min_lr_ratio", "0 to 1", "1.5"),
    ("optim.weight_decay", "at least 0", "-0.1"),
    ("optim.clip", "at least 0", "-1.0"),
    ("optim.beta1", "0 to below 1", "1.0"),
    ("optim.beta2", "0 to below 1", "1.0"),
    ("optim.eps", "above 0", "0.0"),
    ("eval.batches", "at least 1", "0"),
    ("checkpoint.keep_last", "at least 1", "0"),
    ("log.every", "at least 1", "0"),
    ("model.layers", "at least 1", "0"),
    ("model.width", "at least 1", "0"),
    ("model.heads", "at least 1", "0"),
    ("model.ffn", "at least 1", "0"),
    ("model.rope_theta", "above 0", "0.0"),
    ("model.norm_eps", "above 0", "0.0"),
    ("model.init_std", "above 0", "0.0"),
    ("model.kv_heads", "divides `heads`", "3"),
    ("model.head_dim", "even, or 0", "5"),
];

/// A smallest file, with a task.
const TEXT: &str = "[run]\nsteps = 3\n[data]\nvocab_size = 300\nseq_len = 256\nbatch_size = 2\n[optim]\nlr = 1e-3\n\
    [model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
    [task]\nkind = \"recall\"\n";

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
        "usize" | "u64" => "integer".into(),
        "f64" => "number".into(),
        "bool" => "boolean".into(),
        "String" => "text".into(),
        "PathBuf" => "path".into(),
        "Ramp" => "ramp".into(),
        "Attention" => "table, see below".into(),
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

fn resolved(text: &str, set: &[String]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("FILE.toml");
    std::fs::write(&path, text).unwrap();
    Config::load(&path, set).map_err(|e| e.to_string())
}

fn table(out: &mut String, place: &str, fields: &[Field], defaults: Option<&Value>) {
    let ranges = RANGES.iter().map(|(key, range, _)| (*key, *range));
    let range = |key: &str| ranges.clone().find(|(k, _)| *k == key).map_or("", |(_, r)| r);
    _ = writeln!(out, "| key | type | default | range | meaning |\n|---|---|---|---|---|");
    for f in fields {
        let value = defaults.and_then(|d| d.get(&f.name)).filter(|v| !v.is_table());
        let default = match (f.required, value) {
            (true, _) => "required".into(),
            (false, _) if f.name == "head_dim" => "`width / heads`".into(),
            (false, _) if f.name == "attention" => "`dash`".into(),
            (false, Some(v)) => format!("`{v}`"),
            (false, None) => "none".into(),
        };
        let (takes, range) = (type_of(&f.kind), range(&format!("{place}.{}", f.name)));
        _ = writeln!(out, "| `{}` | {takes} | {default} | {range} | {} |", f.name, f.meaning);
    }
    out.push('\n');
}

fn page() -> String {
    let config = resolved(&format!("{TEXT}[compare]\n"), &[]);
    let defaults: Table = config.expect("the smallest file").to_toml().parse().unwrap();
    let mut out = String::from(
        "# Configuration\n\n<!-- Made by `DASHLAB_UPDATE=1 cargo test -p train config::reference`; a test holds it to the code. -->\n\n\
         One TOML file a run; `--set table.key=value` replaces or adds a key. Unknown keys are refused with the nearest known one. \
         Every default is written into the run folder's `config.toml`. `FILE` stands for the name of the \
         configuration file.\n\n",
    );
    for (place, name, source) in TABLES {
        _ = writeln!(out, "## `[{place}]`\n");
        table(&mut out, place, &fields(name, source), defaults.get(place));
    }
    _ = writeln!(out, "## `[model.attention]`\n\n{}", dash_model::attention::reference());
    for (title, name, source) in PARTS {
        out.truncate(out.trim_end().len());
        _ = writeln!(out, "\n\n## {title}\n");
        table(&mut out, name, &fields(name, source), None);
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
        let told = resolved(TEXT, &[format!("{key}={bad}")]).expect_err(&format!("{key} = {bad} is not {range}"));
        assert!(told.contains(key), "{key} = {bad}: {told}");
    }
}
