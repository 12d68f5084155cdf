//! The launches: a thread an element.

pub use super::Binary;
use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::{Error, Result, ensure};
use crate::ops::cuda::{alike, real, same};
use crate::ops::reduce::cuda::sum_axis;
use crate::shape::{broadcast, broadcast_strides, numel};

static SOURCE: Source = Source { name: "elementwise", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Axes that neither operand interrupts become one: (extent, stride in a, stride in b), the last axis the fastest.
fn collapse(shape: &[usize], a: &[usize], b: &[usize]) -> Vec<(usize, usize, usize)> {
    let mut axes: Vec<(usize, usize, usize)> = Vec::new();
    for i in (0..shape.len()).filter(|&i| shape[i] != 1) {
        let (extent, sa, sb) = (shape[i], a[i], b[i]);
        match axes.last_mut() {
            Some((e, la, lb)) if (*la, *lb) == (sa * extent, sb * extent) => (*e, *la, *lb) = (*e * extent, sa, sb),
            _ => axes.push((extent, sa, sb)),
        }
    }
    axes
}

/// a and b combined, each broadcast as on the CPU: the result and its shape.
///
/// # Errors
/// When shapes do not broadcast, kinds differ, or more than four axes remain.
pub fn binary(
    op: &'static str,
    kind: Binary,
    (a, sa): (&CudaBuffer, &[usize]),
    (b, sb): (&CudaBuffer, &[usize]),
) -> Result<(CudaBuffer, Vec<usize>)> {
    same(op, &[a, b])?;
    let shape = broadcast(op, sa, sb)?;
    let (device, n) = (a.device(), numel(&shape));
    let out = device.alloc(op, a.kind(), n)?;
    let head = [&[a, b, &out].map(Arg::Buffer)[..], &[Arg::Long(n as i64), Arg::Int(kind as i32)]].concat();
    let alike = sa == sb;
    let name = if alike { "binary_alike" } else { "binary" };
    let kernel = device.kernel(&unit(a.kind()), name)?;
    let mut axes = collapse(&shape, &broadcast_strides(sa, &shape), &broadcast_strides(sb, &shape));
    ensure!(alike || axes.len() <= 4, op, "{sa:?} and {sb:?} broadcast over more than four axes");
    let mut args = head;
    if !alike {
        while axes.len() < 4 {
            axes.insert(0, (1, 0, 0));
        }
        args.extend(axes[1..].iter().map(|a| Arg::int(a.0)));
        args.extend(axes.iter().map(|a| Arg::int(a.1)));
        args.extend(axes.iter().map(|a| Arg::int(a.2)));
    }
    // SAFETY: the kernel's parameters in order; a thread an element, strides stay inside the operands.
    unsafe { kernel.launch(Grid::over(n, 256), &args)? };
    Ok((out, shape))
}

/// The gradient of a broadcast from `shape` to `from`: sums what was repeated, one axis after the other.
///
/// # Errors
/// When memory runs out.
pub fn reduce_to(d: &CudaBuffer, from: &[usize], shape: &[usize]) -> Result<CudaBuffer> {
    let lead = from.len() - shape.len();
    let mut now = from.to_vec();
    let mut sum = None;
    for axis in 0..from.len() {
        if axis >= lead && shape[axis - lead] == now[axis] {
            continue;
        }
        let extents = (numel(&now[..axis]), now[axis], numel(&now[axis + 1..]));
        sum = Some(sum_axis(sum.as_ref().unwrap_or(d), extents)?);
        now[axis] = 1;
    }
    match sum {
        Some(sum) => Ok(sum),
        None => {
            let mut copy = d.device().alloc("add", d.kind(), d.len())?;
            copy.copy_from(d)?;
            Ok(copy)
        }
    }
}

/// Functions of one number.
#[derive(Debug, Clone, Copy)]
pub enum Unary {
    /// Times the factor.
    Scale = 0,
    /// e^x.
    Exp,
    /// Natural logarithm.
    Ln,
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// x (1 - x): the slope of the sigmoid at its value x.
    Slope,
    /// 1 / x.
    Inverse,
}

/// A function of every element.
///
/// # Errors
/// When memory runs out.
pub fn unary(op: &'static str, kind: Unary, x: &CudaBuffer, factor: f64) -> Result<CudaBuffer> {
    let y = x.device().alloc(op, x.kind(), x.len())?;
    let kernel = x.device().kernel(&unit(x.kind()), "unary")?;
    let args =
        [Arg::Buffer(x), Arg::Buffer(&y), Arg::Long(x.len() as i64), Arg::Int(kind as i32), real(x.kind(), factor)];
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(x.len(), 256), &args)? };
    Ok(y)
}

/// `factor x`.
///
/// # Errors
/// As [`unary`].
pub fn scale(x: &CudaBuffer, factor: f64) -> Result<CudaBuffer> {
    unary("scale", Unary::Scale, x, factor)
}

/// `value` where the mask is not 0, x elsewhere; the mask repeats over the leading axes.
///
/// # Errors
/// When the mask's length does not divide that of x.
pub fn mask_fill(x: &CudaBuffer, mask: &CudaBuffer, value: f64) -> Result<CudaBuffer> {
    let op = "mask_fill";
    ensure!(!mask.is_empty() && x.len().is_multiple_of(mask.len()), op, "{mask:?} does not repeat over {x:?}");
    let y = x.device().alloc(op, x.kind(), x.len())?;
    let kernel = x.device().kernel(&unit(x.kind()), op)?;
    let sizes = [Arg::Long(x.len() as i64), Arg::Long(mask.len() as i64), real(x.kind(), value)];
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(x.len(), 256), &[&[x, mask, &y].map(Arg::Buffer)[..], &sizes].concat())? };
    Ok(y)
}

/// All elements `value`.
///
/// # Errors
/// When memory runs out.
pub fn full(device: &CudaDevice, kind: Kind, n: usize, value: f64) -> Result<CudaBuffer> {
    let x = device.alloc("full", kind, n)?;
    let kernel = device.kernel(&unit(kind), "fill")?;
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(n, 256), &[Arg::Buffer(&x), Arg::Long(n as i64), real(kind, value)])? };
    Ok(x)
}

/// Adds x to `sum`.
///
/// # Errors
/// When kinds or lengths differ.
pub fn add_into(sum: &mut CudaBuffer, x: &CudaBuffer) -> Result<()> {
    alike("add", &[sum, x])?;
    let kernel = x.device().kernel(&unit(x.kind()), "add_into")?;
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(x.len(), 256), &[Arg::Buffer(sum), Arg::Buffer(x), Arg::Long(x.len() as i64)]) }
}

/// Multiplies x by the one number of its kind in `factor`, where that is not 1.
///
/// # Errors
/// When kinds differ.
pub fn scale_by(x: &mut CudaBuffer, factor: &CudaBuffer) -> Result<()> {
    same("scale", &[x, factor])?;
    ensure!(factor.len() == 1, "scale", "the factor is one number, not {factor:?}");
    let kernel = x.device().kernel(&unit(x.kind()), "scale_by")?;
    let args = [Arg::Buffer(x), Arg::Buffer(factor), Arg::Long(x.len() as i64)];
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(x.len(), 256), &args) }
}

/// The numbers in another kind: f32 or f64 from bf16, the other way round, or one of the two in the other.
///
/// # Errors
/// For any other pair of kinds.
pub fn cast(x: &CudaBuffer, to: Kind) -> Result<CudaBuffer> {
    ensure!(x.kind() != to, "cast", "{x:?} is {to:?}");
    join("cast", &[x], to)
}

/// Buffers of f32, f64 or bf16 as one of kind `to`, one behind the other.
///
/// # Errors
/// When a buffer cannot be cast to that kind ([`cast`]), or memory runs out.
pub fn join(op: &'static str, parts: &[&CudaBuffer], to: Kind) -> Result<CudaBuffer> {
    let first = parts.first().ok_or_else(|| Error::invalid(op, "nothing to join"))?;
    let y = first.device().alloc(op, to, parts.iter().map(|part| part.len()).sum())?;
    let mut at = 0;
    for x in parts {
        let (name, number) = match (x.kind(), to) {
            (Kind::Bf16, Kind::F32 | Kind::F64) => ("of_bf16", to),
            (from @ (Kind::F32 | Kind::F64), Kind::Bf16) => ("to_bf16", from),
            (Kind::F32, Kind::F64) => ("of_float", to),
            (Kind::F64, Kind::F32) => ("to_float", Kind::F64),
            (from @ (Kind::F32 | Kind::F64), _) if from == to => ("same_kind", to),
            (from, to) => return Err(Error::invalid(op, format!("{from:?} to {to:?}"))),
        };
        let threads = if name == "to_bf16" { x.len().div_ceil(8) } else { x.len() };
        let kernel = x.device().kernel(&unit(number), name)?;
        let args = [Arg::Buffer(x), Arg::At(&y, at), Arg::Long(x.len() as i64)];
        // SAFETY: the kernel's parameters in order; a thread an element, or eight of them; the parts lie behind each other in y.
        unsafe { kernel.launch(Grid::over(threads, 256), &args)? };
        at += x.len();
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::super::{Binary, binary as on_cpu};
    use super::*;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};

    #[test]
    fn axes_collapse_where_both_operands_run_on() {
        let collapsed = |a: &[usize], b: &[usize]| {
            let shape = broadcast("add", a, b).unwrap();
            collapse(&shape, &broadcast_strides(a, &shape), &broadcast_strides(b, &shape))
        };
        assert_eq!(collapsed(&[2, 3, 4], &[2, 3, 4]), [(24, 1, 1)]);
        assert_eq!(collapsed(&[2, 3, 4], &[4]), [(6, 4, 0), (4, 1, 1)]);
        assert_eq!(collapsed(&[2, 1, 4], &[1, 3, 1]), [(2, 4, 0), (3, 0, 1), (4, 1, 0)]);
    }

    #[test]
    fn binary_ops_agree_with_the_cpu() {
        let Some(device) = cuda() else { return };
        let shapes: [(&[usize], &[usize]); 5] = [
            (&[1], &[1]),
            (&[37, 5], &[37, 5]),
            (&[2, 3, 4], &[4]),
            (&[2, 1, 4], &[1, 3, 1]),
            (&[5, 1, 7, 3], &[6, 1, 3]),
        ];
        for (sa, sb) in shapes {
            for kind in [Kind::F32, Kind::F64] {
                let inputs = tensors(&[(sa, kind), (sb, kind)]);
                for op in [Binary::Add, Binary::Sub, Binary::Mul] {
                    let want = on_cpu("binary", op, &inputs[0], &inputs[1]).unwrap();
                    let [a, b] = [0, 1].map(|i| device.tensor(&inputs[i], kind));
                    let (got, shape) = binary("binary", op, (&a, sa), (&b, sb)).unwrap();
                    assert_eq!(shape, want.shape());
                    compare(&format!("{sa:?} {sb:?} {kind:?}"), &got, &want, Bound::of(kind, kind, 1));
                }
            }
        }
    }

    #[test]
    fn functions_casts_and_fills_agree_with_f64() {
        let Some(device) = cuda() else { return };
        for kind in [Kind::F32, Kind::F64] {
            let inputs = tensors(&[(&[5, 257], kind)]);
            let positive: Vec<f64> = inputs[0].to_f64().unwrap().iter().map(|x| x.abs() + 0.5).collect();
            let x = device.tensor(&crate::Tensor::from_vec(inputs[0].device(), &[5, 257], positive).unwrap(), kind);
            let of = device.numbers(&x);
            type Function = fn(f64) -> f64;
            let functions: [(Unary, Function); 6] = [
                (Unary::Scale, |x| 3.0 * x),
                (Unary::Exp, f64::exp),
                (Unary::Ln, f64::ln),
                (Unary::Sigmoid, |x| 1.0 / (1.0 + (-x).exp())),
                (Unary::Slope, |x| x * (1.0 - x)),
                (Unary::Inverse, |x| 1.0 / x),
            ];
            let expect = |name: &str, got: &CudaBuffer, want: Vec<f64>, bound| {
                let want = crate::Tensor::from_vec(inputs[0].device(), &[want.len()], want).unwrap();
                compare(name, got, &want, bound);
            };
            for (f, on_host) in functions {
                let got = unary("unary", f, &x, 3.0).unwrap();
                expect(&format!("{f:?}"), &got, of.iter().map(|&x| on_host(x)).collect(), Bound::of(kind, kind, 4));
            }
            let mask: Vec<u32> = (0..257).map(|i| u32::from(i % 3 == 0)).collect();
            let on = device.cuda().upload("mask", &mask).unwrap();
            let masked = of.iter().enumerate().map(|(i, &x)| if i % 257 % 3 == 0 { -7.0 } else { x }).collect();
            expect("mask", &mask_fill(&x, &on, -7.0).unwrap(), masked, Bound::exact());
            expect("full", &full(device.cuda(), kind, 1025, 2.5).unwrap(), vec![2.5; 1025], Bound::exact());
            let mut sum = device.cuda().zeros("sum", kind, x.len()).unwrap();
            add_into(&mut sum, &x).unwrap();
            add_into(&mut sum, &x).unwrap();
            expect("sum", &sum, of.iter().map(|x| 2.0 * x).collect(), Bound::exact());
            let rounded: Vec<f64> = of.iter().map(|&x| crate::testing::bf16(x)).collect();
            let back = cast(&cast(&x, Kind::Bf16).unwrap(), kind).unwrap();
            expect("bf16 and back", &back, rounded.clone(), Bound::exact());
            // behind a part of an odd length, where pieces of 16 bytes are cut
            let joined = join("join", &[&x, &x], Kind::Bf16).unwrap();
            expect("joined", &joined, [&rounded[..], &rounded[..]].concat(), Bound::exact());
            expect(
                "joined in full",
                &join("join", &[&x, &x], kind).unwrap(),
                [&of[..], &of[..]].concat(),
                Bound::exact(),
            );
        }
    }
}
