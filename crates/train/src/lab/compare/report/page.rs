//! A report as a page and as text.

use std::fmt::Write as _;

use super::Report;
use super::tables::Table;
use crate::lab::chart::{Drawn, escape, style};

impl Table {
    fn markdown(&self, out: &mut String) {
        let _ =
            write!(out, "\n## {}\n\n| {} |\n|{}\n", self.title, self.head.join(" | "), "---|".repeat(self.head.len()));
        self.rows.iter().for_each(|r| _ = writeln!(out, "| {} |", r.join(" | ")));
        if !self.note.is_empty() {
            let _ = writeln!(out, "\n{}", self.note);
        }
    }

    fn html(&self, out: &mut String) {
        let cells = |kind: &str, row: &[String]| {
            row.iter().map(|c| format!("<{kind}>{}</{kind}>", escape(c))).collect::<String>()
        };
        let head = cells("th", &self.head);
        let _ = writeln!(
            out,
            "<h2>{}</h2>\n<div class=\"wide\"><table><thead><tr>{head}</tr></thead><tbody>",
            escape(&self.title)
        );
        self.rows.iter().for_each(|r| _ = writeln!(out, "<tr>{}</tr>", cells("td", r)));
        let _ = writeln!(out, "</tbody></table></div><p class=\"note\">{}</p>", escape(&self.note));
    }
}

fn figures(out: &mut String, charts: &[(String, Drawn)]) {
    *out += "<div class=\"grid\">\n";
    charts.iter().for_each(|(name, d)| _ = writeln!(out, "<figure id=\"{name}\">{}</figure>", d.inline));
    *out += "</div>\n";
}

impl Report {
    /// For people who read text.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", self.title);
        self.facts.iter().for_each(|f| _ = writeln!(out, "- {f}"));
        self.warnings.iter().for_each(|w| _ = writeln!(out, "\n**Attention:** {w}"));
        self.tables.iter().for_each(|t| t.markdown(&mut out));
        out += "\n## Pictures\n";
        self.charts.iter().for_each(|(name, _)| _ = write!(out, "\n![{name}](plots/{name}.svg)\n"));
        out += "\nEvery number here is computed from `results.csv` beside this file.\n";
        out
    }

    /// One page without network and scripts, readable on a phone, in grey, and in dark mode.
    pub fn html(&self) -> String {
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, \
             initial-scale=1\">\n<title>{0}</title>\n<style>{1}{2}</style></head><body><main>\n<h1>{0}</h1>\n<ul>",
            escape(&self.title),
            include_str!("page.css"),
            style()
        );
        self.facts.iter().for_each(|f| _ = write!(out, "<li>{}</li>", escape(f)));
        out += "</ul>\n";
        self.warnings.iter().for_each(|w| _ = writeln!(out, "<p class=\"warning\">{}</p>", escape(w)));
        let (first, others) = self.charts.split_at(self.charts.len().min(2));
        for (i, t) in self.tables.iter().enumerate() {
            t.html(&mut out);
            if i == 0 {
                figures(&mut out, first);
            }
        }
        out += "<h2>Pictures</h2>\n";
        figures(&mut out, others);
        out += "<p class=\"note\">Bands are 95 % intervals over seeds. Every number here is computed from results.csv beside this \
            file.</p>\n</main></body></html>\n";
        out
    }
}
