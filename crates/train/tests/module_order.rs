//! The order of the modules: config < what all use < training < lab < commands < the crate's entry points. A file names only
//! files of its own module and of modules before it, and no circle of files is left.

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

/// The top-level module of a file, as its place in the order; none for a file of no known one.
fn rank(file: &str) -> Option<usize> {
    let order: [&[&str]; 6] = [
        &["config"],
        &["console", "failure", "files", "program", "signals"],
        &["training"],
        &["lab"],
        &["commands"],
        &["lib", "main", "bin"],
    ];
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
            if code[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
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
fn faults(sources: &Sources) -> Vec<String> {
    let edges = edges(sources);
    let mut out = Vec::new();
    for file in sources.keys().filter(|f| rank(f).is_none()) {
        out.push(format!("{file}.rs is in no module that this test knows"));
    }
    for (from, to) in edges.iter().filter(|(from, to)| rank(from) < rank(to)) {
        out.push(format!("{from}.rs names {to}.rs, which is of a later module"));
    }
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
    if !left.is_empty() {
        out.push(format!("a circle of files: {left:?}"));
    }
    out
}

#[test]
fn every_file_names_only_modules_before_its_own_and_no_circle_is_left() {
    let mut sources = Sources::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut sources);
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
