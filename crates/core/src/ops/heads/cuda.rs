//! One product with the three weights, one below the other, and a kernel that cuts it into heads and turns queries and keys; backwards
//! a kernel that puts the gradients of the heads side by side, and products with them.

use crate::device::Accumulate;
use crate::device::Gemm;
use crate::device::cuda::{Arg, CudaBuffer, CudaData, CudaDevice, Grid, Kind, Operand, Source, Unit};
use crate::error::{Result, ensure};
use crate::number::Compute;
use crate::ops::cuda::elementwise::join;
use crate::ops::cuda::{same, unit_at_once, wide};
use crate::ops::matmul::cuda::{add_product, add_to_input};
use crate::tape::{Grads, Var};
use crate::tensor::Tensor;

static SOURCE: Source = Source { name: "heads", text: include_str!("kernel.cu") };

/// Extents of the op.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Tokens of all sequences.
    pub rows: usize,
    /// Width of x.
    pub c: usize,
    /// Tokens of a sequence.
    pub tokens: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys, and of values.
    pub kv_heads: usize,
    /// Width of a head.
    pub d: usize,
    /// Position of a sequence's first token.
    pub first: usize,
}

impl Sizes {
    /// Columns of the product: queries, keys and values.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.d
    }
}

/// Elements that a thread takes in one access: 16 bytes of bf16 where half a head is whole pieces of that.
fn at_once(x: Kind, d: usize) -> usize {
    if x == Kind::Bf16 && d.is_multiple_of(16) { 8 } else { 1 }
}

fn unit(x: Kind, at_once: usize) -> Unit {
    unit_at_once(&SOURCE, x, at_once)
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [(Kind::Bf16, 8), (Kind::Bf16, 1), (Kind::F32, 1), (Kind::F64, 1)].map(|(x, n)| unit(x, n)).into()
}

/// Runs a kernel over the pieces of all heads.
fn over_heads((name, kind): (&'static str, Kind), device: &CudaDevice, buffers: &[Arg], sizes: Sizes) -> Result<()> {
    let Sizes { rows, tokens, heads, kv_heads, d, first, .. } = sizes;
    let step = at_once(kind, d);
    let (half, kernel) = (d / 2 / step, device.kernel(&unit(kind, step), name)?);
    let pieces = rows * (heads + 2 * kv_heads) * half;
    let numbers = [pieces, tokens, heads, kv_heads, half, first].map(Arg::int);
    // SAFETY: the kernel's parameters in order; a thread a piece, all inside buffers whose lengths the callers checked or made.
    unsafe { kernel.launch(Grid::over(pieces, 256), &[buffers, &numbers].concat()) }
}

/// Refuses angles that do not reach the last position, or of another kind than what is computed in.
fn check_angles(op: &'static str, angles: &CudaBuffer, kind: Kind, sizes: Sizes) -> Result<()> {
    let Sizes { tokens, d, first, .. } = sizes;
    ensure!(angles.kind() == wide(kind) && (first + tokens) * d <= angles.len(), op, "{angles:?} for {sizes:?}");
    ensure!(d > 0 && d.is_multiple_of(2) && tokens > 0 && sizes.rows.is_multiple_of(tokens), op, "{sizes:?}");
    Ok(())
}

/// q `[rows, heads d]`, k and v `[rows, kv_heads d]` of x's kind, from `x [rows, c]`, the weights in full, and angles `[positions, d]`; and
/// the weights as they were multiplied, `[width, c]`, which [`backward`] takes.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn forward(
    x: &CudaBuffer,
    weights: [&CudaBuffer; 3],
    angles: &CudaBuffer,
    sizes: Sizes,
) -> Result<([CudaBuffer; 3], CudaBuffer)> {
    let (op, device, kind) = ("attention_heads", x.device(), x.kind());
    let Sizes { rows, c, heads, kv_heads, d, .. } = sizes;
    check_angles(op, angles, kind, sizes)?;
    let (joined, width) = (join(op, &weights, kind)?, sizes.width());
    let product = device.alloc(op, kind, rows * width)?;
    let size = Gemm::new(rows, width, c).with(Accumulate::Overwrite);
    device.gemm(size, Operand::rows(x, c), Operand::rows(&joined, c).t(), Operand::rows(&product, width))?;
    let fresh = |n: usize| device.alloc(op, kind, rows * n * d);
    let made = [fresh(heads)?, fresh(kv_heads)?, fresh(kv_heads)?];
    let [q, k, v] = &made;
    over_heads(("heads_of_product", kind), device, &[&product, angles, q, k, v].map(Arg::Buffer), sizes)?;
    Ok((made, joined))
}

/// The gradient of the product, of kind `kind`, from those of q, k and v in full; one that is left out is zero.
///
/// # Errors
/// As [`forward`].
pub fn joint_gradient(
    [dq, dk, dv]: [Option<&CudaBuffer>; 3],
    angles: &CudaBuffer,
    sizes: Sizes,
    kind: Kind,
) -> Result<CudaBuffer> {
    let (op, device) = ("attention_heads", angles.device());
    check_angles(op, angles, kind, sizes)?;
    for (d, heads) in [(dq, sizes.heads), (dk, sizes.kv_heads), (dv, sizes.kv_heads)] {
        let Some(d) = d else { continue };
        same(op, &[angles, d])?;
        ensure!(d.len() == sizes.rows * heads * sizes.d, op, "{d:?} for {heads} heads of {sizes:?}");
    }
    let product = device.alloc(op, kind, sizes.rows * sizes.width())?;
    let [dq, dk, dv] = [dq, dk, dv].map(|d| d.map_or(Arg::Null, Arg::Buffer));
    let buffers = [dq, dk, dv, Arg::Buffer(angles), Arg::Buffer(&product)];
    over_heads(("product_of_heads", kind), device, &buffers, sizes)?;
    Ok(product)
}

/// Adds the gradients of x and of the three weights.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(
    (gpu, compute): (&CudaDevice, Compute),
    (dys, x, weights): ([Option<Tensor>; 3], &Var, &[Var; 3]),
    joined: &CudaData,
    angles: &Tensor,
    sizes: Sizes,
    grads: &mut Grads,
) -> Result<()> {
    let (op, Sizes { rows, c, heads, kv_heads, d, .. }) = ("attention_heads", sizes);
    let (xs, angles) = (x.value.on_cuda(op, gpu)?, angles.on_cuda(op, gpu)?.full()?);
    let (kind, width) = (Kind::of_operands(compute, xs.dtype()), sizes.width());
    let mut given = [None; 3];
    for (to, dy) in given.iter_mut().zip(&dys) {
        *to = dy.as_ref().map(|dy| dy.on_cuda(op, gpu)?.full()).transpose()?;
    }
    let product = joint_gradient(given, angles, sizes, kind)?;
    let reached = dys.each_ref().map(Option::is_some);
    drop(dys);
    let (xs, all) = (Operand::rows(xs.of_kind(kind)?, c), Operand::rows(&product, width));
    let mut first = 0;
    for ((w, n), reached) in weights.iter().zip([heads * d, kv_heads * d, kv_heads * d]).zip(reached) {
        // a weight that no gradient reaches has none, as after a product of its own
        if reached {
            add_product(op, gpu, grads, w, Gemm::new(n, c, rows), all.from(first).t(), xs)?;
        }
        first += n;
    }
    let joined = Operand::rows(joined.of_kind(kind)?, c);
    add_to_input(op, gpu, grads, x, Gemm::new(rows, c, width), all, joined)
}

#[cfg(test)]
mod tests {
    use super::super::attention_heads;
    use super::*;
    use crate::ops::RopeTable;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::tape::Tape;
    use crate::{DType, Tensor};

    /// Values and joint gradient against the op on a CPU, whose gradient of x for x and weights as identity is the product's.
    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (b, tokens, c, heads, kv_heads, d, first) in
            [(1, 1, 8, 1, 1, 2, 0), (2, 37, 24, 3, 1, 6, 5), (2, 65, 40, 4, 2, 16, 0), (1, 9, 64, 6, 2, 64, 3)]
        {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let (wide, sizes) = (wide(kind), Sizes { rows: b * tokens, c, tokens, heads, kv_heads, d, first });
                let inputs = tensors(&[
                    (&[b, tokens, c], kind),
                    (&[heads * d, c], kind),
                    (&[kv_heads * d, c], kind),
                    (&[kv_heads * d, c], kind),
                    (&[b, tokens, heads, d], wide),
                    (&[b, tokens, kv_heads, d], wide),
                    (&[b, tokens, kv_heads, d], wide),
                ]);
                let table = RopeTable::new(inputs[0].device(), DType::F64, 80, d, 1e4).unwrap();
                let on: Vec<_> = inputs
                    .iter()
                    .zip([kind; 4].into_iter().chain([wide; 3]))
                    .map(|(x, k)| device.tensor(x, k))
                    .collect();
                let full = [1, 2, 3].map(|i| device.tensor(&inputs[i], wide));
                let angles = device.tensor(&table.angles, wide);
                let name = format!("{sizes:?} {kind:?}");

                let tape = Tape::new();
                let leaves: Vec<_> = inputs[..4].iter().map(|x| tape.leaf(x.clone())).collect();
                let want =
                    attention_heads(&tape, &leaves[0], [&leaves[1], &leaves[2], &leaves[3]], &table, first).unwrap();
                let (got, _) = super::forward(&on[0], full.each_ref(), &angles, sizes).unwrap();
                // bf16: the product is rounded before it is turned, and after
                let bound =
                    if kind == Kind::Bf16 { Bound::relative(6.0 / 512.0) } else { Bound::of(kind, kind, c + 4) };
                for (got, want) in got.iter().zip(&want) {
                    compare(&name, got, &want.value, bound);
                }
                for left_out in [3, 0, 2] {
                    let given: [Option<&CudaBuffer>; 3] =
                        std::array::from_fn(|i| (i != left_out).then_some(&on[4 + i]));
                    let got = joint_gradient(given, &angles, sizes, kind).unwrap();
                    let want = turned_back(&inputs[4..], left_out, &table, sizes);
                    compare(&name, &got, &want, Bound::of(kind, kind, 4));
                }
            }
        }
    }

    /// The gradients side by side: what rope's gradient makes of each, row by row.
    fn turned_back(dys: &[Tensor], left_out: usize, table: &RopeTable, sizes: Sizes) -> Tensor {
        let mut rows = vec![Vec::new(); sizes.rows];
        for (i, dy) in dys.iter().enumerate() {
            let back = if i < 2 {
                crate::ops::rope::rotate(dy, table, sizes.first, true, Compute::Full).unwrap()
            } else {
                dy.clone()
            };
            let back = back.to_f64().unwrap();
            for (row, part) in rows.iter_mut().zip(back.chunks_exact(back.len() / sizes.rows)) {
                row.extend(part.iter().map(|&x| if i == left_out { 0.0 } else { x }));
            }
        }
        Tensor::from_vec(dys[0].device(), &[sizes.rows, sizes.width()], rows.concat()).unwrap()
    }
}
