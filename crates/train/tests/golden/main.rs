//! Replays the golden files of the PyTorch oracle: forward and every gradient, in f64 and in f32.
//!
//! Every file found is run, dispatched on its `variant`; `DASHLAB_GOLDEN` names another folder, which may hold only some
//! of the kinds. All tests have `golden` in their name.

mod attention;
mod entmax;
mod files;
mod model;
mod optim;
mod plain;
