//! Whether arms attend equally many tokens: before any run, where the settings decide it, and as it was measured.

use super::plan::Plan;
use super::table::Rows;
use crate::config::{Config, RouterPlan};
use crate::lab::chart::trimmed;
use crate::lab::stats::Estimate;
use dash_model::Attention;

/// Attended tokens that differ by more than this share of the smaller are no equal budgets.
const ALIKE: f64 = 0.05;

/// Mean keys that a query of the training length attends, where the configuration alone decides them: `None` where a router, another
/// run or the lengths of documents do.
fn planned(config: &Config) -> Option<f64> {
    let (t, attention) = (config.data.seq_len, &config.model.attention);
    if config.router.budget_from.is_some() || config.data.document_mask {
        return None;
    }
    let held = config.router.target_share.map(|share| share * visible(config));
    held.or(attention.listed(t)).map(|listed| attention.attended(t, listed))
}

/// Mean keys that a query of the last validation of an arm attended, over its finished seeds; `None` where no run has finished.
pub fn measured(rows: &Rows, arm: &str) -> Option<f64> {
    let values: Vec<f64> = rows.last(arm, "val", "attended_tokens", "").into_iter().map(|v| v.1).collect();
    (!values.is_empty()).then(|| Estimate::of(&values).mean)
}

/// Mean keys that a query sees, itself included.
fn visible(config: &Config) -> f64 {
    (config.data.seq_len as f64 + 1.0) / 2.0
}

/// Whether two numbers of attended tokens are unequal budgets.
pub fn differ(a: f64, b: f64) -> bool {
    (a - b).abs() > ALIKE * a.min(b)
}

/// The setting with which an arm attends about `wanted` tokens a query, and how many those are; `None` where it has none: dense
/// attention has no budget, and entmax attends two chunks at least.
fn setting(config: &Config, wanted: f64) -> Option<(String, f64)> {
    let (t, attention) = (config.data.seq_len, &config.model.attention);
    let size = attention.chunk_size()?;
    if attention.top().is_some() {
        let with = |top: usize| attention.attended(t, Attention::listed_at(size, top, t));
        let off = |top: &usize| (with(*top) - wanted).abs();
        let top = (1..=t.div_ceil(size)).min_by(|a, b| off(a).total_cmp(&off(b)))?;
        return Some((format!("model.attention.top={top}"), with(top)));
    }
    let share = (1e4 * wanted / visible(config)).round() / 1e4;
    let plan = RouterPlan { target_share: Some(share), ..RouterPlan::default() };
    plan.check(attention, t)
        .is_ok()
        .then(|| (format!("router.target_share={share}"), attention.attended(t, share * visible(config))))
}

/// How an arm comes to the budget of another one.
fn advice(arm: &str, config: &Config, (other, wanted): (&str, f64)) -> Option<String> {
    let (setting, gives) = setting(config, wanted).filter(|(_, gives)| !differ(*gives, wanted))?;
    Some(format!("\"{setting}\" in the `set` of [[compare.arm]] {arm} has it attend {} like {other}", trimmed(gives)))
}

/// What to do about two arms with these numbers of attended tokens, where they are known.
fn ways((arm, own, ours): (&str, &Config, Option<f64>), (base, theirs, other): (&str, &Config, Option<f64>)) -> String {
    let dense = |config: &Config| config.model.attention.chunk_size().is_none();
    if dense(own) || dense(theirs) {
        return "dense attention attends everything and has no budget to set".into();
    }
    let first = other.and_then(|tokens| advice(arm, own, (base, tokens)));
    let ways: Vec<String> = first.into_iter().chain(ours.and_then(|t| advice(base, theirs, (arm, t)))).collect();
    if ways.is_empty() { "no setting of either brings them together".into() } else { ways.join(", or ") }
}

/// For every arm whose budget differs from that of what it is compared with, a warning. `tokens` is what an arm attends a query, where
/// that is known; `told` makes words of two arms with what they attend, or none.
fn warnings(
    plan: &Plan,
    tokens: impl Fn(&str, &Config) -> Option<f64>,
    told: impl Fn((&str, Option<f64>), (&str, Option<f64>)) -> Option<String>,
) -> Vec<String> {
    let one = |(arm, own): &(String, Config)| {
        let (base, theirs) = plan.arms.iter().find(|(name, _)| name == plan.baseline_of(arm) && name != arm)?;
        let (ours, other) = (tokens(arm, own), tokens(base, theirs));
        let what = told((arm, ours), (base, other))?;
        let way = ways((arm, own, ours), (base, theirs, other));
        Some(format!("{what}. A difference between them may be one of budget; {way}."))
    };
    plan.arms.iter().filter_map(one).collect()
}

/// What is known before the first run.
pub fn before(plan: &Plan) -> Vec<String> {
    let told = |a: (&str, Option<f64>), b: (&str, Option<f64>)| match (a, b) {
        ((arm, Some(x)), (base, Some(y))) => {
            let what = format!("unequal budgets: {arm} attends {} tokens a query, {base} {}", trimmed(x), trimmed(y));
            differ(x, y).then_some(what)
        }
        ((open, None), (known, Some(x))) | ((known, Some(x)), (open, None)) => Some(format!(
            "budgets may differ: training decides what {open} attends, {known} attends {} tokens a query",
            trimmed(x)
        )),
        // two routers: the report has what they came to
        ((_, None), (_, None)) => None,
    };
    warnings(plan, |_, config| planned(config), told)
}

/// What was measured.
pub fn after(plan: &Plan, rows: &Rows) -> Vec<String> {
    let told = |a: (&str, Option<f64>), b: (&str, Option<f64>)| {
        let (x, y) = a.1.zip(b.1).filter(|(x, y)| differ(*x, *y))?;
        Some(format!("Unequal budgets: {} attended {} tokens a query, {} {}", a.0, trimmed(x), b.0, trimmed(y)))
    };
    warnings(plan, |arm, _| measured(rows, arm), told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Compare;
    use std::path::{Path, PathBuf};

    /// 64 tokens, of which a query sees 32.5, in chunks of 8.
    const CONFIG: &str = "[run]\nsteps = 30\n[data]\nvocab_size = 40\nseq_len = 64\nbatch_size = 2\n[optim]\nlr = 1e-3\n\
        [model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n[model.attention]\nkind = \"dash\"\nchunk_size = 8\n";

    fn arm(name: &str, set: &[&str]) -> (String, Config) {
        let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        (name.into(), Config::from_text(CONFIG, &set, Path::new("c.toml")).unwrap())
    }

    fn plan(arms: Vec<(String, Config)>) -> Plan {
        let rules = Compare { baseline: arms[0].0.clone(), ..Compare::default() };
        let (own_baselines, rates_of) = (Vec::new(), Vec::new());
        Plan { arms, own_baselines, rates_of, yokes: Vec::new(), rules, out: PathBuf::new(), command: String::new() }
    }

    #[test]
    fn what_a_configuration_decides_is_counted_and_what_training_decides_is_not() {
        // own chunk 4.5 on average; of 64 queries 56 have one chunk more: 8 x 56 / 64 = 7, and 48 a second one: 6
        let topk = arm("topk", &["model.attention.kind=topk", "model.attention.top=3"]);
        assert_eq!(planned(&topk.1), Some(17.5));
        assert_eq!(planned(&arm("dense", &["model.attention.kind=dense"]).1), Some(32.5));
        assert_eq!(planned(&arm("dash", &[]).1), None);
        assert_eq!(planned(&arm("dash", &["router.target_share=0.5"]).1), Some(16.25));
    }

    #[test]
    fn unequal_budgets_are_told_with_settings_that_equalise_them() {
        let topk = || arm("topk", &["model.attention.kind=topk", "model.attention.top=3"]);
        let open = before(&plan(vec![arm("dash", &[]), topk()]));
        let [open] = &open[..] else { panic!("{open:?}") };
        assert!(open.contains("training decides what dash attends, topk attends 17.5 tokens a query"), "{open}");
        // 17.5 / 32.5
        assert!(open.contains("\"router.target_share=0.5385\" in the `set` of [[compare.arm]] dash"), "{open}");
        let held = |share: &str| arm("dash", &[&format!("router.target_share={share}")]);
        assert_eq!(before(&plan(vec![held("0.5385"), topk()])), Vec::<String>::new());
        // 0.7 x 32.5 = 22.75: two chunks and the own one hold 17.5, three and the own one 22.5
        let far = before(&plan(vec![held("0.7"), topk()])).join("\n");
        assert!(far.starts_with("unequal budgets: topk attends 17.5 tokens a query, dash 22.75."), "{far}");
        assert!(
            far.contains("\"model.attention.top=4\" in the `set` of [[compare.arm]] topk has it attend 22.5"),
            "{far}"
        );
        let dense = before(&plan(vec![arm("dense", &["model.attention.kind=dense"]), topk()])).join("\n");
        assert!(dense.contains("dense attention attends everything"), "{dense}");
        // the advice is a configuration that loads and attends what it says
        let set = ["model.attention.kind=topk", "model.attention.top=4"];
        assert_eq!(planned(&arm("topk", &set).1), Some(22.5));
    }

    #[test]
    fn five_per_cent_more_are_alike_and_no_setting_is_told_that_cannot_be() {
        assert!(!differ(20.0, 21.0) && !differ(21.0, 20.0) && differ(20.0, 21.001) && differ(21.001, 20.0));
        // 32.5 tokens are visible; entmax keeps the own chunk and another one
        let dash = arm("dash", &[]).1;
        assert_eq!(setting(&dash, 16.25), Some(("router.target_share=0.5".into(), 16.25)));
        assert_eq!((setting(&dash, 0.5), setting(&dash, 40.0)), (None, None));
    }

    #[test]
    fn an_arm_is_set_against_its_baseline_wherever_that_stands() {
        let top =
            |n: usize| arm(&format!("top{n}"), &["model.attention.kind=topk", &format!("model.attention.top={n}")]);
        // 2, 3 and 4 chunks of 8: 11.5 or so, 17.5 and 22.5 tokens
        let mut plan = plan(vec![top(2), top(3), top(4)]);
        plan.rules.baseline = "top3".into();
        let told = before(&plan);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].starts_with("unequal budgets: top2 attends ") && told[0].contains(", top3 17.5"),
            "{}",
            told[0]
        );
        assert!(told[1].starts_with("unequal budgets: top4 attends 22.5 tokens a query, top3 17.5"), "{}", told[1]);
    }
}
