//! DashAttention (arXiv 2605.18753): learned chunk summaries, entmax routing, and attention to the routed chunks with the
//! log-probability of each as a bias, differentiable end to end.

use dash_core::ops::attention::{Center, Entmax, RouterGradient, entmax_routing_after};
use dash_core::{Error, Result, Tape, Tensor, Var};

use super::keys::{Range, Value, settings};
use super::{Attended, Attention, Chunks, Cost, Export, GradientTo, Inputs, Knob, Loader, Preset, Spec, Variant};
use crate::config::ModelConfig;
use crate::error::ConfigError;
use crate::params::{Group, Init, ParamSpec};
use crate::trace::RouterTrace;

/// The places where the router takes its queries and keys: what comes back there came through the choice.
pub const ROUTER_Q: &str = "router.q";
/// See [`ROUTER_Q`].
pub const ROUTER_K: &str = "router.k";

/// The own chunk's bias of each kv head.
const DIAGONAL: &str = "self_attn.diagonal";

settings! {
    /// Settings of DashAttention.
    pub struct Dash {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Exponent of the entmax; larger is sparser.
        alpha: f64 = 1.5, Knob::Alpha.range();
        /// Factor on the routing scores; larger is sparser.
        gamma: f64 = 1.0, Knob::Gamma.range();
        /// Divides the bias.
        sigma: f64 = 1.0, Range::positive("it divides the bias");
        /// What is subtracted from log w: nothing, its mean over the support, or that mean without a gradient.
        center: Center = Center::None, Range::ANY;
        /// What the gradient of the bias does: all of it, nothing, that of softmax in the place of entmax, all of it with the other sign, or a random vector of its norm for every query and head.
        router_gradient: RouterGradient = RouterGradient::Full, Range::ANY;
        /// What gets that gradient: all of it, the queries, the chunk summaries (keys and learned query), their learned query alone, or all but that query, which then stays zero.
        gradient_to: GradientTo = GradientTo::All, Range::ANY;
        /// The bias is in the forward pass. Without it the scores there have no bias, as with an infinite sigma, and its gradient is that of the sigma given.
        forward_bias: bool = true, Range::ANY;
        /// A learned bias of the own chunk, one a kv head.
        diagonal: bool = false, Range::ANY;
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "dash",
    about: "DashAttention: entmax routing over learned chunk summaries, with a gradient through the choice (arXiv 2605.18753).",
    presets: &[
        Preset {
            name: "dash-released",
            about: "As the released checkpoints: almost no bias, and it is centred.",
            values: &[("sigma", Value::Number(1e6)), ("center", Value::Name("mean"))],
        },
        Preset {
            name: "dash-stopped",
            about: "The same forward pass, no gradient through the choice.",
            values: &[("router_gradient", Value::Name("stopped"))],
        },
        Preset {
            name: "dash-ste",
            about: "The same forward pass, the gradient of softmax through the choice.",
            values: &[("router_gradient", Value::Name("straight-through"))],
        },
        Preset {
            name: "dash-gradient-only",
            about: "No bias in the forward pass, its gradient as if there were.",
            values: &[("forward_bias", Value::Flag(false))],
        },
        Preset {
            name: "dash-placebo",
            about: "The same forward pass, a random gradient of the same norm through the choice.",
            values: &[("router_gradient", Value::Name("placebo"))],
        },
        Preset {
            name: "dash-flipped",
            about: "The same forward pass, the gradient through the choice with the other sign.",
            values: &[("router_gradient", Value::Name("flipped"))],
        },
        Preset {
            name: "dash-q-only",
            about: "The same forward pass, the gradient through the choice to the queries alone.",
            values: &[("gradient_to", Value::Name("q"))],
        },
        Preset {
            name: "dash-summaries-only",
            about: "The same forward pass, the gradient through the choice to the summaries alone.",
            values: &[("gradient_to", Value::Name("summaries"))],
        },
        Preset {
            name: "dash-indexer-only",
            about: "The same forward pass, the gradient through the choice to the learned query of the summaries alone.",
            values: &[("gradient_to", Value::Name("indexer"))],
        },
        Preset {
            name: "dash-frozen",
            about: "Summaries stay means: no gradient to their learned query.",
            values: &[("gradient_to", Value::Name("all-but-indexer"))],
        },
    ],
    keys: Dash::KEYS,
    build: |given| Dash::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("gamma", Value::Number(2.0))],
    golden: &["q", "k", "v", "summary_query", "diagonal"],
};

impl Dash {
    /// For the op that routes.
    pub fn entmax(&self) -> Entmax {
        Entmax {
            chunk_size: self.chunk_size,
            alpha: self.alpha,
            gamma: self.gamma,
            sigma: self.sigma,
            center: self.center,
            gradient: self.router_gradient,
        }
    }

    /// Why the public `dash_attn` package cannot run a model, if it cannot.
    fn beyond_public_package(&self, head_dim: usize, positions: usize) -> Option<String> {
        let power = |n: usize| n >= 16 && n.is_power_of_two();
        if self.alpha != 1.5 {
            return Some(format!("alpha is {}, the package has 1.5", self.alpha));
        }
        if self.diagonal {
            return Some("it has a learned diagonal".into());
        }
        if !self.forward_bias {
            return Some("it has no bias in the forward pass".into());
        }
        if self.center == Center::None && self.sigma != 1.0 {
            return Some(format!("sigma is {} without centring, the package has 1", self.sigma));
        }
        if !power(self.chunk_size) || !power(head_dim) {
            return Some(format!(
                "chunk size {} and head width {head_dim} must be powers of two, 16 or more",
                self.chunk_size
            ));
        }
        (positions.div_ceil(self.chunk_size) > 512).then(|| "it has more than 512 chunks".into())
    }
}

impl Variant for Dash {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        let diagonal = || ParamSpec::new(DIAGONAL, vec![config.kv_heads], Init::Zeros, Group::Vector);
        std::iter::once(ParamSpec::indexer(config)).chain(self.diagonal.then(diagonal)).collect()
    }

    /// Kept: list, weights, bias and head weights, at a density of one half.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let (h, g) = (config.heads as f64, config.kv_heads as f64);
        let chunks = t as f64 / self.chunk_size as f64;
        let candidates = (t as f64 + 1.0) / 2.0 / self.chunk_size as f64;
        Cost { candidates, kept: 0.25 * chunks * (5.0 * g + h), ..Cost::default() }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: None })
    }

    fn knob_mut(&mut self, knob: Knob) -> Option<&mut f64> {
        match knob {
            Knob::Alpha => Some(&mut self.alpha),
            Knob::Gamma => Some(&mut self.gamma),
        }
    }

    fn gradient_is_exact(&self) -> bool {
        self.router_gradient == RouterGradient::Full && self.gradient_to == GradientTo::All && self.forward_bias
    }

    fn check(&self) -> std::result::Result<(), ConfigError> {
        if self.router_gradient == RouterGradient::Stopped && self.gradient_to != GradientTo::All {
            let what = "means nothing to router_gradient = \"stopped\", which gives nobody a gradient; remove one of them";
            return Err(ConfigError::new("model.attention.gradient_to", what.to_string()));
        }
        if self.diagonal && !self.forward_bias {
            let what = "false leaves no bias in the forward pass, but diagonal = true is one; remove one of them";
            return Err(ConfigError::new("model.attention.forward_bias", what.to_string()));
        }
        Ok(())
    }

    fn adopt(&mut self, _own: &Attention, has: &dyn Fn(&str) -> bool) {
        self.diagonal = has(DIAGONAL);
    }

    fn export(&self, config: &ModelConfig, positions: usize) -> Export {
        let own = Export::own(SPEC.kind, "");
        let note = match self.beyond_public_package(config.head_dim, positions) {
            Some(why) => Export::own(SPEC.kind, &format!("the public `dash_attn` package cannot run it: {why}")).note,
            None => format!(
                "{} The public `dash_attn` package reads the same names and keys (`dash_attn.models.llama.LlamaForCausalLM`); it \
                 asks for `\"model_type\": \"llama\"` in `config.json`. With that, `transformers` alone would load a dense Llama, which \
                 is another function.",
                own.note
            ),
        };
        let keys = vec![
            ("chunk_size", Value::Size(self.chunk_size)),
            ("scaling_factor", Value::Number(self.gamma)),
            ("sigma", Value::Number(self.sigma)),
            ("estimate_diagonal", Value::Flag(self.center != Center::None)),
        ];
        Export { loader: Loader::Own, keys, note }
    }

    fn decodes_on_a_card(&self) -> bool {
        true
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let (qbar, diagonal) = match x.own {
            [qbar] => (qbar, None),
            [qbar, diagonal] => (qbar, Some(diagonal)),
            other => return Err(Error::invalid("dash", format!("{} parameters, not 1 or 2", other.len()))),
        };
        let (q, k) = (tape.watch(ROUTER_Q, x.q)?, tape.watch(ROUTER_K, x.k)?);
        let (q, kbar) = self.gradient_to.operands(tape, x, [&q, &k, qbar], self.chunk_size)?;
        let mut routing = entmax_routing_after(x.past(), tape, &q, &kbar, diagonal, self.entmax())?;
        if !self.forward_bias {
            routing.bias = gradient_of(tape, &routing.bias)?;
        }
        let (out, routes) = x.attend_to(tape, routing.routes.clone(), Some(routing.bias.clone()))?;
        let trace = if x.reroute.is_some() { RouterTrace::hard(routes) } else { RouterTrace::soft(routing) };
        Ok((out, Some(trace)))
    }
}

/// Zeros with the gradient of `bias`: b - sg(b), where sg has no gradient.
fn gradient_of(tape: &Tape, bias: &Var) -> Result<Var> {
    let (value, id) = (&bias.value, bias.id());
    let zeros = Tensor::zeros(value.device(), value.shape(), value.dtype())?;
    tape.record("gradient_of", zeros, move |dy, grads| grads.add(id, dy))
}
