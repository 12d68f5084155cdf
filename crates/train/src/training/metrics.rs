//! The record of a run: metrics.jsonl, and the same figures as TensorBoard events.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::eval::Validation;
use super::pace::{Pace, attended_tokens};
use super::probe::LayerProbe;
use super::tasks::LengthResult;
use super::tensorboard::EventFile;
use super::trainer::{LayerStats, StepStats};
use crate::config::Config;
use crate::console::tell;

/// Writes both. A line that cannot be written ends neither the run nor the other file; the first failure is told.
pub struct Metrics {
    lines: Option<File>,
    events: Option<EventFile>,
}

fn complain(what: &str) {
    tell!("warning: {what}");
}

/// JSON has no NaN: it becomes null.
fn number(x: f64) -> Value {
    serde_json::Number::from_f64(x).map_or(Value::Null, Value::Number)
}

/// Decades of what is above 0.
fn logs(x: &[f64]) -> Vec<f64> {
    x.iter().filter(|v| **v > 0.0).map(|v| v.log10()).collect()
}

impl Metrics {
    /// Opens the files of a run folder, dropping lines after `step`: a resumed run writes them again.
    ///
    /// # Errors
    /// When the existing record cannot be read or rewritten.
    pub fn open(folder: &Path, step: u64, tensorboard: bool) -> anyhow::Result<Self> {
        let path = folder.join("metrics.jsonl");
        if let Ok(bytes) = std::fs::read(&path) {
            // a line cut by a crash is no JSON and goes too; one with other bytes than text does not take the rest along
            let text = String::from_utf8_lossy(&bytes);
            let keep = |line: &&str| {
                let step_of = serde_json::from_str::<Value>(line).ok().and_then(|v| v["step"].as_u64());
                step_of.is_some_and(|s| s <= step)
            };
            let kept: String = text.lines().filter(keep).map(|l| format!("{l}\n")).collect();
            if kept.as_bytes() != bytes {
                crate::files::replace_file(&path, kept.as_bytes())?;
            }
        }
        let lines = OpenOptions::new().create(true).append(true).open(&path);
        let lines = lines.with_context(|| format!("{} cannot be opened", path.display()))?;
        let events = tensorboard.then(|| EventFile::open(&folder.join("tensorboard"), step, complain));
        Ok(Metrics { lines: Some(lines), events })
    }

    /// The configuration, as a card of text for TensorBoard.
    pub fn config(&mut self, config: &Config) {
        if let Some(events) = &mut self.events {
            events.text("config", &format!("```toml\n{}\n```", config.to_toml().trim_end()), 0);
            events.flush();
        }
    }

    fn line(&mut self, value: &Value) {
        let Some(file) = &mut self.lines else { return };
        if let Err(e) = file.write_all(format!("{value}\n").as_bytes()) {
            self.lines = None;
            complain(&format!("metrics.jsonl cannot be written ({e}); the run goes on without it"));
        }
    }

    /// A train line.
    pub fn train(&mut self, config: &Config, (step, tokens): (u64, u64), pace: &Pace, s: &StepStats) {
        let line = train_line(config, (step, tokens), pace, s);
        self.line(&line);
        if let Some(events) = &mut self.events {
            train_events(events, config, &line, (step, pace), s);
            events.flush();
        }
    }

    /// A probe line.
    pub fn probe(&mut self, step: u64, loss: f64, layers: &[LayerProbe]) {
        let all: Vec<Value> = layers.iter().map(LayerProbe::json).collect();
        self.line(&json!({"step": step, "split": "probe", "probe_loss": number(loss), "layers": all}));
        let Some(events) = &mut self.events else { return };
        for (probe, line) in layers.iter().zip(&all) {
            let place = format!("probe/layer{}", probe.layer);
            for (key, value) in line.as_object().into_iter().flatten().filter(|(k, _)| *k != "layer") {
                if let Some(value) = value.as_f64() {
                    events.scalar(&format!("{place}/{key}"), value, step);
                }
            }
            for (head, (norm, split)) in probe.scores.iter().zip(&probe.q_heads).enumerate() {
                events.scalar(&format!("{place}/head{head}/score_grad_norm"), *norm, step);
                events.scalar(&format!("{place}/head{head}/router_share_q"), split.share(), step);
            }
            events.histogram(&format!("{place}/log10_score_gradient"), &logs(&probe.score_values), step);
            events.histogram(&format!("{place}/log10_weight"), &logs(&probe.weights), step);
        }
        events.flush();
    }

    /// A validation line.
    pub fn validation(&mut self, step: u64, tokens: u64, v: &Validation, unigram: Option<f64>, sample: Option<&str>) {
        let mut line = json!({
            "step": step, "split": "val", "loss": number(v.loss), "perplexity": number(v.loss.exp()),
            "tokens": v.tokens, "trained_tokens": tokens, "density": number(v.density), "layer_density": v.layers,
            "attended_tokens": number(v.attended),
        });
        if let Some(error) = v.loss_error {
            line["loss_error"] = number(error);
        }
        if let Some(bits) = v.bits_per_byte {
            line["bits_per_byte"] = number(bits);
        }
        if let Some(far) = v.far {
            line["far_loss"] = number(far.loss);
            line["far_tokens"] = json!(far.tokens);
            line["far_control_loss"] = number(far.control);
            line["far_control_tokens"] = json!(far.control_tokens);
            if let Some(error) = far.error {
                line["far_loss_error"] = number(error);
            }
        }
        if let Some(unigram) = unigram {
            line["unigram_loss"] = number(unigram);
        }
        if !v.task.is_empty() {
            line["task"] = v.task.iter().map(LengthResult::json).collect();
        }
        if let Some(sample) = sample {
            line["sample"] = json!(sample);
        }
        self.line(&line);
        let Some(events) = &mut self.events else { return };
        let figures = [
            ("loss", v.loss),
            ("perplexity", v.loss.exp()),
            ("bits_per_byte", v.bits_per_byte.unwrap_or(f64::NAN)),
            ("density", v.density),
        ];
        let figures = figures.into_iter().filter(|(_, x)| x.is_finite());
        for (tag, value) in figures {
            let tag = if tag == "loss" { "loss/val".to_string() } else { format!("val/{tag}") };
            events.scalar(&tag, value, step);
        }
        for r in &v.task {
            let figures =
                [("accuracy", r.score.right), ("router_missed", r.score.missed), ("reader_missed", r.score.misread)];
            for (tag, n) in figures {
                events.scalar(&format!("task/length{}/{tag}", r.length), n as f64 / r.score.asked.max(1) as f64, step);
            }
        }
        events.flush();
    }
}

/// What metrics.jsonl holds of an update.
fn train_line(config: &Config, (step, tokens): (u64, u64), pace: &Pace, s: &StepStats) -> Value {
    let mut line = json!({
        "step": step, "split": "train", "loss": number(s.loss), "lr": s.lr, "grad_norm": number(s.grad_norm),
        "tokens": tokens, "tokens_per_s": number(pace.tokens_per_s.round()),
    });
    line["attended_tokens"] = number(attended_tokens(config, s));
    line["flops_per_token"] = number(pace.flops_per_token);
    if let Some(skipped) = s.skipped {
        line["skipped_updates"] = json!(skipped);
    }
    if let Some(mfu) = pace.mfu {
        line["mfu"] = number(mfu);
    }
    if let Some(bytes) = pace.memory {
        line["gpu_memory_bytes"] = json!(bytes);
    }
    if let Some(knobs) = s.knobs {
        for (key, value) in [("alpha", knobs.alpha), ("gamma", knobs.gamma)] {
            if let Some(value) = value {
                line[key] = json!(value);
            }
        }
    }
    let n = s.routers.len() as f64;
    let mean = |f: fn(&LayerStats) -> f64| s.routers.iter().map(f).sum::<f64>() / n;
    if s.routers.is_empty() {
        // dense: everything visible is attended
        line["density"] = json!(1.0);
    } else {
        line["density"] = number(mean(|l| l.router.density));
        line["active_chunks"] = number(mean(|l| l.router.active_chunks));
        line["empty"] = number(mean(|l| l.router.empty));
        line["bias_mean"] = number(mean(|l| l.router.bias_mean));
        line["bias_max"] = number(s.routers.iter().fold(0.0, |m, l| f64::max(m, l.router.bias_max)));
        let layers = s.routers.iter().map(|l| {
            let mut line = json!({
                "layer": l.layer, "density": number(l.router.density), "active_chunks": number(l.router.active_chunks),
                "empty": number(l.router.empty), "bias_mean": number(l.router.bias_mean),
                "bias_max": number(l.router.bias_max), "score_grad_norm": number(l.router.score_gradient),
                "indexer_q_grad_norm": number(l.indexer_gradient), "chunks_histogram": l.router.histogram,
            });
            if let Some(loss) = l.router.indexer_loss {
                line["indexer_kl"] = number(loss);
            }
            line
        });
        line["layers"] = layers.collect();
    }
    line
}

/// The same for TensorBoard; figures that the line has already are taken from it.
fn train_events(events: &mut EventFile, config: &Config, line: &Value, (step, pace): (u64, &Pace), s: &StepStats) {
    let speed = [Some(("tokens_per_s", pace.tokens_per_s)), pace.mfu.map(|mfu| ("mfu", mfu))];
    let figures = [("loss", s.loss), ("lr", s.lr), ("grad_norm", s.grad_norm)].into_iter();
    for (tag, value) in figures.chain(speed.into_iter().flatten()) {
        // the losses of both halves in one group, which comes before the others by its name
        let tag = if tag == "loss" { "loss/train".to_string() } else { format!("train/{tag}") };
        events.scalar(&tag, value, step);
    }
    let plan = &config.router;
    for key in ["density", "active_chunks", "bias_mean", "bias_max", "attended_tokens", "alpha", "gamma"] {
        // a knob that nothing moves is a constant, and needs no card
        let moves = match key {
            "alpha" => plan.alpha.is_some(),
            "gamma" => plan.gamma.is_some() || plan.target_share.is_some(),
            _ => true,
        };
        if let Some(value) = line[key].as_f64().filter(|_| moves) {
            events.scalar(&format!("router/mean/{key}"), value, step);
        }
    }
    for l in &s.routers {
        let r = &l.router;
        let figures = [
            ("density", r.density),
            ("active_chunks", r.active_chunks),
            ("bias_mean", r.bias_mean),
            ("bias_max", r.bias_max),
            ("score_grad_norm", r.score_gradient),
            ("indexer_q_grad_norm", l.indexer_gradient),
        ];
        let indexer = r.indexer_loss.map(|loss| ("indexer_kl", loss));
        for (tag, value) in figures.into_iter().chain(indexer) {
            events.scalar(&format!("router_layers/{:02}/{tag}", l.layer), value, step);
        }
        events.counts(&format!("router_layers/{:02}/chunks", l.layer), &r.histogram, step);
    }
}

#[cfg(test)]
mod tests;
