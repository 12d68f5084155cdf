//! From text or a synthetic task to batches of token ids: corpora, tokenizers, checked token shards, and a loader that resumes exactly.
//! Knows no tensor and no model; nothing here prints, progress goes through a callback.

mod error;
pub mod files;
mod guard;
mod intake;
mod loader;
mod prepare;
mod report;
mod rng;
mod shard;
mod task;
mod threads;
mod tokenizer;

pub use error::{DataError, Result};
pub use intake::tokens::Side;
pub use intake::whole::{TokenIds, token_ids, whole_text};
pub use intake::{COMPRESSED, EXTENSIONS, FIELD, extensions_for, json_line, no_text};
pub use loader::{Batch, Layout, Loader, LoaderState, Mixture, PackedEpoch, Packing, ValidationText};
pub use prepare::{Prepared, Progress, Settings, Source, Validation, prepare};
pub use report::{EndOfText, Report};
pub use shard::{Shard, ShardWriter};
pub use task::{Example, IGNORE, Question, Shortcut, Task, TaskKind};
pub use tokenizer::{
    Bos, END_OF_TEXT, Encoded, SpecialToken, SpecialTokens, TextStream, Tokenizer, Treatment, Unknown,
};
