//! Means, intervals and paired differences over seeds: Student's t, two-sided at 95 %.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Fewer seeds than this declare no winner: two values always lie apart, and the t interval of one degree of freedom is
/// thirteen standard errors wide.
pub const ENOUGH: usize = 3;

/// Mean of some values with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Number of values.
    pub n: usize,
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the values (n - 1); NaN below two.
    pub deviation: f64,
    /// Half the width of the 95 % interval of the mean; NaN below two.
    pub half: f64,
}

/// What a paired difference says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Fewer than [`ENOUGH`] pairs.
    TooFew,
    /// The interval contains zero.
    Tie,
    /// Above the baseline.
    Higher,
    /// Below the baseline.
    Lower,
}

fn quantile(p: f64, n: usize) -> f64 {
    if n < 2 {
        return f64::NAN;
    }
    StudentsT::new(0.0, 1.0, n as f64 - 1.0).expect("a positive number of degrees of freedom").inverse_cdf(p)
}

impl Estimate {
    /// Of some values.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len();
        let mean = values.iter().sum::<f64>() / n as f64;
        let deviation = match n {
            0 | 1 => f64::NAN,
            _ => (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n as f64 - 1.0)).sqrt(),
        };
        Estimate { n, mean, deviation, half: quantile(0.975, n) * deviation / (n as f64).sqrt() }
    }

    /// The interval.
    pub fn interval(&self) -> (f64, f64) {
        (self.mean - self.half, self.mean + self.half)
    }

    /// As a paired difference.
    pub fn verdict(&self) -> Verdict {
        let (low, high) = self.interval();
        match () {
            _ if self.n < ENOUGH => Verdict::TooFew,
            _ if low > 0.0 => Verdict::Higher,
            _ if high < 0.0 => Verdict::Lower,
            _ => Verdict::Tie,
        }
    }

    /// The smallest true difference that this many pairs with this deviation find with a probability of 80 %:
    /// (t(0.975) + t(0.8)) deviation / sqrt n.
    pub fn detectable(&self) -> f64 {
        (quantile(0.975, self.n) + quantile(0.8, self.n)) * self.deviation / (self.n as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: mean 3, deviation sqrt(2.5), t(0.975, 4) = 2.776445, t(0.8, 4) = 0.940965.
    #[test]
    fn an_estimate_is_that_of_the_tables() {
        let e = Estimate::of(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!((e.n, e.mean), (5, 3.0));
        assert!((e.deviation - 2.5f64.sqrt()).abs() < 1e-12);
        assert!((e.half - 2.776_445 * (2.5f64 / 5.0).sqrt()).abs() < 1e-5, "{}", e.half);
        assert!((e.detectable() - (2.776_445 + 0.940_965) * (0.5f64).sqrt()).abs() < 1e-5);
        assert_eq!(e.verdict(), Verdict::Higher);
    }

    #[test]
    fn few_seeds_and_zero_inside_declare_nothing() {
        assert_eq!(Estimate::of(&[5.0, 5.1]).verdict(), Verdict::TooFew);
        assert_eq!(Estimate::of(&[1.0, -1.0, 0.5]).verdict(), Verdict::Tie);
        assert_eq!(Estimate::of(&[-5.0, -5.1, -4.9]).verdict(), Verdict::Lower);
        assert!(Estimate::of(&[1.0]).half.is_nan());
    }

    /// The interval covers the truth in 95 of 100 draws: 2000 draws of five normals, 1 % is two standard errors.
    #[test]
    fn the_interval_covers() {
        let mut rng = dash_core::rng::Rng::new(5);
        let covers = |_| {
            let e = Estimate::of(&(0..5).map(|_| rng.normal()).collect::<Vec<_>>());
            let (low, high) = e.interval();
            low <= 0.0 && high >= 0.0
        };
        let share = (0..2000).map(covers).filter(|c| *c).count() as f64 / 2000.0;
        assert!((share - 0.95).abs() < 0.015, "{share}");
    }
}
