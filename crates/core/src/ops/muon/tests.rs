use super::*;
use crate::number::DType;
use crate::testing::{device, normal};

/// X^T X of a tall matrix, X X^T of a wide one.
fn gram(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let short = rows.min(columns);
    let at = |i: usize, k: usize| if rows <= columns { x[i * columns + k] } else { x[k * columns + i] };
    let dot = |i: usize, j: usize| (0..rows.max(columns)).map(|k| at(i, k) * at(j, k)).sum();
    (0..short * short).map(|ij| dot(ij / short, ij % short)).collect()
}

/// Whatever the size of the gradient, the trace of the gram matrix is the number of singular values times about 1: the published range of
/// a value is 0.7 to 1.2, and that of its square 0.45 to 1.5.
#[test]
fn a_step_has_singular_values_around_one_whatever_the_size_of_the_gradient() {
    let d = device();
    let s = Muon { momentum: 0.0, step: 1.0, decay: 0.0 };
    let one = Tensor::full(&d, &[], DType::F64, 1.0).unwrap();
    for (shape, size) in [([5, 9], 1e-4), ([9, 5], 1e4), ([1, 7], 1.0), ([7, 1], 1.0), ([1, 1], 3.0), ([40, 130], 1.0)]
    {
        let g = normal(&d, &shape, 3).to_f64().unwrap().iter().map(|x| x * size).collect::<Vec<_>>();
        let g = Tensor::from_vec(&d, &shape, g).unwrap();
        let mut p = Tensor::zeros(&d, &shape, DType::F64).unwrap();
        let mut m = p.clone();
        muon(s, &mut p, &mut m, &g, &one).unwrap();
        let short = shape[0].min(shape[1]);
        let gram = gram(&p.to_f64().unwrap(), shape[0], shape[1]);
        let trace: f64 = (0..short).map(|i| gram[i * short + i]).sum::<f64>() / short as f64;
        assert!((0.45..1.5).contains(&trace), "{shape:?}: {trace}");
        // the direction is the gradient's: the step goes against it
        let dot: f64 = p.to_f64().unwrap().iter().zip(g.to_f64().unwrap()).map(|(p, g)| p * g).sum();
        assert!(dot < 0.0, "{shape:?}");
    }
}

#[test]
fn a_gradient_of_zero_only_decays_and_a_factor_that_is_not_finite_changes_nothing() {
    let d = device();
    let s = Muon { momentum: 0.95, step: 1.0, decay: 0.25 };
    let scalar = |x: f64| Tensor::full(&d, &[], DType::F64, x).unwrap();
    let (mut p, zero) = (normal(&d, &[3, 4], 1), Tensor::zeros(&d, &[3, 4], DType::F64).unwrap());
    let (before, mut m) = (p.to_f64().unwrap(), zero.clone());
    muon(s, &mut p, &mut m, &normal(&d, &[3, 4], 2), &scalar(f64::INFINITY)).unwrap();
    assert_eq!((p.to_f64().unwrap(), m.to_f64().unwrap()), (before.clone(), vec![0.0; 12]));
    muon(s, &mut p, &mut m, &zero, &scalar(1.0)).unwrap();
    assert_eq!(p.to_f64().unwrap(), before.iter().map(|x| 0.75 * x).collect::<Vec<_>>());
}

#[test]
fn what_is_no_matrix_or_lies_elsewhere_is_refused() {
    let d = device();
    let s = Muon { momentum: 0.95, step: 1.0, decay: 0.0 };
    let zeros = |shape: &[usize]| Tensor::zeros(&d, shape, DType::F64).unwrap();
    let one = zeros(&[]);
    let told = |mut p: Tensor, mut m: Tensor, g: Tensor| muon(s, &mut p, &mut m, &g, &one).unwrap_err().to_string();
    assert!(told(zeros(&[3]), zeros(&[3]), zeros(&[3])).contains("expected 2 axes"));
    assert!(told(zeros(&[3, 2]), zeros(&[3, 2]), zeros(&[2, 3])).contains("gradient [2, 3]"));
    let foreign = Tensor::zeros(&device(), &[3, 2], DType::F64).unwrap();
    assert!(told(zeros(&[3, 2]), zeros(&[3, 2]), foreign).contains("inputs differ in device"));
}
