//! A variant that stands in a program that uses this crate, not in the registry.

use std::fmt;
use std::ops::Deref;

use super::{Attention, Variant};

/// A variant of another crate; see [`Attention::custom`].
#[derive(Clone, Copy)]
pub struct Custom(&'static dyn Variant);

impl Attention {
    /// Attention by a variant that the registry does not have: a model of this crate runs and trains it, as
    /// `examples/custom_variant.rs` shows. Configuration files and checkpoints name kinds of the registry only, and its keys are no
    /// knobs. The variant lives as long as the program: make one for a setting, not one for a step.
    pub fn custom(variant: impl Variant + 'static) -> Self {
        Attention::Custom(Custom(Box::leak(Box::new(variant))))
    }
}

impl Deref for Custom {
    type Target = dyn Variant;
    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PartialEq for Custom {
    /// Of one kind with equal values of all keys.
    fn eq(&self, other: &Self) -> bool {
        self.spec().kind == other.spec().kind
            && self.keys().iter().all(|key| self.value(key.name) == other.value(key.name))
    }
}
