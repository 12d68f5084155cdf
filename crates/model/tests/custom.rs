//! A variant of another crate: the one of the example.

#[path = "../examples/custom_variant.rs"]
mod example;

use dash_core::rng::Rng;
use dash_core::{DType, Device, Tape};
use dash_model::attention::keys::{Key, Settings, Value};
use dash_model::attention::{Attended, Inputs, Spec, Variant};
use dash_model::{Attention, Generation, Group, Init, Model, ModelConfig, ParamSpec, Sampling, generate};

/// The gradient of the example agrees with central differences, and the model learns with it.
#[test]
fn the_example_trains() {
    example::main().unwrap();
    let (before, after) = example::train(100).unwrap();
    assert!(before > 2.5 && after < 0.1 * before, "{before} to {after}: a fresh model is near ln 16 = 2.77");
}

#[test]
fn a_model_has_its_parameters_and_generates() {
    let attention = example::SPEC.with(&[]);
    let config = ModelConfig { attention, ..ModelConfig::new(1, 16, (2, 1), 32) };
    config.check().unwrap();
    let model = Model::new(config, 11, 8, 1, &Device::cpu(1).unwrap(), DType::F32).unwrap();
    assert_eq!(model.params().get("model.layers.0.self_attn.slopes").unwrap().shape(), [2]);
    assert_eq!(model.config().attention.kind(), "linear-bias");
    let mut told = Vec::new();
    let mut run = |cache| {
        let how = Generation { max_tokens: 3, sampling: Sampling { temperature: 0.0, top_p: 1.0 }, cache };
        generate(&model, &[1, 2], how, &mut Rng::new(1), |id| {
            told.push(id);
            true
        })
    };
    run(false).unwrap();
    assert!(run(true).unwrap_err().to_string().contains("cache: false"));
    assert_eq!(told.len(), 3 + 1, "the first pass needs no cache");
}

/// Another reader would take the name for a variant of its own, or for none.
#[test]
fn no_file_names_it() {
    let told = serde_json::to_string(&example::SPEC.with(&[])).unwrap_err().to_string();
    assert!(told.contains("linear-bias"), "{told}");
    assert!(serde_json::to_string(&Attention::default()).unwrap().contains("dash"));
}

/// A variant whose parameter has the name of another one.
#[derive(Debug)]
struct Taken;

static TAKEN: Spec = Spec {
    kind: "taken",
    about: "",
    presets: &[],
    keys: &[],
    build: |_| Attention::custom(Taken),
    small: &[],
    golden: &[],
};

impl Settings for Taken {
    fn keys(&self) -> &'static [Key] {
        TAKEN.keys
    }

    fn value(&self, _: &str) -> Option<Value> {
        None
    }
}

impl Variant for Taken {
    fn spec(&self) -> &'static Spec {
        &TAKEN
    }

    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        vec![ParamSpec::new("self_attn.q_proj.weight", vec![config.heads], Init::Zeros, Group::Vector)]
    }

    fn attend(&self, _: &Tape, x: &Inputs) -> dash_core::Result<Attended> {
        Ok((x.q.clone(), None))
    }
}

#[test]
fn a_parameter_of_a_name_that_is_taken_is_refused() {
    let config = ModelConfig { attention: TAKEN.with(&[]), ..ModelConfig::new(1, 16, (2, 1), 32) };
    let told = config.check().unwrap_err().to_string();
    assert!(told.contains("taken has two parameters self_attn.q_proj.weight in a layer"), "{told}");
}

#[test]
fn two_are_equal_when_their_keys_are() {
    let of = |slope| example::SPEC.with(&[("slope", Value::Number(slope))]);
    assert_eq!(of(0.5), of(0.5));
    assert_ne!(of(0.5), of(0.25));
    assert_ne!(of(0.5), Attention::default());
    let refused = ModelConfig { attention: of(0.0), ..ModelConfig::new(1, 16, (2, 1), 32) }.check().unwrap_err();
    assert!(refused.to_string().contains("model.attention.slope"), "{refused}");
}
