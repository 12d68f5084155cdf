//! Training: batches to updates, and everything a run writes down.
//!
//! Start at [`trainer::Trainer::step`], one update as a function; [`run::train`] is the run around it.

pub mod accumulate;
pub mod budget;
mod card;
pub mod checkpoint;
pub mod choices;
pub mod convert;
pub mod device;
pub mod eval;
pub mod export;
pub mod far;
#[cfg(test)]
mod handmade;
pub mod init;
pub mod knobs;
pub mod lengths;
pub mod limits;
pub mod loaded;
pub mod lock;
pub mod material;
pub mod metrics;
pub mod optim;
pub mod pace;
pub mod places;
pub mod preflight;
pub mod probe;
pub mod provenance;
pub mod run;
pub mod schedule;
mod session;
pub mod shares;
pub mod spent;
pub mod spikes;
mod standard_error;
pub mod state;
pub mod stop;
pub mod tasks;
mod tensorboard;
pub mod text;
pub mod trainer;
mod weights;
pub mod whole;
pub mod yoke;
