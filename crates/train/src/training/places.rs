//! Where the data of a run lie when a command starts in another folder than the run did: the paths of a configuration are relative to the
//! folder in which training was started, and both may have moved since.

use std::path::{Path, PathBuf};

use dash_data::Source;

use super::provenance::{self, Start};
use crate::config::Config;

/// A configuration with the places where its data were found.
pub struct Found {
    /// For reading data alone: its paths lead there from here.
    pub config: Config,
    /// The folders from which relative paths were tried, for a message.
    pub looked: String,
}

/// Folders that relative paths are meant from: this process's own, those in which the run was started, the newest first, and the one that
/// the run lies in as its own configuration says, which is another one where a project moved.
fn meant(config: &Config, home: &Path, starts: &[Start]) -> Vec<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    let started = starts.iter().rev().map(|s| s.folder.clone()).filter(|f| f.is_absolute());
    let own = config.folder();
    let moved = home.ancestors().nth(own.components().count()).filter(|_| own.is_relative() && home.ends_with(&own));
    let mut out: Vec<PathBuf> = Vec::new();
    for base in std::iter::once(here).chain(started).chain(moved.map(Path::to_path_buf)) {
        if !out.contains(&base) {
            out.push(base);
        }
    }
    out
}

/// Finds the data of a configuration: from the first folder that has the shards of the material called `trained`, the folders above the
/// model among them, else from the first of those that are meant that has the text, else from this process's own. (A text of the same
/// name in any folder above would be taken for the run's.) `home` is the folder of the run or the export.
pub fn found(config: &Config, home: &Path, starts: &[Start], trained: Option<&str>) -> Found {
    let home = std::fs::canonicalize(home).unwrap_or_else(|_| home.to_path_buf());
    let (d, meant) = (&config.data, meant(config, &home, starts));
    let above: Vec<PathBuf> = home.ancestors().skip(1).map(Path::to_path_buf).collect();
    let key = trained.and_then(|hash| hash.split('+').next()).unwrap_or_default();
    let has_shards = |base: &&PathBuf| !key.is_empty() && base.join(&d.cache).join(key).join("report.json").is_file();
    let has_text = |base: &&PathBuf| match d.source {
        Source::Text | Source::Tokens => base.join(&d.path).exists(),
        Source::Cargo => base.join("Cargo.lock").is_file(),
    };
    let base = meant.iter().chain(&above).find(has_shards).or_else(|| meant.iter().find(has_text));
    let mut config = config.clone();
    if let Some(base) = base.filter(|base| **base != meant[0]) {
        let d = &mut config.data;
        d.cache = base.join(&d.cache);
        // for the workspace's dependencies the folder itself, see `Config::data_settings`
        d.path = base.join(&d.path);
        if !d.tokenizer.as_os_str().is_empty() {
            d.tokenizer = base.join(&d.tokenizer);
        }
    }
    let looked = meant.iter().map(|b| b.display().to_string()).collect::<Vec<_>>().join(", ");
    Found { config, looked: format!("{looked}; shards also above {}", home.display()) }
}

/// As [`found`] for a run that goes on: a text that the configuration names and that is there from here is meant, whatever the run was
/// started with.
pub fn found_to_resume(config: &Config, folder: &Path, trained: Option<&str>) -> Found {
    if config.data.source != Source::Cargo && config.data.path.exists() {
        return Found { config: config.clone(), looked: String::new() };
    }
    found(config, folder, &provenance::read(folder).unwrap_or_default(), trained)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::reference::SMALLEST;

    fn config(set: &[&str]) -> Config {
        let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        Config::from_text(SMALLEST, &set, Path::new("small.toml")).unwrap()
    }

    fn started_in(folder: &Path) -> Start {
        serde_json::from_value(serde_json::json!({
            "time": "", "step": 0, "folder": folder, "command": [], "version": "", "commit": "", "changed": false, "device": "",
            "instruction_set": "", "threads": 1, "packages": {}, "processor": "", "system": "",
        }))
        .unwrap()
    }

    #[test]
    fn data_are_found_from_where_the_run_was_started_and_from_above_a_folder_that_moved() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (project, run) = (dir.join("project"), dir.join("away/runs/full"));
        let shards = project.join("data/abc");
        std::fs::create_dir_all(&shards).unwrap();
        std::fs::create_dir_all(&run).unwrap();
        std::fs::write(project.join("own.txt"), "text").unwrap();
        let config = config(&["data.source=text", "data.path=own.txt", "task.share=0.5"]);
        let paths = |starts: &[Start], home: &Path| {
            let d = found(&config, home, starts, Some("abc+task-1")).config.data;
            (d.path, d.cache)
        };
        // from the folder of the start by its text; nowhere else is there any
        assert_eq!(paths(&[], &run), ("own.txt".into(), "data".into()));
        let there = (project.join("own.txt"), project.join("data"));
        assert_eq!(paths(&[started_in(&project)], &run), there);
        // the shards of the very material come before a text of the same name
        let near = dir.join("near");
        std::fs::create_dir(&near).unwrap();
        std::fs::write(near.join("own.txt"), "another text").unwrap();
        let both = [started_in(&project), started_in(&near)];
        assert_eq!(paths(&both, &run).0, near.join("own.txt"));
        std::fs::write(shards.join("report.json"), "{}").unwrap();
        assert_eq!(paths(&both, &run), there);
        // moved as a whole, with a record of a folder that is gone
        std::fs::rename(&project, dir.join("moved")).unwrap();
        let moved = dir.join("moved/runs/full");
        std::fs::create_dir_all(&moved).unwrap();
        let now = (dir.join("moved/own.txt"), dir.join("moved/data"));
        assert_eq!(paths(&[started_in(&project)], &moved), now);
        let looked = found(&config, &moved, &[started_in(&project)], None).looked;
        assert!(
            looked.contains(&project.display().to_string())
                && looked.contains(&dir.join("moved").display().to_string())
        );
    }
}
