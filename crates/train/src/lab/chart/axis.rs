//! From numbers to places: ranges, ticks, and how a number is written.

/// An axis: a range of numbers over a range of places.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    /// Over the finite numbers among these, none of which is left out; nothing when there are none. A logarithmic axis has only
    /// the positive ones.
    pub fn over(numbers: impl IntoIterator<Item = f64>, log: bool) -> Option<Self> {
        let mut range: Option<(f64, f64)> = None;
        for x in numbers.into_iter().filter(|x| x.is_finite() && (!log || *x > 0.0)) {
            let x = if log { x.log10() } else { x };
            range = Some(range.map_or((x, x), |(low, high)| (low.min(x), high.max(x))));
        }
        let (low, high) = range?;
        Some(Axis { low, high, log, from: 0.0, to: 1.0 })
    }

    /// With room at both ends, a share of the range.
    pub fn padded(self, share: f64) -> Self {
        let size = self.low.abs().max(self.high.abs());
        // around zero alone there is no size to go by
        let room = if size == 0.0 { 1.0 } else { ((self.high - self.low) * share).max(1e-3 * size).max(1e-9) };
        Axis { low: self.low - room, high: self.high + room, ..self }
    }

    /// Between these places.
    pub fn placed(self, from: f64, to: f64) -> Self {
        Axis { from, to, ..self }
    }

    /// The place of a number; none outside a logarithm's numbers.
    pub fn at(&self, x: f64) -> Option<f64> {
        let x = if self.log { (x > 0.0).then(|| x.log10())? } else { x };
        let place = self.from + (x - self.low) / (self.high - self.low) * (self.to - self.from);
        place.is_finite().then_some(place)
    }

    /// About `n` round numbers inside the range.
    pub fn ticks(&self, n: usize) -> Vec<f64> {
        if !self.log {
            return round_numbers(self.low, self.high, n);
        }
        if self.high - self.low < 0.9 {
            let (low, high) = (10f64.powf(self.low), 10f64.powf(self.high));
            return round_numbers(low, high, n).into_iter().filter(|x| *x > 0.0).collect();
        }
        let (first, last) = (self.low.ceil() as i32, self.high.floor() as i32);
        let step = ((last - first) as usize / n + 1) as i32;
        let all: &[f64] = if self.high - self.low < 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = (first - 1..=last).filter(|p| all.len() > 1 || (p - first) % step == 0);
        let numbers = powers.flat_map(|p| all.iter().map(move |m| m * 10f64.powi(p)));
        numbers.filter(|x| (self.low..=self.high).contains(&x.log10())).collect()
    }
}

fn round_numbers(low: f64, high: f64, n: usize) -> Vec<f64> {
    let raw = (high - low) / n as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw * 0.999).unwrap_or(raw);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    // products, not sums: no error adds up, and zero is zero
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number with four digits that matter.
pub fn trimmed(v: f64) -> String {
    if v == 0.0 {
        return "0".into();
    }
    let size = v.abs();
    if !(1e-3..1e6).contains(&size) {
        return format!("{v:.2e}").replace(".00e", "e").replace("0e", "e");
    }
    let decimals = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{v:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::over([0.03, 0.97], false).unwrap();
        assert_eq!(axis.ticks(5).iter().map(|x| trimmed(*x)).collect::<Vec<_>>(), ["0.2", "0.4", "0.6", "0.8"]);
        let axis = Axis::over([1e-6, f64::NAN, 0.0, 2e-1], true).unwrap();
        assert_eq!(
            axis.ticks(6).iter().map(|x| trimmed(*x)).collect::<Vec<_>>(),
            ["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1"]
        );
        let axis = Axis::over([60.0, 300.0], true).unwrap();
        assert_eq!(axis.ticks(5), [100.0, 150.0, 200.0, 250.0, 300.0]);
        assert!(Axis::over([f64::NAN], false).is_none() && Axis::over([-1.0], true).is_none());
    }

    #[test]
    fn a_number_has_its_place_and_no_other() {
        let axis = Axis::over([10.0, 1000.0], true).unwrap().placed(0.0, 100.0);
        assert_eq!((axis.at(100.0), axis.at(0.0), axis.at(f64::NAN)), (Some(50.0), None, None));
        // one number only: it stands in the middle
        let axis = Axis::over([5.0], false).unwrap().padded(0.1).placed(0.0, 100.0);
        assert!((axis.at(5.0).unwrap() - 50.0).abs() < 1e-9);
    }

    #[test]
    fn numbers_are_short() {
        for (x, text) in
            [(0.0, "0"), (1234567.0, "1.23e6"), (2e6, "2e6"), (0.3, "0.3"), (-12.3456, "-12.35"), (1e-4, "1e-4")]
        {
            assert_eq!(trimmed(x), text);
        }
    }
}
