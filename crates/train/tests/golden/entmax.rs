use dash_core::{DType, Tape, Tensor, ops};

use crate::files::{all, difference, error};

/// Probabilities and the gradient of the scores.
fn run(scores: Tensor, upstream: Tensor, alpha: f64) -> (Tensor, Tensor) {
    let t = Tape::new();
    let z = t.leaf(scores);
    let p = ops::entmax(&t, &z, alpha).unwrap();
    let grads = t.backward_from(&p, upstream).unwrap();
    (p.value, grads.get(&z).unwrap().clone())
}

#[test]
fn golden_entmax_f64() {
    for g in all("entmax") {
        let (p, dz) = run(g.tensor("scores", DType::F64), g.tensor("grad_probs", DType::F64), g.number("alpha"));
        let (forward, backward) = (error(&p, g.numbers("probs")), error(&dz, g.numbers("grad.scores")));
        assert!(forward <= 1e-9 && backward <= 1e-9, "{}: off by {forward:e} and {backward:e}", g.name);
    }
}

/// Against f64 on the same rounded scores (scores near 3e4 lose digits that decide the result before any op runs).
///
/// p = u^beta with u <= 1 and beta = 1/(alpha-1). x and tau carry an ulp each, tau also the rounding of a norm over n
/// terms in 16 lanes; p multiplies that by beta. Backward weighs with r = p^(2-alpha) and subtracts a mean over the
/// support, whose n terms may cancel.
#[test]
fn golden_entmax_f32() {
    for g in all("entmax") {
        let alpha = g.number("alpha");
        let (scores, upstream) = (g.tensor("scores", DType::F32), g.tensor("grad_probs", DType::F32));
        let (want, want_dz) = run(scores.to_dtype(DType::F64).unwrap(), upstream.to_dtype(DType::F64).unwrap(), alpha);
        let (p, dz) = run(scores, upstream, alpha);
        let n = *g.shape("scores").last().unwrap();
        let rounding = f32::EPSILON as f64 / (alpha - 1.0) * (2.0 + (n as f64 / 16.0).sqrt());
        // dz is a difference of terms of size one: a row with one survivor has exactly none left
        let (backward, scale) = difference(&dz, &want_dz.to_f64().unwrap());
        let (forward, backward) = (error(&p, &want.to_f64().unwrap()), backward / scale.max(1.0));
        let allowed = rounding * (n as f64).sqrt();
        assert!(
            forward <= 2.0 * rounding,
            "{}: probabilities off by {forward:e}, allowed {:e}",
            g.name,
            2.0 * rounding
        );
        assert!(backward <= 2.0 * allowed, "{}: gradient off by {backward:e}, allowed {:e}", g.name, 2.0 * allowed);
        for row in p.to_f64().unwrap().chunks(n) {
            assert!((row.iter().sum::<f64>() - 1.0).abs() <= 1e-5, "{}", g.name);
        }
    }
}
