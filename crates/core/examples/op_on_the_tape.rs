//! An op of one's own: y = max(x, 0)^2, recorded on a tape, and its gradient checked.
//!
//!     cargo run -p dash-core --example op_on_the_tape
//!
//! Ops of the crate look the same; their kernels are generic over f32 and f64 and live in `cpu.rs` beside the op.

use dash_core::testing::{check_grad, normal};
use dash_core::{Result, Tape, Tensor, Var, ops};

/// y = max(x, 0)^2 (So et al. 2021, arXiv 2109.08668). Kept for backward: max(x, 0). dx = 2 max(x, 0) dy.
fn squared_relu(tape: &Tape, x: &Var) -> Result<Var> {
    let (device, shape) = (x.value.device().clone(), x.value.shape().to_vec());
    let positive: Vec<f64> = x.value.to_vec()?.into_iter().map(|v: f64| v.max(0.0)).collect();
    let y = Tensor::from_vec(&device, &shape, positive.iter().map(|r| r * r).collect())?;
    let x = x.id(); // backward needs no value of x, so it keeps only where the gradient goes
    tape.record("squared_relu", y, move |dy, grads| {
        let dx = positive.iter().zip(dy.to_vec::<f64>()?).map(|(r, d)| 2.0 * r * d).collect();
        grads.add(x, Tensor::from_vec(&device, &shape, dx)?)
    })
}

fn main() -> Result<()> {
    let device = dash_core::testing::device();
    // every element against central differences in f64; a wrong factor in `dx` panics here
    check_grad(&[normal(&device, &[3, 37], 1)], |tape, v| squared_relu(tape, &v[0]));

    let tape = Tape::new();
    let x = tape.leaf(Tensor::from_vec(&device, &[2, 2], vec![1.0, -2.0, 3.0, 0.5])?);
    let loss = ops::sum_all(&tape, &squared_relu(&tape, &x)?)?;
    println!("loss {}", loss.value.item()?);
    println!("gradient {:?}", tape.backward(&loss)?.get(&x).expect("x is on the tape").to_vec::<f64>()?);
    Ok(())
}
