//! What a report is made from, and what it consists of.

use super::super::contrast::Contrast;
use super::super::criteria::Status;
use super::super::measure::Measure;
use super::super::plan::Plan;
use super::super::table::Results;
use super::super::tuning::Choice;
use crate::lab::chart::Drawn;

/// A table of text.
pub struct Table {
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A part of the report.
pub struct Section {
    pub title: String,
    /// Pictures before the table: names of their files, and what is drawn.
    pub charts: Vec<(String, Drawn)>,
    pub table: Option<Table>,
    /// Preformatted lines.
    pub lines: Vec<String>,
    pub note: String,
}

impl Section {
    pub fn new(title: &str) -> Self {
        Section { title: title.into(), charts: Vec::new(), table: None, lines: Vec::new(), note: String::new() }
    }

    pub fn with_table<const N: usize>(mut self, head: [&str; N], rows: Vec<Vec<String>>) -> Self {
        self.table = Some(Table { head: head.map(str::to_string).to_vec(), rows });
        self
    }

    pub fn with_note(mut self, note: &str) -> Self {
        self.note = note.split_whitespace().collect::<Vec<_>>().join(" ");
        self
    }

    pub fn with_chart(mut self, name: &str, drawn: Option<Drawn>) -> Self {
        self.charts.extend(drawn.map(|d| (name.to_string(), d)));
        self
    }
}

/// Everything that a reader sees, in order.
pub struct Report {
    pub title: String,
    pub answer: String,
    pub forest: Option<(String, Drawn)>,
    pub warnings: Vec<String>,
    pub sections: Vec<Section>,
}

impl Report {
    /// All pictures, with the names of their files.
    pub fn charts(&self) -> impl Iterator<Item = &(String, Drawn)> {
        self.forest.iter().chain(self.sections.iter().flat_map(|s| &s.charts))
    }
}

/// What all parts of the report are made from.
pub struct Study<'a> {
    pub plan: &'a Plan,
    pub results: &'a Results,
    /// The primary outcome first.
    pub measures: Vec<Measure>,
    /// Comparisons by each measure.
    pub contrasts: Vec<Vec<Contrast>>,
    /// What the tuning runs chose, where there were any.
    pub choices: Vec<Choice>,
}

impl Study<'_> {
    /// Number of an arm's signs in every picture.
    pub fn series(&self, arm: &str) -> usize {
        self.plan.arms.iter().position(|(name, _)| name == arm).unwrap_or(0)
    }
}

/// What is known beside the rows.
#[derive(Default)]
pub struct Notes {
    /// What became of runs that did not finish, or are not those that were planned.
    pub unfinished: Vec<String>,
    /// The declaration.
    pub criteria: Status,
    /// Builds and machines of the runs.
    pub builds: Vec<String>,
}
