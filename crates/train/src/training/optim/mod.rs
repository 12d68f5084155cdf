//! The optimiser over all parameters, with clipping by the global norm. A kind is one file: a [`Rule`].

mod adamw;
mod muon;
mod rule;

use std::ops::Range;

use dash_core::{Result, Tensor};
use dash_model::{Group, Param, ParamError, Params};

pub use rule::{Item, Rule, Update};

use crate::config::{Optim, OptimKind};

/// The rule of a kind: one line a kind.
pub fn rule(kind: OptimKind) -> &'static dyn Rule {
    match kind {
        OptimKind::Adamw => &adamw::AdamW,
        OptimKind::Muon => &muon::Muon,
    }
}

/// Learning rate and weight decay of a group at a step's learning rate `lr`: the one place that decides them.
fn rates(o: &Optim, group: Group, lr: f64) -> (f64, f64) {
    match group {
        Group::Embedding => (lr * o.embedding_lr, o.embedding_weight_decay.unwrap_or(o.weight_decay)),
        Group::Matrix => (lr, o.weight_decay),
        Group::Vector => (lr * o.vector_lr, o.vector_weight_decay),
    }
}

/// The state of all parameters.
pub struct Optimizer {
    rule: &'static dyn Rule,
    /// One list of slots a parameter, in the order of the parameters.
    state: Vec<Vec<Tensor>>,
    /// Updates made.
    pub step: u64,
}

fn slot_name(slot: &str, param: &Param) -> String {
    format!("{slot}.{}", param.name)
}

impl Optimizer {
    /// All state at 0.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn new(o: &Optim, params: &Params) -> Result<Self> {
        let rule = rule(o.kind);
        let zero = |p: &Param| Tensor::zeros(p.value.device(), p.value.shape(), p.value.dtype());
        let zeros = |p: &Param| rule.slots(p.group).iter().map(|_| zero(p)).collect::<Result<Vec<_>>>();
        Ok(Optimizer { rule, state: params.iter().map(zeros).collect::<Result<_>>()?, step: 0 })
    }

    /// Takes the state after `step` updates by name, as [`Optimizer::named`] gives it.
    ///
    /// # Errors
    /// Names the first tensor that is missing or has another shape.
    pub fn from_named(
        o: &Optim,
        params: &Params,
        step: u64,
        mut find: impl FnMut(&str) -> Option<Tensor>,
    ) -> std::result::Result<Self, ParamError> {
        let rule = rule(o.kind);
        let mut take = |slot: &str, p: &Param| {
            let name = slot_name(slot, p);
            match find(&name) {
                Some(x) if x.shape() == p.value.shape() => Ok(x),
                Some(x) => {
                    let what = format!("has shape {:?}, the parameter {:?}", x.shape(), p.value.shape());
                    Err(ParamError { name, what })
                }
                None => Err(ParamError { name, what: "is missing".into() }),
            }
        };
        let mut state = Vec::with_capacity(params.len());
        for p in params.iter() {
            let slots = rule.slots(p.group).iter();
            state.push(slots.map(|slot| take(slot, p)).collect::<std::result::Result<Vec<_>, _>>()?);
        }
        Ok(Optimizer { rule, state, step })
    }

    /// Forgets the state of all other parameters: another process has it, and they get no gradient here.
    pub fn keep(&mut self, own: &Range<usize>) {
        for (i, state) in self.state.iter_mut().enumerate() {
            if !own.contains(&i) {
                state.clear();
            }
        }
    }

    /// As `optim.kind` has it.
    pub fn kind(&self) -> &'static str {
        self.rule.kind()
    }

    /// The state that is here, with its names.
    pub fn named<'a>(&'a self, params: &'a Params) -> impl Iterator<Item = (String, &'a Tensor)> {
        let of = |(p, state): (&'a Param, &'a Vec<Tensor>)| {
            self.rule.slots(p.group).iter().zip(state).map(move |(slot, x)| (slot_name(slot, p), x))
        };
        params.iter().zip(&self.state).flat_map(of)
    }

    /// Whether the state of parameter `i` is finite.
    ///
    /// # Errors
    /// When the device fails.
    pub fn is_finite(&self, i: usize) -> Result<bool> {
        self.state[i].iter().try_fold(true, |all, x| Ok(all && x.is_finite()?))
    }

    /// One update by gradients that are multiplied by `scale`, an f64 scalar on the device: nothing is read on the host. A parameter without a
    /// gradient stays as it is. Where the scale is not finite, no parameter and no state is changed; the update is counted all the
    /// same, and where it is to be made again, whoever reads that afterwards calls [`Optimizer::undo_steps`].
    ///
    /// # Errors
    /// When shapes or devices differ.
    pub fn update(
        &mut self,
        params: &mut Params,
        (grads, scale): (&[Option<Tensor>], &Tensor),
        lr: f64,
        o: &Optim,
    ) -> Result<()> {
        self.step += 1;
        let mut all = Vec::with_capacity(grads.len());
        for ((param, grad), state) in params.iter_mut().zip(grads).zip(&mut self.state) {
            let (lr, weight_decay) = rates(o, param.group, lr);
            if let Some(grad) = grad {
                all.push(Item { group: param.group, lr, weight_decay, param: &mut param.value, state, grad });
            }
        }
        self.rule.update(&Update { settings: o, step: self.step, scale }, all)
    }

    /// Takes the count of updates back that changed nothing.
    pub fn undo_steps(&mut self, count: u64) {
        self.step -= count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_rates_of_their_own_and_by_default_only_vectors_differ() {
        let optim = |text: &str| toml::from_str::<Optim>(&format!("lr = 0.5\nweight_decay = 0.2\n{text}")).unwrap();
        let all = |o: &Optim| [Group::Embedding, Group::Matrix, Group::Vector].map(|g| rates(o, g, 0.5));
        assert_eq!(all(&optim("")), [(0.5, 0.2), (0.5, 0.2), (0.5, 0.0)]);
        let own = optim("embedding_lr = 2.0\nembedding_weight_decay = 0.0\nvector_lr = 0.5\nvector_weight_decay = 0.1");
        assert_eq!(all(&own), [(1.0, 0.0), (0.5, 0.2), (0.25, 0.1)]);
    }
}
