//! What every check says.

/// One line of the table.
pub struct Check {
    pub what: String,
    pub against: &'static str,
    pub error: f64,
    pub allowed: f64,
}

impl Check {
    pub fn passed(&self) -> bool {
        self.error <= self.allowed
    }
}

/// What most checks are against.
pub const DIFFERENCES: &str = "central differences";

/// The largest of some errors.
pub fn largest(errors: &[f64]) -> f64 {
    errors.iter().copied().fold(0.0, f64::max)
}
