use super::*;
use crate::ops::cuda::testing::cuda;

/// What a list of (norm, factor) leads to: for each the bits of its scale and of what it exceeded, then the window.
fn run(device: &Device, updates: &[(f64, f64)], limit: f64) -> (Vec<[u64; 2]>, Vec<f64>) {
    let mut window = NormWindow::new(device, &[]).unwrap();
    let scalar = |x: f64| Tensor::full(device, &[], DType::F64, x).unwrap();
    let decisions = updates.iter().map(|&(norm, factor)| {
        let Decision { scale, exceeded } = spike_guard(&mut window, &scalar(norm), &scalar(factor), limit).unwrap();
        // NaN is NaN, whatever its bits
        [scale, exceeded].map(|x| x.item().unwrap()).map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() })
    });
    (decisions.collect(), window.norms().unwrap())
}

fn left_out(decision: &[u64; 2]) -> bool {
    decision[1] != u64::MAX
}

#[test]
fn a_spike_is_left_out_and_a_new_level_becomes_the_rule() {
    // nothing is known yet, then a norm at the limit and one above it
    let mut updates: Vec<_> = (0..ENOUGH).map(|i| (if i == 5 { 1e3 } else { 1.0 }, 0.5)).collect();
    updates.extend([(4.0, 0.5), (4.5, 0.25)]);
    // a fault is no outlier and does not come into the window
    updates.extend([(f64::NAN, f64::NAN), (f64::INFINITY, f64::INFINITY), (1.0, f64::NAN)]);
    let first = updates.len();
    updates.extend([(1.0, 0.5); WINDOW].iter().chain(&[(10.0, 0.5); WINDOW]));
    let (decisions, norms) = run(&crate::testing::device(), &updates, 4.0);
    assert!(decisions[..=ENOUGH].iter().all(|d| d[0] == 0.5f64.to_bits() && !left_out(d)));
    assert_eq!(decisions[ENOUGH + 1], [u64::MAX, 1.0f64.to_bits()]);
    assert_eq!(decisions[ENOUGH + 3][0], f64::INFINITY.to_bits(), "a factor that is not finite stays");
    assert!(decisions[ENOUGH + 2..first + WINDOW].iter().all(|d| !left_out(d)));
    let out = decisions[first + WINDOW..].iter().filter(|d| left_out(d)).count();
    assert_eq!(out, WINDOW / 2, "half a window");
    assert_eq!(norms, [10.0; WINDOW]);
}

#[test]
fn the_window_goes_on_from_its_norms() {
    let d = crate::testing::device();
    let norms: Vec<f64> = (0..100).map(|i| f64::from(i % 7)).collect();
    assert_eq!(NormWindow::new(&d, &norms).unwrap().norms().unwrap(), norms[36..]);
    assert_eq!(NormWindow::new(&d, &norms[..3]).unwrap().norms().unwrap(), norms[..3]);
    let mut window = NormWindow::new(&d, &norms).unwrap();
    let single = Tensor::full(&d, &[], DType::F32, 1.0).unwrap();
    assert!(spike_guard(&mut window, &single, &single, 2.0).unwrap_err().to_string().contains("f64 scalars"));
}

#[test]
fn a_card_decides_as_the_cpu_does() {
    let Some(gpu) = cuda() else { return };
    let mut rng = crate::rng::Rng::new(3);
    // equal norms, spikes, faults, and windows of every length
    let one = |i: usize, rng: &mut crate::rng::Rng| match i % 17 {
        3 => (f64::NAN, f64::NAN),
        5 => (2.0, 1.0),
        11 => (1e3 * rng.uniform(), 0.5),
        _ => (rng.uniform(), 1.0),
    };
    let updates: Vec<_> = (0..300).map(|i| one(i, &mut rng)).collect();
    let want = run(&crate::testing::device(), &updates, 1.5);
    assert!((20..250).contains(&want.0.iter().filter(|d| left_out(d)).count()));
    assert_eq!(run(&gpu.device(), &updates, 1.5), want);
}
