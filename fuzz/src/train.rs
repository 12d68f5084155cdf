//! What is fuzzed of `train`: a function a format, over any bytes. It returns for every input, with an error or with something usable; a
//! panic is a fault. `crates/train/tests/fuzz.rs` runs the same functions over `corpus/` on a stable toolchain.

use std::path::Path;
use std::sync::LazyLock;

use dash_core::Device;
use dash_model::{Described, Params, parse_tensors};
use train::config::Config;
use train::optim::Optimizer;
use train::training::checkpoint::State;
use train::training::preflight;

/// Reads any bytes; returns whether they were usable.
pub type Target = fn(&[u8]) -> bool;

/// Name and function of each; the seeds lie in `corpus/NAME/`.
pub const TARGETS: [(&str, Target); 4] =
    [("safetensors", safetensors), ("model", model), ("state", state), ("config", config)];

const CONFIG: &str = include_str!("../corpus/config/smallest.toml");

static SMALL: LazyLock<(Config, Device)> = LazyLock::new(|| {
    let config = Config::from_text(CONFIG, &[], Path::new("smallest.toml")).expect("the seed is a configuration");
    (config, Device::cpu(1).expect("one thread"))
});

/// Weights and optimiser state of a checkpoint of `corpus/config/smallest.toml`.
pub fn safetensors(data: &[u8]) -> bool {
    let (config, device) = &*SMALL;
    let Ok(tensors) = parse_tensors(data, Path::new("fuzz.safetensors"), device) else { return false };
    let take = |name: &str| tensors.get(name).cloned();
    let Ok(params) = Params::from_named(&config.model, config.data.vocab_size, take) else { return false };
    Optimizer::from_named(&config.optim, &params, 1, take).is_ok()
}

/// An exported folder: `config.json`, a zero byte, `model.safetensors`. A model that is taken reads four tokens.
pub fn model(data: &[u8]) -> bool {
    let (_, device) = &*SMALL;
    let (json, weights) = data.split_at(data.iter().position(|&b| b == 0).unwrap_or(data.len()));
    let Ok(described) = Described::parse(json, Path::new("config.json")) else { return false };
    let weights = weights.get(1..).unwrap_or_default();
    let Ok(model) = described.model(weights, Path::new("model.safetensors"), device) else { return false };
    let ids: Vec<u32> = (0..4.min(model.positions() as u32)).map(|i| i % model.vocab() as u32).collect();
    let ids = model.ids(&ids, 1).expect("a sequence of tokens");
    model.last_logits(&ids).expect("ids below the vocabulary, no more than positions");
    true
}

/// `state.json` of a checkpoint. What is read is written and read again as the same.
pub fn state(data: &[u8]) -> bool {
    let Ok(state) = State::parse(data) else { return false };
    let written = serde_json::to_vec(&state).expect("a state is JSON");
    assert_eq!(State::parse(&written).expect("its own text"), state);
    true
}

/// A configuration, with `--set` in the lines that begin with `#--set `. What is read is written and read again as the same, and its
/// sizes are counted.
pub fn config(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let set: Vec<String> = text.lines().filter_map(|l| l.strip_prefix("#--set ")).map(str::to_string).collect();
    let path = Path::new("fuzz.toml");
    let Ok(config) = Config::from_text(text, &set, path) else { return false };
    let again = Config::from_text(&config.to_toml(), &[], path).expect("a resolved configuration");
    assert_eq!(again, config);
    let _ = preflight::check_fits(&config, 1, false);
    let _ = config.positions();
    true
}
