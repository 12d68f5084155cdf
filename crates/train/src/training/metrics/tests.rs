//! What metrics.jsonl and TensorBoard say of literal figures, against values counted by hand.

use dash_model::{Dash, RouterStats};

use dash_data::Batch;

use super::super::far::FarLoss;
use super::super::handmade::{Pull, config, reader};
use super::super::knobs::Knobs;
use super::super::probe::Probe;
use super::super::tasks::Score;
use super::super::tensorboard::scalars;
use super::*;
use crate::training::lengths::Lengths;

#[test]
fn a_resumed_record_forgets_what_comes_after_the_checkpoint_and_a_cut_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    std::fs::write(&path, b"{\"step\":1}\n\xff\xfe\n{\"step\":2}\n{\"step\":3}\n{\"st").unwrap();
    Metrics::open(dir.path(), 2, false).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
}

fn layer(layer: usize, density: f64, active_chunks: f64, bias: (f64, f64)) -> LayerStats {
    let router = RouterStats {
        density,
        active_chunks,
        tokens: 20.0,
        histogram: vec![0, 3, 1],
        empty: 0.25 * (layer + 1) as f64,
        bias_mean: bias.0,
        bias_max: bias.1,
        score_gradient: 0.5,
        indexer_loss: None,
        rows: 4,
    };
    LayerStats { layer, router, indexer_gradient: 0.125 }
}

fn stats(routers: Vec<LayerStats>, attended: Option<f64>) -> StepStats {
    let knobs = Some(Knobs { alpha: Some(1.5), gamma: Some(4.0) });
    let lengths = Lengths::whole(48);
    StepStats { loss: 2.5, grad_norm: 0.75, lr: 1e-3, routers, knobs, attended, skipped: None, lengths }
}

/// Of a run on a CPU.
fn pace(config: &Config, tokens_per_s: f64, s: &StepStats) -> Pace {
    Pace::of(config, (&dash_core::Device::cpu(1).unwrap(), 1), tokens_per_s, s)
}

/// (tag, number) of a step.
fn events(folder: &Path, step: i64) -> Vec<(String, f64)> {
    let all = scalars(&folder.join("tensorboard")).into_iter().filter(|(s, ..)| *s == step);
    all.map(|(_, tag, number)| (tag, number)).collect()
}

/// configs/test.toml: two layers, width 32, 4 heads of 8, 2 kv heads, ffn 64, vocabulary 300, 48 tokens, chunks of 8. A block has
/// 2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 64 = 9216 matrix elements, so the model multiplies 2 x 9216 + 32 x 300 = 28032. A query sees
/// 49 / 2 = 24.5 tokens, of which 0.4 are attended, and scores 24.5 / 8 = 3 whole chunks.
#[test]
// Above 60 lines: the expected record stands whole.
fn a_train_line_holds_means_over_layers_and_the_work_of_a_token() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[]);
    let mut metrics = Metrics::open(dir.path(), 0, true).unwrap();
    let s = stats(vec![layer(0, 0.5, 2.0, (0.25, 3.0)), layer(1, 0.75, 3.0, (0.75, 2.0))], Some(0.4));
    let pace = Pace { mfu: Some(0.25), memory: Some(1 << 20), ..pace(&config, 1234.4, &s) };
    metrics.train(&config, (5, 960), &pace, &s);
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    let attended = 0.4 * 24.5;
    let flops = 6.0 * 28032.0 + 3.0 * 2.0 * 4.0 * 32.0 * attended + 2.0 * 2.0 * 32.0 * 3.0;
    for (key, want) in [
        ("step", 5.0),
        ("loss", 2.5),
        ("lr", 1e-3),
        ("grad_norm", 0.75),
        ("tokens", 960.0),
        ("tokens_per_s", 1234.0),
        ("mfu", 0.25),
        ("gpu_memory_bytes", 1048576.0),
        ("density", 0.625),
        ("active_chunks", 2.5),
        ("empty", 0.375),
        ("bias_mean", 0.5),
        ("bias_max", 3.0),
        ("attended_tokens", attended),
        ("flops_per_token", flops),
        ("alpha", 1.5),
        ("gamma", 4.0),
    ] {
        let got = line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"));
        assert!((got - want).abs() <= 1e-12 * want, "{key}: {got}, counted by hand {want}");
    }
    let second = &line["layers"][1];
    let want = json!({"layer": 1, "density": 0.75, "active_chunks": 3.0, "empty": 0.5, "bias_mean": 0.75, "bias_max": 2.0,
        "score_grad_norm": 0.5, "indexer_q_grad_norm": 0.125, "chunks_histogram": [0, 3, 1]});
    assert_eq!(*second, want);

    let events = events(dir.path(), 5);
    let got = |tag: &str| events.iter().find(|(t, _)| t == tag).map(|(_, x)| *x);
    for (tag, want) in [
        ("loss/train", 2.5),
        ("train/lr", 1e-3),
        ("train/grad_norm", 0.75),
        ("train/tokens_per_s", 1234.4),
        ("router/mean/density", 0.625),
        ("router/mean/active_chunks", 2.5),
        ("router/mean/bias_mean", 0.5),
        ("router/mean/bias_max", 3.0),
        ("router/mean/attended_tokens", attended),
        ("router_layers/00/density", 0.5),
        ("router_layers/01/density", 0.75),
        ("router_layers/01/active_chunks", 3.0),
        ("router_layers/00/bias_max", 3.0),
        ("router_layers/01/score_grad_norm", 0.5),
        ("router_layers/01/indexer_q_grad_norm", 0.125),
    ] {
        let got = got(tag).unwrap_or_else(|| panic!("{tag} in {events:?}"));
        // TensorBoard holds f32
        assert!((got - want).abs() <= 1e-6 * want, "{tag}: {got}, counted by hand {want}");
    }
    // nothing moves alpha or gamma here, so neither has a card
    assert!(got("router/mean/alpha").is_none() && got("router/mean/gamma").is_none());
    assert!(got("router_layers/00/chunks").is_some());
}

#[test]
fn a_knob_has_a_card_where_something_moves_it() {
    let cards = |set: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(dir.path(), 0, true).unwrap();
        let (config, s) = (config(set), stats(vec![layer(0, 0.5, 2.0, (0.0, 0.0))], Some(0.4)));
        metrics.train(&config, (1, 1), &pace(&config, 1.0, &s), &s);
        let events = events(dir.path(), 1);
        ["alpha", "gamma"].map(|knob| events.iter().any(|(tag, _)| *tag == format!("router/mean/{knob}")))
    };
    assert_eq!(cards(&["router.target_share=0.5"]), [false, true]);
    assert_eq!(cards(&["router.gamma={from=1.0,to=2.0,steps=5}"]), [false, true]);
    assert_eq!(cards(&["router.alpha={from=1.25,to=1.5,steps=5}"]), [true, false]);
}

#[test]
fn dense_attention_attends_everything_visible() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(dir.path(), 0, false).unwrap();
    let (config, s) = (config(&["model.attention.kind=dense"]), stats(Vec::new(), None));
    metrics.train(&config, (1, 192), &pace(&config, 10.0, &s), &s);
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["density"], &line["attended_tokens"]), (&json!(1.0), &json!(24.5)));
    // 6 x 28032 + 768 x 24.5, and nothing is routed
    assert_eq!(line["flops_per_token"], json!(187008.0));
    assert!(line.get("layers").is_none() && line.get("active_chunks").is_none());
}

#[test]
fn a_probe_line_and_its_events_hold_the_same_figures() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(dir.path(), 0, true).unwrap();
    let model =
        reader(Dash { chunk_size: 2, ..Dash::default() }.into(), 2, 8, &Pull { q: &[0.0, 1.0], k: &[0.5, 1.0] });
    let ids: Vec<u32> = (0..16).map(|i| i * 5 % 8).collect();
    let batch = Batch {
        inputs: ids.clone().into(),
        targets: ids,
        batch: 2,
        state: Default::default(),
        questions: Vec::new(),
        documents: Vec::new(),
    };
    let (loss, layers) = Probe::new(&batch, 2).run(&model).unwrap();
    metrics.probe(3, loss, &layers);
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["step"], &line["split"], &line["probe_loss"]), (&json!(3), &json!("probe"), &number(loss)));
    let events = events(dir.path(), 3);
    let (mut compared, mut heads) = (0, 0);
    for layer in line["layers"].as_array().unwrap() {
        for (key, value) in layer.as_object().unwrap().iter().filter(|(key, value)| *key != "layer" && value.is_f64()) {
            let tag = format!("probe/layer{}/{key}", layer["layer"]);
            let found = events.iter().find(|(t, _)| *t == tag).unwrap_or_else(|| panic!("{tag} in {events:?}"));
            let want = value.as_f64().unwrap();
            assert!((found.1 - want).abs() <= 1e-6 * want.abs(), "{tag}: {}, not {want}", found.1);
            compared += 1;
        }
        heads +=
            events.iter().filter(|(t, _)| *t == format!("probe/layer{}/head0/score_grad_norm", layer["layer"])).count();
        assert!(events.iter().all(|(t, _)| *t != format!("probe/layer{}/layer", layer["layer"])));
    }
    assert!(compared >= 10 && heads == 2, "{compared} figures, {heads} heads");
    assert_eq!(events.iter().filter(|(t, _)| t.ends_with("/log10_weight")).count(), 2);
    assert_eq!(logs(&[0.0, 100.0, 0.1, 1.0]), [2.0, -1.0, 0.0]);
}

#[test]
// Above 60 lines: the expected record stands whole.
fn a_validation_line_and_its_events_hold_the_same_figures() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(dir.path(), 0, true).unwrap();
    let score = Score { asked: 8, right: 4, missed: 3, misread: 1, unseen: 5 };
    let result = LengthResult {
        loss_error: Some(0.25),
        length: 48,
        loss: 1.25,
        score,
        by_distance: [(4, score)].into(),
        by_question: vec![score],
        shortcut: dash_data::Shortcut { accuracy: 0.25, by_question: vec![0.25] },
        spent: Vec::new(),
        density: 0.5,
        layers: vec![0.5],
        listed: 12.0,
    };
    let v = Validation {
        loss_error: Some(0.5),
        loss: 2.0,
        bits_per_byte: Some(1.5),
        far: Some(FarLoss { loss: 3.0, error: Some(0.125), tokens: 7, control: 4.0, control_tokens: 9 }),
        task: vec![result],
        attended: 9.5,
        tokens: 96,
        density: 0.625,
        by_position: vec![2.0; 48],
        layers: vec![0.5, 0.75],
    };
    metrics.validation(10, 1920, &v, Some(5.5), Some("text"));
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    let perplexity = 2f64.exp();
    for (key, want) in [
        ("step", json!(10)),
        ("split", json!("val")),
        ("loss", json!(2.0)),
        ("perplexity", json!(perplexity)),
        ("tokens", json!(96)),
        ("trained_tokens", json!(1920)),
        ("density", json!(0.625)),
        ("layer_density", json!([0.5, 0.75])),
        ("attended_tokens", json!(9.5)),
        ("bits_per_byte", json!(1.5)),
        ("loss_error", json!(0.5)),
        ("unigram_loss", json!(5.5)),
        ("far_loss", json!(3.0)),
        ("far_loss_error", json!(0.125)),
        ("far_tokens", json!(7)),
        ("far_control_loss", json!(4.0)),
        ("far_control_tokens", json!(9)),
        ("sample", json!("text")),
    ] {
        assert_eq!(line[key], want, "{key}");
    }
    let task = &line["task"][0];
    let shares = ["accuracy", "router_missed", "reader_missed", "unseen", "loss", "density"].map(|key| &task[key]);
    assert_eq!(shares, [&json!(0.5), &json!(0.375), &json!(0.125), &json!(0.625), &json!(1.25), &json!(0.5)]);
    assert_eq!((&task["by_distance"][0]["distance_below"], &task["loss_error"]), (&json!(4), &json!(0.25)));
    let mut want = vec![
        ("loss/val", 2.0),
        ("val/perplexity", perplexity),
        ("val/bits_per_byte", 1.5),
        ("val/density", 0.625),
        ("task/length48/accuracy", 0.5),
        ("task/length48/router_missed", 0.375),
        ("task/length48/reader_missed", 0.125),
    ];
    for (tag, got) in events(dir.path(), 10) {
        let at =
            want.iter().position(|(t, _)| *t == tag).unwrap_or_else(|| panic!("{tag} is no figure of a validation"));
        let (_, want) = want.remove(at);
        assert!((got - want).abs() <= 1e-6 * want, "{tag}: {got}, not {want}");
    }
    assert!(want.is_empty(), "{want:?} are missing");
    // what is not known has no number, and is no 0
    let unknown = Validation { bits_per_byte: None, loss: f64::NAN, task: Vec::new(), ..v };
    metrics.validation(11, 1920, &unknown, None, None);
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    assert!(line["loss"].is_null() && line.get("bits_per_byte").is_none() && line.get("task").is_none());
    assert_eq!(events(dir.path(), 11), [("val/density".to_string(), 0.625)]);
}
