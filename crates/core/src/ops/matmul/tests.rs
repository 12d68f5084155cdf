use super::*;
use crate::device::{Accumulate, Device, Gemm};
use crate::number::{Compute, DType};
use crate::testing::{bf16, check_grad, cpu, device, normal, relative_error};

#[test]
fn grads() {
    let d = device();
    check_grad(&[normal(&d, &[2, 5, 7], 1), normal(&d, &[3, 7], 2)], |t, v| linear(t, &v[0], &v[1]));
    check_grad(&[normal(&d, &[2, 3, 4, 5], 1), normal(&d, &[2, 3, 5, 6], 2)], |t, v| matmul(t, &v[0], &v[1]));
}

#[test]
fn f32_error_is_that_of_its_arithmetic() {
    // A chain of k fused multiply-adds is off by at most k half-ulps of its partial sums; random signs leave sqrt(k). Rows
    // of 512 and 128 numbers are those that crowd a cache and are copied where that matters.
    let d = device();
    for (m, n, k) in [(1, 1, 1), (65, 130, 33), (300, 257, 500), (43, 50, 1999), (150, 128, 512)] {
        let (a, b, seed) = (normal(&d, &[m, k], 1), normal(&d, &[n, k], 2), normal(&d, &[m, n], 3));
        let run = |dtype| {
            let t = Tape::new();
            let rounded = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap();
            let (a, b) = (t.leaf(rounded(&a)), t.leaf(rounded(&b)));
            let y = linear(&t, &a, &b).unwrap();
            let grads = t.backward_from(&y, rounded(&seed)).unwrap();
            [y.value, grads.get(&a).unwrap().clone(), grads.get(&b).unwrap().clone()]
        };
        for ((got, want), length) in run(DType::F32).iter().zip(run(DType::F64)).zip([k, n, m]) {
            let error = relative_error(got, &want.to_f64().unwrap());
            assert!(error < 2.0 * (length as f64).sqrt() * f32::EPSILON as f64, "{m} {n} {k}: {error:e}");
        }
    }
}

#[test]
fn a_few_rows_are_the_rows_of_many() {
    let d = device();
    let tape = Tape::inference();
    for (n, k) in [(1, 1), (3, 16), (70, 33), (257, 500)] {
        let (x, w) = (normal(&d, &[9, k], 1), normal(&d, &[n, k], 2));
        let residual = normal(&d, &[9, n], 3);
        let many =
            crate::ops::linear_add(&tape, &tape.leaf(x.clone()), &tape.leaf(w.clone()), &tape.leaf(residual.clone()));
        let many = many.unwrap().value.to_f64().unwrap();
        for m in 1..=FEW_ROWS {
            let rows = |x: &Tensor, width| {
                tape.leaf(Tensor::from_vec(&d, &[m, width], x.to_f64().unwrap()[..m * width].to_vec()).unwrap())
            };
            let few =
                crate::ops::linear_add(&tape, &rows(&x, k), &tape.leaf(w.clone()), &rows(&residual, n)).unwrap().value;
            assert!(relative_error(&few, &many[..m * n]) < 1e-14 * k as f64, "{m} of [{n}, {k}]");
            // onto what is there, as a gradient is
            let mut c = residual.to_f64().unwrap()[..m * n].to_vec();
            let size = Gemm::new(m, n, k).with(Accumulate::Existing);
            let (xs, ws) = (x.to_f64().unwrap(), w.to_f64().unwrap());
            gemm(cpu(&d), Compute::Full, size, MatRef::rows(&xs, k), MatRef::rows(&ws, k).t(), MatMut::rows(&mut c, n));
            assert_eq!(c, few.to_f64().unwrap());
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let run = |threads, compute, rows| {
        let d = Device::cpu(threads).unwrap();
        let normal = |shape: &[usize], seed| normal(&d, shape, seed).to_dtype(DType::F32).unwrap();
        let (a, b) = (normal(&[rows, 200], 1), normal(&[190, 200], 2));
        let t = Tape::new().computing(compute);
        let (a, b) = (t.leaf(a), t.leaf(b));
        let y = linear(&t, &a, &b).unwrap();
        let seed = y.value.clone();
        let g = t.backward_from(&y, seed).unwrap();
        [g.get(&a).unwrap().to_vec::<f32>().unwrap(), g.get(&b).unwrap().to_vec().unwrap()]
    };
    for compute in [Compute::Full, Compute::Bf16] {
        for rows in [1, 4, 333, 2100] {
            assert_eq!(run(1, compute, rows), run(4, compute, rows));
        }
    }
}

#[test]
fn a_product_added_to_what_is_there_is_the_product_plus_it() {
    // 2100 along the inner axis are cut into parts, 40 are not
    let d = device();
    for k in [40, 2100] {
        let (a, b, start) = (normal(&d, &[30, k], 1), normal(&d, &[k, 50], 2), normal(&d, &[30, 50], 3));
        let operands =
            || (MatRef::rows(a.as_slice::<f64>().unwrap(), k), MatRef::rows(b.as_slice::<f64>().unwrap(), 50));
        let run = |mut c: Vec<f64>, accumulate| {
            let (a, b) = operands();
            gemm(cpu(&d), Compute::Full, Gemm::new(30, 50, k).with(accumulate), a, b, MatMut::rows(&mut c, 50));
            c
        };
        let (fresh, sum) =
            (run(vec![f64::NAN; 1500], Accumulate::Overwrite), run(start.to_vec().unwrap(), Accumulate::Existing));
        for ((&y, &x), &got) in fresh.iter().zip(start.as_slice::<f64>().unwrap()).zip(&sum) {
            assert!((got - (x + y)).abs() <= k as f64 * f64::EPSILON * (x.abs() + y.abs() + 1.0));
        }
    }
}

#[test]
fn rows_apart_hold_the_same_product_and_the_gap_is_not_touched() {
    let d = device();
    for (m, n, k) in [(30, 50, 0), (30, 50, 40), (30, 50, 2100), (700, 70, 33)] {
        let (a, b) = (normal(&d, &[m, k.max(1)], 1), normal(&d, &[k.max(1), n], 2));
        let run = |ldc: usize, accumulate| {
            let mut c: Vec<f64> = (0..m * ldc).map(|i| if i % ldc < n { (i % ldc) as f64 } else { -1.0 }).collect();
            let (a, b) =
                (MatRef::rows(a.as_slice::<f64>().unwrap(), k.max(1)), MatRef::rows(b.as_slice::<f64>().unwrap(), n));
            gemm(cpu(&d), Compute::Full, Gemm::new(m, n, k).with(accumulate), a, b, MatMut::rows(&mut c, ldc));
            c
        };
        for accumulate in [Accumulate::Overwrite, Accumulate::Existing] {
            let (close, apart) = (run(n, accumulate), run(n + 7, accumulate));
            for (close, apart) in close.chunks(n).zip(apart.chunks(n + 7)) {
                assert_eq!(close, &apart[..n], "{m} {n} {k}");
                assert_eq!(apart[n..], [-1.0; 7], "{m} {n} {k}");
            }
        }
    }
}

#[test]
fn several_products_of_one_input_and_the_input_itself_add_up() {
    // the gradient of x begins as memory that is shared with another gradient, then is its own
    let d = device();
    check_grad(&[normal(&d, &[5, 4], 1), normal(&d, &[4, 4], 2), normal(&d, &[4, 4], 3)], |t, v| {
        let both = crate::ops::add(t, &linear(t, &v[0], &v[1])?, &linear(t, &v[0], &v[2])?)?;
        crate::ops::add(t, &linear(t, &both, &v[1])?, &crate::ops::add(t, &v[0], &both)?)
    });
}

#[test]
fn a_residual_is_added_with_the_bits_of_a_sum() {
    let d = device();
    // one task; many tasks; an inner axis in parts
    for (m, n, k) in [(3, 5, 4), (300, 70, 33), (40, 36, 4096)] {
        for dtype in [DType::F32, DType::F64] {
            let t = Tape::inference();
            let leaf = |shape: &[usize], seed| t.leaf(normal(&d, shape, seed).to_dtype(dtype).unwrap());
            let (x, w, r) = (leaf(&[m, k], 1), leaf(&[n, k], 2), leaf(&[m, n], 3));
            let two = crate::ops::add(&t, &r, &linear(&t, &x, &w).unwrap()).unwrap();
            let one = linear_add(&t, &x, &w, &r).unwrap();
            assert_eq!(one.value.to_f64().unwrap(), two.value.to_f64().unwrap(), "{m} {n} {k}");
        }
    }
    check_grad(&[normal(&d, &[5, 4], 1), normal(&d, &[3, 4], 2), normal(&d, &[5, 3], 3)], |t, v| {
        linear_add(t, &v[0], &v[1], &v[2])
    });
    check_grad(&[normal(&d, &[5, 4], 1), normal(&d, &[4, 4], 2)], |t, v| linear_add(t, &v[0], &v[1], &v[0]));
}

#[test]
fn wrong_width_is_told() {
    let (d, t) = (device(), Tape::new());
    let (x, w) = (t.leaf(normal(&d, &[2, 4], 1)), t.leaf(normal(&d, &[3, 5], 2)));
    assert_eq!(linear(&t, &x, &w).unwrap_err().to_string(), "linear: x has shape [2, 4], w has shape [3, 5]");
    let w = t.leaf(normal(&d, &[3, 4], 2));
    let told = linear_add(&t, &x, &w, &x).unwrap_err().to_string();
    assert_eq!(told, "linear_add: the product has shape [2, 3], the residual [2, 4]");
}

/// The same formula evaluated naively with bf16 operands: round both, multiply in f64.
fn rounded(x: &Tensor) -> Tensor {
    Tensor::from_vec(x.device(), x.shape(), x.to_f64().unwrap().into_iter().map(bf16).collect()).unwrap()
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_formula_with_rounded_operands() {
    let d = device();
    for (m, n, k) in [(1, 1, 1), (9, 33, 7), (65, 130, 33), (300, 257, 1031), (43, 50, 1999)] {
        let (a, b) = (
            normal(&d, &[m, k], 1).to_dtype(DType::F32).unwrap(),
            normal(&d, &[n, k], 2).to_dtype(DType::F32).unwrap(),
        );
        let seed = normal(&d, &[m, n], 3).to_dtype(DType::F32).unwrap();
        let run = |a: &Tensor, b: &Tensor, seed: &Tensor, dtype, compute| {
            let t = Tape::new().computing(compute);
            let (a, b) = (t.leaf(a.to_dtype(dtype).unwrap()), t.leaf(b.to_dtype(dtype).unwrap()));
            let y = linear(&t, &a, &b).unwrap();
            let g = t.backward_from(&y, seed.to_dtype(dtype).unwrap()).unwrap();
            [y.value.to_f64().unwrap(), g.get(&a).unwrap().to_f64().unwrap(), g.get(&b).unwrap().to_f64().unwrap()]
        };
        let exact = run(&a, &b, &seed, DType::F64, Compute::Full);
        let naive = run(&rounded(&a), &rounded(&b), &rounded(&seed), DType::F64, Compute::Full);
        let ours = run(&a, &b, &seed, DType::F32, Compute::Bf16);
        for i in 0..3 {
            let error = |x: &[f64]| relative_error(&Tensor::from_vec(&d, &[x.len()], x.to_vec()).unwrap(), &exact[i]);
            // f32 sums add their own rounding, which shows where the operands round to themselves
            let allowed = 2.0 * error(&naive[i]) + (k as f64).sqrt() * f32::EPSILON as f64;
            assert!(error(&ours[i]) <= allowed, "{m} {n} {k}, output {i}: {:e} against {:e}", error(&ours[i]), allowed);
        }
    }
}

#[test]
fn a_scalar_and_inputs_of_two_devices_or_types_are_told() {
    let (d, t) = (device(), Tape::new());
    let w = t.leaf(normal(&d, &[3, 1], 1));
    let error = linear(&t, &t.leaf(normal(&d, &[], 2)), &w).unwrap_err().to_string();
    assert_eq!(error, "linear: x is a scalar, w has shape [3, 1]");
    let single = t.leaf(normal(&d, &[2, 1], 2).to_dtype(DType::F32).unwrap());
    let error = linear(&t, &single, &w).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "linear: inputs differ in device or element type: F32 [2, 1] on cpu with 2 threads and F64 [3, 1] on"
        ),
        "{error}"
    );
    let elsewhere = t.leaf(normal(&device(), &[2, 1], 2));
    assert!(
        linear(&t, &elsewhere, &w).unwrap_err().to_string().contains("linear: inputs differ in device or element type")
    );
    let residual = t.leaf(normal(&device(), &[2, 3], 2));
    let x = t.leaf(normal(&d, &[2, 1], 2));
    assert!(
        crate::ops::linear_add(&t, &x, &w, &residual)
            .unwrap_err()
            .to_string()
            .contains("differ in device or element type")
    );
}

/// An inner axis without elements makes factors of any extent cheap.
#[test]
fn a_product_too_large_for_memory_is_refused() {
    let (d, t) = (device(), Tape::new());
    let half = 1 << (usize::BITS / 2);
    let zeros = |shape: &[usize]| t.leaf(Tensor::zeros(&d, shape, DType::F64).unwrap());
    let told = linear(&t, &zeros(&[half, 0]), &zeros(&[half, 0])).unwrap_err().to_string();
    assert_eq!(told, format!("linear: shape {:?} has more elements than memory can address", [half, half]));
    let told = matmul(&t, &zeros(&[half, 0]), &zeros(&[0, half])).unwrap_err().to_string();
    assert_eq!(told, format!("matmul: shape {:?} has more elements than memory can address", [half, half]));
}
