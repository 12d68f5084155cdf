//! From text or a synthetic task to batches of token ids: corpora, a byte-level BPE tokenizer, checked token shards, and a loader that
//! resumes exactly. Knows no tensor and no model; nothing here prints, progress goes through a callback.

pub mod corpus;
mod error;
mod loader;
mod prepare;
mod rng;
mod shard;
mod task;
mod tokenizer;

pub use error::{DataError, Result};
pub use loader::{Batch, Loader, LoaderState, Mixture};
pub use prepare::{Prepared, Progress, Settings, Source, prepare};
pub use shard::{Shard, ShardWriter};
pub use task::{Example, IGNORE, Question, Task, TaskKind};
pub use tokenizer::{END_OF_TEXT, Tokenizer};
