//! The update of four million weights.

use std::hint::black_box;

use dash_core::{DType, Tensor, ops};

use super::bench::{Bench, Cost};
use super::ceilings::{best, wait};
use crate::failure::Result;

const WEIGHTS: usize = 4 << 20;

/// AdamW, and the norm of a gradient.
pub fn time(bench: &mut Bench) -> Result<()> {
    let n = WEIGHTS as f64;
    let grad = bench.normal(&[WEIGHTS])?;
    let (mut p, mut m1, mut m2) = (grad.clone(), Tensor::zeros(&bench.device, &[WEIGHTS], DType::F32)?, grad.clone());
    let settings = ops::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };
    let one = Tensor::full(&bench.device, &[], DType::F64, 1.0)?;
    m2.accumulate(&grad)?;
    ops::adamw(settings, &mut p, &mut m1, &mut m2, &grad, &one)?;
    let device = bench.device.clone();
    let s = best(bench.steps, || {
        ops::adamw(settings, &mut p, &mut m1, &mut m2, &grad, &one).and_then(|()| wait(&device)).expect("shapes agree");
    });
    // weight and two moments are read and written, the gradient is read
    bench.add_f32("adamw (4 M)", s, Cost { flops: 16.0 * n, elements: 7.0 * n });
    let s = best(bench.steps, || {
        black_box(ops::grad_norm(&device, [&grad]).expect("one device"));
        wait(&device).expect("it has run before");
    });
    bench.add_f32("grad norm (4 M)", s, Cost { flops: 2.0 * n, elements: n });
    Ok(())
}
