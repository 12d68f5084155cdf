//! Routing from the summaries to the output against central differences.

use dash_core::ops::attention::{
    Center, Entmax, RouterGradient, Routes, block_attention, chunk_summary, entmax_routing,
};
use dash_core::testing::{GRADIENT_ERROR, grad_errors, normal};
use dash_core::{Device, Ids, Result as CoreResult, Tape, Tensor, Var, ops};

use super::check::{Check, DIFFERENCES, largest};

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

/// The routing path of every input, and the two gradients that are not those of their forward.
pub fn against_differences(device: &Device) -> CoreResult<Vec<Check>> {
    let inputs = [
        normal(device, &[1, 22, 4, 3], 41),
        normal(device, &[1, 22, 2, 3], 42),
        normal(device, &[1, 22, 2, 3], 43),
        normal(device, &[6], 44),
        normal(device, &[2], 45),
    ];
    let mut out = full_gradient(&inputs)?;
    out.extend(other_gradients(&inputs)?);
    Ok(out)
}

fn full_gradient(inputs: &[Tensor]) -> CoreResult<Vec<Check>> {
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
        for (input, error) in names.iter().zip(grad_errors(inputs, f, f)?) {
            let what = format!("dash, routing path, {name}: d{input}");
            out.push(Check { what, against: DIFFERENCES, error, allowed: GRADIENT_ERROR });
        }
    }
    Ok(out)
}

/// The forward of all three gradients is one; what stopped and straight-through differentiate is written out.
fn other_gradients(inputs: &[Tensor]) -> CoreResult<Vec<Check>> {
    let mut out = Vec::new();
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
