//! The trainer: configuration, the loop, checkpoints, export, and the command line over them.

mod audit;
pub mod checkpoint;
pub mod cli;
mod compare;
pub mod config;
mod eval;
mod export;
mod failure;
mod metrics;
pub mod optim;
mod peer;
mod plot;
mod preflight;
mod probe;
mod router;
mod run;
mod schedule;
mod signals;
mod tasks;
mod tensorboard;
pub mod trainer;
mod verify;

mod bench;
mod bench_ops;

pub use failure::Failure;
