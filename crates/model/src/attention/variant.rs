//! What a variant of attention is: one type that implements [`Variant`] and one [`Spec`] beside it.

use dash_core::{Result, Tape, Var};

use super::keys::{Given, Key, Range, Settings, Value};
use super::{Attention, Inputs, Layer};
use crate::config::ModelConfig;
use crate::error::ConfigError;
use crate::params::ParamSpec;
use crate::trace::RouterTrace;

/// What the registry knows of a variant without a value of it.
#[derive(Debug)]
pub struct Spec {
    /// Its name in configurations, and the `variant` of its golden cases.
    pub kind: &'static str,
    /// One sentence for the reference.
    pub about: &'static str,
    /// Other names for it with some defaults replaced.
    pub presets: &'static [Preset],
    /// Its keys.
    pub keys: &'static [Key],
    /// From values of its keys.
    pub build: fn(&Given) -> Attention,
    /// Values at which sequences of two dozen tokens have something to route: tests and the audit run these.
    pub small: &'static [(&'static str, Value)],
    /// The inputs of its golden cases: q, k, v, then what [`Inputs::own`] holds, where a case has it.
    pub golden: &'static [&'static str],
}

/// A named set of values for some keys.
#[derive(Debug)]
pub struct Preset {
    /// Taken wherever a kind is.
    pub name: &'static str,
    /// One sentence for the reference.
    pub about: &'static str,
    /// What differs from the defaults.
    pub values: &'static [(&'static str, Value)],
}

impl Spec {
    /// The variant with its defaults and some values in their place.
    pub fn with(&self, values: &[(&'static str, Value)]) -> Attention {
        (self.build)(&Given::of(values))
    }

    /// The keys that stay when a configuration is given this kind: its numbers. What makes a preset, and switches, do not.
    pub fn kept_keys(&self) -> impl Iterator<Item = &'static str> {
        let by_preset = |key: &Key| self.presets.iter().any(|p| p.values.iter().any(|(k, _)| *k == key.name));
        self.keys.iter().filter(move |k| k.takes.is_number() && !by_preset(k)).map(|k| k.name)
    }
}

/// Chunks of keys of which a query attends some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    /// Tokens of a chunk.
    pub size: usize,
    /// Attended chunks at most, the own one included, where the choice is hard.
    pub top: Option<usize>,
}

/// What a layer costs beyond q, k, v, o, the feed-forward layer, and the attended pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Multiply-adds of a token with the variant's own parameters, forward.
    pub products: f64,
    /// Chunks or windows that a query scores, on average; each is a product of `heads * head_dim`.
    pub candidates: f64,
    /// Elements kept for backward, per token.
    pub kept: f64,
}

/// Who loads an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    /// Stock `transformers`, as a Llama.
    Stock,
    /// The model code beside the weights: config.json has a name that stock loaders refuse.
    Own,
}

/// What export writes for a variant.
#[derive(Debug, Clone, PartialEq)]
pub struct Export {
    /// Who loads it.
    pub loader: Loader,
    /// Further keys of config.json.
    pub keys: Vec<(&'static str, Value)>,
    /// For the README of the folder.
    pub note: String,
}

impl Export {
    /// For what only the model code beside the weights computes, with the reason in brackets where there is one to tell.
    pub fn own(kind: &str, why: &str) -> Self {
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        let note = format!(
            "This is a model with {kind} attention{why}. `AutoModelForCausalLM.from_pretrained(folder, \
             trust_remote_code=True)` computes the logits in `parity.safetensors` with the `modeling_dashlab.py` beside this \
             file."
        );
        Export { loader: Loader::Own, keys: Vec::new(), note }
    }
}

/// What training may move from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knob {
    /// The entmax exponent of the router.
    Alpha,
    /// The factor on the routing scores; a larger one makes the choice sparser.
    Gamma,
}

impl Knob {
    /// Values that it may have, also on the way of a schedule.
    pub const fn range(self) -> Range {
        match self {
            // At 1.001 logits agree to 3e-4 of the largest in f32; at 1.000001 the gradient norm is off by up to 3.5 %, because
            // 1 / (alpha - 1) multiplies every rounding.
            Knob::Alpha => {
                Range::within(1.001, 2.0, "1 is softmax, near which f32 loses its digits, and 2 is sparsemax")
            }
            // Beyond it scores leave f32 and every row of the router is empty.
            Knob::Gamma => Range::above(0.0, 1e38, "scores are f32"),
        }
    }
}

impl std::fmt::Display for Knob {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Knob::Alpha => "alpha",
            Knob::Gamma => "gamma",
        })
    }
}

/// Output `[b, t, h, d]`, and what the router did where there is one.
pub type Attended = (Var, Option<RouterTrace>);

/// A variant of attention: everything that the rest of the program asks of it.
pub trait Variant: Settings + Send + Sync {
    /// What the registry knows of it.
    fn spec(&self) -> &'static Spec;

    /// Refuses values that do not fit each other; ranges of single keys are checked before.
    ///
    /// # Errors
    /// Names the key.
    fn check(&self) -> std::result::Result<(), ConfigError> {
        Ok(())
    }

    /// Its parameters in a layer besides those of q, k, v and o.
    fn params(&self, _config: &ModelConfig) -> Vec<ParamSpec> {
        Vec::new()
    }

    /// What it costs in sequences of `t` tokens.
    fn cost(&self, _config: &ModelConfig, _t: usize) -> Cost {
        Cost::default()
    }

    /// Its chunks, where it has some.
    fn chunks(&self) -> Option<Chunks> {
        None
    }

    /// Last tokens up to the query that every query attends besides its chunks; 0 without such a window.
    fn window(&self) -> usize {
        0
    }

    /// Mean number of keys that a query of a sequence of `t` tokens attends, all branches together, when its chunks hold
    /// `listed` tokens: without chunks all of them, (t + 1) / 2.
    fn attended(&self, t: usize, listed: f64) -> f64 {
        if self.chunks().is_some() { listed } else { (t as f64 + 1.0) / 2.0 }
    }

    /// A knob, where it has that one.
    fn knob_mut(&mut self, _knob: Knob) -> Option<&mut f64> {
        None
    }

    /// What its random choices follow from, where it has some; 0 in a configuration stands for the seed of the run.
    fn seed_mut(&mut self) -> Option<&mut usize> {
        None
    }

    /// Whether a card has kernels for all that [`Variant::attend`] asks of kept tokens.
    fn decodes_on_a_card(&self) -> bool {
        false
    }

    /// Whether it attends a number of chunks that [`Inputs::budget`] may change.
    fn takes_budget(&self) -> bool {
        false
    }

    /// Whether a GPU keeps every score of a query for it, whatever the shapes: memory then grows with the square of the sequence.
    fn keeps_scores(&self) -> bool {
        false
    }

    /// Whether it has a loss of its own, a mean over queries, beside that of the model.
    fn has_own_loss(&self) -> bool {
        false
    }

    /// Whether backward computes the gradient of the function that forward computes.
    fn gradient_is_exact(&self) -> bool {
        true
    }

    /// Takes over what a model trained with `own` needs to be evaluated with this variant, besides the keys that both have.
    /// `has` tells whether the model has a parameter, by its name in the layer.
    fn adopt(&mut self, _own: &Attention, _has: &dyn Fn(&str) -> bool) {}

    /// What export writes for a model that was trained on `positions` tokens.
    fn export(&self, _config: &ModelConfig, _positions: usize) -> Export {
        Export::own(self.spec().kind, "")
    }

    /// What [`Variant::attend`] reads besides q, k and v; without projections of its own, the parameters as they are.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn project(&self, _tape: &Tape, layer: &Layer) -> Result<Vec<Var>> {
        Ok(layer.params.to_vec())
    }

    /// Attention itself.
    ///
    /// # Errors
    /// When shapes or settings do not fit.
    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended>;
}
