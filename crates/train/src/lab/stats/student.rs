//! Student's t: means with intervals, paired differences, two one-sided tests, what could have been shown.

use statrs::distribution::{ChiSquared, ContinuousCDF, StudentsT};

use super::interval::Interval;

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

fn student(n: usize) -> Option<StudentsT> {
    (n >= 2).then(|| StudentsT::new(0.0, 1.0, n as f64 - 1.0).expect("a positive number of degrees of freedom"))
}

fn quantile(p: f64, n: usize) -> f64 {
    student(n).map_or(f64::NAN, |t| t.inverse_cdf(p))
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

    /// Whether all values are equal: their mean may differ from them by its rounding.
    pub fn is_constant(&self) -> bool {
        self.half <= 1e-12 * self.mean.abs()
    }
}

/// A paired t test of differences with this estimate.
#[derive(Debug, Clone, Copy)]
pub struct Student(pub Estimate);

impl Student {
    /// P(T < z), z the mean's distance from c in standard errors, and P(T > z) = P(T < -z), which 1 - P(T < z) would round. Differences
    /// without any spread are as far as can be.
    fn tails(&self, c: f64) -> (f64, f64) {
        let e = &self.0;
        let Some(t) = student(e.n) else { return (f64::NAN, f64::NAN) };
        let distance = e.mean - c;
        // 0/0: no spread, and just there
        let z = if distance == 0.0 { 0.0 } else { distance / (e.deviation / (e.n as f64).sqrt()) };
        (t.cdf(z), t.cdf(-z))
    }

    /// Two-sided p of "zero on average".
    pub fn p(&self) -> f64 {
        let (below, above) = self.tails(0.0);
        (2.0 * below.min(above)).clamp(0.0, 1.0)
    }

    /// p of "not equivalent": the larger of two one-sided tests against -margin and margin (Schuirmann 1987).
    pub fn p_equivalent(&self, margin: f64) -> f64 {
        self.tails(-margin).1.max(self.tails(margin).0)
    }

    /// Interval of the mean.
    pub fn interval(&self, level: f64) -> Interval {
        let e = &self.0;
        let half = quantile(0.5 + level / 2.0, e.n) * e.deviation / (e.n as f64).sqrt();
        Interval { low: e.mean - half, high: e.mean + half, level }
    }

    /// The smallest true difference that so many pairs with this deviation find with a probability of 80 % at this alpha:
    /// (t(1 - alpha/2) + t(0.8)) deviation / sqrt n.
    pub fn detectable(&self, alpha: f64) -> f64 {
        let e = &self.0;
        (quantile(1.0 - alpha / 2.0, e.n) + quantile(0.8, e.n)) * e.deviation / (e.n as f64).sqrt()
    }

    /// The same at the upper end of the 95 % interval of the deviation: few pairs know it badly.
    pub fn detectable_at_most(&self, alpha: f64) -> f64 {
        let n = self.0.n as f64;
        if n < 2.0 {
            return f64::NAN;
        }
        let chi = ChiSquared::new(n - 1.0).expect("a positive number of degrees of freedom").inverse_cdf(0.025);
        self.detectable(alpha) * ((n - 1.0) / chi).sqrt()
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
        assert!((Student(e).detectable(0.05) - (2.776_445 + 0.940_965) * (0.5f64).sqrt()).abs() < 1e-5);
        assert!(Estimate::of(&[1.0]).half.is_nan() && Student(Estimate::of(&[1.0])).p().is_nan());
    }

    /// Student's sleep data (1908, Biometrika 6), as R's documentation of t.test prints them: t = -4.0621, df = 9,
    /// p = 0.002833, interval 0.7001142 to 2.4598858.
    #[test]
    fn the_paired_test_of_students_sleep() {
        let s = Student(Estimate::of(&[1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]));
        assert!((s.p() - 0.002833).abs() < 5e-7, "{}", s.p());
        let i = s.interval(0.95);
        assert!((i.low - 0.700_114_2).abs() < 1e-6 && (i.high - 2.459_885_8).abs() < 1e-6, "{i:?}");
    }

    /// A difference far above zero is as improbable as the same below, and neither p rounds to zero.
    #[test]
    fn both_signs_have_the_same_p() {
        let up = [1.0, 1.0001, 0.9999, 1.0002, 0.9998, 1.0, 1.0001, 0.9999, 1.0003, 0.9997, 1.0, 1.0001];
        let (up, down) = (Student(Estimate::of(&up)), Student(Estimate::of(&up.map(|x| -x))));
        assert!(up.p() > 0.0 && up.p() < 1e-30 && up.p() == down.p(), "{} {}", up.p(), down.p());
        assert_eq!(up.p_equivalent(2.0), down.p_equivalent(2.0));
    }

    /// A deviation of 0.012 from three pairs has the 95 % interval 0.006 to 0.075 (chi-square of 2 degrees: 0.0506, 7.378).
    #[test]
    fn three_pairs_know_their_deviation_badly() {
        let e = Estimate { n: 3, mean: 0.0, deviation: 0.012, half: f64::NAN };
        let ratio = Student(e).detectable_at_most(0.05) / Student(e).detectable(0.05);
        assert!((0.012 * ratio - 0.0754).abs() < 1e-4, "{ratio}");
    }

    /// Both one-sided tests by hand: mean 0.02, standard error 0.01, margin 0.05, 4 degrees: t = 7 and 3, p(3) = 0.01997.
    #[test]
    fn equivalence_is_the_worse_of_two_tests() {
        let s = Student(Estimate { n: 5, mean: 0.02, deviation: 0.01 * 5f64.sqrt(), half: f64::NAN });
        assert!((s.p_equivalent(0.05) - 0.019_97).abs() < 1e-5, "{}", s.p_equivalent(0.05));
        // at the margin itself nothing is shown
        assert!((s.p_equivalent(0.02) - 0.5).abs() < 1e-12);
        let same = Student(Estimate::of(&[0.0; 4]));
        assert_eq!((same.p(), same.p_equivalent(0.01)), (1.0, 0.0));
    }

    /// The interval covers the truth in 95 of 100 draws: 2000 draws of five normals, 1 % is two standard errors.
    #[test]
    fn the_interval_covers() {
        let mut rng = dash_core::rng::Rng::new(5);
        let covers = |_| {
            let e = Estimate::of(&(0..5).map(|_| rng.normal()).collect::<Vec<_>>());
            e.mean.abs() <= e.half
        };
        let share = (0..2000).map(covers).filter(|c| *c).count() as f64 / 2000.0;
        assert!((share - 0.95).abs() < 0.015, "{share}");
    }
}
