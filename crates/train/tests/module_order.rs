//! The order of the modules of each crate: a file names only files of its own level and of levels before it. In `train` no circle of
//! files is left, either. In the other crates there are some inside a module: a folder's `mod.rs` has the types and the checks, the files
//! below it the kernels, kinds or formats that take these types, and it calls them. Only the order of the levels is held there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Files below `src`, by path without `.rs`, and their text.
type Sources = BTreeMap<String, String>;

fn read(folder: &Path, at: &str, into: &mut Sources) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if path.is_dir() {
            read(&path, &format!("{at}{name}/"), into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.insert(format!("{at}{name}"), fs::read_to_string(&path).unwrap());
        }
    }
}

/// Top-level modules, the levels in their order.
type Order = &'static [&'static [&'static str]];

const TRAIN: Order = &[
    &["config"],
    &["console", "failure", "files", "program", "signals"],
    &["peers"],
    &["training"],
    &["lab"],
    &["commands"],
    &["lib", "main", "bin"],
];
const CORE: Order = &[
    &["error"],
    &["number", "rng", "shape"],
    &["device"],
    &["ids", "storage"],
    &["dispatch", "tensor"],
    &["communicator", "tape"],
    &["ops"],
    &["testing"],
    &["lib"],
];
/// A configuration has an attention, whose kinds read sizes of the model and declare parameters.
const MODEL: Order = &[
    &["error"],
    &["budget", "cache", "rope", "trace"],
    &["attention", "config", "params"],
    &["decoder", "flops"],
    &["generate", "load"],
    &["lib"],
];
const DATA: Order = &[
    &["error", "files", "guard", "rng", "threads"],
    &["intake", "shard", "task", "tokenizer"],
    &["report"],
    &["loader", "prepare"],
    &["lib"],
];

/// (file, file of a later level that it names): a tensor on a card is cast and summed by the kernels of these ops.
const EXEMPT: [(&str, &str); 2] = [("device/cuda/data", "ops/cuda"), ("tensor", "ops/cuda")];

/// The top-level module of a file, as its place in the order; none for a file of no known one.
fn rank(file: &str, order: Order) -> Option<usize> {
    let top = file.split('/').next()?;
    order.iter().position(|modules| modules.contains(&top))
}

/// The text without its comments, and without the tests at its end.
fn code(text: &str) -> String {
    let lines = text.lines().take_while(|l| *l != "#[cfg(test)]" || !text.contains("#[cfg(test)]\nmod tests {"));
    lines.map(|l| l.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The paths that begin here, groups in braces written out: `a::{b, c::d}` is `a::b` and `a::c::d`. Returns what is left.
fn paths<'a>(mut text: &'a str, before: &[String], out: &mut Vec<Vec<String>>) -> &'a str {
    let mut path = before.to_vec();
    loop {
        text = text.trim_start();
        if let Some(mut group) = text.strip_prefix('{') {
            loop {
                group = group.trim_start().trim_start_matches(',').trim_start();
                if let Some(alias) = group.strip_prefix("as ") {
                    group = alias.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
                    continue;
                }
                match group.strip_prefix('}') {
                    Some(rest) => return rest,
                    None if group.is_empty() => return group,
                    None => {
                        let rest = paths(group, &path, out);
                        // neither a name nor a group, for example `*`
                        group = if rest.len() == group.len() { &group[1..] } else { rest };
                    }
                }
            }
        }
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        if end > 0 {
            path.push(text[..end].to_string());
        }
        match text[end..].strip_prefix("::") {
            Some(rest) => text = rest,
            None => {
                out.push(path);
                return &text[end..];
            }
        }
    }
}

/// The file that a path of names leads to: the longest beginning that is one.
fn target(sources: &Sources, path: &[String]) -> String {
    let names = |n: usize| path[..n].join("/");
    let places = (1..=path.len()).rev().flat_map(|n| [names(n), format!("{}/mod", names(n))]);
    places.into_iter().find(|place| sources.contains_key(place)).unwrap_or("lib".to_string())
}

/// The module of a file: `a/b` of `a/b.rs` and of `a/b/mod.rs`, the crate itself of `lib.rs` and `main.rs`.
fn module(file: &str) -> Vec<String> {
    let mut names: Vec<String> = file.split('/').map(str::to_string).collect();
    if ["mod", "lib", "main"].contains(&names[names.len() - 1].as_str()) {
        names.pop();
    }
    names
}

/// Names of the files and folders right below a module.
fn children<'a>(sources: &'a Sources, module: &[String]) -> BTreeSet<&'a str> {
    let folder = module.iter().map(|m| format!("{m}/")).collect::<String>();
    let below = sources.keys().filter_map(|file| file.strip_prefix(&folder)).filter(|rest| *rest != "mod");
    below.filter_map(|rest| rest.split('/').next()).collect()
}

/// (file, file it names), by `crate::`, by `super::` or as a child of its own.
fn edges(sources: &Sources) -> BTreeSet<(String, String)> {
    let mut out = BTreeSet::new();
    for (file, text) in sources {
        let code = code(text);
        let own = module(file);
        let roots = children(sources, &own).into_iter().map(|c| format!("{c}::"));
        let roots: Vec<String> =
            ["crate::", "super::", "self::"].map(str::to_string).into_iter().chain(roots).collect();
        for (start, _) in roots.iter().flat_map(|r| code.match_indices(r.as_str())) {
            // `$crate::` of a macro is no path of the file that has the macro
            if code[..start].ends_with(|c: char| c.is_alphanumeric() || "_:$".contains(c)) {
                continue;
            }
            let (mut module, mut rest) = (own.as_slice(), &code[start..]);
            if let Some(below) = rest.strip_prefix("crate::") {
                (module, rest) = (&[], below);
            }
            rest = rest.strip_prefix("self::").unwrap_or(rest);
            while let Some(above) = rest.strip_prefix("super::") {
                module = &module[..module.len() - 1];
                rest = above;
            }
            let mut found = Vec::new();
            paths(rest, module, &mut found);
            out.extend(found.iter().map(|p| (file.clone(), target(sources, p))).filter(|(a, b)| a != b));
        }
    }
    out
}

/// What breaks the order, in words.
fn disorder(sources: &Sources, order: Order) -> Vec<String> {
    let mut out = Vec::new();
    for file in sources.keys().filter(|f| rank(f, order).is_none()) {
        out.push(format!("{file}.rs is in no module that this test knows"));
    }
    for (from, to) in edges(sources).iter().filter(|(from, to)| rank(from, order) < rank(to, order)) {
        out.push(format!("{from}.rs names {to}.rs, which is of a later module"));
    }
    out
}

/// Files that name each other in a circle, in words.
fn circles(sources: &Sources) -> Option<String> {
    let edges = edges(sources);
    // what names no file that is left, or is named by none, is in no circle
    let mut left: BTreeSet<&String> = sources.keys().collect();
    loop {
        let among = |from: &String, to: &String| left.contains(from) && left.contains(to);
        let names = |f: &String| edges.iter().any(|(from, to)| from == f && among(from, to));
        let is_named = |f: &String| edges.iter().any(|(from, to)| to == f && among(from, to));
        let circle: BTreeSet<&String> = left.iter().copied().filter(|f| names(f) && is_named(f)).collect();
        if circle.len() == left.len() {
            break;
        }
        left = circle;
    }
    (!left.is_empty()).then(|| format!("a circle of files: {left:?}"))
}

/// Both, of this crate.
fn faults(sources: &Sources) -> Vec<String> {
    disorder(sources, TRAIN).into_iter().chain(circles(sources)).collect()
}

/// The sources of a crate of this workspace.
fn sources_of(name: &str) -> Sources {
    let mut sources = Sources::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src"), "", &mut sources);
    sources
}

#[test]
fn every_file_names_only_modules_before_its_own_and_no_circle_is_left() {
    let sources = sources_of("train");
    let all = edges(&sources);
    for (from, to) in
        [("training/run", "training/trainer"), ("commands/train", "training/run"), ("failure", "config/mod")]
    {
        assert!(all.contains(&(from.to_string(), to.to_string())), "{from}.rs names {to}.rs");
    }
    let faults = faults(&sources);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_levels_of_the_other_crates_stand_in_their_order() {
    let mut exempt = 0;
    for (name, order, known) in [
        ("core", CORE, ("ops/softmax/mod", "dispatch")),
        ("model", MODEL, ("decoder", "attention/mod")),
        ("data", DATA, ("prepare/make", "tokenizer/mod")),
    ] {
        let mut sources = sources_of(name);
        // files of tests name whatever they test with
        sources.retain(|file, _| !["tests", "parity"].iter().any(|test| file.ends_with(test)));
        let all = edges(&sources);
        assert!(all.contains(&(known.0.into(), known.1.into())), "{name}: {known:?}");
        let (allowed, faults): (Vec<_>, Vec<_>) = disorder(&sources, order).into_iter().partition(|fault| {
            EXEMPT.iter().any(|(from, to)| *fault == format!("{from}.rs names {to}.rs, which is of a later module"))
        });
        assert!(faults.is_empty(), "{name}: {}", faults.join("\n"));
        exempt += allowed.len();
        // a fault is planted in the first level and found
        let first = sources.keys().find(|file| rank(file, order) == Some(0)).unwrap().clone();
        let last = &known.0.split('/').next().unwrap();
        sources.insert(first.clone(), format!("use crate::{last}::Something;"));
        assert!(disorder(&sources, order).iter().any(|f| f.starts_with(&format!("{first}.rs names {last}"))), "{name}");
    }
    assert_eq!(exempt, EXEMPT.len(), "an exemption that is not needed goes");
}

#[test]
fn a_planted_import_is_found() {
    let sources =
        |files: &[(&str, &str)]| files.iter().map(|(f, t)| (f.to_string(), t.to_string())).collect::<Sources>();
    let base = [
        ("lib", ""),
        ("config/mod", "mod data;\npub use data::Data;"),
        ("config/data", "pub struct Data;"),
        (
            "training/run",
            "use super::{eval::{sample, Set as Some_}, *};\nuse crate::config::Config;\n// crate::lab is not named here",
        ),
        ("training/mod", ""),
        ("training/eval", ""),
        ("lab/audit/mod", "use crate::training::run::{self, train};"),
    ];
    assert_eq!(faults(&sources(&base)), Vec::<String>::new());
    for (file, planted, word) in [
        ("config/data", "use super::Config;", "circle"),
        ("config/data", "fn f(config: &crate::config::Config) {}", "circle"),
        ("config/data", "use crate::training::eval::sample;", "later module"),
        ("config/data", "use super::super::training::run;", "later module"),
        ("training/eval", "fn f() -> crate::lab::audit::Check {}", "later module"),
        ("training/eval", "use crate::Failure;", "later module"),
        ("training/eval", "use super::run::train;", "circle"),
        ("training/eval", "use crate::{config::Config, training::{run}};", "circle"),
        ("other/eval", "", "no module"),
    ] {
        let mut files = sources(&base);
        files.insert(file.to_string(), planted.to_string());
        let faults = faults(&files);
        assert!(faults.iter().any(|f| f.contains(word)), "{planted}: {faults:?}");
    }
}
