//! What a decoder is made of beside attention.

use dash_core::{DType, Ids, Tensor, ops};

use super::bench::{Bench, Cost};
use crate::failure::Result;

/// From queries `[b, t, h, d]` on.
pub fn time(bench: &mut Bench, q: &Tensor) -> Result<()> {
    let s = bench.sizes;
    let (n, c, f, v) = (s.rows(), s.width, s.ffn, s.vocab);
    let x = bench.normal(&[n, c])?;
    linear(bench, &x, (n, c, f))?;

    let weight = bench.normal(&[c])?;
    // forward reads x and writes y; backward reads x and dy and writes dx
    let cost = Cost { flops: 12.0 * s.x(), elements: 5.0 * s.x() };
    bench.time("rmsnorm", cost, &[x.clone(), weight], |t, v| ops::rmsnorm(t, &v[0], &v[1], 1e-6))?;

    let table = ops::RopeTable::new(&bench.device, DType::F32, s.tokens, s.head_dim, 1e4)?;
    // three operations a number, in both directions
    let cost = Cost { flops: 6.0 * s.q(), elements: 4.0 * s.q() };
    bench.time("rope (queries)", cost, std::slice::from_ref(q), |t, v| ops::rope(t, &v[0], &table, 0))?;

    let hidden = (n * f) as f64;
    let inputs = [x.clone(), bench.normal(&[f, c])?, bench.normal(&[f, c])?, bench.normal(&[c, f])?];
    // three products of 6 c each; 40 for silu and the product with the gate, both ways
    let cost =
        Cost { flops: (18.0 * c as f64 + 40.0) * hidden, elements: 4.0 * s.x() + 4.0 * hidden + 9.0 * (c * f) as f64 };
    bench.time("swiglu", cost, &inputs, |t, v| ops::swiglu(t, &v[0], [&v[1], &v[2], &v[3]], None))?;

    // backward hands the gradient on and computes nothing
    let cost = Cost { flops: s.x(), elements: 3.0 * s.x() };
    bench.time("add", cost, &[x.clone(), x.clone()], |t, v| ops::add(t, &v[0], &v[1]))?;

    let ids = Ids::places(&bench.device, &(0..n).map(|i| i * 7919 % v).collect::<Vec<_>>())?;
    let table = bench.normal(&[v, c])?;
    // backward adds the rows of dy to a table of zeros
    let cost = Cost { flops: s.x(), elements: 4.0 * s.x() + (v * c) as f64 };
    bench.time("embedding", cost, &[table], |t, w| ops::embedding(t, &w[0], &ids))?;

    let head = bench.normal(&[v, c])?;
    // the logits are never written: x and the head are read, their gradients written
    let cost = Cost { flops: 6.0 * s.x() * v as f64, elements: 2.0 * s.x() + 2.0 * (v * c) as f64 };
    bench.time("cross-entropy", cost, &[x, head], |t, v| ops::linear_cross_entropy(t, &v[0], &v[1], &ids, n as f64))
}

/// Products y = x W^T of x `[n, from]` and W `[to, from]`; backward has two of the same size.
fn linear(bench: &mut Bench, x: &Tensor, (n, c, f): (usize, usize, usize)) -> Result<()> {
    let s = bench.sizes;
    let heads = s.heads * s.head_dim;
    let flops = |from: usize, to: usize| 6.0 * (n * from) as f64 * to as f64;
    // each of x, y and W is read or written three times
    let (narrow, wide, weight) = (s.x(), (n * f) as f64, (c * f) as f64);
    let (wq, wf, wd) = (bench.normal(&[heads, c])?, bench.normal(&[f, c])?, bench.normal(&[c, f])?);
    let op = |t: &dash_core::Tape, v: &[dash_core::Var]| ops::linear(t, &v[0], &v[1]);
    let cost = Cost { flops: flops(c, heads), elements: 3.0 * (narrow + s.q() + (heads * c) as f64) };
    bench.time("linear width -> heads", cost, &[x.clone(), wq], op)?;
    let cost = Cost { flops: flops(c, f), elements: 3.0 * (narrow + wide + weight) };
    bench.time("linear width -> ffn", cost, &[x.clone(), wf], op)?;
    let gated = bench.normal(&[n, f])?;
    bench.time("linear ffn -> width", cost, &[gated, wd], op)
}
