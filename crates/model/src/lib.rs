//! A Llama decoder with interchangeable attention: dense, token-level entmax, hard top-k, InfLLM v2, NSA and DashAttention.
//!
//! Parameter names are those of Hugging Face checkpoints. An attention variant is one file in `attention/` and one arm of
//! [`Attention`]; what it attends is a list of blocks, and the engine behind it is shared.

pub mod attention;
mod config;
mod decoder;
mod flops;
mod generate;
mod params;
mod router;

pub use config::{Attention, Compute, ConfigError, Dash, KINDS, ModelConfig, Nsa, Windows};
pub use decoder::{Forward, Model};
pub use flops::{Flops, flops};
pub use generate::{Sampling, generate};
pub use params::{Param, Params, parameters};
pub use router::{RouterStats, RouterTrace};
