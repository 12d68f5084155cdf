//! One update as a function: batches -> loss -> backward -> clip -> update.

use dash_core::ops::{self, clip_factor};
use dash_core::{DType, Device, Error, Ids, Tape, Tensor, Var};
use dash_data::Batch;
use dash_model::{AskedStats, Model, RouterStats, RouterTrace};

use super::accumulate::{Tree, leaf, total};
use super::knobs::{self, AttendedTokens, Knobs, merged};
use super::lengths::Lengths;
use super::optim::Optimizer;
use super::schedule::learning_rate;
use super::shares::{Reduced, Shares};
use super::spikes::Guard;
use super::tasks::RouterChoice;
use super::yoke::Yoke;
use crate::config::Config;
use crate::failure::{Failure, Result};
use crate::peers::Peers;

/// What training changes.
pub struct Trainer {
    /// Weights.
    pub model: Model,
    /// Its state and step.
    pub optimizer: Optimizer,
    /// Updates handed to the device whose figures the host has not read yet, the oldest first.
    unread: Vec<Handed>,
    /// What the run took from another one.
    pub yoke: Yoke,
    /// What leaves updates out.
    pub spikes: Guard,
    /// What of an update this process makes, where several train.
    shares: Shares,
}

/// An update that was handed to the device.
struct Handed {
    step: u64,
    /// To look for the first value that is not finite; empty where the update is read at once.
    batches: Vec<Batch>,
    losses: Vec<Tensor>,
    grad_norm: Tensor,
    /// What the gradients were multiplied by: not finite from the first update on that went wrong.
    factor: Tensor,
    /// The median that its norm exceeded, by which the spike guard left it out, else NaN; where there is a guard.
    exceeded: Option<Tensor>,
    /// Whether the oracle chose the chunks.
    oracle: bool,
}

/// Updates handed to a device, at most, before their figures are read: a step that went wrong is found after so many.
const UNREAD: usize = 64;
/// The same where several processes train: a process that waits for its GPU longer than for the others seems to hang.
const UNREAD_BY_SEVERAL: usize = 8;

/// What an update tells.
#[derive(Debug, Clone)]
pub struct StepStats {
    /// Mean cross-entropy of the update's tokens, in nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate used.
    pub lr: f64,
    /// One entry per routed layer, over all micro-batches of the update; empty unless asked for.
    pub routers: Vec<LayerStats>,
    /// alpha and gamma of the update, where the attention has them.
    pub knobs: Option<Knobs>,
    /// Attended tokens over visible tokens, where the attention routes and the step logs or steers by it.
    pub attended: Option<f64>,
    /// Of the sequences, or of the documents in them that do not see each other.
    pub lengths: Lengths,
    /// Updates that the spike guard has left out so far, where there is one.
    pub skipped: Option<u64>,
}

/// Router figures of one layer.
#[derive(Debug, Clone)]
pub struct LayerStats {
    /// Layer number.
    pub layer: usize,
    /// What the router chose.
    pub router: RouterStats,
    /// Norm of the gradient of `indexer_q`, summed over the update; 0 where it has none.
    pub indexer_gradient: f64,
}

/// A batch's ids and targets `[b, t]` on the model's device.
///
/// # Errors
/// When they do not divide into the batch's sequences, or the device has no memory left.
pub fn batch_ids(model: &Model, batch: &Batch) -> dash_core::Result<(Ids, Ids)> {
    let inputs = model.ids(&batch.inputs, batch.batch)?.of_documents(&batch.documents)?;
    Ok((inputs, model.ids(&batch.targets, batch.batch)?))
}

/// Tokens of all of them that count in the loss.
fn counted(batches: &[Batch]) -> usize {
    batches.iter().map(Batch::counted).sum()
}

impl Trainer {
    /// Fresh weights and moments.
    ///
    /// # Errors
    /// When no model can be built from the configuration, or a run that it names gives nothing to take.
    pub fn new(config: &Config, device: &Device) -> Result<Self> {
        let (c, t) = (&config.model, config.positions());
        let mut model = Model::new(c.clone(), config.data.vocab_size, t, config.run.seed, device, DType::F32)?;
        let optimizer = Optimizer::new(&config.optim, model.params())?;
        let yoke = Yoke::of(config)?;
        yoke.set(&mut model)?;
        Ok(Trainer { yoke, ..Trainer::of(model, optimizer) })
    }

    /// Of weights and moments.
    pub fn of(model: Model, optimizer: Optimizer) -> Self {
        Trainer {
            model,
            optimizer,
            unread: Vec::new(),
            yoke: Yoke::default(),
            spikes: Guard::default(),
            shares: Shares::alone(),
        }
    }

    /// From now on several processes train: each keeps the state of the parameters that it owns.
    pub fn share(&mut self, peers: &Peers) {
        self.shares = Shares::of(peers.clone(), self.model.params());
        if let Some(own) = self.shares.own() {
            self.optimizer.keep(&own);
        }
    }

    /// The processes that train.
    pub fn peers(&self) -> &Peers {
        self.shares.peers()
    }

    /// This process's device, and how many processes have one like it.
    pub fn devices(&self) -> (&Device, usize) {
        (self.model.device(), self.peers().world())
    }

    /// All optimiser state with its names, in the first process; it is in host memory where another process has some of it.
    ///
    /// # Errors
    /// When another process does not answer.
    pub fn gathered_state(&self) -> Result<Vec<(String, Tensor)>> {
        let own = self.optimizer.named(self.model.params()).map(|(name, x)| (name, x.clone()));
        self.shares.gather(self.model.params(), own.collect())
    }

    /// One update from `batches`, which together are the global batch. The loss is normalised by the number of tokens of
    /// all of them, so it does not matter how they are cut.
    ///
    /// `None` where nothing of the update was read on the host: on a GPU, without `with_routers` and a controller, the host goes on
    /// while the device works. [`Trainer::settle`] reads it.
    ///
    /// # Errors
    /// When a value of it, or of an update before it that was not read, is not finite: the error names the step and where it
    /// appears first, and weights and moments are those of before that step.
    pub fn step(&mut self, config: &Config, batches: &[Batch], with_routers: bool) -> Result<Option<StepStats>> {
        let device = self.model.device().clone();
        let stats = device.enter(|| self.update(config, batches, with_routers))?;
        let most = if self.peers().world() == 1 { UNREAD } else { UNREAD_BY_SEVERAL };
        if stats.is_none() && self.unread.len() >= most {
            self.settle()?;
        }
        Ok(stats)
    }

    fn update(&mut self, config: &Config, batches: &[Batch], with_routers: bool) -> Result<Option<StepStats>> {
        let step = self.optimizer.step + 1;
        let lr = learning_rate(&config.optim, step, config.run.steps);
        let tokens = counted(batches);
        knobs::apply(&config.router, self.yoke.gamma_at(step), &mut self.model, step);
        let mut sums = Tree::new(leaf(batches.len()));
        let (mut losses, mut attended) = (Vec::with_capacity(batches.len()), Vec::new());
        let mut asked: Vec<Vec<Option<AskedStats>>> = Vec::new();
        let steers = config.router.target_share.is_some();
        for batch in &batches[self.peers().block(batches.len())] {
            let tape = Tape::new().computing(config.model.compute.into());
            let leaves = self.model.leaves(&tape);
            let (loss, traces) = self.loss_of(config.router.oracle, (&tape, &leaves), batch, tokens as f64)?;
            losses.push(loss.value.clone());
            let mut grads = tape.backward(&loss)?;
            sums.push(leaves.iter().map(|leaf| grads.take(leaf)).collect::<Vec<Option<Tensor>>>())?;
            if with_routers || steers {
                attended.push(AttendedTokens::of(&traces)?);
            }
            if with_routers {
                let of = |trace: &Option<_>| trace.as_ref().map(RouterTrace::ask).transpose();
                asked.push(traces.iter().map(of).collect::<dash_core::Result<_>>()?);
            }
        }
        let grads = sums.finish()?.unwrap_or_default();
        let Reduced { grads, losses, reached, norm } = self.shares.reduce(self.model.params(), grads, losses)?;
        let before = self.unread.last().map(|handed| handed.factor.clone());
        let finite: Vec<Tensor> = losses.iter().cloned().chain(before).collect();
        let factor = clip_factor(&norm, config.optim.clip, &finite)?;
        // all processes have the same bits of the norm, so all decide alike
        let guard = config.optim.spike_guard.map(|limit| self.spikes.decide(&norm, &factor, limit)).transpose()?;
        let (scale, exceeded) = guard.map_or((factor.clone(), None), |guard| (guard.scale, Some(guard.exceeded)));
        let params = self.model.params_mut();
        self.optimizer.update(params, (&grads, &scale), lr, &config.optim)?;
        self.shares.spread(params, &reached)?;
        // a CPU's figures are there
        let later = !(with_routers || steers) && self.model.device().is_asynchronous();
        let kept = if later { batches.to_vec() } else { Vec::new() };
        let oracle = config.router.oracle;
        self.unread.push(Handed { step, batches: kept, losses, grad_norm: norm, factor, exceeded, oracle });
        if later {
            return Ok(None);
        }
        // the step is handed out: what the host reads, it reads only now
        let (loss, grad_norm) = self.read(Some((batches, &grads)))?;
        let knobs = Knobs::of(&self.model.config().attention);
        let shares = attended.iter().map(AttendedTokens::share).collect::<dash_core::Result<Vec<_>>>()?;
        let shares: Vec<f64> = self.peers().concat(shares)?.into_iter().flatten().collect();
        let attended = (!shares.is_empty()).then(|| total(&shares) / shares.len() as f64);
        knobs::control(&config.router, &mut self.model, attended);
        let routers = if with_routers { self.routers(&asked, &grads)? } else { Vec::new() };
        let skipped = config.optim.spike_guard.map(|_| self.spikes.skipped);
        Ok(Some(StepStats { loss, grad_norm, lr, routers, knobs, attended, skipped, lengths: Lengths::of(batches) }))
    }

    /// The figures of all layers, from what this process asked of its micro-batches and the gradients of the parameters that it owns.
    fn routers(&self, asked: &[Vec<Option<AskedStats>>], grads: &[Option<Tensor>]) -> Result<Vec<LayerStats>> {
        let layers = asked.first().map_or(0, Vec::len);
        let norm = |layer: usize| {
            let gradient = self.model.indexer(layer).and_then(|i| grads[i].as_ref());
            gradient.map(|g| ops::grad_norm(g.device(), [g])).transpose()
        };
        // all asked for before the first is read
        let norms = (0..layers).map(norm).collect::<dash_core::Result<Vec<_>>>()?;
        let gradients = norms.iter().map(|norm| norm.as_ref().map_or(Ok(0.0), Tensor::item));
        let gradients = gradients.collect::<dash_core::Result<Vec<f64>>>()?;
        let read = |micro: &Vec<Option<AskedStats>>| {
            micro.iter().map(|asked| asked.as_ref().map(AskedStats::read).transpose()).collect()
        };
        let own = asked.iter().map(read).collect::<dash_core::Result<Vec<Vec<Option<RouterStats>>>>>()?;
        let (stats, gradients) = (self.peers().concat(own)?, self.peers().concat(vec![gradients])?);
        let mut routers = Vec::new();
        for layer in 0..layers {
            let all: Vec<&RouterStats> = stats.iter().filter_map(|micro| micro[layer].as_ref()).collect();
            let Some(router) = merged(&all) else { continue };
            // one process owns it, the others have 0
            let indexer_gradient = gradients.iter().map(|of_rank| of_rank[layer]).sum();
            routers.push(LayerStats { layer, router, indexer_gradient });
        }
        Ok(routers)
    }

    /// The loss of a micro-batch, and what the routers chose or the oracle did in their place.
    fn loss_of(
        &self,
        oracle: bool,
        (tape, leaves): (&Tape, &[Var]),
        batch: &Batch,
        tokens: f64,
    ) -> dash_core::Result<(Var, Vec<Option<RouterTrace>>)> {
        let (ids, targets) = batch_ids(&self.model, batch)?;
        let oracle = oracle.then(|| RouterChoice::Oracle.of(&batch.questions)).flatten();
        self.model.loss_as(tape, leaves, (&ids, &targets), tokens, oracle.as_ref())
    }

    /// Reads what [`Trainer::step`] has left unread, and waits for the device.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn settle(&mut self) -> Result<()> {
        if self.unread.is_empty() {
            return Ok(());
        }
        let device = self.model.device().clone();
        device.enter(|| self.read(None).map(|_| ()))
    }

    /// Loss and gradient norm of the last update, after those of all that were not read. `now` are batches and gradients of the last
    /// one where it is read at once.
    fn read(&mut self, now: Option<(&[Batch], &[Option<Tensor>])>) -> Result<(f64, f64)> {
        let mut last = (0.0, 0.0);
        let unread = std::mem::take(&mut self.unread);
        let count = unread.len() as u64;
        for (i, handed) in unread.iter().enumerate() {
            let Handed { step, batches, losses, grad_norm, exceeded, oracle, .. } = handed;
            let (batches, grads) = now.filter(|_| i + 1 == unread.len()).unwrap_or((batches, &[]));
            let values = losses.iter().map(Tensor::item).collect::<dash_core::Result<Vec<f64>>>()?;
            last = (total(&values), grad_norm.item()?);
            let bad = values.iter().position(|loss| !loss.is_finite());
            if bad.is_none() && last.1.is_finite() {
                let exceeded = exceeded.as_ref().map(Tensor::item).transpose()?;
                exceeded.iter().for_each(|exceeded| self.spikes.read(*step, last.1, *exceeded));
                continue;
            }
            // neither this update nor a later one has changed anything
            self.optimizer.undo_steps(count - i as u64);
            let infinite = |g: &Option<Tensor>| g.as_ref().is_some_and(|g| !g.is_finite().unwrap_or(true));
            let name = self.model.params().iter().zip(grads).find(|(_, g)| infinite(g)).map(|(p, _)| p.name.clone());
            // owners come in the order of the parameters
            let name = self.peers().concat(vec![name])?.into_iter().flatten().next();
            if !self.peers().is_first() {
                // it happened to all, and the first process tells
                return Err(Failure::Elsewhere(1));
            }
            if let Some(bad) = bad {
                return Err(self.not_finite((*step, "loss"), *oracle, &batches[bad..=bad], counted(batches)));
            }
            let what = name.map_or("gradient norm".into(), |name| format!("gradient of {name}"));
            return Err(self.not_finite((*step, &what), *oracle, batches, counted(batches)));
        }
        Ok(last)
    }

    /// Runs the micro-batches again on a tape that checks every output, with the loss of the update, and tells of the first value that
    /// is not finite.
    fn not_finite(&self, (step, what): (u64, &str), oracle: bool, batches: &[Batch], tokens: usize) -> Failure {
        let first = self
            .model
            .params()
            .iter()
            .find(|p| !p.value.is_finite().unwrap_or(true))
            .map(|p| format!("parameter {}", p.name));
        let found = |batch: &Batch| {
            let tape = Tape::checking().computing(self.model.config().compute.into());
            let leaves = self.model.leaves(&tape);
            let loss = self.loss_of(oracle, (&tape, &leaves), batch, tokens as f64);
            match loss.and_then(|(loss, _)| tape.backward(&loss)) {
                Err(Error::NonFinite { at, op, what }) => Some(format!("the {what} of {op} in {at}")),
                _ => None,
            }
        };
        let first = first.or_else(|| batches.iter().find_map(found));
        let first = first.map_or("no other value of the step is non-finite".into(), |f| {
            format!("the first non-finite value is {f}")
        });
        Failure::Run(anyhow::anyhow!(
            "step {step}: the {what} is not finite; {first}. The weights of the last checkpoint are kept; resume from it with a lower \
             optim.lr, a longer optim.warmup_steps or a smaller optim.clip"
        ))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn data_and_ops_ignore_the_same_target() {
        assert_eq!(dash_data::IGNORE, dash_core::IGNORE);
    }
}
