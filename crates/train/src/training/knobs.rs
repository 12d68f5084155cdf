//! The attention's knobs, alpha and gamma, while a run goes on: schedules, and a controller that holds the attended tokens at a target.

use dash_core::Tensor;
use dash_core::ops::attention::Routes;
use dash_data::Batch;
use dash_model::attention::Knob;
use dash_model::{Attention, Model, RouterStats, RouterTrace};
use serde::{Deserialize, Serialize};

use super::accumulate::total;
use crate::config::RouterPlan;

/// Gain of the controller: gamma is multiplied by (measured / target)^GAIN each update. At 0.05 an error of a factor two
/// changes gamma by 3.5 % an update; the density answers to gamma at once, so the loop has one slow pole and cannot ring.
const GAIN: f64 = 0.05;
/// Where gamma stays, so that a router that cannot reach its target does not drift without end.
pub const GAMMA: (f64, f64) = (1e-3, 1e5);

/// alpha and gamma that are in force, each where the attention has it as a knob; part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Knobs {
    /// See `model.attention.alpha`.
    pub alpha: Option<f64>,
    /// See `model.attention.gamma`.
    pub gamma: Option<f64>,
}

impl Knobs {
    /// Those of a model, where its attention has any.
    pub fn of(attention: &Attention) -> Option<Self> {
        let knobs = Knobs { alpha: attention.knob(Knob::Alpha), gamma: attention.knob(Knob::Gamma) };
        (knobs.alpha.is_some() || knobs.gamma.is_some()).then_some(knobs)
    }
}

/// Mean attended tokens of every choice of the layers that route, on the device; `None` where no layer routes.
#[derive(Debug)]
pub struct AttendedTokens(Option<(Tensor, Vec<Seen>)>);

/// A choice: one a layer, or one for each length of the documents of a pass.
#[derive(Debug)]
struct Seen {
    layer: usize,
    /// of the layer's queries
    share: f64,
    /// tokens that a query sees on average, (t + 1) / 2
    visible: f64,
}

impl AttendedTokens {
    /// Asks the device for them.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn of(traces: &[Option<RouterTrace>]) -> dash_core::Result<Self> {
        let (mut all, mut seen): (Vec<&Routes>, Vec<Seen>) = (Vec::new(), Vec::new());
        for (layer, trace) in traces.iter().flatten().enumerate() {
            let queries = |routes: &Routes| (routes.extents().0 * routes.extents().2) as f64;
            let of_layer: f64 = trace.all_routes().map(queries).sum();
            for routes in trace.all_routes() {
                let (share, visible) = (queries(routes) / of_layer.max(1.0), (routes.extents().2 as f64 + 1.0) / 2.0);
                seen.push(Seen { layer, share, visible });
                all.push(routes);
            }
        }
        Ok(AttendedTokens(Routes::mean_tokens(&all)?.map(|tokens| (tokens, seen))))
    }

    /// Attended over visible tokens, mean over the layers; `None` where no layer routes. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn share(&self) -> dash_core::Result<Option<f64>> {
        let Some((tokens, seen)) = &self.0 else { return Ok(None) };
        let mut layers: Vec<(f64, f64)> = Vec::new();
        for (tokens, seen) in tokens.to_f64()?.iter().zip(seen) {
            layers.resize(seen.layer + 1, (0.0, 0.0));
            let (attended, visible) = &mut layers[seen.layer];
            *attended += tokens * seen.share;
            *visible += seen.visible * seen.share;
        }
        let shares = layers.iter().map(|(attended, visible)| attended / visible).sum::<f64>();
        Ok(Some(shares / layers.len() as f64))
    }
}

/// [`AttendedTokens::share`] of a forward pass.
///
/// # Errors
/// When the device fails.
pub fn attended_share(traces: &[Option<RouterTrace>]) -> dash_core::Result<Option<f64>> {
    AttendedTokens::of(traces)?.share()
}

/// Figures of a layer over several micro-batches, each weighted by its rows; the gradient is that of all of them together.
/// `None` of none.
pub fn merged(all: &[&RouterStats]) -> Option<RouterStats> {
    let [first, ..] = all else { return None };
    if all.len() == 1 {
        return Some((*first).clone());
    }
    let sum = |f: &dyn Fn(&RouterStats) -> f64| total(&all.iter().map(|s| f(s)).collect::<Vec<f64>>());
    let rows = sum(&|s| s.rows as f64).max(1.0);
    let mean = |f: &dyn Fn(&RouterStats) -> f64| sum(&|s| f(s) * s.rows as f64) / rows;
    let routed = |s: &RouterStats| (s.active_chunks - 1.0) * s.rows as f64;
    let mut histogram = vec![0; all.iter().map(|s| s.histogram.len()).max().unwrap_or(0)];
    all.iter().for_each(|s| s.histogram.iter().enumerate().for_each(|(n, count)| histogram[n] += count));
    Some(RouterStats {
        density: mean(&|s| s.density),
        active_chunks: mean(&|s| s.active_chunks),
        tokens: sum(&|s| s.tokens) / all.len() as f64,
        histogram,
        empty: mean(&|s| s.empty),
        bias_mean: sum(&|s| s.bias_mean * routed(s)) / sum(&routed).max(1.0),
        bias_max: all.iter().fold(0.0, |m, s| f64::max(m, s.bias_max)),
        score_gradient: sum(&|s| s.score_gradient * s.score_gradient).sqrt(),
        indexer_loss: first.indexer_loss.map(|_| mean(&|s| s.indexer_loss.unwrap_or(0.0))),
        rows: all.iter().map(|s| s.rows).sum(),
    })
}

/// Before update `step`: what the schedules and the replayed gamma of another run say, on top of what is in force.
pub fn apply(plan: &RouterPlan, replayed: Option<f64>, model: &mut Model, step: u64) {
    model.set_knobs(plan.alpha.map(|r| r.at(step)), plan.gamma.map(|r| r.at(step)).or(replayed));
}

/// After an update that attended `share` of what is visible: moves gamma towards the target.
pub fn control(plan: &RouterPlan, model: &mut Model, share: Option<f64>) {
    let (Some(target), Some(share)) = (plan.target_share, share) else { return };
    let Some(gamma) = model.config().attention.knob(Knob::Gamma) else { return };
    let gamma = gamma * (GAIN * (share / target).ln()).exp();
    model.set_knobs(None, Some(gamma.clamp(GAMMA.0, GAMMA.1)));
}

/// Tokens that the starting gamma is found on, at least, where there are as many: a fresh model routes all text alike, to 1 %
/// (docs/log/runs.md).
const START_TOKENS: usize = 1024;
/// Halvings of the range of gamma (18 in its logarithm): to 0.1 %.
const HALVINGS: usize = 14;

/// Gamma, by bisection on its logarithm, at which `share` of it is `target`. `share` falls with gamma.
///
/// # Errors
/// Those of `share`.
pub fn gamma_for<E>(target: f64, halvings: usize, mut share: impl FnMut(f64) -> Result<f64, E>) -> Result<f64, E> {
    let (mut low, mut high) = (GAMMA.0.ln(), GAMMA.1.ln());
    for _ in 0..halvings {
        let middle = 0.5 * (low + high);
        if share(middle.exp())? > target {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok((0.5 * (low + high)).exp())
}

/// Gamma at which a fresh model attends the target share of the first sequences of a batch: where the controller
/// starts, so that the first updates are not spent on finding it.
///
/// # Errors
/// When the model refuses the batch.
pub fn initial_gamma(model: &mut Model, plan: &RouterPlan, batch: &Batch) -> dash_core::Result<()> {
    let Some(target) = plan.target_share else { return Ok(()) };
    let alpha = plan.alpha.map(|r| r.from);
    let length = batch.inputs.len() / batch.batch;
    let batch = batch.first(START_TOKENS.div_ceil(length));
    let ids = model.ids(&batch.inputs, batch.batch)?.of_documents(&batch.documents)?;
    let gamma = gamma_for(target, HALVINGS, |gamma| {
        model.set_knobs(alpha, Some(gamma));
        let tape = dash_core::Tape::inference();
        let leaves = model.leaves(&tape);
        Ok::<_, dash_core::Error>(attended_share(&model.forward(&tape, &leaves, &ids)?.routers)?.unwrap_or(1.0))
    })?;
    model.set_knobs(alpha, Some(gamma));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::handmade::{Pull, reader};
    use super::*;
    use dash_model::{Dash, Dense, ModelConfig};

    use crate::config::Ramp;

    /// Five tokens in chunks of two, two kv heads: both attend 1 + 2 + 1 + 2 + 1 tokens of their own chunks, one of them chunk 0
    /// besides from queries 2, 3 and 4: 20 tokens for 10 queries. A query sees (5 + 1) / 2 = 3.
    #[test]
    fn the_attended_share_is_tokens_over_visible_tokens_of_the_layers_that_route() {
        let device = dash_core::Device::cpu(1).unwrap();
        let layer = |chosen: bool| {
            let routes = Routes::from_choice(&device, (1, 2, 5), 2, |_, kv, query, chunks| {
                if chosen && kv == 0 && query >= 2 {
                    chunks.push(0);
                }
            });
            Some(RouterTrace::hard(routes.unwrap()))
        };
        assert_eq!(attended_share(&[layer(true)]).unwrap(), Some(2.0 / 3.0));
        // 14 tokens for 10 queries in the other layer; a dense one is none
        let both = attended_share(&[layer(true), None, layer(false)]).unwrap().unwrap();
        assert!((both - (2.0 + 1.4) / 2.0 / 3.0).abs() < 1e-15, "{both}");
        assert_eq!(attended_share(&[None]).unwrap(), None);
    }

    #[test]
    fn the_controller_moves_gamma_by_the_ratio_to_the_power_of_its_gain() {
        let dash = Dash { chunk_size: 2, gamma: 4.0, ..Dash::default() };
        let mut model = reader(dash.into(), 1, 8, &Pull { q: &[], k: &[] });
        let plan = RouterPlan { target_share: Some(0.25), ..Default::default() };
        let gamma = |model: &Model| model.config().attention.knob(Knob::Gamma).unwrap();
        // twice as much as wanted: sharper by 2 ^ 0.05
        control(&plan, &mut model, Some(0.5));
        assert!((gamma(&model) - 4.0 * 2f64.powf(0.05)).abs() < 1e-12, "{}", gamma(&model));
        control(&plan, &mut model, Some(0.125));
        assert!((gamma(&model) - 4.0).abs() < 1e-12);
        control(&plan, &mut model, None);
        control(&RouterPlan::default(), &mut model, Some(0.5));
        assert!((gamma(&model) - 4.0).abs() < 1e-12);
        // a router that cannot be sharper stays within bounds
        (0..10_000).for_each(|_| control(&plan, &mut model, Some(1.0)));
        assert_eq!(gamma(&model), GAMMA.1);
    }

    #[test]
    fn schedules_move_the_knobs_before_an_update() {
        let dash = Dash { chunk_size: 2, gamma: 4.0, ..Dash::default() };
        let mut model = reader(dash.into(), 1, 8, &Pull { q: &[], k: &[] });
        let ramp = |from, to| Some(Ramp { from, to, steps: 4 });
        let plan = RouterPlan { alpha: ramp(1.25, 1.5), gamma: ramp(1.0, 2.0), ..Default::default() };
        apply(&plan, None, &mut model, 3);
        assert_eq!(Knobs::of(&model.config().attention), Some(Knobs { alpha: Some(1.375), gamma: Some(1.5) }));
        assert_eq!(Knobs::of(&Dense {}.into()), None);
        apply(&RouterPlan::default(), Some(3.5), &mut model, 4);
        assert_eq!(Knobs::of(&model.config().attention), Some(Knobs { alpha: Some(1.375), gamma: Some(3.5) }));
    }

    #[test]
    fn a_fresh_model_starts_at_the_gamma_that_attends_the_target() {
        let dash = Dash { chunk_size: 4, ..Dash::default() };
        let config = ModelConfig { attention: dash.into(), init_std: 0.5, ..ModelConfig::new(2, 16, (2, 1), 16) };
        let device = dash_core::Device::cpu(1).unwrap();
        let mut model = Model::new(config, 50, 64, 3, &device, dash_core::DType::F64).unwrap();
        let plan = RouterPlan { target_share: Some(0.5), ..Default::default() };
        // 40 sequences of 64 tokens, of which the first 16, 1024 tokens, are looked at
        let mut rng = dash_core::rng::Rng::new(1);
        let ids: std::sync::Arc<[u32]> = (0..40 * 64).map(|_| rng.below(50) as u32).collect();
        let (inputs, targets, state) = (ids.clone(), ids.to_vec(), Default::default());
        let batch = Batch { inputs, targets, batch: 40, state, questions: Vec::new(), documents: Vec::new() };
        initial_gamma(&mut model, &plan, &batch).unwrap();
        let share = |model: &Model, sequences: std::ops::Range<usize>| {
            let ids = model.ids(&ids[sequences.start * 64..sequences.end * 64], sequences.len()).unwrap();
            let tape = dash_core::Tape::inference();
            attended_share(&model.forward(&tape, &model.leaves(&tape), &ids).unwrap().routers).unwrap().unwrap()
        };
        // gamma is found to 0.1 %, of which the share moves by less
        assert!((share(&model, 0..16) - 0.5).abs() < 1e-3, "{}", share(&model, 0..16));
        assert!((share(&model, 16..40) - 0.5).abs() > 1e-4, "other sequences attend another share");
    }

    #[test]
    fn the_starting_gamma_is_found_by_bisection() {
        // share = 1 / gamma: 0.25 at 4
        let found = gamma_for(0.25, 40, |gamma| Ok::<_, ()>(1.0 / gamma)).unwrap();
        assert!((found - 4.0).abs() < 1e-6, "{found}");
        // 14 halvings of the logarithm of 1e-3 to 1e5, which is 18.4: to 0.1 %
        let found = gamma_for(0.25, HALVINGS, |gamma| Ok::<_, ()>(1.0 / gamma)).unwrap();
        assert!((found / 4.0 - 1.0).abs() < 1.2e-3, "{found}");
    }

    #[test]
    fn figures_of_micro_batches_weigh_by_rows() {
        let stats = |density: f64, rows: u64, score_gradient: f64| RouterStats {
            density,
            active_chunks: 1.0 + density,
            tokens: 10.0 * density,
            histogram: vec![0, rows],
            empty: density,
            bias_mean: density,
            bias_max: density,
            score_gradient,
            indexer_loss: Some(density),
            rows,
        };
        let (a, b) = (stats(0.5, 10, 3.0), stats(1.0, 30, 4.0));
        assert_eq!(merged(&[&a]), Some(a.clone()));
        assert_eq!(merged(&[]), None);
        let m = merged(&[&a, &b]).unwrap();
        // (0.5 * 10 + 1.0 * 30) / 40
        assert_eq!((m.density, m.active_chunks, m.empty), (0.875, 1.875, 0.875));
        assert_eq!(m.indexer_loss, Some(0.875));
        // of all queries, of which every micro-batch has as many: (5 + 10) / 2
        assert_eq!(m.tokens, 7.5);
        // by routed chunks: (0.5 * 5 + 1.0 * 30) / 35
        assert_eq!((m.bias_mean, m.bias_max), (32.5 / 35.0, 1.0));
        assert_eq!((m.score_gradient, m.rows, m.histogram), (5.0, 40, vec![0, 40]));
    }
}
