//! The trainer: configuration, training, studies, and the command line over them.
//!
//! Five parts, each knowing only those before it: [`config`] is plain data, [`peers`] connects several processes, [`training`] is the loop with all that it reads and
//! writes, [`lab`] is what studies and proves, [`commands`] is the command line.

pub mod commands;
pub mod config;
mod console;
mod failure;
mod files;
pub mod lab;
pub mod peers;
mod program;
mod signals;
pub mod training;

pub use failure::Failure;
pub use training::{checkpoint, optim, trainer};
