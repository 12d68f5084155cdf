use super::super::criteria::Status;
use super::super::table::Row;
use super::*;
use crate::config::{Compare, Config};
use crate::lab::stats::Time;

const CONFIG: &str = "[run]\nsteps = 30\n[data]\nvocab_size = 40\nseq_len = 64\nbatch_size = 2\n[task]\nkind = \"recall\"\n\
    pairs = 4\n[optim]\nlr = 1e-3\n[model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
    [model.attention]\nkind = \"dash\"\nchunk_size = 8\n";

/// Rows of arms whose seeds end at these accuracies; at update 20 they stand at the same, at 10 at 0.1.
fn rows(accuracies: &[(&str, &[f64])]) -> Rows {
    let mut all = Rows::default();
    for (arm, values) in accuracies {
        for (seed, &value) in values.iter().enumerate() {
            let mut push = |split: &str, metric: &str, at: &str, step: u64, value: f64| {
                let (arm, split, metric, at) = (arm.to_string(), split.into(), metric.into(), at.into());
                all.0.push(Row { arm, seed: seed as u64, step, split, metric, at, value });
            };
            push("val", "accuracy", "length=64", 10, 0.1);
            push("val", "accuracy", "length=64", 20, value);
            push("val", "accuracy", "length=64", 30, value);
            push("val", "asked", "length=64", 30, 512.0);
            push("val", "accuracy", "length=64 distance<32", 30, value);
            push("val", "loss", "", 30, 1.0 - value);
            push("val", "loss_error", "", 30, if seed % 2 == 0 { 0.03 } else { 0.04 });
            push("val", "attended_tokens", "", 30, 20.0);
            push("run", "finished", "", 30, 1.0);
            push("run", "steps", "", 30, 30.0);
            push("run", "learning_rate", "", 30, 0.001);
        }
    }
    all
}

fn plan(arms: &[&str], rules: Compare) -> Plan {
    let config = Config::from_text(CONFIG, &[], Path::new("c.toml")).unwrap();
    let config = Config { compare: Some(rules.clone()), ..config };
    Plan {
        arms: arms.iter().map(|name| (name.to_string(), config.clone())).collect(),
        own_baselines: Vec::new(),
        rates_of: Vec::new(),
        yokes: Vec::new(),
        rules: Compare { baseline: arms[0].into(), ..rules },
        out: PathBuf::new(),
        command: "train compare --config c.toml".into(),
    }
}

fn report_of(rules: Compare, rows: Rows) -> Report {
    let mut arms: Vec<&str> = rows.0.iter().map(|r| r.arm.as_str()).filter(|a| !a.contains('@')).collect();
    arms.dedup();
    // what a reader has: the rows as they come back from the file
    let read = Rows::from_csv(&rows.csv()).unwrap();
    assert_eq!(read, rows);
    Report::new(&plan(&arms, rules), &Results::of(read), &Notes::default())
}

fn cell(report: &Report, title: &str, arm: &str, column: &str) -> String {
    let section = report.sections.iter().find(|s| s.title.starts_with(title)).expect(title);
    let table = section.table.as_ref().unwrap();
    let i = table.head.iter().position(|h| h == column).expect(column);
    table.rows.iter().find(|r| r[0] == arm).expect(arm)[i].clone()
}

const PRIMARY: &str = "Primary outcome: accuracy at length 64";

fn primary() -> Compare {
    Compare { primary: "accuracy".into(), seeds: 6, ..Compare::default() }
}

const LOW: [f64; 6] = [0.2, 0.3, 0.4, 0.2, 0.3, 0.4];
const HIGH: [f64; 6] = [0.6, 0.8, 0.7, 0.9, 0.95, 0.92];

#[test]
fn the_answer_is_the_first_sentence_and_every_number_follows_from_the_rows() {
    let r = report_of(Compare { contrast: "b".into(), ..primary() }, rows(&[("a", &LOW), ("b", &HIGH), ("c", &LOW)]));
    // differences 0.4, 0.5, 0.3, 0.7, 0.65, 0.52: mean 0.5117; all six have one sign, so p = 2 / 64 and the interval of level
    // 1 - 2 / 64 is their range
    assert!(r.answer.starts_with("b is better than a in accuracy at length 64: "), "{}", r.answer);
    for part in ["difference 0.51 (96.875 % interval 0.30 to 0.70)", "6 pairs", "exact sign-flip test p = 0.031"] {
        assert!(r.answer.contains(part), "{part} in {}", r.answer);
    }
    assert_eq!(cell(&r, PRIMARY, "b", "reading"), "better (declared)");
    assert_eq!(cell(&r, PRIMARY, "b", "sign-flip"), "0.031 (0.031)");
    assert_eq!(cell(&r, PRIMARY, "b", "higher in"), "6 of 6");
    assert_eq!((cell(&r, PRIMARY, "c", "p"), cell(&r, PRIMARY, "c", "reading")), ("1".into(), "undecided".into()));
    // two checks at 0.9 or more: seeds 3, 4 and 5, at update 30
    assert_eq!(cell(&r, "Time to solve", "b", "solved"), "3 of 6");
    assert_eq!(cell(&r, "Time to solve", "b", "solved at"), "30, 30, 30");
    assert_eq!(cell(&r, "Time to solve", "a", "median"), "> 30");
    // of 12 runs 3 solved, all in one arm: C(6, 3) of C(12, 3) divisions, on both sides
    assert_eq!(cell(&r, "Time to solve", "b", "log-rank p"), "0.18 (0.18)");
    let seeds = r.sections.iter().find(|s| s.title.starts_with("Seed by seed")).unwrap().table.as_ref().unwrap();
    assert_eq!(seeds.rows[4], ["4", "0.3", "0.95", "0.3"]);
    let (page, text) = (r.html(), r.markdown());
    assert!(text.lines().nth(2).unwrap().starts_with("b is better than a"));
    assert!(page.contains(&r.answer) && page.find("id=\"forest\"").unwrap() < page.find("<table").unwrap());
    assert!(page.contains("<svg") && !page.replace("http://www.w3.org/2000/svg", "").contains("http"));
    assert!(!page.contains("<script") && !page.contains("href="), "a page of its own");
}

#[test]
fn five_pairs_of_an_accuracy_cannot_decide_and_say_so() {
    let r = report_of(primary(), rows(&[("a", &LOW[..5]), ("b", &HIGH[..5])]));
    assert!(r.answer.starts_with("It is undecided whether b differs from a"), "{}", r.answer);
    assert!(r.answer.contains("so few pairs cannot give a p below 0.062"), "{}", r.answer);
    assert_eq!(cell(&r, PRIMARY, "b", "interval"), "0.30 to 0.70 (93.8 %)");
    // the loss is one minus the accuracy, and its t test decides
    assert_eq!(cell(&r, "Exploratory: loss", "b", "reading"), "better");
    let two = report_of(primary(), rows(&[("a", &LOW[..2]), ("b", &HIGH[..2])]));
    assert!(two.answer.starts_with("It is undecided"));
}

#[test]
fn within_the_margin_is_equivalent_and_many_arms_share_a_correction() {
    let near: Vec<f64> = LOW.iter().zip([0.01, -0.01, 0.02, 0.0, -0.02, 0.01]).map(|(a, d)| a + d).collect();
    let margin = |margin| Compare { margin: Some(margin), contrast: "b".into(), ..primary() };
    let all = [("a", &LOW[..]), ("b", &near), ("c", &HIGH)];
    let r = report_of(margin(0.05), rows(&all));
    assert!(r.answer.starts_with("b is equivalent to a in accuracy"), "{}", r.answer);
    assert!(report_of(margin(0.005), rows(&all)).answer.starts_with("It is undecided"));
    // without a declared contrast two comparisons double the smallest p: 0.031 becomes 0.062
    let r = report_of(primary(), rows(&all));
    assert_eq!(cell(&r, PRIMARY, "c", "Holm"), "0.062");
    assert!(r.answer.contains("after Holm's correction for 2 comparisons: undecided: b"), "{}", r.answer);
}

#[test]
fn what_was_not_declared_explores_and_what_was_changed_is_told_first() {
    let r = report_of(Compare { seeds: 6, ..Compare::default() }, rows(&[("a", &LOW), ("b", &HIGH)]));
    assert!(r.answer.ends_with("so this explores and decides nothing."), "{}", r.answer);
    let rows = rows(&[("a", &LOW), ("b", &HIGH)]);
    let criteria = Status { changed: vec!["compare.alpha 0.05 -> 0.1".into()], file: String::new() };
    let notes = Notes { criteria, ..Notes::default() };
    let r = Report::new(&plan(&["a", "b"], primary()), &Results::of(rows), &notes);
    assert!(
        r.answer.starts_with("Criteria were changed after the first run (compare.alpha 0.05 -> 0.1)"),
        "{}",
        r.answer
    );
}

#[test]
fn unequal_budgets_stand_in_the_box_and_in_the_first_table() {
    let attends = |tokens: f64| {
        let mut all = rows(&[("a", &LOW), ("b", &HIGH)]);
        for r in all.0.iter_mut().filter(|r| r.arm == "b" && r.metric == "attended_tokens") {
            r.value = tokens;
        }
        report_of(primary(), all)
    };
    let r = attends(10.0);
    assert_eq!(cell(&r, PRIMARY, "b", "attended tokens"), "10 against 20");
    let told = r.warnings.join("\n");
    // 20 of 32.5 tokens that a query sees
    let wanted =
        ["Unequal budgets: b attended 10 tokens a query, a 20", "\"router.target_share=0.6154\"", "[[compare.arm]] b"];
    assert!(wanted.iter().all(|part| told.contains(part)), "{told}");
    let equal = attends(20.9);
    let head = |r: &Report| r.sections[0].table.as_ref().unwrap().head.clone();
    assert!(
        equal.warnings.is_empty() && !head(&equal).contains(&"attended tokens".to_string()),
        "{:?}",
        equal.warnings
    );
    assert!(head(&attends(21.1)).contains(&"attended tokens".to_string()), "above 5 %");
}

#[test]
fn the_columns_are_explained_once_and_shares_stay_between_0_and_1() {
    let mut all = rows(&[("a", &LOW[..3]), ("b", &HIGH[..3])]);
    for (seed, value) in [0.0, 0.0, 0.66].into_iter().enumerate() {
        let (arm, at) = ("b".to_string(), "length=64".to_string());
        let (split, metric) = ("val".into(), "router_missed".into());
        all.0.push(Row { arm, seed: seed as u64, step: 30, split, metric, at, value });
    }
    let r = report_of(primary(), all);
    assert_eq!(r.markdown().matches("A difference is arm minus baseline").count(), 1);
    let faults = r.sections.iter().find(|s| s.title == "Whose fault").unwrap().table.as_ref().unwrap();
    let row = faults.rows.iter().find(|row| row[1] == "b").unwrap();
    // 0.22, with a t interval of 0.95 to either side
    assert_eq!(row[3], "0.22 (0.00 to 0.66)");
}

#[test]
fn who_trained_the_runs_is_in_the_rows() {
    let mut all = rows(&[("a", &LOW), ("b", &HIGH)]);
    let maker = "version 0.1.0, commit 1234567890, device cpu, processor A, B \"C\"";
    all.push_maker("a", 0, 30, maker);
    all.push_maker("b", 0, 30, maker);
    let read = Rows::from_csv(&all.csv()).unwrap();
    assert_eq!(read, all);
    let told = super::repeat::builds(&read);
    assert_eq!(told, ["Trained by version 0.1.0, commit 1234567890, device cpu, processor A, B  C  (2 runs)"]);
}

#[test]
fn a_failed_run_never_solved_its_task() {
    let mut all = rows(&[("a", &HIGH), ("b", &HIGH)]);
    all.0.retain(|r| !(r.arm == "b" && r.seed == 4 && r.metric == "finished"));
    all.push_run("b", 4, 20, "finished", 0.0);
    all.push_run("b", 4, 20, "failed", 1.0);
    for r in all.0.iter_mut().filter(|r| r.arm == "b" && r.seed == 4 && r.metric == "accuracy") {
        r.value = 0.1;
    }
    let r = report_of(primary(), all);
    assert_eq!(cell(&r, "Time to solve", "a", "solved"), "3 of 6");
    assert_eq!(cell(&r, "Time to solve", "b", "solved"), "2 of 6");
    assert_eq!(cell(&r, PRIMARY, "b", "pairs"), "5");
}

#[test]
fn a_time_that_nobody_reached_is_told_as_such() {
    let told = |all: &[(f64, bool)]| {
        let times: Vec<_> = (1..).zip(all).map(|(seed, &(at, happened))| (seed, Time { at, happened })).collect();
        super::tables::time(&times)
    };
    assert_eq!(told(&[(12.0, false), (12.0, false)]), "none by 12");
    assert_eq!(told(&[(12.0, true), (12.0, true)]), "12 in all");
    assert_eq!(told(&[(4.0, true), (8.0, true)]), "6.0 (4.0 to 8.0)");
    assert_eq!(told(&[(4.0, true), (12.0, false)]), "8.0 (4.0 to 12.0), 1 censored");
    assert_eq!(told(&[]), "no run finished");
}

#[test]
fn the_best_rate_is_chosen_and_every_rate_is_shown() {
    let rules = Compare { learning_rates: vec![0.001, 0.003, 0.01], tuning_seeds: vec![0, 1], ..primary() };
    let all = [
        ("a", &LOW[..]),
        ("b", &HIGH),
        ("a@0.001", &[0.1, 0.2]),
        ("a@0.003", &[0.4, 0.2]),
        ("a@0.01", &[0.2, 0.2]),
        ("b@0.001", &[0.1, 0.2]),
        ("b@0.003", &[0.4, 0.5]),
        ("b@0.01", &[0.9, 0.8]),
    ];
    let plan = plan(&["a", "b"], rules.clone());
    let results = Results::of(rows(&all));
    let choices = plan.choices(&results).unwrap();
    assert_eq!(choices.iter().map(|c| (c.rate, c.at_edge())).collect::<Vec<_>>(), [(0.003, false), (0.01, true)]);
    assert_eq!(plan.with_rates(&choices).arms[1].1.optim.lr, 0.01);
    let r = report_of(rules, rows(&all));
    let table =
        r.sections.iter().find(|s| s.title.starts_with("Learning rates tried")).unwrap().table.as_ref().unwrap();
    assert_eq!(table.rows.len(), 6);
    assert_eq!(table.rows[5][..], ["b", "0.01", "0.85", "0.9, 0.8", "0", "0.65", "chosen"]);
    assert!(r.warnings.iter().any(|w| w.contains("learning rate of b is 0.01, at the edge")), "{:?}", r.warnings);
    // before all tuning runs have ended nothing is chosen
    assert!(plan.choices(&Results::of(rows(&all[..7]))).is_none());
}

#[test]
fn the_error_of_one_evaluation_is_told_for_accuracies_and_losses() {
    let r = report_of(primary(), rows(&[("a", &LOW), ("b", &HIGH)]));
    let section = r.sections.iter().find(|s| s.title == "Seed error and evaluation error").unwrap();
    let told = |measure: &str| {
        let rows = &section.table.as_ref().unwrap().rows;
        rows.iter().find(|row| row[0] == measure && row[1] == "b").expect(measure)[3].clone()
    };
    let loss = told("loss of the answers (nats)");
    let error: f64 = loss.strip_suffix(" (over sequences)").expect(&loss).parse().unwrap();
    assert!((error - 0.0353553).abs() < 1e-5, "the root of the mean square of 0.03 and 0.04: {loss}");
    assert!(told("accuracy at length 64").ends_with(" (512 questions)"));
    assert_eq!(told("loss of the answers (nats), mean over the run"), "not known");
    // records of earlier builds have none
    let mut old = rows(&[("a", &LOW), ("b", &HIGH)]);
    old.0.retain(|row| row.metric != "loss_error");
    let r = report_of(primary(), old);
    let section = r.sections.iter().find(|s| s.title == "Seed error and evaluation error").unwrap();
    assert!(section.table.as_ref().unwrap().rows.iter().any(|row| row[0].starts_with("loss") && row[3] == "not known"));
}
