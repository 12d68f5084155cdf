//! The hard choice of `topk` with a bias that is trained: b_c = log w_c, where w is the group mean of softmax over the chosen chunks of
//! the scores they were chosen by. What is left of DashAttention when the support is of a fixed size.

use dash_core::ops::attention::{RouterGradient, softmax_bias, topk_routing_after};
use dash_core::{Result, Tape};

use super::keys::{Range, Value, settings};
use super::{
    Attended, Chunks, Cost, GradientTo, Inputs, Knob, Preset, ROUTER_K, ROUTER_Q, Spec, Variant,
};
use crate::config::ModelConfig;
use crate::error::ConfigError;
use crate::params::ParamSpec;
use crate::trace::RouterTrace;

settings! {
    /// Settings of the hard choice with a bias.
    pub struct TopKBias {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the own one included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// Factor on the scores: larger biases, and another group mean of several heads.
        gamma: f64 = 1.0, Knob::Gamma.range();
        /// What the gradient of the bias does: all of it, or nothing; the others are of dash.
        router_gradient: RouterGradient = RouterGradient::Full, Range::ANY;
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "topk-bias",
    about: "The best chunks as topk has them, with the logarithm of softmax over the chosen ones as a trained bias.",
    presets: &[Preset {
        name: "topk-bias-stopped",
        about: "The same forward pass, no gradient through the bias.",
        values: &[("router_gradient", Value::Name("stopped"))],
    }],
    keys: TopKBias::KEYS,
    build: |given| TopKBias::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3)), ("gamma", Value::Number(2.0))],
    golden: &["q", "k", "v", "summary_query"],
};

impl Variant for TopKBias {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn check(&self) -> std::result::Result<(), ConfigError> {
        match self.router_gradient {
            RouterGradient::Full | RouterGradient::Stopped => Ok(()),
            RouterGradient::StraightThrough | RouterGradient::Flipped | RouterGradient::Placebo => Err(ConfigError::new(
                "model.attention.router_gradient",
                "of kind \"topk-bias\" is \"full\" or \"stopped\"; the others are of kind \"dash\"".to_string(),
            )),
        }
    }

    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        vec![ParamSpec::indexer(config)]
    }

    /// Kept: list, weights, bias and head weights, at a density of one half.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let (h, g) = (config.heads as f64, config.kv_heads as f64);
        let chunks = t as f64 / self.chunk_size as f64;
        let candidates = (t as f64 + 1.0) / 2.0 / self.chunk_size as f64;
        Cost { candidates, kept: 0.25 * chunks * (5.0 * g + h), ..Cost::default() }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    fn takes_budget(&self) -> bool {
        true
    }

    fn gradient_is_exact(&self) -> bool {
        self.router_gradient == RouterGradient::Full
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let qbar = x.own.first().ok_or_else(|| dash_core::Error::invalid("topk-bias", "it has no indexer"))?;
        let (q, k) = (tape.watch(ROUTER_Q, x.q)?, tape.watch(ROUTER_K, x.k)?);
        let stopped = self.router_gradient == RouterGradient::Stopped;
        let constants = Tape::inference();
        let of = if stopped { &constants } else { tape };
        let constant = |x: &dash_core::Var| constants.leaf(x.value.clone());
        let [q, k, qbar] = if stopped { [&q, &k, qbar].map(constant) } else { [q, k, qbar.clone()] };
        let (q, kbar) = GradientTo::All.operands(of, x, [&q, &k, &qbar], self.chunk_size)?;
        let top = x.tops(self.top)?;
        let routes = topk_routing_after(x.past(), &q.value, &kbar.value, self.chunk_size, top.top(), self.gamma)?;
        let mut routing = softmax_bias(of, &q, &kbar, routes, self.gamma)?;
        if stopped {
            routing.bias = tape.leaf(routing.bias.value);
        }
        let (out, routes) = x.attend_to(tape, routing.routes.clone(), Some(routing.bias.clone()))?;
        let trace = if x.reroute.is_some() { RouterTrace::hard(routes) } else { RouterTrace::soft(routing) };
        Ok((out, Some(trace)))
    }
}
