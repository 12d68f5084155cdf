//! The form of docs/log that its README promises: one `# ` title a file, dated entries with the newest first, and the same four
//! heads in each.

use std::fs;
use std::path::Path;

const HEADS: [&str; 4] = ["**Question.**", "**Prediction.**", "**Result.**", "**Kept?**"];

/// `2026-11-26` at the start of a heading, with a title behind it.
fn date(heading: &str) -> Option<&str> {
    let date = heading.get(..10)?;
    let form = date.bytes().enumerate().all(|(i, b)| if i == 4 || i == 7 { b == b'-' } else { b.is_ascii_digit() });
    if !form {
        return None;
    }
    let month = (1..=12).contains(&date[5..7].parse().unwrap_or(0));
    let day = (1..=31).contains(&date[8..].parse().unwrap_or(0));
    let title = heading[10..].strip_prefix(": ").or_else(|| heading[10..].strip_prefix(", "))?;
    (month && day && !title.trim().is_empty()).then_some(date)
}

/// An entry's line number, the text behind `## `, and the heads below it in their order.
struct Entry<'a> {
    line: usize,
    heading: &'a str,
    heads: Vec<&'static str>,
}

/// The entries of a file, and what is wrong with its headings.
fn entries(text: &str) -> (Vec<Entry<'_>>, Vec<String>) {
    let (mut entries, mut faults, mut fenced) = (Vec::<Entry>::new(), Vec::new(), false);
    if !text.starts_with("# ") {
        faults.push("line 1: no title".to_owned());
    }
    for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line)) {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        if let Some(heading) = line.strip_prefix("## ") {
            entries.push(Entry { line: number, heading, heads: Vec::new() });
        } else if line.starts_with('#') && number > 1 {
            faults.push(format!("line {number}: a heading that is no entry: {line}"));
        } else if let Some(entry) = entries.last_mut() {
            entry.heads.extend(HEADS.into_iter().filter(|head| line.starts_with(head)));
        }
    }
    (entries, faults)
}

/// What is wrong with a file of the log, a line each.
fn faults(text: &str) -> Vec<String> {
    let (entries, mut faults) = entries(text);
    if entries.is_empty() {
        faults.push("no entry".to_owned());
    }
    let mut before: Option<&str> = None;
    for Entry { line, heading, heads } in entries {
        if heads != HEADS {
            faults.push(format!("line {line}: {heading}: heads are {heads:?}"));
        }
        match date(heading) {
            None => faults.push(format!("line {line}: no date and title: {heading}")),
            Some(date) => {
                if before.is_some_and(|before| date > before) {
                    faults.push(format!("line {line}: newer than the entry above: {heading}"));
                }
                before = Some(date);
            }
        }
    }
    faults
}

#[test]
fn every_entry_of_the_log_has_a_date_and_the_same_heads() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/log");
    let index = fs::read_to_string(folder.join("README.md")).unwrap();
    let (mut files, mut wrong) = (0, Vec::new());
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "README.md" {
            continue;
        }
        files += 1;
        if !index.contains(&format!("]({name})")) {
            wrong.push(format!("{name}: not in README.md"));
        }
        wrong.extend(faults(&fs::read_to_string(&path).unwrap()).into_iter().map(|fault| format!("{name}: {fault}")));
    }
    assert!(files >= 10, "{files} files in {folder:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_the_form_forbids_is_found() {
    let entry = |heading: &str| format!("## {heading}\n\n{}\n\n", HEADS.join(" Text.\n\n"));
    let file = |entries: &[&str]| format!("# Title\n\n{}", entries.concat());
    let (new, old) = (entry("2026-11-26: new"), entry("2026-11-25, second pass"));
    assert_eq!(faults(&file(&[&new, &old])), Vec::<String>::new());

    let found = |text: &str, fault: &str| {
        let faults = faults(text);
        assert!(faults.len() == 1 && faults[0].contains(fault), "{fault}: {faults:?}");
    };
    found(&file(&[&old, &new]), "newer than the entry above");
    found(&file(&[&entry("an entry without a date")]), "no date and title");
    found(&file(&[&entry("a naïve sum")]), "no date and title");
    found(&file(&[&entry("2026-13-26: month 13")]), "no date and title");
    found(&file(&[&entry("2026-11-26")]), "no date and title");
    found(&file(&[&new.replace("**Prediction.**", "**Floor and prediction**")]), "heads are");
    found(&file(&[&new.replace("**Kept?**", "**Question.**")]), "heads are");
    found(&file(&[&new, "### A part\n"]), "no entry: ### A part");
    found(&new, "no title");
    found("# Title\n", "no entry");
}
