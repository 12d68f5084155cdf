//! Statistics of comparisons: Student's t, exact tests by enumeration, survival, corrections for many comparisons. Pure functions
//! of numbers; each is held to published values in its tests.

mod flip;
mod holm;
mod interval;
mod student;
mod survival;

pub use flip::SubsetMeans;
pub use holm::holm;
pub use interval::Interval;
pub use student::{Estimate, Student};
pub use survival::{LogRank, Time, kaplan_meier, log_rank, median, restricted_mean};
