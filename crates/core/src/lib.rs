//! Tensors, a tape, and the ops of a small language model, each with its gradient.
//!
//! The crate knows no model, no file, no configuration and no environment variable. Device, generator and tape are
//! passed to whoever needs them; nothing here is global but the counter that numbers tapes, and nothing here prints.
//!
//! Shape letters, used in every comment: `b` batch, `t` tokens, `h` query heads, `g` key/value heads, `d` head width,
//! `c` model width, `f` MLP width, `v` vocabulary, `n` chunks, `s` chunk size, `m` keys where they are not the tokens (windows).
//! In matrix products C `[m, n]` = A `[m, k]` B `[k, n]`.
//!
//! ```
//! use dash_core::{Device, Tape, Tensor, ops};
//! let device = Device::cpu(1)?;
//! let tape = Tape::new();
//! let x = tape.leaf(Tensor::from_vec(&device, &[2, 2], vec![1.0f64, 2.0, 3.0, 4.0])?);
//! let y = ops::sum_all(&tape, &ops::mul(&tape, &x, &x)?)?;
//! let grads = tape.backward(&y)?;
//! assert_eq!(grads.get(&x).unwrap().to_vec::<f64>()?, [2.0, 4.0, 6.0, 8.0]);
//! # Ok::<(), dash_core::Error>(())
//! ```

pub mod communicator;
pub mod device;
mod dispatch;
mod error;
mod ids;
mod number;
pub mod ops;
pub mod rng;
mod shape;
mod storage;
mod tape;
mod tensor;
pub mod testing;

pub use device::{CpuDevice, CudaDevice, CudaOptions, Device};
pub use error::{Error, Result};
pub use ids::{IGNORE, Ids};
pub use number::{Compute, DType, Element, Host, Number};
pub use storage::Storage;
pub use tape::{Grads, Id, ScalarCell, Tape, Var, Watcher};
pub use tensor::Tensor;
