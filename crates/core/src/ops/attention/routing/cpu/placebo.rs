use crate::device::CpuNumber;
use crate::rng::Rng;

/// A hash of a gradient and its place. Its bits are those of the run, so the draw needs no state and does not depend on threads.
fn hash<T: CpuNumber>(ds: &[T], place: usize) -> u64 {
    let mix = |h: u64, bits: u64| {
        let h = (h ^ bits).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^ (h >> 29)
    };
    ds.iter().fold(mix(0, place as u64), |h, x| mix(h, x.f64().to_bits()))
}

/// Replaces the gradient of one head's scores by a random vector of the same norm that adds up to zero. `inside` tells where
/// the head has a probability above zero; elsewhere the gradient is zero and stays so.
pub fn replace<T: CpuNumber>(ds: &mut [T], inside: impl Fn(usize) -> bool, place: usize) {
    let mut rng = Rng::new(hash(ds, place));
    let mut drawn: Vec<f64> = (0..ds.len()).map(|e| if inside(e) { rng.normal() } else { 0.0 }).collect();
    let count = (0..ds.len()).filter(|&e| inside(e)).count();
    if count < 2 {
        // a sum of zero leaves no other gradient than zero
        return;
    }
    let mean = drawn.iter().sum::<f64>() / count as f64;
    drawn.iter_mut().enumerate().filter(|(e, _)| inside(*e)).for_each(|(_, z)| *z -= mean);
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let factor = norm(&mut ds.iter().map(|x| x.f64())) / norm(&mut drawn.iter().copied());
    ds.iter_mut().zip(&drawn).for_each(|(d, z)| *d = T::of(z * factor));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(ds: &[f64], place: usize) -> Vec<f64> {
        let mut out = ds.to_vec();
        replace(&mut out, |e| ds[e] != 0.0, place);
        out
    }

    #[test]
    fn the_draw_is_of_the_gradient_and_its_place_and_keeps_norm_and_sum() {
        let ds = [0.5, -1.0, 0.0, 0.25, 0.75];
        let (a, b, c) = (replaced(&ds, 7), replaced(&ds, 8), replaced(&[0.5, -1.0, 0.0, 0.25, 0.750001], 7));
        assert!(a == replaced(&ds, 7) && a != b && a != c);
        // another direction each, not one that is stretched
        assert!((a[0] / a[1] - b[0] / b[1]).abs() > 1e-3 && (a[0] / a[1] - c[0] / c[1]).abs() > 1e-3);
        assert!(a[2] == 0.0 && a.iter().sum::<f64>().abs() < 1e-12);
        // two that add up to zero with the norm 5: 5 / sqrt 2 and its opposite; one alone stays
        let two = replaced(&[3.0, 0.0, 4.0], 0);
        assert!((two[0].abs() - 12.5f64.sqrt()).abs() < 1e-12 && two[0] == -two[2], "{two:?}");
        assert_eq!(replaced(&[0.0, 2.0], 0), [0.0, 2.0]);
    }
}
