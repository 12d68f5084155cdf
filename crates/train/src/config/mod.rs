//! The configuration of a run: one flat TOML file, `--set key=value` on top, everything resolved before any compute.
//!
//! Plain data: everything else in this crate may read it, and it reads nothing of the rest.

mod check;
mod compare;
mod data;
mod diff;
mod error;
mod eval;
mod file;
mod init;
mod optim;
mod origin;
mod probe;
mod problems;
pub mod reference;
mod router;
mod run;
mod set;
mod template;
mod word;

use std::io::Read;
use std::path::Path;

use toml::{Table, Value};

pub use compare::{Arm, Compare};
pub use data::Data;
pub use diff::{Difference, Effect};
pub use error::{ConfigError, LoadError};
pub use eval::{Checkpoint, Eval, Far, Log, Stop};
pub use file::Config;
pub use init::Init;
pub use optim::{AdjustLr, DECAY_FRACTION, MIN_LR_RATIO, MOMENTUM, Optim, OptimKind, Schedule};
pub use origin::{Origin, on_the_hub};
pub use probe::ProbePlan;
pub use problems::nearest;
pub use router::{Ramp, RouterPlan};
pub use run::{DeviceName, MOST_THREADS, Run};
pub use template::{about, template};
pub use word::word;

use set::{apply, explained};

/// Gives keys that had another name the one that they have: runs and files of earlier builds stay readable.
fn rename(table: &mut Table) {
    if let Some(Value::Table(router)) = table.get_mut("router")
        && let Some(share) = router.remove("target_density")
    {
        router.insert("target_share".into(), share);
    }
}

/// A file with a key and its earlier name says two things.
fn check_names(table: &Table, place: &str) -> Result<(), LoadError> {
    match table.get("router").and_then(Value::as_table) {
        Some(router) if router.contains_key("target_density") && router.contains_key("target_share") => {
            Err(LoadError::new(
                place,
                "router.target_density is the earlier name of router.target_share: give one of them, not both",
            ))
        }
        _ => Ok(()),
    }
}

/// What the reference knows of every table but `[model.attention]`.
pub fn sections() -> Vec<reference::Section> {
    // not through `Config::from_text`, which asks this function what keys there are
    let config: Config = toml::from_str(reference::SMALLEST).expect("the smallest file is right");
    let config = config.resolve(Path::new("FILE.toml"), "FILE.toml").expect("the smallest file is right");
    reference::sections(&config.to_toml().parse().expect("a configuration is TOML"))
}

/// Bytes of a configuration at most: a device without an end (`/dev/zero`) must not fill the memory.
const MOST_BYTES: u64 = 16 << 20;

/// The text of a file or a pipe.
fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(std::io::Error::other(format!("it is larger than {} MB, no configuration", MOST_BYTES >> 20)));
    }
    Ok(text)
}

impl Config {
    /// Reads a file, applies `key=value` settings, fills in defaults and refuses what cannot run. The folder of a run stands for the
    /// configuration that it holds, with itself as the place of the run.
    ///
    /// # Errors
    /// A [`LoadError`] that names file, key, what was expected and, for a misspelt key, the nearest one.
    pub fn load(path: &Path, set: &[String]) -> Result<Self, LoadError> {
        if path.is_dir() {
            return Config::load_run(path, set);
        }
        let text = read(path).map_err(|e| LoadError::new(path.display(), format_args!("cannot be read: {e}")))?;
        Config::from_text(&text, set, path)
    }

    /// As [`Config::load`], from the text of the file at `path`, which is not read.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_text(text: &str, set: &[String], path: &Path) -> Result<Self, LoadError> {
        let place = path.display().to_string();
        let explain = |e: &toml::de::Error| LoadError::new(&place, explained(e.to_string().trim_end()));
        let mut table: Table = text.parse().map_err(|e| explain(&e))?;
        check_names(&table, &place)?;
        rename(&mut table);
        for assignment in set {
            apply(&mut table, assignment)?;
            // at once, so that of the old name and the new one the later wins
            rename(&mut table);
        }
        let where_ = if set.is_empty() { place.clone() } else { format!("{place} with --set {}", set.join(" --set ")) };
        let filled = origin::fill(&mut table, &where_)?;
        if let Some(problems) = problems::of(&sections(), &table, text) {
            return Err(LoadError::new(where_, problems));
        }
        let gives_compute = table.get("model").is_some_and(|model| model.get("compute").is_some());
        // from the text where nothing is on top of it, so that a message shows the line
        let config: Result<Config, _> =
            if set.is_empty() && !filled { toml::from_str(text) } else { Value::Table(table).try_into() };
        let mut config = config.map_err(|e| LoadError::new(&where_, explained(e.to_string().trim_end())))?;
        // a name that is none is told by the check of the table
        if let (false, Ok(device)) = (gives_compute, config.run.device_name()) {
            config.model.compute = device.default_compute();
        }
        let config = config.resolve(path, &where_)?;
        if filled {
            origin::check_tokenizer(&config, &where_)?;
        }
        Ok(config)
    }

    /// The configuration of a run folder, which may have been moved, with settings on top of it.
    fn load_run(folder: &Path, set: &[String]) -> Result<Self, LoadError> {
        let path = folder.join("config.toml");
        if !path.is_file() {
            let what = "is a folder without config.toml; name a configuration file or the folder of a run";
            return Err(LoadError::new(folder.display(), what));
        }
        let own = Config::of_run(folder)?;
        let mut config = Config::from_text(&own.to_toml(), set, &path)?;
        let place = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
        if config.folder() == own.folder()
            && let (Some(dir), Some(name)) = (folder.parent().or(place.parent()), place.file_name())
        {
            config.run.dir = if dir.as_os_str().is_empty() { ".".into() } else { dir.to_path_buf() };
            config.run.name = name.to_string_lossy().into_owned();
        }
        Ok(config)
    }

    /// Reads the resolved configuration of a run folder.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn of_run(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("config.toml");
        let place = path.display().to_string();
        let table = std::fs::read_to_string(&path).ok().and_then(|text| text.parse::<Table>().ok());
        if let Some(mut table) = table
            && let Some(Value::Table(optim)) = table.get_mut("optim")
        {
            optim::drop_unread(optim);
            let config: Result<Config, _> = Value::Table(table).try_into();
            let explain = |e: toml::de::Error| LoadError::new(&place, explained(e.to_string().trim_end()));
            return config.map_err(explain)?.resolve(&path, &place);
        }
        Config::load(&path, &[])
    }

    fn resolve(mut self, path: &Path, place: &str) -> Result<Self, LoadError> {
        self.model.resolve();
        self.optim.resolve();
        self.set_seed(self.run.seed);
        if self.run.name.is_empty() {
            self.run.name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        }
        match self.check() {
            Ok(()) => Ok(self),
            Err(e) => Err(LoadError::new(place, e)),
        }
    }

    /// Another seed of the run, which is that of the attention's random choices, too, unless they have one of their own.
    pub fn set_seed(&mut self, seed: u64) {
        let before = std::mem::replace(&mut self.run.seed, seed);
        if let Some(own) = self.model.attention.seed_mut()
            && (*own == 0 || *own as u64 == before)
        {
            *own = seed as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_core::ops::attention::RouterGradient;
    use dash_model::{Attention, Compute};

    const MINIMAL: &str = "[run]\nsteps = 3\n[data]\nvocab_size = 300\nseq_len = 64\nbatch_size = 2\n\
        [optim]\nlr = 1e-3\n[model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
        [model.attention]\nkind = \"dash\"\nchunk_size = 8\n";

    fn load(text: &str, set: &[&str]) -> Result<Config, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    fn error(text: &str, set: &[&str]) -> String {
        load(text, set).expect_err("a wrong request").to_string()
    }

    #[test]
    fn what_is_written_out_reads_back_equal() {
        let config = load(MINIMAL, &["optim.lr=3e-4", "run.name=b", "model.attention.gamma=2.0"]).unwrap();
        assert_eq!((config.optim.lr, config.run.name.as_str(), config.model.head_dim), (3e-4, "b", 8));
        assert_eq!(load(&config.to_toml(), &[]).unwrap(), config);
        let dense = load(MINIMAL, &["model.attention.kind=dense"]).unwrap();
        assert_eq!(dense.model.attention, dash_model::Dense {}.into());
        let on_gpu = |set: &[&str]| load(MINIMAL, &[&["run.device=cuda:1"], set].concat()).unwrap();
        assert_eq!(on_gpu(&[]).run.device_name(), Ok(DeviceName::Cuda(1)));
        assert_eq!(on_gpu(&[]).model.compute, Compute::Bf16);
        assert_eq!(on_gpu(&["model.compute=f32"]).model.compute, Compute::F32);
        assert_eq!(load(&on_gpu(&["model.compute=f32"]).to_toml(), &[]).unwrap().model.compute, Compute::F32);
        let stopped = load(MINIMAL, &["model.attention.sigma=2.0", "model.attention.kind=dash-stopped"]).unwrap();
        let Attention::Dash(d) = stopped.model.attention else { panic!() };
        assert_eq!((d.chunk_size, d.sigma, d.router_gradient), (8, 1.0, RouterGradient::Stopped));
        assert_eq!(load(MINIMAL, &["run.name=nan"]).unwrap().run.name, "nan");
        assert_eq!(load(MINIMAL, &["run.name=\"7\""]).unwrap().run.name, "7");
    }

    #[test]
    fn the_earlier_name_of_the_target_share_is_read() {
        let of = |text: &str, set: &[&str]| load(text, set).unwrap().router.target_share;
        let table = |key: &str| format!("{MINIMAL}[router]\n{key} = 0.5\n");
        assert_eq!(of(&table("target_density"), &[]), Some(0.5));
        assert_eq!(of(&table("target_share"), &["router.target_density=0.6"]), Some(0.6));
        assert_eq!(of(&table("target_density"), &["router.target_share=0.6"]), Some(0.6));
        assert_eq!(of(MINIMAL, &["router.target_density=0.6", "router.target_share=0.7"]), Some(0.7));
        let both = format!("{}target_density = 0.6\n", table("target_share"));
        assert!(error(&both, &["run.steps=4"]).contains("give one of them, not both"));
        assert!(load(&table("target_density"), &[]).unwrap().to_toml().contains("target_share = 0.5"));
    }

    #[test]
    fn bad_requests_are_told() {
        let swap = |a: &str, b: &str| MINIMAL.replace(a, b);
        assert!(error(&swap("steps = 3", "stpes = 3"), &[]).contains("did you mean `steps`?"));
        assert!(error(&swap("chunk_size = 8", "chunksize = 8"), &[]).contains("did you mean `chunk_size`?"));
        assert!(error(MINIMAL, &["optim.learning=1"]).contains("unknown field `learning`"));
        assert!(
            error(&swap("steps = 3", "steps = \"x\""), &[])
                .contains("\"x\" is text, where an integer, 0 or above is taken")
        );
        assert!(error(MINIMAL, &["optim.momentum=0.9"]).contains("means nothing to optim.kind = \"adamw\""));
        let list = error(MINIMAL, &["data.extensions=[py,h]"]);
        assert!(list.ends_with("where a list is taken; in a shell: --set 'data.extensions=[\"py\",\"h\"]'"), "{list}");
        assert!(
            error(MINIMAL, &["task.kind=recall", "task.eval_lengths=64,128"]).ends_with("'task.eval_lengths=[64,128]'")
        );
        assert!(error(MINIMAL, &["optim.lr=fast"]).contains("optim.lr: \"fast\" is text, where a number is taken"));
        // numbers that are 0 or infinite where they are computed with
        for set in ["model.init_std=1e39", "model.init_std=1e-320", "model.norm_eps=1e-60", "optim.weight_decay=1e39"] {
            assert!(error(MINIMAL, &[set]).contains("f32"), "{set}");
        }
        assert!(error(MINIMAL, &["run.steps=0.5"]).contains("run.steps: 0.5 is not an integer, 0 or above"));
        assert!(error(MINIMAL, &["run.steps=-1"]).contains("run.steps: -1 is not an integer, 0 or above"));
        assert!(error(MINIMAL, &["model.tie_embeddings=1"]).contains("model.tie_embeddings: 1 is not true or false"));
        assert!(error(MINIMAL, &["model.attention.kind=dahs"]).contains("did you mean `dash`?"));
        assert!(error(MINIMAL, &["steps=10"]).contains("unknown field `steps`; did you mean `run.steps`?"));
        assert!(error(MINIMAL, &["learning_rate=1"]).contains("did you mean `optim.lr`?"));
        let every = error(MINIMAL, &["every=1"]);
        assert!(
            every.contains("did you mean `eval.every`, `checkpoint.every`, `log.every`, `probe.every`?"),
            "{every}"
        );
        assert!(
            error(&swap("heads = 2", "heads = 3"), &["model.head_dim=8", "model.kv_heads=2"])
                .contains("model.kv_heads: 2 does not divide heads = 3")
        );
    }

    #[test]
    fn numbers_out_of_range_and_keys_without_meaning_are_told() {
        assert!(error(MINIMAL, &["model.width=1000000000000"]).contains("model.width: 1000000000000 is above 1048576"));
        assert!(error(MINIMAL, &["data.vocab_size=9000000000000000000"]).contains("the largest id"));
        assert!(error(MINIMAL, &["data.path=a.txt"]).contains("data.path: means nothing to data.source = \"cargo\""));
        assert!(error(MINIMAL, &["data.validation=last-file"]).contains("means nothing to data.source = \"cargo\""));
        let end = ["data.source=tokens", "data.path=x", "data.vocab_size=65", "data.end_of_text=65"];
        assert!(error(MINIMAL, &end).contains("data.end_of_text: 65 is not below data.vocab_size = 65"));
        let last = ["data.source=text", "data.path=x", "data.validation=last-file", "data.validation_share=0.1"];
        assert!(error(MINIMAL, &last).contains("data.validation_share: means nothing to data.validation"));
        assert!(error(MINIMAL, &["data.validation_share=0.6"]).contains("0.6 is not above 0 and at most 0.5"));
        assert!(error(MINIMAL, &["model.head_dim=7"]).contains("model.head_dim: 7 is odd"));
        assert!(
            error(MINIMAL, &["model.attention.chunk_size=64"])
                .contains("seq_len 64 with chunk_size 64 leaves nothing to route")
        );
        assert!(
            error(MINIMAL, &["model.attention.alpha=2.5"]).contains("model.attention.alpha: 2.5 is not at least 1.001")
        );
        assert!(
            error(MINIMAL, &["model.attention={kind=\"topk\",chunk_size=8,top=9}"]).contains("9 is above the 8 chunks")
        );
        assert!(
            error(MINIMAL, &["optim.schedule=constant", "optim.min_lr_ratio=0.1"])
                .contains("optim.min_lr_ratio: means nothing to optim.schedule = \"constant\"")
        );
        assert!(error(MINIMAL, &["optim.decay_fraction=0.3"]).contains("optim.decay_fraction: means nothing to"));
        assert!(error(MINIMAL, &["optim.kind=adan"]).contains("unknown variant `adan`"));
        assert!(error(MINIMAL, &["data.source=text"]).contains("data.path: is needed"));
        assert!(error(MINIMAL, &["nonsense"]).contains("has no ="));
        for wrong in ["tpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda:64", ""] {
            let e = error(MINIMAL, &[&format!("run.device=\"{wrong}\"")]);
            assert!(e.contains("is none of \"cpu\", \"cuda\" and \"cuda:N\""), "{e}");
        }
    }

    #[test]
    fn differences_name_keys_and_whether_they_matter() {
        let a = load(MINIMAL, &[]).unwrap();
        let b = load(MINIMAL, &["optim.lr=2e-3", "run.threads=2", "eval.batches=3"]).unwrap();
        let found: Vec<_> = a.differences(&b).into_iter().map(|d| (d.text, d.effect)).collect();
        let wanted = [
            ("eval.batches: 8 -> 3", Effect::Figures),
            ("optim.lr: 0.001 -> 0.002", Effect::Weights),
            ("run.threads: 0 -> 2", Effect::Nothing),
        ];
        assert_eq!(found, wanted.map(|(text, effect)| (text.to_string(), effect)));
    }
}
