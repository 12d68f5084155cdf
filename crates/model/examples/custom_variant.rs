//! A variant of attention of one's own, in a program that uses these crates: linear biases (ALiBi, Press et al. 2022, arXiv
//! 2108.12409), one slope a head, learned here, on top of the rotary angles, which ALiBi would replace. It is composed from
//! primitives, so its gradient comes with them; a kernel can wait until the idea has shown its worth.
//!
//!     cargo run -p dash-model --example custom_variant
//!
//! To have it in configurations, comparisons and exports as well, it moves to a file of `crates/model/src/attention/`:
//! CONTRIBUTING.md, "How to add an attention variant".

use dash_core::rng::Rng;
use dash_core::testing::{check_grad, normal};
use dash_core::{DType, Device, Error, Ids, Result, Tape, Tensor, Var, ops};
use dash_model::attention::keys::{Key, Range, Setting, Settings, Type, Value};
use dash_model::attention::{Attended, Inputs, Spec, Variant};
use dash_model::{Attention, Group, Init, Model, ModelConfig, ParamSpec};

/// Slope of every head at the start, where no other is given.
const SLOPE: f64 = 0.1;

/// Attention with linear biases.
#[derive(Debug)]
struct LinearBias {
    /// Slope of every head at the start, a token.
    slope: f64,
}

/// What there is to know of the variant without a value of it.
pub static SPEC: Spec = Spec {
    kind: "linear-bias",
    about: "Softmax attention with a learned linear bias on the distance.",
    presets: &[],
    keys: &[Key {
        name: "slope",
        takes: Type::Number,
        range: Range::positive("far tokens weigh less"),
        default: "SLOPE",
        meaning: "Slope of every head at the start.",
    }],
    build: |given| Attention::custom(LinearBias { slope: given.get("slope").unwrap_or(SLOPE) }),
    small: &[],
    golden: &["q", "k", "v", "slopes"],
};

impl Settings for LinearBias {
    fn keys(&self) -> &'static [Key] {
        SPEC.keys
    }

    fn value(&self, key: &str) -> Option<Value> {
        (key == "slope").then(|| self.slope.value())
    }
}

impl Variant for LinearBias {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    /// What is learned is added to the slope, so that it starts at 0.
    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        vec![ParamSpec::new("self_attn.slopes", vec![config.heads], Init::Zeros, Group::Vector)]
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        if x.past() > 0 {
            return Err(Error::invalid(SPEC.kind, "keeps no keys of earlier passes; generate with cache: false"));
        }
        let [slopes] = x.own else {
            return Err(Error::invalid(SPEC.kind, format!("{} parameters, not 1", x.own.len())));
        };
        Ok((attend(tape, [x.q, x.k, x.v, slopes], self.slope)?, None))
    }
}

/// o_i = sum over j <= i of softmax_j(q_i . k_j / sqrt d - (slope + slopes_h) (i - j)) v_j; q `[b, t, h, d]`, k and v `[b, t, g, d]`, slopes
/// `[h]`.
fn attend(tape: &Tape, [q, k, v, slopes]: [&Var; 4], slope: f64) -> Result<Var> {
    let [_, t, heads, d] = q.value.dims(SPEC.kind)?;
    let group = heads / k.value.shape()[2];
    let device = q.value.device();
    // [b, h, t, d]; a key/value head serves `group` query heads
    let heads_first = |x: &Var| ops::transpose(tape, x, &[0, 2, 1, 3]);
    let served = Ids::places(device, &(0..heads).map(|head| head / group).collect::<Vec<_>>())?;
    let spread = |x: &Var| ops::index_select(tape, &heads_first(x)?, 1, &served);
    let (q, k, v) = (heads_first(q)?, ops::transpose(tape, &spread(k)?, &[0, 1, 3, 2])?, spread(v)?);

    let distance: Vec<f64> = (0..t * t).map(|i| (i % t) as f64 - (i / t) as f64).collect();
    let distance = tape.leaf(Tensor::from_vec(device, &[1, t, t], distance)?.to_dtype(q.value.dtype())?);
    let learned = ops::mul(tape, &ops::reshape(tape, slopes, &[heads, 1, 1])?, &distance)?;
    let bias = ops::add(tape, &learned, &ops::scale(tape, &distance, slope)?)?;
    let scores = ops::scale(tape, &ops::matmul(tape, &q, &k)?, 1.0 / (d as f64).sqrt())?;
    let later: Vec<bool> = (0..t * t).map(|i| i % t > i / t).collect();
    let scores = ops::mask_fill(
        tape,
        &ops::add(tape, &scores, &bias)?,
        &Ids::mask(device, &[t * t], &later)?,
        f64::NEG_INFINITY,
    )?;
    heads_first(&ops::matmul(tape, &ops::softmax(tape, &scores)?, &v)?)
}

/// The loss before and after some steps of plain gradient descent on one sequence, which repeats itself.
pub fn train(steps: usize) -> Result<(f64, f64)> {
    const VOCAB: usize = 16;
    const T: usize = 32;
    let config = ModelConfig {
        attention: SPEC.with(&[("slope", Value::Number(0.2))]),
        init_std: 0.1,
        ..ModelConfig::new(2, 32, (4, 2), 64)
    };
    let mut model = Model::new(config, VOCAB, T, 1, &Device::cpu(1)?, DType::F32)?;
    let mut rng = Rng::new(2);
    let period: Vec<u32> = (0..T / 2).map(|_| rng.below(VOCAB) as u32).collect();
    let text: Vec<u32> = period.iter().cycle().take(T + 1).copied().collect();
    let (ids, targets) = (model.ids(&text[..T], 1)?, model.ids(&text[1..], 1)?);
    let mut losses = Vec::new();
    for _ in 0..=steps {
        let tape = Tape::new();
        let leaves = model.leaves(&tape);
        let (loss, _) = model.loss(&tape, &leaves, (&ids, &targets), T as f64)?;
        losses.push(loss.value.item()?);
        let gradients = tape.backward(&loss)?;
        let plain = Tape::inference();
        for (param, leaf) in model.params_mut().iter_mut().zip(&leaves) {
            if let Some(g) = gradients.get(leaf) {
                let step = ops::scale(&plain, &plain.leaf(g.clone()), -0.5)?;
                param.value = ops::add(&plain, &plain.leaf(param.value.clone()), &step)?.value;
            }
        }
    }
    Ok((losses[0], losses[steps]))
}

/// Checks the gradient, then trains.
pub fn main() -> Result<()> {
    // every element of every input against central differences in f64
    let device = dash_core::testing::device();
    let inputs = [&[1, 7, 4, 6][..], &[1, 7, 2, 6], &[1, 7, 2, 6], &[4]];
    let inputs: Vec<Tensor> = inputs.iter().enumerate().map(|(i, shape)| normal(&device, shape, i as u64)).collect();
    check_grad(&inputs, |tape, x| attend(tape, [&x[0], &x[1], &x[2], &x[3]], 0.1));

    let (before, after) = train(100)?;
    println!("loss {before:.3}, after 100 steps {after:.3}");
    Ok(())
}
