//! The launches. Places are sorted by token on the host ([`CudaIds::by_id`]), so that the sums have an order.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ids::CudaIds;

static SOURCE: Source = Source { name: "embedding", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Rows of `w [v, width]`.
///
/// # Errors
/// When memory runs out.
pub(crate) fn forward(w: &CudaBuffer, ids: &CudaIds, width: usize) -> Result<CudaBuffer> {
    let (op, device) = ("embedding", w.device());
    let y = device.alloc(op, w.kind(), ids.ids.len() * width)?;
    let kernel = device.kernel(&unit(w.kind()), "embedding_forward")?;
    let args = [&[w, &ids.ids, &y].map(Arg::Buffer)[..], &[Arg::Long(y.len() as i64), Arg::int(width)]].concat();
    // SAFETY: the kernel's parameters in order; a thread an element of y, ids are below v.
    unsafe { kernel.launch(Grid::over(y.len(), 256), &args)? };
    Ok(y)
}

/// Adds the gradient of w to `dw`.
///
/// # Errors
/// When the extents do not fit.
pub(crate) fn backward(dy: &CudaBuffer, ids: &CudaIds, width: usize, dw: &mut CudaBuffer) -> Result<()> {
    ensure!(dy.len() == ids.ids.len() * width, "embedding", "{dy:?} for {} ids of width {width}", ids.ids.len());
    let kernel = dy.device().kernel(&unit(dy.kind()), "embedding_backward")?;
    let sorted = ids.by_id()?;
    let args = [dy, &sorted.tokens, &sorted.starts, &sorted.places, dw].map(Arg::Buffer);
    // SAFETY: the kernel's parameters in order; a block a token that occurs.
    unsafe { kernel.launch(Grid::line(sorted.tokens.len(), 256), &[&args[..], &[Arg::int(width)]].concat()) }
}

#[cfg(test)]
mod tests {
    use super::super::embedding;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (vocab, width, tokens) in [(1, 1, 1), (17, 5, 97), (300, 257, 63)] {
            for kind in [Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[vocab, width], kind), (&[tokens, width], kind)]);
                let ids: Vec<u32> = (0..tokens).map(|i| (i * i % vocab) as u32).collect();
                let of = crate::Ids::new(inputs[0].device(), &[tokens], &ids).unwrap();
                let (want, [dw_want]) = reference(&inputs, |tape, [w]| embedding(tape, w, &of));
                let on = crate::Ids::new(&device.device(), &[tokens], &ids).unwrap();
                let on = on.on_cuda("test", device.cuda()).unwrap();
                let name = format!("{vocab} x {width}, {tokens} {kind:?}");
                let y = super::forward(&device.tensor(&inputs[0], kind), on, width).unwrap();
                compare(&name, &y, &want, Bound::exact());
                let mut dw = device.cuda().zeros("dw", kind, vocab * width).unwrap();
                super::backward(&device.tensor(&inputs[1], kind), on, width, &mut dw).unwrap();
                compare(&name, &dw, &dw_want, Bound::of(kind, kind, tokens));
            }
        }
    }
}
