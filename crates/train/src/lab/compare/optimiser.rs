//! What the arms' optimisers do to the size of a gradient, which a study of a router's gradient has to know.

use super::plan::Plan;
use crate::config::OptimKind;

/// Warnings about arms that are trained by Muon, or not by what they are compared with.
pub fn warnings(plan: &Plan) -> Vec<String> {
    let name = |kind| match kind {
        OptimKind::Adamw => "adamw",
        OptimKind::Muon => "muon",
    };
    let (mut out, by) = (Vec::new(), |kind| plan.arms.iter().filter(move |(_, config)| config.optim.kind == kind));
    for (arm, own) in &plan.arms {
        let base = plan.arms.iter().find(|(name, _)| name == plan.baseline_of(arm) && name != arm);
        if let Some((base, theirs)) = base.filter(|(_, theirs)| theirs.optim.kind != own.optim.kind) {
            let (own, theirs) = (name(own.optim.kind), name(theirs.optim.kind));
            out.push(format!(
                "Unequal optimisers: {arm} is trained by {own}, {base} by {theirs}. A difference between them may be one of optimiser."
            ));
        }
    }
    let muon: Vec<&str> = by(OptimKind::Muon).map(|(arm, _)| arm.as_str()).collect();
    if !muon.is_empty() {
        out.push(format!(
            "Trained by muon: {}. It gives every matrix an update of one size, whatever the size of its gradient: what a router's gradient \
             adds to a projection shows in its direction alone.",
            muon.join(", ")
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::config::reference::SMALLEST;
    use crate::config::{Compare, Config};

    #[test]
    fn muon_is_told_and_unequal_optimisers_too() {
        let told = |kinds: [&str; 2]| {
            let arm = |(i, kind): (usize, &str)| {
                let set = [format!("optim.kind={kind}")];
                (format!("a{i}"), Config::from_text(SMALLEST, &set, Path::new("c.toml")).unwrap())
            };
            let arms = kinds.into_iter().enumerate().map(arm).collect();
            let rules = Compare { baseline: "a0".into(), ..Compare::default() };
            let (own_baselines, rates_of, yokes) = (Vec::new(), Vec::new(), Vec::new());
            warnings(&Plan { arms, own_baselines, rates_of, yokes, rules, out: PathBuf::new(), command: String::new() })
        };
        assert_eq!(told(["adamw", "adamw"]), Vec::<String>::new());
        let both = told(["muon", "muon"]);
        assert!(both.len() == 1 && both[0].starts_with("Trained by muon: a0, a1."), "{both:?}");
        let one = told(["adamw", "muon"]);
        assert!(one.len() == 2 && one[0].contains("a1 is trained by muon, a0 by adamw"), "{one:?}");
    }
}
