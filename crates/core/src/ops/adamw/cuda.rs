//! The launches: all parameters of an update in one, or as many as a table holds.

use super::AdamW;
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Table, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{real, same};

static SOURCE: Source = Source { name: "adamw", text: include_str!("kernel.cu") };

/// Parameters of a launch: 72 bytes each of the 4096 that a kernel's parameters may have.
const MANY: usize = 48;

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into()), ("MANY", MANY.to_string())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// A parameter's part in an update.
pub struct Item<'a> {
    /// Its rates; everything else is the same for all parameters of an update.
    pub settings: AdamW,
    /// Parameter p, moments m and v.
    pub state: [&'a mut CudaBuffer; 3],
    /// Its gradient.
    pub g: &'a CudaBuffer,
    /// Gets p as bf16.
    pub operand: Option<&'a mut CudaBuffer>,
}

/// Updates all of them, with the gradients multiplied by the one f64 in `scale` where it is given; where that is not finite, nothing changes.
///
/// # Errors
/// When kinds or lengths differ.
pub fn adamw(items: &mut [Item], scale: Option<&CudaBuffer>) -> Result<()> {
    let op = "adamw";
    if let Some(s) = scale {
        ensure!((s.kind(), s.len()) == (Kind::F64, 1), op, "{s:?} is no factor");
    }
    let Some(first) = items.first() else { return Ok(()) };
    let (s, kind) = (first.settings, first.state[0].kind());
    for Item { settings: own, state: [p, m, v], g, operand } in &*items {
        same(op, &[first.state[0], p, m, v, g])?;
        ensure!([m.len(), v.len(), g.len()] == [p.len(); 3], op, "{m:?}, {v:?} and {g:?} for {p:?}");
        let shared = |s: &AdamW| (s.beta1.to_bits(), s.beta2.to_bits(), s.eps.to_bits(), s.step);
        ensure!(shared(own) == shared(&s), op, "{own:?} and {s:?} in one update");
        if let Some(o) = operand {
            ensure!((o.kind(), o.len()) == (Kind::Bf16, p.len()), op, "operand {o:?} for {p:?}");
        }
    }
    let root = (1.0 / (1.0 - s.beta2.powf(s.step as f64))).sqrt();
    let numbers = [s.beta1, s.beta2, 1.0 - s.beta1, 1.0 - s.beta2, root, s.eps].map(|x| real(kind, x));
    let scale = scale.map_or(Arg::Null, Arg::Buffer);
    for items in items.chunks(MANY) {
        let (mut table, mut blocks) = (Table::new(MANY * 9), 0);
        for Item { settings: s, state: [p, m, v], g, operand } in items {
            for buffer in [&**p, m, v, g] {
                table.buffer(buffer);
            }
            match operand.as_deref() {
                Some(operand) => table.buffer(operand),
                None => table.null(),
            }
            table.long(p.len() as u64);
            table.long(blocks as u64);
            table.f64(1.0 - s.lr * s.weight_decay);
            table.f64(s.lr / (1.0 - s.beta1.powf(s.step as f64)));
            blocks += p.len().div_ceil(256);
        }
        let kernel = items[0].g.device().kernel(&unit(kind), "adamw")?;
        let args = [&[Arg::Table(&table), Arg::int(items.len()), scale], &numbers[..]].concat();
        // SAFETY: the kernel's parameters in order; the table has its nine words a row, and blocks cover every parameter.
        unsafe { kernel.launch(Grid::line(blocks, 256), &args)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{AdamW, adamw};
    use super::Item;
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
                let item = Item { settings: s, state, g: &g, operand: Some(&mut operand) };
                super::adamw(&mut [item], Some(&scale)).unwrap();
            }
            for (got, want) in [(&gp, &p), (&gm, &m), (&gv, &v)] {
                compare(&format!("{kind:?}"), got, want, Bound::of(kind, kind, 8));
            }
            compare("operand", &operand, &p, Bound::of(kind, Kind::Bf16, 8));
        }
    }

    /// More parameters than a table holds, of sizes that do and do not fill their blocks, each with rates of its own.
    #[test]
    fn many_parameters_at_once_are_each_updated_alone() {
        let Some(device) = cuda() else { return };
        let sizes: Vec<usize> = (0..2 * super::MANY + 3).map(|i| 1 + i * 37 % 700).collect();
        let settings =
            |i: usize| AdamW { lr: 1e-3 * i as f64, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3 };
        let buffers = |n: usize| tensors(&[(&[n], Kind::F32), (&[n], Kind::F32), (&[n], Kind::F32), (&[n], Kind::F32)]);
        let mut on: Vec<Vec<_>> = sizes
            .iter()
            .map(|&n| {
                let positive = |(i, x): (usize, crate::Tensor)| {
                    let x =
                        if i == 2 { x.to_f64().unwrap().iter().map(|x| x * x).collect() } else { x.to_f64().unwrap() };
                    device.tensor(&crate::Tensor::from_vec(&crate::testing::device(), &[n], x).unwrap(), Kind::F32)
                };
                buffers(n).into_iter().enumerate().map(positive).collect()
            })
            .collect();
        let copy = |x: &crate::device::cuda::CudaBuffer| {
            let mut to = device.cuda().alloc("test", x.kind(), x.len()).unwrap();
            to.copy_from(x).unwrap();
            to
        };
        let mut alone: Vec<Vec<_>> = on.iter().map(|all| all.iter().map(copy).collect()).collect();
        fn item(settings: AdamW, all: &mut [crate::device::cuda::CudaBuffer]) -> Item<'_> {
            let [p, m, v, g] = all else { unreachable!("four buffers") };
            Item { settings, state: [p, m, v], g, operand: None }
        }
        let mut items: Vec<Item> = on.iter_mut().enumerate().map(|(i, all)| item(settings(i), all)).collect();
        super::adamw(&mut items, None).unwrap();
        for (i, all) in alone.iter_mut().enumerate() {
            super::adamw(&mut [item(settings(i), all)], None).unwrap();
        }
        for (together, alone) in on.iter().zip(&alone) {
            for (x, y) in together.iter().zip(alone) {
                assert_eq!(x.download::<f32>().unwrap(), y.download::<f32>().unwrap());
            }
        }
    }
}
