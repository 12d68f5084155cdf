//! `compare --rows`: a report from published rows.

use std::fs;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::sandbox::{RECALL, Sandbox, failed, succeeded};

#[test]
fn published_rows_are_read_as_they_are_and_what_they_lack_is_told() {
    let s = Sandbox::new();
    let rules = "compare={seeds=1,primary=\"loss\",contrast=\"dash\",arm=[{name=\"dense\",set=[\"model.attention.kind=dense\"]},\
        {name=\"dash\"}]}";
    let set = [RECALL, "data.vocab_size=40", "run.steps=2", rules];
    succeeded(&s.run(&["compare"], &set));
    let rows = fs::read_to_string(s.path("runs/compare-test/results.csv")).unwrap();
    let tables = |path: &str| {
        let text = fs::read_to_string(s.path(path).join("report.md")).unwrap();
        text.lines().filter(|l| l.starts_with('|')).map(str::to_string).collect::<Vec<_>>()
    };
    // compressed, as they are published
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(rows.as_bytes()).unwrap();
    let packed = packed.finish().unwrap();
    fs::write(s.path("rows.csv.gz"), &packed).unwrap();
    succeeded(&s.run(&["compare", "--rows", "rows.csv.gz", "--out", "packed"], &set));
    assert_eq!(tables("packed"), tables("runs/compare-test"));

    let told = |content: &[u8], words: &[&str]| {
        fs::write(s.path("other"), content).unwrap();
        failed(&s.run(&["compare", "--rows", "other", "--out", "none"], &set), 2, &[&["other"], words].concat());
        assert!(!s.path("none").exists());
    };
    failed(
        &s.run(&["compare", "--rows", "rows.csv.gz", "--out", "rows.csv.gz"], &set),
        2,
        &["rows.csv.gz: is no folder"],
    );
    told(b"a,b\n1,2\n", &["is no results.csv"]);
    told(&packed[..packed.len() - 9], &["cut off", "bring the whole file"]);
    told(&[rows.as_bytes(), b"\xff"].concat(), &["is not valid UTF-8"]);
    let (head, second) = (rows.lines().next().unwrap(), rows.lines().nth(1).unwrap());
    told(format!("{head}\n{second}\ndense,0").as_bytes(), &["line 3 is \"dense,0\", expected arm,seed"]);
    told(
        rows.replacen(second, &second.replace(",0,", ",x,"), 1).as_bytes(),
        &["line 2 is", "with finite numbers for seed"],
    );
    for value in ["NaN", "inf", "1e308"] {
        let line = format!("{},{value}", second.rsplit_once(',').unwrap().0);
        told(rows.replacen(second, &line, 1).as_bytes(), &["line 2 is", value, "with finite numbers"]);
    }
    told(format!("{rows}{second}\n").as_bytes(), &["once more", "a run counts once"]);

    let report = |args: &[&str]| {
        succeeded(&s.run(&[&["compare", "--rows", "rows.csv.gz", "--out", "again"], args].concat(), &set));
        fs::read_to_string(s.path("again/report.md")).unwrap()
    };
    assert!(!report(&[]).contains("The rows of"));
    let text = report(&["--seeds", "3"]);
    assert!(text.contains("The rows of dash have the seeds 0; those of the configuration are 0, 1, 2."), "{text}");
    let text = report(&["--arms", "dense"]);
    assert!(text.lines().nth(2).unwrap().starts_with("The declared contrast, dash, is not among these arms"), "{text}");
}

#[test]
fn a_damaged_record_of_a_run_is_told_and_a_cut_last_line_is_none() {
    let s = Sandbox::new();
    let set = [RECALL, "data.vocab_size=40", "run.steps=2", "compare={seeds=1}"];
    succeeded(&s.run(&["compare", "--arms", "dense,dash"], &set));
    let report = ["compare", "--arms", "dense,dash", "--report-only"];
    let record = s.path("runs/compare-test/runs/dash-s0/metrics.jsonl");
    let good = fs::read_to_string(&record).unwrap();
    fs::write(&record, format!("{good}{{\"step\": 2, \"spl")).unwrap();
    succeeded(&s.run(&report, &set));
    let plot = ["plot", "--model", "runs/compare-test/runs/dash-s0", "--out", "plots"];
    succeeded(&s.bin(&plot));
    let (first, rest) = good.split_once('\n').unwrap();
    for bad in ["{\"step\": 1", "{\"step\": 1, \"split\": \"train\", \"loss\": 1e999}"] {
        fs::write(&record, format!("{first}\n{bad}\n{rest}")).unwrap();
        failed(&s.run(&report, &set), 2, &["dash-s0/metrics.jsonl is damaged", "line 2", "take the run away"]);
        assert!(!s.bin(&plot).status.success());
    }
    // a number that no run can have is no figure
    fs::write(&record, good.replace("\"loss\":", "\"loss\":1e300,\"other\":")).unwrap();
    succeeded(&s.run(&report, &set));
}
