//! One op is one folder. Its `mod.rs` has the equation, the shapes, what is kept for backward and the source;
//! `cpu.rs` the kernels, generic over f32 and f64; `tests.rs` the gradient check and the edge that hurt once.
//!
//! Primitives, from which a new attention variant can be composed before anyone writes a kernel, come first; then the
//! ops in the order the model uses them; then the ops of the update.

mod attach;
pub mod cuda;
mod documents;
mod elementwise;
mod layout;
mod matmul;
mod reduce;
mod softmax;

mod cross_entropy;
mod embedding;
mod gated_sum;
mod heads;
mod rmsnorm;
mod rope;
mod swiglu;

pub mod attention;
mod entmax;

mod adamw;
pub mod grad_norm;
mod muon;
mod spike_guard;

pub use adamw::{AdamW, Moments, adamw, adamw_all};
pub use attach::attach;
pub use cross_entropy::{linear_cross_entropy, token_nll};
pub use documents::{Documents, Group, Grouping, join_documents, split_documents};
pub use elementwise::{add, exp, ln, mask_fill, mul, scale, sigmoid, sub};
pub use embedding::embedding;
pub use entmax::entmax;
pub use gated_sum::gated_sum;
pub use grad_norm::{clip_factor, grad_norm};
pub use heads::attention_heads;
pub use layout::{index_select, reshape, transpose};
pub use matmul::{linear, linear_add, matmul};
pub use muon::{Muon, muon};
pub use reduce::{sum_all, sum_axis};
pub use rmsnorm::rmsnorm;
pub use rope::{RopeTable, frequencies as rope_frequencies, rope};
pub use softmax::softmax;
pub use spike_guard::{Decision, NormWindow, spike_guard};
pub use swiglu::{swiglu, swiglu_scratch};
