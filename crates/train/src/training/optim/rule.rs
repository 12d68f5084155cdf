//! What a kind of optimiser has to be.

use dash_core::{Result, Tensor};
use dash_model::Group;

use crate::config::Optim;

/// What a kind of optimiser is. Its state is tensors of the parameter's shape and type, known by name to the checkpoint, to
/// `verify-resume` and to the estimates of memory and disk.
pub trait Rule: Sync {
    /// As `optim.kind` has it.
    fn kind(&self) -> &'static str;

    /// Names of the tensors kept for each parameter of a group; a checkpoint calls them `SLOT.PARAMETER`. They start at 0.
    fn slots(&self, group: Group) -> &'static [&'static str];

    /// One update of all parameters that have a gradient. Where the scale is not finite nothing may change.
    ///
    /// # Errors
    /// When shapes or devices differ.
    fn update(&self, update: &Update, all: Vec<Item>) -> Result<()>;
}

/// A parameter's part in an update.
pub struct Item<'a> {
    /// The parameter's group.
    pub group: Group,
    /// Learning rate of this step and this parameter's group.
    pub lr: f64,
    /// Decoupled weight decay of this parameter's group.
    pub weight_decay: f64,
    /// The parameter.
    pub param: &'a mut Tensor,
    /// Its state, in the order of the slots.
    pub state: &'a mut [Tensor],
    /// Its gradient.
    pub grad: &'a Tensor,
}

/// What all parts of an update have in common.
pub struct Update<'a> {
    /// The keys of the configuration.
    pub settings: &'a Optim,
    /// Number of this update, from 1.
    pub step: u64,
    /// What the gradients are multiplied by: a scalar in f64 on the device.
    pub scale: &'a Tensor,
}
