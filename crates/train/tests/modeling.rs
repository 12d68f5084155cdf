//! The model code that an export carries has its own list of attention kinds. Here it is held equal to the registry: each kind is
//! computed there, or refused by name.

use std::collections::BTreeSet;

use dash_model::VARIANTS;

const MODELING: &str = include_str!("../src/modeling_dashlab.py");

/// Text between quotes.
fn quoted(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split('"').skip(1).step_by(2).map(str::to_string)
}

/// The kinds that the file computes (`if kind == "dash":` and the `elif`s after it, each followed by `o = ...`), and those in its line `REFUSED = (...)`, which
/// it needs where there are some.
fn kinds(python: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let lines: Vec<&str> = python.lines().map(str::trim).collect();
    let branches = lines.windows(2).filter_map(|l| {
        let condition = l[0].strip_prefix("if kind == ").or(l[0].strip_prefix("elif kind == "))?;
        // a branch that gives the output `o`; others declare parameters
        l[1].strip_prefix("o = ")?;
        condition.strip_prefix('"')?.strip_suffix("\":").filter(|kind| !kind.contains('"')).map(str::to_string)
    });
    let refused = python.lines().filter_map(|l| l.strip_prefix("REFUSED = ")).flat_map(quoted);
    (branches.collect(), refused.collect())
}

/// What differs from the registry, in words.
fn faults(python: &str, registry: &BTreeSet<String>) -> Vec<String> {
    let (computed, refused) = kinds(python);
    let said: BTreeSet<String> = computed.union(&refused).cloned().collect();
    let missing = registry.difference(&said).map(|kind| {
        format!("modeling_dashlab.py neither computes {kind:?} nor refuses it: write its forward pass, or add REFUSED = (\"{kind}\",)")
    });
    let unknown =
        said.difference(registry).map(|kind| format!("modeling_dashlab.py knows {kind:?}, the registry does not"));
    let both = computed.intersection(&refused).map(|kind| format!("modeling_dashlab.py computes and refuses {kind:?}"));
    missing.chain(unknown).chain(both).collect()
}

#[test]
fn every_kind_of_the_registry_is_computed_or_refused_by_name() {
    let registry: BTreeSet<String> = VARIANTS.iter().map(|v| v.kind.to_string()).collect();
    assert!(registry.len() >= 6);
    assert_eq!(faults(MODELING, &registry), Vec::<String>::new());
    // what falls through names the kind
    assert!(MODELING.contains("raise ValueError(f\"dashlab.attention.kind {kind!r}"));
}

#[test]
fn a_kind_that_one_of_both_lacks_is_found() {
    let registry: BTreeSet<String> = ["dense", "dash"].map(str::to_string).into();
    let parameters = "        if kind == \"dash\" or kind == \"topk\":\n            self.x = 1\n        if kind == \"dash\":\n            self.y = 1\n";
    let branch = |kind: &str| format!("        elif kind == \"{kind}\":\n            o = read(q, k, v)\n");
    let dense = parameters.to_string() + &branch("dense").replace("elif", "if");
    let both = dense.clone() + &branch("dash");
    assert_eq!(faults(&both, &registry), Vec::<String>::new());
    assert!(faults(&dense, &registry)[0].contains("neither computes \"dash\""));
    assert_eq!(faults(&("REFUSED = (\"dash\",)\n".to_string() + &dense), &registry), Vec::<String>::new());
    assert!(faults(&(both.clone() + &branch("nsa")), &registry)[0].contains("knows \"nsa\""));
    assert!(faults(&(both + "REFUSED = (\"dash\",)\n"), &registry)[0].contains("computes and refuses"));
}
