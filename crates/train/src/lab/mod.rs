//! What studies and proves: comparisons, the audit, timings, pictures. Training does not know of it.

pub mod audit;
pub mod bench;
pub mod bench_ops;
pub mod chart;
pub mod compare;
mod peer;
pub mod plot;
mod stats;
mod timing;
pub mod verify;
