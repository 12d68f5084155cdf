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
