//! Time to an event that not every run reaches: Kaplan-Meier curves, restricted means, the exact log-rank test.

/// More runs than this are not enumerated: each half of them has 2^21 subsets.
const MOST_RUNS: usize = 42;

/// When something happened, or up to when it had not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Time {
    /// Time of the event, or of the last look.
    pub at: f64,
    /// Whether it happened; else it is censored.
    pub happened: bool,
}

/// The different times of events, ascending, each with the number at risk and the number of events.
fn events(times: &[Time]) -> Vec<(f64, usize, usize)> {
    let mut at: Vec<f64> = times.iter().filter(|t| t.happened).map(|t| t.at).collect();
    at.sort_by(f64::total_cmp);
    at.dedup();
    // what is censored at the time of an event is still at risk there
    let risk = |u: f64| times.iter().filter(|t| t.at >= u).count();
    let count = |u: f64| times.iter().filter(|t| t.happened && t.at == u).count();
    at.into_iter().map(|u| (u, risk(u), count(u))).collect()
}

/// The share for which it has not happened yet: (time, share from then on), beginning with (0, 1). Kaplan and Meier 1958.
pub fn kaplan_meier(times: &[Time]) -> Vec<(f64, f64)> {
    let mut out = vec![(0.0, 1.0)];
    let mut share = 1.0;
    for (at, risk, count) in events(times) {
        share *= 1.0 - count as f64 / risk as f64;
        out.push((at, share));
    }
    out
}

/// The first time at which the share is at most one half; none if it stays above.
pub fn median(times: &[Time]) -> Option<f64> {
    // a product of fractions may end a rounding above one half
    kaplan_meier(times).into_iter().find(|(_, share)| *share <= 0.5 + 1e-12).map(|(at, _)| at)
}

/// Mean time up to `limit`: the area below the Kaplan-Meier curve. Where nothing is censored earlier, it is the mean of
/// min(time, limit).
pub fn restricted_mean(times: &[Time], limit: f64) -> f64 {
    let curve = kaplan_meier(times);
    let ends = curve.iter().skip(1).map(|c| c.0).chain([limit]);
    curve.iter().zip(ends).map(|(&(from, share), to)| share * (to.min(limit) - from).max(0.0)).sum()
}

/// Outcome of a log-rank test of two groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogRank {
    /// Events of the first group.
    pub observed: f64,
    /// What equal rates would give it.
    pub expected: f64,
    /// Exact two-sided p: the share of all divisions of the runs into groups of these sizes whose observed - expected is as far
    /// from zero.
    pub p: f64,
    /// The smallest p that any division of these runs has.
    pub attainable: f64,
}

/// The subsets of some scores: for each size their sums, ascending.
fn subsets(scores: &[f64]) -> Vec<Vec<f64>> {
    let mut out = vec![Vec::new(); scores.len() + 1];
    let mut sums = vec![0.0f64; 1 << scores.len()];
    out[0].push(0.0);
    for set in 1..sums.len() {
        sums[set] = sums[set & (set - 1)] + scores[set.trailing_zeros() as usize];
        out[set.count_ones() as usize].push(sums[set]);
    }
    out.iter_mut().for_each(|s| s.sort_unstable_by(f64::total_cmp));
    out
}

/// The exact log-rank test (Peto and Peto 1972) by its permutation distribution. Labels may be exchanged because all runs are
/// censored alike, at the end of the run. None for an empty group and above [`MOST_RUNS`].
pub fn log_rank(a: &[Time], b: &[Time]) -> Option<LogRank> {
    let all: Vec<Time> = a.iter().chain(b).copied().collect();
    if a.is_empty() || b.is_empty() || all.len() > MOST_RUNS {
        return None;
    }
    let events = events(&all);
    // a run's share of observed - expected; they add up to zero
    let hazard = |t: f64| events.iter().filter(|e| e.0 <= t).map(|e| e.2 as f64 / e.1 as f64).sum::<f64>();
    let scores: Vec<f64> = all.iter().map(|t| t.happened as u8 as f64 - hazard(t.at)).collect();
    let seen = scores[..a.len()].iter().sum::<f64>();
    let (left, right) = scores.split_at(scores.len() / 2);
    let (left, right) = (subsets(left), subsets(right));
    let farthest = farthest(&scores, a.len());
    let share = |least: f64| {
        let (mut far, mut all) = (0u64, 0u64);
        for (size, sums) in left.iter().enumerate() {
            let Some(others) = a.len().checked_sub(size).and_then(|n| right.get(n)) else { continue };
            all += sums.len() as u64 * others.len() as u64;
            for s in sums {
                let above = others.len() - others.partition_point(|o| s + o < least);
                let below = others.partition_point(|o| s + o <= -least);
                // a least of zero or less is met from both sides by what is in between
                far += if least > 0.0 { above + below } else { others.len() } as u64;
            }
        }
        far as f64 / all as f64
    };
    let observed = a.iter().filter(|t| t.happened).count() as f64;
    let p = share(seen.abs() - 1e-9);
    Some(LogRank { observed, expected: observed - seen, p, attainable: share(farthest - 1e-9) })
}

/// The largest |observed - expected| of any group of this size.
fn farthest(scores: &[f64], size: usize) -> f64 {
    let mut sorted = scores.to_vec();
    sorted.sort_by(f64::total_cmp);
    let low: f64 = sorted[..size].iter().sum();
    let high: f64 = sorted[sorted.len() - size..].iter().sum();
    low.abs().max(high.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(at: &[f64], censored: &[usize]) -> Vec<Time> {
        at.iter().enumerate().map(|(i, &at)| Time { at, happened: !censored.contains(&i) }).collect()
    }

    /// Weeks in remission of leukaemia (Freireich et al. 1963, Blood 21), 6-MP and placebo.
    fn leukaemia() -> (Vec<Time>, Vec<Time>) {
        let drug = [6., 6., 6., 6., 7., 9., 10., 10., 11., 13., 16., 17., 19., 20., 22., 23., 25., 32., 32., 34., 35.];
        let placebo = [1., 1., 2., 2., 3., 4., 4., 5., 5., 8., 8., 8., 8., 11., 11., 12., 12., 15., 17., 22., 23.];
        (times(&drug, &[3, 5, 7, 8, 11, 12, 13, 16, 17, 18, 19, 20]), times(&placebo, &[]))
    }

    /// The Kaplan-Meier table of 6-MP, as textbooks print it (Kleinbaum and Klein, Survival Analysis, chapter 2), medians of 23
    /// and 8 weeks, restricted means of 23.3 (up to week 35) and 8.67 as R's survfit prints them.
    #[test]
    fn the_curve_of_the_textbooks() {
        let (drug, placebo) = leukaemia();
        let wanted = [
            (0.0, 1.0),
            (6.0, 0.8571),
            (7.0, 0.8067),
            (10.0, 0.7529),
            (13.0, 0.6902),
            (16.0, 0.6275),
            (22.0, 0.5378),
            (23.0, 0.4482),
        ];
        let curve = kaplan_meier(&drug);
        assert_eq!(curve.len(), wanted.len());
        for ((t, s), (u, w)) in curve.iter().zip(wanted) {
            assert!(*t == u && (s - w).abs() < 5e-5, "{t}: {s}");
        }
        assert_eq!((median(&drug), median(&placebo)), (Some(23.0), Some(8.0)));
        assert!((restricted_mean(&drug, 35.0) - 23.29).abs() < 5e-3);
        assert!((restricted_mean(&placebo, 35.0) - 8.667).abs() < 5e-4);
        assert_eq!(median(&times(&[3.0, 5.0], &[0, 1])), None);
    }

    /// 9 events observed and 19.25 expected with 6-MP (the same chapter); p of the chi-square of 16.8 is 4e-5.
    #[test]
    fn observed_and_expected_of_the_textbooks() {
        let (drug, placebo) = leukaemia();
        let test = log_rank(&drug[..], &placebo).unwrap();
        assert_eq!(test.observed, 9.0);
        assert!((test.expected - 19.25).abs() < 5e-3, "{}", test.expected);
        assert!(test.p > 1e-6 && test.p < 1e-4, "{}", test.p);
    }

    /// Callaert 2003, "Comparing statistical software packages: the case of the logrank test in StatXact", The American
    /// Statistician 57: the exact p of these times with ties is 0.0505, as R's coin computes it, too.
    #[test]
    fn the_exact_p_of_tied_times() {
        let a = times(&[1., 1., 5., 6., 6., 6., 6.], &[]);
        let b = times(&[2., 2., 2., 3., 4., 4., 5., 5.], &[]);
        let test = log_rank(&a, &b).unwrap();
        assert!((test.p - 0.0505).abs() < 5e-5, "{}", test.p);
        assert_eq!(log_rank(&b, &a).unwrap().p, test.p);
    }

    /// Complete separation has the smallest p: 2 of C(6, 3) = 20 divisions, 2 of C(10, 5) = 252.
    #[test]
    fn separated_groups_attain_the_minimum() {
        let a = times(&[1., 2., 3.], &[]);
        let test = log_rank(&a, &times(&[9., 9., 9.], &[0, 1, 2])).unwrap();
        assert!((test.p - 0.1).abs() < 1e-12 && test.p == test.attainable);
        let a = times(&[1., 2., 3., 4., 5.], &[]);
        let test = log_rank(&a, &times(&[9.; 5], &[0, 1, 2, 3, 4])).unwrap();
        assert!((test.p - 2.0 / 252.0).abs() < 1e-12, "{test:?}");
        let never = times(&[9.; 3], &[0, 1, 2]);
        assert_eq!(log_rank(&never, &never).unwrap().p, 1.0);
        assert!(log_rank(&[], &a).is_none());
    }
}
