//! A loss of a part of a model, for example of its router, in a pass whose loss is another one: forward x as it is, backward the gradient of
//! `weight` times the loss beside that of x. So a layer trains what belongs to it without a second output of the model.
//! Kept for backward: nothing.

#[cfg(test)]
mod tests;

use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// `x`, whose backward pass also gives the scalar `loss` the gradient `weight`. What is made of `x` does not depend on the loss; only
/// where nothing of `x` reaches the scalar that backward starts from, the loss is not reached either.
///
/// # Errors
/// When the loss is no scalar, or the device has no memory left.
pub fn attach(tape: &Tape, x: &Var, loss: &Var, weight: f64) -> Result<Var> {
    ensure!(loss.value.numel() == 1, "attach", "a loss is a scalar, got shape {:?}", loss.value.shape());
    let (id, loss_id) = (x.id(), loss.id());
    let (device, shape, dtype) = (loss.value.device().clone(), loss.value.shape().to_vec(), loss.value.dtype());
    tape.record("attach", x.value.clone(), move |dy, grads| {
        grads.add(id, dy)?;
        grads.add(loss_id, Tensor::full(&device, &shape, dtype, weight)?)
    })
}
