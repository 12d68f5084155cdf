//! Every attention variant of the registry as a whole: its own projections, its router, and what it attends.

use dash_core::{DType, Tape, Tensor, Var, ops::RopeTable};
use dash_model::attention::{Inputs, Knob, Layer, attend};
use dash_model::{Init, ModelConfig, VARIANTS};

use super::attention::{Attended, Qkv, attention_cost};
use super::bench::{Bench, Cost};
use crate::config::Config;
use crate::console::tell;
use crate::failure::{Failure, Result};
use crate::training::convert::{Other, other_attention};

/// Times each variant: the configured one as it is, the others with its numbers where they have the key, and with as many chunks as
/// hold the tokens that the entmax router attends. What these sizes do not allow is told and left out.
pub fn time(bench: &mut Bench, qkv: &Qkv, config: &Config, routed: Attended) -> Result<()> {
    let t = bench.sizes.tokens as f64;
    let listed = routed.density * (t + 1.0) / 2.0;
    for spec in VARIANTS {
        let own = &config.model.attention;
        let mut attention = if spec.kind == own.kind() {
            *own
        } else {
            match other_attention(config, &Other { kind: spec.kind, top: None, chunk_size: Some(routed.chunk) }, listed)
            {
                Ok(attention) => attention,
                Err(Failure::Request(e)) => {
                    tell!("{} is not timed: {e}", spec.kind);
                    continue;
                }
                Err(failure) => return Err(failure),
            }
        };
        if let Some(gamma) = attention.knob_mut(Knob::Gamma) {
            *gamma = routed.gamma;
        }
        time_one(bench, qkv, &ModelConfig { attention, ..config.model.clone() })?;
    }
    Ok(())
}

fn time_one(bench: &mut Bench, qkv: &Qkv, config: &ModelConfig) -> Result<()> {
    let (s, attention) = (bench.sizes, &config.attention);
    let mut inputs = vec![qkv.q.clone(), qkv.k.clone(), qkv.v.clone()];
    inputs.push(bench.normal(&[s.batch, s.tokens, s.width])?);
    let mut weights = 0.0;
    for spec in attention.params(config) {
        let n: usize = spec.shape.iter().product();
        weights += n as f64;
        inputs.push(match spec.init {
            Init::Ones => Tensor::full(&bench.device, &spec.shape, DType::F32, 1.0)?,
            Init::Zeros => Tensor::zeros(&bench.device, &spec.shape, DType::F32)?,
            Init::Normal(std) => Tensor::normal(&bench.device, &spec.shape, DType::F32, std, &mut bench.rng)?,
        });
    }
    let rope = RopeTable::of_frequencies(&bench.device, DType::F32, s.tokens, &config.rope_frequencies())?;
    let run = |tape: &Tape, vars: &[Var]| {
        let [q, k, v, x, params @ ..] = vars else { unreachable!("four inputs come before the parameters") };
        let own = attention.project(tape, &Layer { x, params, config, rope: &rope, first: 0 })?;
        attend(
            tape,
            attention,
            &Inputs { q, k, v, own: &own, layer: 0, budget: None, reroute: None, loss_share: None, cache: None },
        )
    };
    let tape = Tape::inference().computing(bench.compute);
    let vars: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
    let listed = match run(&tape, &vars)?.1 {
        Some(trace) => trace.stats()?.tokens,
        None => 0.0,
    };
    drop((vars, tape));
    // as `dash_model::flops` counts a layer: attended pairs, products with its own parameters, and scores of its candidates
    let own = attention.cost(config, s.tokens);
    let attended = attention.attended(s.tokens, listed);
    let pairs = attention_cost(s, (s.rows() * s.heads) as f64 * attended);
    let scores = 2.0 * s.q() * own.candidates;
    let x = if own.products > 0.0 { 3.0 * s.x() } else { 0.0 };
    let cost = Cost {
        flops: pairs.flops + 6.0 * s.rows() as f64 * own.products + scores,
        elements: pairs.elements + x + 3.0 * weights,
    };
    bench.time(format!("all of {}", attention.kind()), cost, &inputs, |t, v| Ok(run(t, v)?.0))
}
