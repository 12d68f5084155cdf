//! Finding one's way: what a file can hold, and what each command and key is for.

use std::fs;
use std::path::Path;

use crate::sandbox::{SMALL, Sandbox};

/// Keys of the reference as `[place] name`, from docs/config.md.
fn documented() -> Vec<(String, String)> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/config.md")).unwrap();
    let (mut place, mut out) = (String::new(), Vec::new());
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            place = title.trim_matches('`').trim_matches(['[', ']']).to_string();
        } else if let Some(name) = line.strip_prefix("| `").and_then(|l| l.split('`').next())
            && !place.contains(' ')
        {
            out.push((place.clone(), name.to_string()));
        }
    }
    assert!(out.len() > 60, "{}", out.len());
    out
}

#[test]
fn a_new_file_has_every_key_and_trains_on_ones_own_text() {
    let s = Sandbox::with_verses();
    let file = s.out(&["init", "--text", "own.txt"]);
    fs::write(s.path("mine.toml"), &file).unwrap();
    let keys = documented();
    for (place, name) in keys.iter().filter(|(place, name)| {
        let table = format!("{place}.{name}");
        !["model.attention", "compare.arm"].contains(&place.as_str())
            && table != "model.attention"
            && !keys.iter().any(|(place, _)| *place == table)
    }) {
        let at = file.find(&format!("[{place}]\n")).unwrap_or_else(|| panic!("no table {place} in\n{file}"));
        let table = file[at + 1..].split("\n\n").next().unwrap();
        let set = |l: &str| l.trim_start_matches('#').split(" =").next() == Some(name);
        assert!(table.lines().any(set), "{place}.{name} in\n{table}");
    }
    let mut args = vec!["--config", "mine.toml"];
    args.extend(SMALL);
    s.out(&args);
    let resolved = fs::read_to_string(s.path("runs/mine/config.toml")).unwrap();
    assert!(resolved.contains("path = \"own.txt\"") && resolved.contains("kind = \"dash\""), "{resolved}");
    // what is switched off are the defaults: switched on they change nothing
    let on: String = file
        .split("\n\n")
        .filter(|table| !table.starts_with("#["))
        .map(|table| {
            let line = |l: &str| match l.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') && !rest.ends_with('=') && !rest.starts_with("name =") => {
                    format!("{rest}\n")
                }
                _ => format!("{l}\n"),
            };
            table.lines().map(line).collect::<String>() + "\n"
        })
        .collect();
    fs::write(s.path("on.toml"), on).unwrap();
    let mut args = vec!["--config", "on.toml", "--set", "run.name=mine", "--resume"];
    args.extend(SMALL);
    let told = s.told(0, &args);
    assert!(!told.contains("->"), "{told}");
}

#[test]
fn every_kind_has_a_file_that_loads() {
    let s = Sandbox::with_verses();
    // a text that comes later is no fault, and is told
    assert!(s.told(0, &["init", "--text", "later.txt"]).contains("later.txt is not there yet"));
    assert_eq!(s.told(0, &["init", "--text", "own.txt"]), "");
    fs::create_dir(s.path("fineweb")).unwrap();
    fs::write(s.path("fineweb/000.parquet"), "PAR1").unwrap();
    let file = s.out(&["init", "--text", "fineweb"]);
    assert!(file.contains("\nextensions = [\"parquet\"]\n"), "{file}");
    let told = s.told(2, &["init", "--kind", "sparse"]);
    let kinds: Vec<&str> = told.split("is none of ").nth(1).unwrap().trim().split(", ").collect();
    assert!(kinds.contains(&"nsa") && kinds.contains(&"dash-stopped"), "{told}");
    for kind in kinds {
        fs::write(s.path("k.toml"), s.out(&["init", "--text", "own.txt", "--kind", kind])).unwrap();
        let name = format!("run.name={kind}");
        let set = ["--set", "run.steps=1", "--set", "data.vocab_size=300", "--set", "eval.batches=1", "--set", &name];
        let args: Vec<&str> = ["--config", "k.toml"].into_iter().chain(set).collect();
        s.out(&args);
        assert!(s.path("runs").join(kind).join("checkpoints/step-00000001/model.safetensors").is_file(), "{kind}");
    }
}

#[test]
fn a_key_is_explained_as_in_the_reference() {
    let s = Sandbox::with_verses();
    let told = s.out(&["config", "optim.lr"]);
    assert!(told.contains("[optim]\nlr - Peak learning rate. (number, above 0; required)"), "{told}");
    assert!(!told.contains("beta1"));
    let gamma = s.out(&["config", "gamma"]);
    assert!(gamma.contains("[router]") && gamma.contains("[model.attention] with kind = \"dash\""), "{gamma}");
    let all = s.out(&["config"]);
    for (_, name) in documented().iter().filter(|(place, _)| place != "compare.arm") {
        assert!(all.contains(&format!("\n{name} - ")), "{name}");
    }
    assert!(s.told(2, &["config", "model.d_model"]).contains("did you mean width?"));
    assert!(s.told(2, &["config", "optim.wieght_decay"]).contains("did you mean weight_decay?"));
}

#[test]
fn help_has_examples_and_the_version_says_what_was_built() {
    let s = Sandbox::with_verses();
    let listed = s.out(&["--help"]);
    let commands = listed.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names: Vec<&str> =
        commands.lines().filter_map(|l| l.strip_prefix("  ")?.split(' ').next()).filter(|n| !n.is_empty()).collect();
    assert!(names.len() >= 12, "{names:?}");
    for name in names.iter().filter(|n| **n != "help") {
        let help = s.out(&[name, "--help"]);
        assert!(help.contains("Examples:\n  train "), "{name}: {help}");
    }
    let version = s.out(&["--version"]);
    assert!(version.contains("commit ") && version.contains("instruction set "), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        let script = s.out(&["completions", shell]);
        assert!(script.contains("verify-resume") && script.contains("extend"), "{shell}");
    }
}
