//! What a kind of optimiser has to be.

use dash_core::{Result, Tensor};

use crate::config::Optim;

/// What a kind of optimiser is. Its state is tensors of the parameter's shape and type, known by name to the checkpoint, to
/// `verify-resume` and to the estimates of memory and disk.
pub trait Rule: Sync {
    /// As `optim.kind` has it.
    fn kind(&self) -> &'static str;

    /// Names of the tensors kept for each parameter; a checkpoint calls them `SLOT.PARAMETER`. They start at 0.
    fn slots(&self) -> &'static [&'static str];

    /// One update of one parameter; `state` is in the order of the slots. Where the scale is not finite nothing may change.
    ///
    /// # Errors
    /// When shapes or devices differ.
    fn update(&self, update: &Update, param: &mut Tensor, state: &mut [Tensor], grad: &Tensor) -> Result<()>;
}

/// What an update of one parameter is given.
pub struct Update<'a> {
    /// The keys of the configuration.
    pub settings: &'a Optim,
    /// Learning rate of this step and this parameter's group.
    pub lr: f64,
    /// Decoupled weight decay of this parameter's group.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// What the gradient is multiplied by: a scalar in f64 on the device.
    pub scale: &'a Tensor,
}
