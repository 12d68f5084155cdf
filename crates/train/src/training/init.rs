//! The weights that a run starts from, where they are not drawn.

use std::path::Path;

use dash_core::Device;
use dash_data::LoaderState;
use dash_model::{Described, Model, Param, Params};

use super::checkpoint;
use super::checkpoint::State;
use super::eval::{ValidationSet, model_folder};
use super::schedule::{decay_from, learning_rate};
use super::tasks::RouterChoice;
use super::trainer::Trainer;
use crate::config::{Config, Origin, Schedule};
use crate::console::tell;
use crate::failure::{Failure, Result};

/// The model of a folder with its own attention, for sequences as long as those of `config`.
fn origin(from: &Path, config: &Config, device: &Device) -> Result<Model> {
    let described = Origin::of(from, "the model to start from").map_err(Failure::request)?;
    let positions = config.positions();
    if from.join("config.json").is_file() {
        let of = Described { config: described.model, vocab: described.vocab, positions };
        return of.load(from, device).map_err(Failure::request);
    }
    let folder = model_folder(from).map_err(Failure::Request)?;
    let mut own = config.clone();
    (own.model, own.data.vocab_size) = (described.model, described.vocab);
    // what it took from another run is in its own knobs
    own.router.budget_from = None;
    checkpoint::load_model(&folder, &own, device).map_err(Failure::Request)
}

/// Warns of sequences that are longer than those that the weights were made for.
fn tell_longer(from: &Path, config: &Config) -> Result<()> {
    let made_for = Origin::of(from, "the model to start from").map_err(Failure::request)?.positions;
    let positions = config.positions();
    if positions > made_for {
        tell!("warning: {} was made for {made_for} tokens, this run reads {positions}", from.display());
    }
    Ok(())
}

/// Parameters that a new model has beside those of another one, and those that it has no use for.
struct Change {
    fresh: Vec<String>,
    unused: Vec<String>,
}

/// Puts the values of one model into another wherever both have the parameter.
fn take(model: &mut Model, from: &Params) -> Result<Change> {
    let mut fresh = Vec::new();
    for Param { name, value, .. } in model.params_mut().iter_mut() {
        match from.get(name) {
            Some(theirs) if theirs.shape() == value.shape() => *value = theirs.clone(),
            Some(theirs) => {
                return Err(Failure::request(format!(
                    "init.from: {name} has shape {:?} there, this model's is {:?}",
                    theirs.shape(),
                    value.shape()
                )));
            }
            None => fresh.push(name.clone()),
        }
    }
    let unused = from.iter().filter(|p| model.params().get(&p.name).is_none()).map(|p| p.name.clone()).collect();
    Ok(Change { fresh, unused })
}

/// `n parameters (a, b, c, ...)`
fn named(names: &[String]) -> String {
    let more = if names.len() > 3 { ", ..." } else { "" };
    format!("{} parameters ({}{more})", names.len(), names[..names.len().min(3)].join(", "))
}

/// A trainer at the start of a run: of drawn weights, or of those that `init.from` names. Every parameter of the file is read, and each that has no place in the new
/// model, or that the file lacks, belongs to an attention and is told.
///
/// # Errors
/// As [`Trainer::new`], or when the folder's model cannot be read.
pub fn trainer(config: &Config, device: &Device) -> Result<Trainer> {
    let mut trainer = Trainer::new(config, device)?;
    let Some(init) = &config.init else { return Ok(trainer) };
    tell_longer(&init.from, config)?;
    let from = origin(&init.from, config, device)?;
    let change = take(&mut trainer.model, from.params())?;
    tell!("weights   of {} ({} attention)", init.from.display(), from.config().attention.kind());
    if !change.fresh.is_empty() {
        tell!("          {} are new, at their initial values", named(&change.fresh));
    }
    if !change.unused.is_empty() {
        tell!("          {} have no use here", named(&change.unused));
    }
    Ok(trainer)
}

/// Where a run begins.
pub struct Stand {
    /// Weights and moments.
    pub trainer: Trainer,
    /// Position in the data.
    pub data: LoaderState,
    /// Tokens seen.
    pub tokens: u64,
}

/// The start of a run: [`trainer`] before the first update, or after those of the checkpoint that `init.moments` goes on from.
///
/// # Errors
/// As [`trainer`], or when the checkpoint has no moments for these parameters, or as many updates as the run shall have.
pub fn stand(config: &Config, device: &Device, data_hash: &str) -> Result<Stand> {
    match &config.init {
        Some(init) if init.moments => fork(&init.from, config, device, data_hash),
        _ => Ok(Stand { trainer: trainer(config, device)?, data: LoaderState::default(), tokens: 0 }),
    }
}

fn fork(from: &Path, config: &Config, device: &Device, data_hash: &str) -> Result<Stand> {
    let refused = |what: String| Failure::request(format!("init.moments: {} {what}", from.display()));
    if from.join("config.json").is_file() {
        return Err(refused(
            "holds weights without moments; name a run or a checkpoint, or leave init.moments out".into(),
        ));
    }
    tell_longer(from, config)?;
    let described = Origin::of(from, "the model to start from").map_err(Failure::request)?;
    let folder = model_folder(from).map_err(Failure::Request)?;
    let mut own = config.clone();
    // a task's sequences are numbered, whatever their length
    let cut = described.cut_otherwise(&config.data).filter(|_| config.reads_text());
    (own.model, own.data.vocab_size) = (described.model, described.vocab);
    own.router.budget_from = None;
    let (theirs, state) = checkpoint::load(&folder, &own, device).map_err(Failure::Request)?;
    if state.step >= config.run.steps {
        let (made, all) = (state.step, config.run.steps);
        return Err(refused(format!(
            "has made {made} updates, which run.steps = {all} counts, too; set it above {made}"
        )));
    }
    let mut trainer = Trainer::new(config, device)?;
    let Change { fresh, unused } = take(&mut trainer.model, theirs.model.params())?;
    let names = |model: &Model| model.params().iter().map(|p| p.name.clone()).collect::<Vec<_>>();
    if names(&trainer.model) != names(&theirs.model) {
        let what = if fresh.is_empty() { named(&unused) } else { named(&fresh) };
        return Err(refused(format!(
            "has other parameters than this model, whose moments would be of unlike age: {what}; leave init.moments out"
        )));
    }
    if own.model.attention == config.model.attention
        && let Some(knobs) = state.knobs
    {
        // what a controller has steered
        trainer.model.set_knobs(knobs.alpha, knobs.gamma);
    }
    (trainer.optimizer, trainer.spikes) = (theirs.optimizer, theirs.spikes);
    let (data, place) = place(config, &state, data_hash, cut);
    tell!("weights   and moments of {} after {} updates; the corpus {place}", folder.display(), state.step);
    tell!("rate      {}", rates(config, state.step));
    Ok(Stand { trainer, data, tokens: state.tokens })
}

/// Where a schedule stands that goes on after `done` updates, so that a decay is seen to begin where it was meant to.
fn rates(config: &Config, done: u64) -> String {
    let (o, steps) = (&config.optim, config.run.steps);
    let rate = |step| learning_rate(o, step, steps);
    let decay = match o.schedule {
        Schedule::WarmupStableDecay => match decay_from(o, steps) {
            from if from < done => {
                format!("; the decay began at update {from}, before these weights (optim.decay_fraction)")
            }
            from => format!("; the decay begins after update {from}"),
        },
        Schedule::Cosine | Schedule::Constant => String::new(),
    };
    format!("{:.2e} at update {}, {:.2e} at the last, {steps}{decay}", rate(done + 1), done + 1, rate(steps))
}

/// Where a run goes on in its data from a checkpoint, in words, too. A position says something only in the order that it was counted in: `cut` is a key
/// by which the sequences are others.
fn place(config: &Config, state: &State, data_hash: &str, cut: Option<&str>) -> (LoaderState, String) {
    if state.data_hash != data_hash {
        return (LoaderState::default(), "is other data, read from its beginning".into());
    }
    match cut {
        Some(key) => (
            LoaderState::default(),
            format!("is cut into other sequences ({key}), read from the beginning of their order"),
        ),
        None if state.seed != config.run.seed => {
            (state.data, "goes on at that place of another order (run.seed)".into())
        }
        None => (state.data, "goes on where it stood".into()),
    }
}

/// Tells what the swap of the attention costs before any update: the validation loss with the attention that the weights were trained with,
/// and with the run's own.
///
/// # Errors
/// When the folder's model cannot be read.
pub fn tell_jump(model: &Model, config: &Config, set: &ValidationSet) -> Result<()> {
    let Some(init) = &config.init else { return Ok(()) };
    let from = origin(&init.from, config, model.device())?;
    let (before, after) = (set.run(&from, RouterChoice::Own)?.loss, set.run(model, RouterChoice::Own)?.loss);
    let (theirs, ours) = (from.config().attention.kind(), model.config().attention.kind());
    tell!(
        "start     validation loss {before:.4} with {theirs} attention, {after:.4} with {ours}: a jump of {:+.4}",
        after - before
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(name)
    }

    const TEXT: &str =
        "[run]\nsteps = 3\n[data]\nseq_len = 48\nbatch_size = 2\n[optim]\nlr = 1e-3\n[task]\nkind = \"recall\"\n";

    fn config(from: &Path, set: &[&str]) -> std::result::Result<Config, String> {
        let mut all = vec![format!("init.from={:?}", from.display().to_string())];
        all.extend(set.iter().map(|s| s.to_string()));
        Config::from_text(TEXT, &all, Path::new("c.toml")).map_err(|e| e.to_string())
    }

    fn values(model: &Model) -> Vec<(String, Vec<f32>)> {
        let of = |p: &Param| (p.name.clone(), p.value.as_slice::<f32>().unwrap().to_vec());
        model.params().iter().map(of).collect()
    }

    #[test]
    fn extents_and_weights_come_from_the_folder() {
        let device = Device::cpu(1).unwrap();
        for name in ["llama-f32-tied", "llama-bf16-sharded", "llama-f16", "llama3-f32"] {
            let folder = fixture(name);
            let theirs = Model::load(&folder, &device).unwrap();
            let dense = config(&folder, &["model.attention.kind=dense"]).unwrap();
            assert_eq!((dense.model.layers, dense.model.ffn, dense.data.vocab_size), (2, 48, 96), "{name}");
            assert_eq!(dense.model.rope_scaling.is_some(), name == "llama3-f32");
            let ours = trainer(&dense, &device).unwrap().model;
            assert_eq!(values(&ours), values(&theirs), "{name}");
            // what it is written as needs the folder no more
            let again = Config::from_text(&dense.to_toml(), &["init.from=/gone".into()], Path::new("c.toml")).unwrap();
            assert_eq!(again.model, dense.model);
        }
    }

    #[test]
    fn what_an_attention_adds_is_new_and_what_it_lacks_is_left_out() {
        let device = Device::cpu(1).unwrap();
        let dash =
            config(&fixture("llama-f16"), &["model.attention.kind=dash", "model.attention.chunk_size=8"]).unwrap();
        let theirs = Model::load(&fixture("llama-f16"), &device).unwrap();
        let mut model = Model::new(dash.model.clone(), 96, 48, 7, &device, dash_core::DType::F32).unwrap();
        let change = take(&mut model, theirs.params()).unwrap();
        let indexers: Vec<String> = (0..2).map(|l| format!("model.layers.{l}.{}", dash_model::INDEXER)).collect();
        assert_eq!((change.fresh, change.unused), (indexers.clone(), Vec::new()));
        // and back: the values are the same ones
        let mut dense = Model::new(theirs.config().clone(), 96, 48, 7, &device, dash_core::DType::F32).unwrap();
        let change = take(&mut dense, model.params()).unwrap();
        assert_eq!((change.fresh, change.unused), (Vec::new(), indexers));
        assert_eq!(values(&dense), values(&theirs));
    }

    #[test]
    fn what_contradicts_the_folder_is_refused_by_name() {
        let folder = fixture("llama-f32-tied");
        for (set, told) in [
            ("model.layers=3", "model.layers: 3, but"),
            ("model.rope_theta=1e4", "model.rope_theta: 10000.0, but"),
            ("model.tie_embeddings=false", "model.tie_embeddings: false, but"),
            ("data.vocab_size=97", "data.vocab_size: 97, but"),
            (
                "model.rope_scaling={factor=8.0,low_freq_factor=1.0,high_freq_factor=4.0,original_positions=64}",
                "model.rope_scaling",
            ),
        ] {
            let e = config(&folder, &[set]).unwrap_err();
            assert!(e.contains(told) && e.contains("config.json"), "{set}: {e}");
        }
        // other angles only where they are asked for, and then they are those of the file
        let scaling = "model.rope_scaling={factor=8.0,low_freq_factor=1.0,high_freq_factor=4.0,original_positions=64}";
        let changed =
            config(&folder, &["init.change_rope=true", "model.rope_theta=1e4", scaling, "model.attention.kind=dense"])
                .unwrap();
        assert_eq!(changed.model.rope_theta, 1e4);
        assert_eq!(changed.model.rope_scaling.unwrap().factor, 8.0);
        assert!(config(&folder, &["init.change_rope=true"]).unwrap_err().contains("says to what"));
        // the same, said once more
        let agreeing = ["model.layers=2", "model.rope_theta=5000.0", "model.head_dim=0", "model.attention.kind=dense"];
        assert_eq!(config(&folder, &agreeing).unwrap().model.head_dim, 8);
        let nothing = tempfile::tempdir().unwrap();
        let e = config(nothing.path(), &[]).unwrap_err();
        assert!(e.contains("holds no config.json and no config.toml"), "{e}");
        assert!(config(&nothing.path().join("none"), &[]).unwrap_err().contains("none\" is no folder"));
        let e = config(&folder.join("config.json"), &[]).unwrap_err();
        assert!(e.contains("is a file; expected the folder of"), "{e}");
    }

    /// A copy of a fixture.
    fn copied(name: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        dir
    }

    #[test]
    fn a_text_is_read_with_the_tokens_of_the_weights_or_not_at_all() {
        let (dir, other) = (copied("llama-f16"), tempfile::tempdir().unwrap());
        let learn = |text: &str, path: &Path| {
            let learned =
                dash_data::Tokenizer::learn([text].into_iter(), 264, dash_data::Treatment::default()).unwrap();
            std::fs::write(path.join("tokenizer.json"), learned.json()).unwrap();
            format!("data.tokenizer={:?}", path.join("tokenizer.json").display().to_string())
        };
        // half of the sequences are text
        let set = ["model.attention.kind=dense", "task.share=0.5", "data.source=text", "data.path=."];
        let told = |more: &[&str]| config(dir.path(), &[&set, more].concat()).err();
        let e = told(&[]).unwrap();
        assert!(e.contains("has no tokenizer.json") && e.contains("data.tokenizer"), "{e}");
        let named = learn("the cat sat on the mat", other.path());
        assert_eq!(told(&[&named]), None);
        learn("and the dog ran home", dir.path());
        let e = told(&[&named]).unwrap();
        assert!(e.contains("data.tokenizer") && e.contains("is another tokenizer than"), "{e}");
        assert_eq!(told(&[]), None);
        assert_eq!(told(&["data.source=tokens"]), None);
    }

    #[test]
    fn a_padded_vocabulary_is_one_of_a_loaded_model_alone() {
        let loaded = config(&fixture("llama-f16"), &["model.attention.kind=dense"]).unwrap();
        assert!(loaded.fits_tokenizer(96) && loaded.fits_tokenizer(90) && !loaded.fits_tokenizer(97));
        let drawn = Config { init: None, ..loaded.clone() };
        assert!(drawn.fits_tokenizer(96) && !drawn.fits_tokenizer(90));
        assert_eq!([loaded.data_settings().padded, drawn.data_settings().padded], [true, false]);
    }
}
