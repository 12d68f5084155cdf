//! `audit`: what a sceptic can check on his own machine. Every op and every attention variant against central differences in
//! f64; whole models, every parameter, routing path included; a block against dfdx, an independent tape; the entmax solver on
//! flat, peaked and tied rows. Exit status 1 on any miss.

use dash_core::ops::attention::{
    Center, Entmax, RouterGradient, Routes, Span, block_attention, chunk_summary, dense_attention, entmax_routing,
    span_attention, topk_routing,
};
use dash_core::rng::Rng;
use dash_core::testing::{GRADIENT_ERROR, grad_errors, normal};
use dash_core::{DType, Device, Ids, Result as CoreResult, Tape, Tensor, Var, ops};
use dash_model::{Attention, Model, ModelConfig, kinds};
use serde_json::{Value, json};

use super::peer;
use crate::console::print_line;
use crate::failure::{Failure, Result};

/// One line of the table.
struct Check {
    what: String,
    against: &'static str,
    error: f64,
    allowed: f64,
}

impl Check {
    fn passed(&self) -> bool {
        self.error <= self.allowed
    }
}

type Op<'a> = Box<dyn Fn(&Tape, &[Var]) -> CoreResult<Var> + 'a>;

/// Runs every check, prints the table, and fails on any miss.
///
/// # Errors
/// [`Failure::Run`] naming what missed.
pub fn audit(as_json: bool) -> Result<()> {
    // two threads: results do not depend on it, and a poisoned device would only slow the differences
    let device = Device::cpu(2)?;
    let mut checks = ops_against_differences(&device)?;
    checks.extend(routing_against_differences(&device)?);
    checks.extend(models_against_differences(&device)?);
    checks.extend(block_against_dfdx(&device)?);
    checks.extend(solver(&device)?);
    let missed: Vec<&Check> = checks.iter().filter(|c| !c.passed()).collect();
    if as_json {
        let line = |c: &Check| json!({"what": c.what, "against": c.against, "error": c.error, "allowed": c.allowed, "passed": c.passed()});
        let all: Vec<Value> = checks.iter().map(line).collect();
        print_line!("{}", json!({"passed": missed.is_empty(), "checks": all}))?;
    } else {
        print_line!("{:<52} {:<20} {:>9} {:>9}", "what", "against", "error", "allowed")?;
        for c in &checks {
            let verdict = if c.passed() { "" } else { "  MISSED" };
            print_line!("{:<52} {:<20} {:>9.1e} {:>9.1e}{verdict}", c.what, c.against, c.error, c.allowed)?;
        }
        print_line!("{} checks, {} missed", checks.len(), missed.len())?;
    }
    match missed.first() {
        None => Ok(()),
        Some(first) => Err(Failure::Run(anyhow::anyhow!(
            "{} of {} checks missed; the first is {}: off {} by {:e}, allowed {:e}",
            missed.len(),
            checks.len(),
            first.what,
            first.against,
            first.error,
            first.allowed
        ))),
    }
}

const DIFFERENCES: &str = "central differences";

fn largest(errors: &[f64]) -> f64 {
    errors.iter().copied().fold(0.0, f64::max)
}

/// Every op of the tape. Extents are odd, so that no kernel meets only whole tiles.
fn ops_against_differences(device: &Device) -> CoreResult<Vec<Check>> {
    let mut seed = 0;
    let mut x = |shape: &[usize]| {
        seed += 1;
        normal(device, shape, seed)
    };
    let targets = Ids::new(device, &[5], &[3, 0, dash_core::IGNORE, 6, 3])?;
    let ids = Ids::new(device, &[2, 2], &[2, 0, 2, 5])?;
    let (mask, places) = (Ids::mask(device, &[3], &[true, false, false])?, Ids::places(device, &[3, 0, 3])?);
    let rope = ops::RopeTable::new(device, DType::F64, 7, 6, 1e4)?;
    // chunks wider than the 16 lanes of a vector, so that both the lanes and what is left over are checked
    let list = topk_routing(&x(&[1, 61, 1, 4]), &x(&[1, 3, 1, 4]), 18, 3, 1.0)?;
    let entries = list.to_host()?.len();
    let windows = Span::Windows { length: 4, stride: 2 };
    let mut cases: Vec<(&str, Vec<Tensor>, Op)> = vec![
        ("add", vec![x(&[2, 3]), x(&[3])], Box::new(|t, v| ops::add(t, &v[0], &v[1]))),
        ("sub", vec![x(&[2, 3]), x(&[3])], Box::new(|t, v| ops::sub(t, &v[0], &v[1]))),
        ("mul", vec![x(&[2, 3]), x(&[2, 1])], Box::new(|t, v| ops::mul(t, &v[0], &v[1]))),
        ("scale", vec![x(&[5])], Box::new(|t, v| ops::scale(t, &v[0], -1.7))),
        ("exp", vec![x(&[5])], Box::new(|t, v| ops::exp(t, &v[0]))),
        ("ln", vec![x(&[5])], Box::new(|t, v| ops::ln(t, &ops::exp(t, &v[0])?))),
        ("sigmoid", vec![x(&[5])], Box::new(|t, v| ops::sigmoid(t, &v[0]))),
        ("mask_fill", vec![x(&[2, 3])], Box::new(|t, v| ops::mask_fill(t, &v[0], &mask, 2.0))),
        ("reshape", vec![x(&[2, 3])], Box::new(|t, v| ops::reshape(t, &v[0], &[3, 2]))),
        ("transpose", vec![x(&[2, 3, 4])], Box::new(|t, v| ops::transpose(t, &v[0], &[2, 0, 1]))),
        ("index_select", vec![x(&[2, 4, 3])], Box::new(|t, v| ops::index_select(t, &v[0], 1, &places))),
        ("sum_axis", vec![x(&[2, 3, 4])], Box::new(|t, v| ops::sum_axis(t, &v[0], 1))),
        ("sum_all", vec![x(&[2, 3])], Box::new(|t, v| ops::sum_all(t, &v[0]))),
        ("matmul", vec![x(&[2, 3, 5]), x(&[2, 5, 4])], Box::new(|t, v| ops::matmul(t, &v[0], &v[1]))),
        ("linear", vec![x(&[2, 3, 5]), x(&[7, 5])], Box::new(|t, v| ops::linear(t, &v[0], &v[1]))),
        (
            "linear_add",
            vec![x(&[2, 3, 5]), x(&[7, 5]), x(&[2, 3, 7])],
            Box::new(|t, v| ops::linear_add(t, &v[0], &v[1], &v[2])),
        ),
        ("softmax", vec![x(&[3, 19])], Box::new(|t, v| ops::softmax(t, &v[0]))),
        ("entmax, alpha 1.25", vec![x(&[3, 19])], Box::new(|t, v| ops::entmax(t, &v[0], 1.25))),
        ("entmax, alpha 1.5", vec![x(&[3, 19])], Box::new(|t, v| ops::entmax(t, &v[0], 1.5))),
        ("entmax, alpha 2", vec![x(&[3, 19])], Box::new(|t, v| ops::entmax(t, &v[0], 2.0))),
        ("rmsnorm", vec![x(&[3, 19]), x(&[19])], Box::new(|t, v| ops::rmsnorm(t, &v[0], &v[1], 1e-6))),
        ("rope", vec![x(&[1, 7, 2, 6])], Box::new(|t, v| ops::rope(t, &v[0], &rope, 0))),
        (
            "swiglu",
            vec![x(&[2, 3, 5]), x(&[37, 5]), x(&[37, 5]), x(&[5, 37]), x(&[2, 3, 5])],
            Box::new(|t, v| ops::swiglu(t, &v[0], [&v[1], &v[2], &v[3]], Some(&v[4]))),
        ),
        ("embedding", vec![x(&[6, 3])], Box::new(|t, v| ops::embedding(t, &v[0], &ids))),
        (
            "linear_cross_entropy",
            vec![x(&[5, 4]), x(&[7, 4])],
            Box::new(|t, v| ops::linear_cross_entropy(t, &v[0], &v[1], &targets, 4.0)),
        ),
        ("chunk_summary", vec![x(&[1, 14, 2, 3]), x(&[6])], Box::new(|t, v| chunk_summary(t, &v[0], &v[1], 4))),
        (
            "dense_attention",
            vec![x(&[1, 37, 4, 3]), x(&[1, 37, 2, 3]), x(&[1, 37, 2, 3])],
            Box::new(|t, v| dense_attention(t, &v[0], &v[1], &v[2])),
        ),
        (
            "block_attention, with a bias",
            vec![x(&[1, 61, 2, 3]), x(&[1, 61, 1, 3]), x(&[1, 61, 1, 3]), x(&[entries])],
            Box::new(|t, v| block_attention(t, &v[0], &v[1], &v[2], &list, Some(&v[3]))),
        ),
    ];
    for (name, span, alpha) in [
        ("span_attention, entmax", Span::Causal, 1.5),
        ("span_attention, sliding window", Span::Sliding(5), 1.0),
        ("span_attention, compressed windows", windows, 1.0),
    ] {
        let m = span.keys(37);
        let inputs = vec![x(&[1, 37, 4, 3]), x(&[1, m, 2, 3]), x(&[1, m, 2, 3])];
        cases.push((name, inputs, Box::new(move |t, v| span_attention(t, &v[0], &v[1], &v[2], span, alpha))));
    }
    let check = |(name, inputs, op): (&str, Vec<Tensor>, Op)| {
        let error = largest(&grad_errors(&inputs, &op, &op)?);
        Ok(Check { what: format!("op {name}"), against: DIFFERENCES, error, allowed: GRADIENT_ERROR })
    };
    cases.into_iter().map(check).collect()
}

const SETTINGS: Entmax =
    Entmax { chunk_size: 4, alpha: 1.5, gamma: 1.5, sigma: 1.0, center: Center::None, gradient: RouterGradient::Full };

/// DashAttention from summaries to output: inputs q, k, v, indexer query and diagonal.
fn dash(t: &Tape, v: &[Var], settings: Entmax) -> CoreResult<Var> {
    let kbar = chunk_summary(t, &v[1], &v[3], settings.chunk_size)?;
    let routing = entmax_routing(t, &v[0], &kbar, v.get(4), settings)?;
    block_attention(t, &v[0], &v[1], &v[2], &routing.routes, Some(&routing.bias))
}

/// log of the group mean of softmax over the earlier chunks, at the listed entries, from primitives: what straight-through
/// differentiates. 0 for the own chunk.
fn soft_log(t: &Tape, q: &Var, kbar: &Var, routes: &Routes, gamma: f64) -> CoreResult<Var> {
    let ([b, tokens, h, d], [_, n, g, _]) = (q.value.dims("audit")?, kbar.value.dims("audit")?);
    let (group, device, list) = (h / g, q.value.device(), routes.to_host()?);
    let head_of = Ids::places(device, &(0..h).map(|i| i / group).collect::<Vec<_>>())?;
    let q = ops::transpose(t, q, &[0, 2, 1, 3])?;
    let keys = ops::transpose(t, &ops::index_select(t, kbar, 2, &head_of)?, &[0, 2, 3, 1])?;
    let scores = ops::scale(t, &ops::matmul(t, &q, &keys)?, gamma / (d as f64).sqrt())?;
    let s = list.chunk_size();
    let later: Vec<bool> = (0..tokens * n).map(|i| i % n >= i / n / s).collect();
    let later = Ids::mask(device, &[tokens, n], &later)?;
    let p = ops::softmax(t, &ops::mask_fill(t, &scores, &later, f64::NEG_INFINITY)?)?;
    let p = ops::sum_axis(t, &ops::reshape(t, &p, &[b, g, group, tokens, n])?, 2)?;
    let p = ops::scale(t, &ops::reshape(t, &p, &[b * g * tokens * n])?, 1.0 / group as f64)?;
    let (mut places, mut own) = (Vec::new(), Vec::new());
    for row in 0..b * g * tokens {
        for &c in list.chunks_of(row / tokens / g, row / tokens % g, row % tokens) {
            let is_own = c as usize == row % tokens / s;
            places.push(row * n + if is_own { 0 } else { c as usize });
            own.push(is_own);
        }
    }
    let (places, own) = (Ids::places(device, &places)?, Ids::mask(device, &[own.len()], &own)?);
    let p = ops::mask_fill(t, &ops::index_select(t, &p, 0, &places)?, &own, 1.0)?;
    ops::ln(t, &p)
}

fn routing_against_differences(device: &Device) -> CoreResult<Vec<Check>> {
    let inputs = [
        normal(device, &[1, 22, 4, 3], 41),
        normal(device, &[1, 22, 2, 3], 42),
        normal(device, &[1, 22, 2, 3], 43),
        normal(device, &[6], 44),
        normal(device, &[2], 45),
    ];
    let mut out = Vec::new();
    let cases = [
        ("sigma 1", SETTINGS),
        ("sigma 2, centred", Entmax { sigma: 2.0, center: Center::Mean, ..SETTINGS }),
        ("alpha 1.25", Entmax { alpha: 1.25, gamma: 3.0, ..SETTINGS }),
        ("alpha 2", Entmax { alpha: 2.0, gamma: 0.5, ..SETTINGS }),
        ("sigma 0.5", Entmax { sigma: 0.5, ..SETTINGS }),
    ];
    let names = ["q", "k", "v", "indexer_q", "diagonal"];
    for (name, settings) in cases {
        let f = |t: &Tape, v: &[Var]| dash(t, v, settings);
        for (input, error) in names.iter().zip(grad_errors(&inputs, f, f)?) {
            let what = format!("dash, routing path, {name}: d{input}");
            out.push(Check { what, against: DIFFERENCES, error, allowed: GRADIENT_ERROR });
        }
    }
    // the forward of all three gradients is one; what stopped and straight-through differentiate is written out
    let fixed = {
        let t = Tape::inference();
        let v: Vec<Var> = inputs.iter().map(|x| t.leaf(x.clone())).collect();
        let kbar = chunk_summary(&t, &v[1], &v[3], 4)?;
        let routing = entmax_routing(&t, &v[0], &kbar, None, SETTINGS)?;
        let soft = soft_log(&t, &v[0], &kbar, &routing.routes, SETTINGS.gamma)?;
        (routing.routes, routing.bias.value, soft.value)
    };
    let (list, bias, soft) = (&fixed.0, &fixed.1, &fixed.2);
    let stopped = |t: &Tape, v: &[Var]| block_attention(t, &v[0], &v[1], &v[2], list, Some(&t.leaf(bias.clone())));
    let error = grad_errors(
        &inputs[..3],
        |t, v| {
            let qbar = t.leaf(inputs[3].clone());
            let v = [v[0].clone(), v[1].clone(), v[2].clone(), qbar];
            dash(t, &v, Entmax { gradient: RouterGradient::Stopped, ..SETTINGS })
        },
        stopped,
    )?;
    let what = "dash-stopped: dq, dk, dv of a constant bias".into();
    out.push(Check { what, against: DIFFERENCES, error: largest(&error), allowed: GRADIENT_ERROR });
    let straight = |t: &Tape, v: &[Var]| {
        let kbar = chunk_summary(t, &v[1], &v[3], 4)?;
        let moved = ops::sub(t, &soft_log(t, &v[0], &kbar, list, SETTINGS.gamma)?, &t.leaf(soft.clone()))?;
        let bias = ops::add(t, &t.leaf(bias.clone()), &moved)?;
        block_attention(t, &v[0], &v[1], &v[2], list, Some(&bias))
    };
    let error = grad_errors(
        &inputs[..4],
        |t, v| dash(t, v, Entmax { gradient: RouterGradient::StraightThrough, ..SETTINGS }),
        straight,
    )?;
    let what = "dash-ste: dq, dk, dv, dindexer_q of the softmax".into();
    out.push(Check { what, against: DIFFERENCES, error: largest(&error), allowed: GRADIENT_ERROR });
    Ok(out)
}

/// Parameters of a tensor whose derivative is taken by differences.
const SAMPLED: usize = 6;

/// Whole models of every kind that has the gradient of its function: every parameter tensor, some elements of each.
fn models_against_differences(device: &Device) -> Result<Vec<Check>> {
    let mut out = Vec::new();
    let small = |kind| (kind, Attention::small(kind).expect("a kind"));
    for (kind, attention) in kinds().into_iter().map(small).filter(|(_, a)| a.gradient_is_exact()) {
        let text = "layers=2\nwidth=12\nheads=4\nkv_heads=2\nhead_dim=4\nffn=10\ninit_std=0.4\n";
        let config: ModelConfig = toml::from_str(text).expect("a model");
        let config = ModelConfig { attention, ..config };
        let mut model = Model::new(config, 13, 23, 5, device, DType::F64)?;
        let mut rng = Rng::new(6);
        // no parameter at its initial zero, which could hide a factor
        for p in model.params_mut().iter_mut().filter(|p| p.value.shape().len() == 1) {
            let moved = p.value.to_f64()?.iter().map(|x| x + 0.3 * rng.normal()).collect();
            p.value = Tensor::from_vec(device, p.value.shape(), moved)?;
        }
        let mut draw = || (0..46).map(|_| rng.below(13) as u32).collect::<Vec<u32>>();
        let (ids, targets) = (model.ids(&draw(), 2)?, model.ids(&draw(), 2)?);
        let loss = |model: &Model, tape: &Tape| -> CoreResult<(Var, Vec<Var>)> {
            let leaves = model.leaves(tape);
            Ok((model.loss(tape, &leaves, (&ids, &targets), 46.0)?.0, leaves))
        };
        let tape = Tape::new();
        let (value, leaves) = loss(&model, &tape)?;
        let grads = tape.backward(&value)?;
        let mut worst = (0.0f64, String::new());
        for (i, leaf) in leaves.iter().enumerate() {
            let Some(g) = grads.get(leaf).map(Tensor::to_f64).transpose()? else {
                return Err(Failure::Run(anyhow::anyhow!(
                    "{kind}: {} has no gradient",
                    model.params().iter().nth(i).map_or("", |p| &p.name)
                )));
            };
            let base = leaf.value.to_f64()?;
            let scale = g.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
            for _ in 0..SAMPLED {
                let at = rng.below(base.len());
                let mut shifted = |by: f64| -> CoreResult<f64> {
                    let mut data = base.clone();
                    data[at] += by;
                    let param = model.params_mut().iter_mut().nth(i).expect("there are as many as leaves");
                    param.value = Tensor::from_vec(device, leaf.value.shape(), data)?;
                    loss(&model, &Tape::inference())?.0.value.item()
                };
                let slope = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
                shifted(0.0)?;
                let error = (slope - g[at]).abs() / scale;
                if error >= worst.0 {
                    worst = (error, model.params().iter().nth(i).map_or(String::new(), |p| p.name.clone()));
                }
            }
        }
        // deeper than an op: the third derivative of two layers is larger, the truncation error 1e-10 x 100
        let what = format!("model {kind}, worst {}", worst.1.trim_start_matches("model."));
        out.push(Check { what, against: DIFFERENCES, error: worst.0, allowed: 10.0 * GRADIENT_ERROR });
    }
    Ok(out)
}

fn block_against_dfdx(device: &Device) -> CoreResult<Vec<Check>> {
    let mut out = Vec::new();
    for (name, kind) in [("dense", peer::Kind::Dense), ("dash", peer::Kind::Dash)] {
        for o in peer::opinions(device, kind)? {
            let what = format!("Llama block, {name}: d{}", o.name);
            out.push(Check { what, against: "dfdx 0.13 (f32)", error: o.dfdx, allowed: peer::ALLOWED });
            let what = format!("Llama block, {name}: d{} in f32", o.name);
            out.push(Check { what, against: "ours in f64", error: o.own, allowed: peer::ALLOWED });
        }
    }
    Ok(out)
}

/// The threshold of sorted 1.5-entmax or sparsemax, in f64: the exact solution in closed form, of x = (alpha-1)(z - max z).
fn sorted_threshold(x: &[f64], alpha: f64) -> f64 {
    let mut x = x.to_vec();
    x.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut squares, mut threshold) = (0.0, 0.0, f64::NAN);
    for (i, v) in x.iter().enumerate() {
        sum += v;
        squares += v * v;
        let r = i as f64 + 1.0;
        let tau = if alpha == 2.0 {
            (sum - 1.0) / r
        } else {
            let mean = sum / r;
            mean - ((1.0 - (squares - r * mean * mean)) / r).max(0.0).sqrt()
        };
        if tau <= *v {
            threshold = tau;
        }
    }
    threshold
}

/// x at the threshold to within this is on the edge: its p is 0 or the square of a rounding, and either side is right.
const EDGE: f64 = 1e-6;

/// Largest |sum p - 1| over rows, and the number of elements on the wrong side of the sorted solution's threshold.
fn solve(device: &Device, dtype: DType, rows: &[Vec<f64>], alpha: f64) -> CoreResult<(f64, usize)> {
    let (mut worst, mut wrong) = (0.0f64, 0);
    for row in rows {
        // the solver sees rounded scores; so does the sorted solution
        let tape = Tape::inference();
        let z = tape.leaf(Tensor::from_vec(device, &[row.len()], row.clone())?.to_dtype(dtype)?);
        let (p, z) = (ops::entmax(&tape, &z, alpha)?.value.to_f64()?, z.value.to_f64()?);
        let top = z.iter().copied().fold(f64::MIN, f64::max);
        let x: Vec<f64> = z.iter().map(|z| (alpha - 1.0) * (z - top)).collect();
        worst = worst.max((p.iter().sum::<f64>() - 1.0).abs());
        if alpha != 1.25 {
            let tau = sorted_threshold(&x, alpha);
            let sides = x.iter().zip(&p).filter(|(x, _)| (*x - tau).abs() > EDGE);
            wrong += sides.filter(|(x, p)| (**p > 0.0) != (**x > tau)).count();
        }
    }
    Ok((worst, wrong))
}

fn solver(device: &Device) -> CoreResult<Vec<Check>> {
    let mut rng = Rng::new(9);
    let mut rows = |n: usize, f: &dyn Fn(f64) -> f64| -> Vec<Vec<f64>> {
        (0..64).map(|_| (0..n).map(|_| f(rng.normal())).collect()).collect()
    };
    let kinds = [
        ("flat (1024, deviation 0.1)", rows(1024, &|x| 0.1 * x)),
        ("normal (257)", rows(257, &|x| 2.0 * x)),
        ("peaked (64, deviation 30)", rows(64, &|x| 30.0 * x)),
        ("tied (100, rounded)", rows(100, &|x| x.round())),
        ("constant (11)", rows(11, &|_| 0.25)),
        ("large (50, shifted by 1000)", rows(50, &|x| x + 1e3)),
    ];
    let mut out = Vec::new();
    for (name, rows) in &kinds {
        for alpha in [1.25, 1.5, 2.0] {
            let (single, wrong) = solve(device, DType::F32, rows, alpha)?;
            let (double, _) = solve(device, DType::F64, rows, alpha)?;
            let check = |what: String, against, error, allowed| Check { what, against, error, allowed };
            out.push(check(format!("entmax {alpha}, {name}: |sum p - 1|, f32"), "1", single, 1e-5));
            out.push(check(format!("entmax {alpha}, {name}: |sum p - 1|, f64"), "1", double, 1e-12));
            if alpha != 1.25 {
                out.push(check(
                    format!("entmax {alpha}, {name}: wrong side of the edge, f32"),
                    "sorted solution",
                    wrong as f64,
                    0.0,
                ));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_passes() {
        let checks = |c: CoreResult<Vec<Check>>| c.unwrap();
        let device = Device::cpu(2).unwrap();
        let all =
            checks(ops_against_differences(&device)).into_iter().chain(checks(routing_against_differences(&device)));
        for c in all.chain(models_against_differences(&device).unwrap()).chain(solver(&device).unwrap()) {
            assert!(c.passed(), "{}: {:e} of {:e}", c.what, c.error, c.allowed);
        }
    }
}
