//! A report as a page and as text.

use std::fmt::Write as _;

use super::study::{Report, Section, Table};
use crate::lab::chart::{Drawn, escape, style};

impl Table {
    fn markdown(&self, out: &mut String) {
        let _ = write!(out, "\n| {} |\n|{}\n", self.head.join(" | "), "---|".repeat(self.head.len()));
        self.rows.iter().for_each(|r| _ = writeln!(out, "| {} |", r.join(" | ")));
    }

    /// Every cell names its column, so that a narrow page can show a row as a card; the more columns, the wider a page that does.
    fn html(&self, out: &mut String) {
        let class = match self.head.len() {
            0..=3 => "few",
            4..=7 => "some",
            _ => "many",
        };
        let head: String = self.head.iter().map(|c| format!("<th>{}</th>", escape(c))).collect();
        let _ = writeln!(out, "<div class=\"wide\"><table class=\"{class}\"><thead><tr>{head}</tr></thead><tbody>");
        for row in &self.rows {
            let cell = |(name, c): (&String, &String)| format!("<td data-of=\"{}\">{}</td>", escape(name), escape(c));
            let cells: String = self.head.iter().zip(row).map(cell).collect();
            let _ = writeln!(out, "<tr>{cells}</tr>");
        }
        *out += "</tbody></table></div>\n";
    }
}

impl Section {
    fn markdown(&self, out: &mut String) {
        let _ = writeln!(out, "\n## {}", self.title);
        self.charts.iter().for_each(|(name, _)| _ = write!(out, "\n![{name}](plots/{name}.svg)\n"));
        self.table.iter().for_each(|t| t.markdown(out));
        if !self.lines.is_empty() {
            let _ = write!(out, "\n```\n{}\n```\n", self.lines.join("\n"));
        }
        if !self.note.is_empty() {
            let _ = writeln!(out, "\n{}", self.note);
        }
    }

    fn html(&self, out: &mut String) {
        let _ = writeln!(out, "<h2>{}</h2>", escape(&self.title));
        match self.charts.as_slice() {
            [] => {}
            [(name, drawn)] => figure(out, " class=\"single\"", name, drawn),
            several => {
                *out += "<div class=\"grid\">\n";
                several.iter().for_each(|(name, drawn)| figure(out, "", name, drawn));
                *out += "</div>\n";
            }
        }
        self.table.iter().for_each(|t| t.html(out));
        if !self.lines.is_empty() {
            let _ = writeln!(out, "<pre>{}</pre>", escape(&self.lines.join("\n")));
        }
        if !self.note.is_empty() {
            let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(&self.note));
        }
    }
}

/// Rows of these tables are cards on a page up to so many pixels wide.
fn cards(class: &str, width: usize) -> String {
    format!("@media (max-width:{width}px){{\n{}}}\n", include_str!("cards.css").replace(".cards", class))
}

fn figure(out: &mut String, class: &str, name: &str, drawn: &Drawn) {
    let _ = writeln!(out, "<figure{class} id=\"{name}\">{}</figure>", drawn.inline);
}

impl Report {
    /// For people who read text.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n{}\n", self.title, self.answer);
        self.forest.iter().for_each(|(name, _)| _ = write!(out, "\n![{name}](plots/{name}.svg)\n"));
        self.warnings.iter().for_each(|w| _ = writeln!(out, "\n**Attention:** {w}"));
        self.sections.iter().for_each(|s| s.markdown(&mut out));
        out
    }

    /// One page without network and scripts, readable on a phone, in grey, and in dark mode.
    pub fn html(&self) -> String {
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, \
             initial-scale=1\">\n<title>{0}</title>\n<style>{1}{4}{5}{2}</style></head><body><main>\n<h1>{0}</h1>\n<p \
             class=\"answer\">{3}</p>\n",
            escape(&self.title),
            include_str!("page.css"),
            style(),
            escape(&self.answer),
            cards(".some", 640),
            cards(".many", 960)
        );
        self.forest.iter().for_each(|(name, drawn)| figure(&mut out, " class=\"single\"", name, drawn));
        self.warnings.iter().for_each(|w| _ = writeln!(out, "<p class=\"warning\">{}</p>", escape(w)));
        self.sections.iter().for_each(|s| s.html(&mut out));
        out + "</main></body></html>\n"
    }
}
