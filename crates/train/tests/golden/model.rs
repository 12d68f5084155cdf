use dash_core::rng::Rng;
use dash_core::{DType, Ids, Tape, Tensor};
use dash_model::{Attention, Model, ModelConfig, Params, VARIANTS};
use train::config::Optim;
use train::optim::Optimizer;

use crate::files::{Golden, all, difference, error};

/// The model of a case: its table `attention` is that of a configuration.
fn model(g: &Golden, dtype: DType) -> Model {
    let attention: Attention = serde_json::from_value(g.config["attention"].clone())
        .unwrap_or_else(|e| panic!("{}: attention is no table: {e}", g.name));
    let (heads, ffn) = ((g.size("num_attention_heads"), g.size("num_key_value_heads")), g.size("intermediate_size"));
    let config = ModelConfig {
        head_dim: g.size("head_dim"),
        rope_theta: g.number("rope_theta"),
        norm_eps: g.number("rms_norm_eps"),
        tie_embeddings: g.config["tie_word_embeddings"].as_bool().unwrap(),
        qkv_bias: g.config["qkv_bias"].as_bool().unwrap_or(false),
        qk_norm: g.config["qk_norm"].as_bool().unwrap_or(false),
        attention,
        ..ModelConfig::new(g.size("num_hidden_layers"), g.size("hidden_size"), heads, ffn)
    };
    let find = |name: &str| g.has(name).then(|| g.tensor(name, dtype));
    let params = Params::from_named(&config, g.size("vocab_size"), find).unwrap();
    let named = g.names().filter(|n| n.starts_with("grad.")).count();
    assert_eq!(params.len(), named, "{}: every golden gradient belongs to a parameter", g.name);
    Model::with_params(config, params, g.shape("ids")[1]).unwrap()
}

/// Ids and targets `[b, t]` of a case.
fn batch(m: &Model, g: &Golden) -> (Ids, Ids) {
    let ids = |name| m.ids(&g.ids(name), g.shape("ids")[0]).unwrap();
    (ids("ids"), ids("targets"))
}

/// Logits, loss and every gradient.
fn results(m: &Model, g: &Golden) -> Vec<(String, Tensor)> {
    let (ids, targets) = batch(m, g);
    let t = Tape::new();
    let leaves = m.leaves(&t);
    let (loss, _) = m.loss(&t, &leaves, (&ids, &targets), targets.len() as f64).unwrap();
    let mut out = vec![("logits".into(), m.logits(&ids).unwrap()), ("loss".into(), loss.value.clone())];
    let mut grads = t.backward(&loss).unwrap();
    for (p, leaf) in m.params().iter().zip(&leaves) {
        // a parameter that only a choice reads has none: the oracle's is zero
        let zeros = || Tensor::zeros(leaf.value.device(), leaf.value.shape(), leaf.value.dtype()).unwrap();
        out.push((format!("grad.{}", p.name), grads.take(leaf).unwrap_or_else(zeros)));
    }
    out
}

#[test]
fn every_kind_has_a_golden_model() {
    if std::env::var_os("DASHLAB_GOLDEN").is_some() {
        return; // another folder may hold only some
    }
    let kinds: Vec<String> =
        all("model").iter().map(|g| g.config["attention"]["kind"].as_str().unwrap().into()).collect();
    let missing: Vec<&str> = VARIANTS.iter().map(|v| v.kind).filter(|k| !kinds.iter().any(|have| have == k)).collect();
    assert!(missing.is_empty(), "oracle/make_fixtures.py makes no model of {missing:?}");
}

#[test]
fn golden_model_f64() {
    for g in all("model") {
        for (name, got) in results(&model(&g, DType::F64), &g) {
            let e = error(&got, g.numbers(&name));
            assert!(e <= 1e-9, "{}: {name} is off by {e:e}", g.name);
        }
    }
}

/// What f32 can give depends on the case: scores near the edge of a support decide with the difference of large numbers.
/// So the limit is measured: the f64 model with every parameter moved by a random ulp of f32 shows how far one rounding
/// carries. A value passes through some 40 roundings forward and backward, which add like a random walk: 6 of one.
#[test]
fn golden_model_f32() {
    for g in all("model") {
        let mut rng = Rng::new(1);
        let mut one_rounding = std::collections::HashMap::new();
        for _ in 0..4 {
            let mut m = model(&g, DType::F64);
            for p in m.params_mut().iter_mut() {
                let moved =
                    p.value.to_f64().unwrap().iter().map(|x| x * (1.0 + f32::EPSILON as f64 * rng.normal())).collect();
                p.value = Tensor::from_vec(p.value.device(), p.value.shape(), moved).unwrap();
            }
            for (name, got) in results(&m, &g) {
                let e = error(&got, g.numbers(&name));
                let worst: &mut f64 = one_rounding.entry(name).or_default();
                *worst = worst.max(e);
            }
        }
        let size = |name: &str| g.numbers(name).iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let largest = g.names().filter(|n| n.starts_with("grad.")).map(size).fold(0.0, f64::max);
        for (name, got) in results(&model(&g, DType::F32), &g) {
            // a sum that is zero in exact arithmetic (NSA's position embedding, see `error`) stays so wherever the parameters are, and
            // comes out as the rounding of its terms, which are no larger than the largest gradient
            let (e, allowed) = if size(&name) < 1e-12 {
                (difference(&got, g.numbers(&name)).0, 6.0 * f32::EPSILON as f64 * largest)
            } else {
                (error(&got, g.numbers(&name)), 6.0 * one_rounding[&name])
            };
            assert!(e <= allowed, "{}: {name} is off by {e:e}, allowed {allowed:e}", g.name);
        }
    }
}

#[test]
fn golden_model_ten_adamw_losses() {
    // the fixture's settings are the defaults
    let optim: Optim = toml::from_str("lr = 1e-3").unwrap();
    for g in all("model") {
        let mut m = model(&g, DType::F64);
        let mut optimizer = Optimizer::new(&optim, m.params()).unwrap();
        let (ids, targets) = batch(&m, &g);
        for (i, want) in g.numbers("losses").iter().enumerate() {
            let t = Tape::new();
            let leaves = m.leaves(&t);
            let (loss, _) = m.loss(&t, &leaves, (&ids, &targets), targets.len() as f64).unwrap();
            let got = loss.value.item().unwrap();
            assert!((got - want).abs() <= 1e-9 * want, "{}: loss {i} is {got}, the oracle's {want}", g.name);
            let mut grads = t.backward(&loss).unwrap();
            let losses = [loss.value.clone()];
            drop(loss);
            let grads: Vec<Option<Tensor>> = leaves.iter().map(|l| grads.take(l)).collect();
            drop(leaves);
            let norm = dash_core::ops::grad_norm(m.device(), grads.iter().flatten()).unwrap();
            let scale = dash_core::ops::clip_factor(&norm, optim.clip, &losses).unwrap();
            optimizer.update(m.params_mut(), (&grads, &scale), 1e-3, &optim).unwrap();
        }
    }
}
