//! The model code that an export carries has its own list of attention kinds. Here it is held equal to the registry: each kind is
//! computed there, or refused by name.

use std::collections::BTreeSet;

use dash_model::VARIANTS;

const MODELING: &str = include_str!("../src/modeling_dashlab.py");

/// Text between quotes.
fn quoted(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split('"').skip(1).step_by(2).map(str::to_string)
}

/// The kinds that the file computes (`if kind == "dash":` and the `elif`s after it), and those in its line `REFUSED = (...)`, which
/// it needs where there are some.
fn kinds(python: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let branches = python.lines().map(str::trim).filter_map(|l| {
        let condition = l.strip_prefix("if kind == ").or(l.strip_prefix("elif kind == "))?;
        // `if kind == "dash" or ...` declares parameters
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
    let file = |lines: &str| format!("        if kind == \"dash\" or kind == \"topk\":\n{lines}");
    let both = file("        if kind == \"dense\":\n        elif kind == \"dash\":\n");
    assert_eq!(faults(&both, &registry), Vec::<String>::new());
    assert!(faults(&file("    if kind == \"dense\":\n"), &registry)[0].contains("neither computes \"dash\""));
    assert_eq!(
        faults(&("REFUSED = (\"dash\",)\n".to_string() + &file("    if kind == \"dense\":\n")), &registry).len(),
        0
    );
    assert!(faults(&(both.clone() + "    elif kind == \"nsa\":\n"), &registry)[0].contains("knows \"nsa\""));
    assert!(faults(&(both + "REFUSED = (\"dash\",)\n"), &registry)[0].contains("computes and refuses"));
}
