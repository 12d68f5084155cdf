//! How numbers are written: as many digits as their error has, which is two.

use crate::lab::chart::trimmed;
use crate::lab::stats::{Estimate, Interval};

/// Number and error, rounded to two digits of the error.
pub fn rounded(x: f64, error: f64) -> (String, String) {
    // below the rounding of a mean an error is none
    if !(error > 1e-12 * x.abs() && error.is_finite() && x.is_finite()) {
        return (trimmed(x), trimmed(error));
    }
    let decimals = 1 - error.log10().floor() as i32;
    let write = |v: f64| match decimals {
        0..=8 => format!("{v:.*}", decimals as usize),
        9.. => format!("{v:.1e}"),
        _ => {
            let unit = 10f64.powi(-decimals);
            format!("{:.0}", (v / unit).round() * unit)
        }
    };
    // minus zero is zero
    let clean = |s: String| if s.trim_start_matches(['-', '0', '.']).is_empty() { s.replace('-', "") } else { s };
    (clean(write(x)), write(error))
}

/// `1.234 ± 0.056`
pub fn plus_minus(e: &Estimate) -> String {
    match e.n {
        0 => "no run finished".into(),
        1 => format!("{} (one seed)", trimmed(e.mean)),
        _ if e.is_constant() => format!("{} ± 0", trimmed(e.mean)),
        _ => {
            let (mean, half) = rounded(e.mean, e.half);
            format!("{mean} ± {half}")
        }
    }
}

/// A mean and the ends of its interval, with two digits of half the interval; without the ends where there is no interval.
pub fn with_interval(mean: f64, interval: Option<Interval>) -> (String, Option<(String, String)>) {
    match interval.filter(|i| i.high > i.low) {
        Some(i) => {
            let of = |x: f64| rounded(x, (i.high - i.low) / 2.0).0;
            (of(mean), Some((of(i.low), of(i.high))))
        }
        None => (number(mean), None),
    }
}

/// A probability: two digits.
pub fn probability(p: f64) -> String {
    match p {
        _ if !p.is_finite() => "-".into(),
        _ if p >= 0.995 => "1".into(),
        _ if p < 1e-4 => format!("{p:.1e}"),
        _ => format!("{p:.*}", (1 - p.log10().floor() as i32) as usize),
    }
}

/// A number that may be missing.
pub fn number(x: f64) -> String {
    if x.is_finite() { trimmed(x) } else { "-".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_digits_of_the_error() {
        for ((x, error), wanted) in [
            ((0.35812, 0.20349), ("0.36", "0.20")),
            ((0.97, 3e-16), ("0.97", "3e-16")),
            ((1.483972, 0.0554), ("1.484", "0.055")),
            ((1253.0, 347.0), ("1250", "350")),
            ((16.0, 4.2), ("16.0", "4.2")),
            ((-0.0001, 0.013), ("0.000", "0.013")),
            ((2.0, 0.0), ("2", "0")),
        ] {
            let (a, b) = rounded(x, error);
            assert_eq!((a.as_str(), b.as_str()), wanted);
        }
        for (p, text) in [(0.0527, "0.053"), (0.002833, "0.0028"), (1.1e-5, "1.1e-5"), (0.25, "0.25"), (1.0, "1")] {
            assert_eq!(probability(p), text);
        }
    }
}
