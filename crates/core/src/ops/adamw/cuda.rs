//! The launch: any range of a flat arena of parameters with one decay.

use std::ops::Range;

use super::AdamW;
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{real, same};

static SOURCE: Source = Source { name: "adamw", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Updates parameters p, moments m and v in `range` by the gradient g, writes p as bf16 to `operand` where it is given, and
/// multiplies g with the one f64 in `scale` where it is given; where that is not finite, nothing changes.
///
/// # Errors
/// When kinds or lengths differ.
pub fn adamw(
    s: AdamW,
    [p, m, v]: [&mut CudaBuffer; 3],
    g: &CudaBuffer,
    operand: Option<&mut CudaBuffer>,
    scale: Option<&CudaBuffer>,
    range: Range<usize>,
) -> Result<()> {
    let (op, kind) = ("adamw", p.kind());
    same(op, &[p, m, v, g])?;
    ensure!([p.len(), m.len(), v.len(), g.len()] == [p.len(); 4] && range.end <= p.len(), op, "{range:?} of {p:?}");
    if let Some(s) = scale {
        ensure!((s.kind(), s.len()) == (Kind::F64, 1), op, "{s:?} is no factor");
    }
    if let Some(o) = &operand {
        ensure!((o.kind(), o.len()) == (Kind::Bf16, p.len()), op, "operand {o:?} for {p:?}");
    }
    let kernel = p.device().kernel(&unit(kind), "adamw")?;
    let at = |b| Arg::At(b, range.start);
    let step = s.lr / (1.0 - s.beta1.powf(s.step as f64));
    let root = (1.0 / (1.0 - s.beta2.powf(s.step as f64))).sqrt();
    let numbers = [s.beta1, s.beta2, 1.0 - s.beta1, 1.0 - s.beta2, 1.0 - s.lr * s.weight_decay, step, root, s.eps];
    let buffers =
        [at(p), at(m), at(v), at(g), operand.as_deref().map_or(Arg::Null, at), scale.map_or(Arg::Null, Arg::Buffer)];
    let args = [&buffers[..], &[Arg::Long(range.len() as i64)], &numbers.map(|x| real(kind, x))].concat();
    // SAFETY: the kernel's parameters in order; a thread an element of the range.
    unsafe { kernel.launch(Grid::over(range.len(), 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::super::{AdamW, adamw};
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};

    #[test]
    fn agrees_with_the_cpu_over_three_updates() {
        let Some(device) = cuda() else { return };
        for kind in [Kind::F32, Kind::F64] {
            let n = 1025;
            let inputs = tensors(&[(&[n], kind), (&[n], kind), (&[n], kind), (&[n], kind), (&[n], kind), (&[n], kind)]);
            let [mut p, mut m, mut v] = [0, 1, 2].map(|i| inputs[i].clone());
            v = crate::Tensor::from_vec(v.device(), &[n], v.to_f64().unwrap().iter().map(|x| x * x).collect()).unwrap();
            let [mut gp, mut gm, mut gv] = [&p, &m, &v].map(|x| device.tensor(x, kind));
            let mut operand = device.cuda().alloc("operand", Kind::Bf16, n).unwrap();
            for step in 1..4 {
                let scale = device.cuda().upload("scale", &[0.25f64]).unwrap();
                let s = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step };
                let g = &inputs[2 + step as usize];
                let factor = crate::Tensor::full(g.device(), &[], crate::DType::F64, 0.25).unwrap();
                adamw(s, &mut p, &mut m, &mut v, g, &factor).unwrap();
                let g = device.tensor(g, kind);
                let state = [&mut gp, &mut gm, &mut gv];
                super::adamw(s, state, &g, Some(&mut operand), Some(&scale), 0..n).unwrap();
            }
            for (got, want) in [(&gp, &p), (&gm, &m), (&gv, &v)] {
                compare(&format!("{kind:?}"), got, want, Bound::of(kind, kind, 8));
            }
            compare("operand", &operand, &p, Bound::of(kind, Kind::Bf16, 8));
        }
    }
}
