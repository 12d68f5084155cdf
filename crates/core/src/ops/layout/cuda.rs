//! The launches: a thread an element of the output.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ids::CudaIds;
use crate::shape::{numel, strides};

static SOURCE: Source = Source { name: "layout", text: include_str!("kernel.cu") };

fn unit(kind: Kind) -> Unit {
    let (word, number) = match kind {
        Kind::Bf16 => ("bf16", "float"),
        Kind::F32 | Kind::U32 => ("u32", "float"),
        Kind::F64 | Kind::U64 => ("u64", "double"),
    };
    Unit::new(&SOURCE, [("W", word.into()), ("R", number.into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::Bf16, Kind::F32, Kind::F64].map(unit).into()
}

/// Axis i of the output is axis `axes[i]` of x.
///
/// # Errors
/// When the extents do not fit x, `axes` is no permutation, or more than five axes remain after neighbours that stay together are counted as one.
pub fn permute(x: &CudaBuffer, shape: &[usize], axes: &[usize]) -> Result<CudaBuffer> {
    let op = "transpose";
    ensure!(x.len() == numel(shape) && axes.len() == shape.len(), op, "{x:?} as {shape:?} by {axes:?}");
    let mut seen = vec![false; axes.len()];
    let is_new = |&a: &usize| seen.get_mut(a).is_some_and(|seen| !std::mem::replace(seen, true));
    ensure!(axes.iter().all(is_new), op, "{axes:?} is no order of {} axes", axes.len());
    let own = strides(shape);
    let mut moved: Vec<(usize, usize)> = Vec::new();
    for &axis in axes.iter().filter(|&&a| shape[a] != 1) {
        let (extent, stride) = (shape[axis], own[axis]);
        match moved.last_mut() {
            Some((e, s)) if *s == stride * extent => (*e, *s) = (*e * extent, stride),
            _ => moved.push((extent, stride)),
        }
    }
    ensure!(moved.len() <= 5, op, "{axes:?} of {shape:?} moves more than five axes");
    while moved.len() < 5 {
        moved.insert(0, (1, 0));
    }
    let out = x.device().alloc(op, x.kind(), x.len())?;
    let kernel = x.device().kernel(&unit(x.kind()), "permute")?;
    let mut args = vec![Arg::Buffer(x), Arg::Buffer(&out), Arg::Long(x.len() as i64)];
    args.extend(moved[1..].iter().map(|a| Arg::int(a.0)));
    args.extend(moved.iter().map(|a| Arg::Long(a.1 as i64)));
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(x.len(), 256), &args)? };
    Ok(out)
}

/// `out[o, j, i] = x[o, index[j], i]` for `x [outer, n, inner]`.
///
/// # Errors
/// When the extents do not fit x or an index is not below n.
pub(crate) fn index_select(
    x: &CudaBuffer,
    (outer, n, inner): (usize, usize, usize),
    index: &CudaIds,
) -> Result<CudaBuffer> {
    let (op, device) = ("index_select", x.device());
    ensure!(x.len() == outer * n * inner, op, "{x:?} as [{outer}, {n}, {inner}]");
    ensure!(index.host().iter().all(|&i| (i as usize) < n), op, "an index is not below {n}");
    let (count, on) = (index.host().len(), &index.ids);
    let total = outer * count * inner;
    let out = device.alloc(op, x.kind(), total)?;
    let kernel = device.kernel(&unit(x.kind()), "select")?;
    let sizes = [count, n, inner].map(Arg::int);
    let args = [&[x, on, &out].map(Arg::Buffer)[..], &[Arg::Long(total as i64)], &sizes].concat();
    // SAFETY: the kernel's parameters in order; a thread an element of the output, indices are below n.
    unsafe { kernel.launch(Grid::over(total, 256), &args)? };
    Ok(out)
}

/// Its gradient, `[outer, n, inner]`, for dy of f32 or f64.
///
/// # Errors
/// As [`index_select`].
pub(crate) fn index_select_backward(
    dy: &CudaBuffer,
    (outer, n, inner): (usize, usize, usize),
    index: &CudaIds,
) -> Result<CudaBuffer> {
    let (op, device, index) = ("index_select", dy.device(), index.host());
    ensure!(dy.len() == outer * index.len() * inner, op, "{dy:?} as [{outer}, {}, {inner}]", index.len());
    ensure!(matches!(dy.kind(), Kind::F32 | Kind::F64), op, "gradients are f32 or f64, not {dy:?}");
    ensure!(index.iter().all(|&i| (i as usize) < n), op, "an index is not below {n}");
    let mut places: Vec<u32> = (0..index.len() as u32).collect();
    places.sort_by_key(|&p| index[p as usize]);
    let mut starts = vec![0u32; n + 1];
    index.iter().for_each(|&i| starts[i as usize + 1] += 1);
    (0..n).for_each(|i| starts[i + 1] += starts[i]);
    let total = outer * n * inner;
    let dx = device.alloc(op, dy.kind(), total)?;
    let (starts, places) = (device.upload(op, &starts)?, device.upload(op, &places)?);
    let kernel = device.kernel(&unit(dy.kind()), "select_backward")?;
    let sizes = [index.len(), n, inner].map(Arg::int);
    let args = [&[dy, &starts, &places, &dx].map(Arg::Buffer)[..], &[Arg::Long(total as i64)], &sizes].concat();
    // SAFETY: the kernel's parameters in order; a thread an element of dx.
    unsafe { kernel.launch(Grid::over(total, 256), &args)? };
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::super::{index_select, transpose};
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};
    use crate::tape::Tape;

    #[test]
    fn transposes_agree_with_the_cpu() {
        let Some(device) = cuda() else { return };
        let cases: [(&[usize], &[usize]); 5] = [
            (&[1], &[0]),
            (&[37, 65], &[1, 0]),
            (&[2, 5, 3, 7], &[0, 2, 1, 3]),
            (&[2, 3, 4, 5, 6], &[4, 3, 2, 1, 0]),
            (&[2, 3, 4, 5], &[2, 3, 0, 1]),
        ];
        for (shape, axes) in cases {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let inputs = tensors(&[(shape, kind)]);
                let tape = Tape::inference();
                let want = transpose(&tape, &tape.leaf(inputs[0].clone()), axes).unwrap();
                let got = super::permute(&device.tensor(&inputs[0], kind), shape, axes).unwrap();
                compare(&format!("{shape:?} by {axes:?} {kind:?}"), &got, &want.value, Bound::exact());
            }
        }
    }

    #[test]
    fn selections_agree_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (outer, n, inner, index) in [(1, 1, 1, vec![0, 0]), (3, 5, 7, vec![4, 0, 4, 2]), (2, 65, 33, vec![64; 97])]
        {
            for kind in [Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[outer, n, inner], kind), (&[outer, index.len(), inner], kind)]);
                let picked = crate::Ids::new(inputs[0].device(), &[index.len()], &index).unwrap();
                let (want, [dx_want]) = reference(&inputs, |tape, [x]| index_select(tape, x, 1, &picked));
                let [x_, dy] = [0, 1].map(|i| device.tensor(&inputs[i], kind));
                let name = format!("[{outer}, {n}, {inner}] {kind:?}");
                let extents = (outer, n, inner);
                let on = crate::Ids::new(&device.device(), &[index.len()], &index).unwrap();
                let on = on.on_cuda("test", device.cuda()).unwrap();
                compare(&name, &super::index_select(&x_, extents, on).unwrap(), &want, Bound::exact());
                let dx = super::index_select_backward(&dy, extents, on).unwrap();
                compare(&name, &dx, &dx_want, Bound::of(kind, kind, index.len()));
            }
        }
    }
}
