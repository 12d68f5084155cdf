//! Statistics of comparisons: Student's t, exact tests by enumeration, survival, corrections for many comparisons. Pure functions
//! of numbers; each is held to published values in its tests.

mod flip;
mod holm;
mod student;
mod survival;

pub use flip::SubsetMeans;
pub use holm::holm;
pub use student::{Estimate, Student};
pub use survival::{LogRank, Time, kaplan_meier, log_rank, median, restricted_mean};

/// An interval and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Probability that such an interval covers the truth.
    pub level: f64,
}
