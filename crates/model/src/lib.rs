//! A Llama decoder with interchangeable attention: dense, token-level entmax, hard top-k, InfLLM v2, NSA and DashAttention.
//!
//! Parameter names are those of Hugging Face checkpoints. An attention variant is one file in `attention/` and one line of the
//! registry in [`attention`].

pub mod attention;
mod budget;
mod cache;
mod config;
mod decoder;
mod error;
mod flops;
mod generate;
mod load;
mod params;
mod rope;
mod trace;

pub use attention::{
    Attention, Dash, Dense, InfLlmV2, KlIndexer, Landmark, Mass, Nsa, RandomChunks, TokenEntmax, TopK, TopKBias,
    VARIANTS, kinds,
};
pub use budget::{Budget, Profile};
pub use cache::{Cache, LayerCache};
pub use config::{Compute, ModelConfig};
pub use decoder::{Forward, Model};
pub use error::{ConfigError, ParamError};
pub use flops::{Flops, flops};
pub use generate::{Generation, Sampling, generate, has_cache};
pub use load::{Described, LoadError, parse_tensors, read_folder, read_tensors};
pub use params::{Group, INDEXER, Init, Param, ParamSpec, Params, parameters, parameters_in};
pub use rope::RopeScaling;
pub use trace::{AskedStats, RouterStats, RouterTrace};
