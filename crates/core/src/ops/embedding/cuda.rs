//! The launches. Places are sorted by token on the host, where the batch comes from, so that the sums have an order.

use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};

static SOURCE: Source = Source { name: "embedding", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// The token ids of a batch on the device, in order and by token.
#[derive(Debug)]
pub struct Ids {
    ids: CudaBuffer,
    tokens: CudaBuffer,
    starts: CudaBuffer,
    places: CudaBuffer,
}

impl Ids {
    /// Sorts and uploads ids, all of which are below `vocab`.
    ///
    /// # Errors
    /// When one is not, or memory runs out.
    pub fn new(device: &CudaDevice, ids: &[u32], vocab: usize) -> Result<Self> {
        let op = "embedding";
        if let Some(place) = ids.iter().position(|&id| id as usize >= vocab) {
            let what = format!("token id {} at place {place} is not below the vocabulary size {vocab}", ids[place]);
            return Err(crate::Error::invalid(op, what));
        }
        let mut places: Vec<u32> = (0..ids.len() as u32).collect();
        places.sort_by_key(|&p| ids[p as usize]);
        let (mut tokens, mut starts) = (Vec::new(), Vec::new());
        for (i, &place) in places.iter().enumerate() {
            let id = ids[place as usize];
            if tokens.last() != Some(&id) {
                tokens.push(id);
                starts.push(i as u32);
            }
        }
        starts.push(ids.len() as u32);
        let upload = |x: &[u32]| device.upload(op, x);
        Ok(Ids { ids: upload(ids)?, tokens: upload(&tokens)?, starts: upload(&starts)?, places: upload(&places)? })
    }
}

/// Rows of `w [v, width]`.
///
/// # Errors
/// When memory runs out.
pub fn forward(w: &CudaBuffer, ids: &Ids, width: usize) -> Result<CudaBuffer> {
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
pub fn backward(dy: &CudaBuffer, ids: &Ids, width: usize, dw: &mut CudaBuffer) -> Result<()> {
    ensure!(dy.len() == ids.ids.len() * width, "embedding", "{dy:?} for {} ids of width {width}", ids.ids.len());
    let kernel = dy.device().kernel(&unit(dy.kind()), "embedding_backward")?;
    let args = [dy, &ids.tokens, &ids.starts, &ids.places, dw].map(Arg::Buffer);
    // SAFETY: the kernel's parameters in order; a block a token that occurs.
    unsafe { kernel.launch(Grid::line(ids.tokens.len(), 256), &[&args[..], &[Arg::int(width)]].concat()) }
}

#[cfg(test)]
mod tests {
    use super::super::embedding;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::tape::Tape;

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (vocab, width, tokens) in [(1, 1, 1), (17, 5, 97), (300, 257, 63)] {
            for kind in [Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[vocab, width], kind), (&[tokens, width], kind)]);
                let ids: Vec<u32> = (0..tokens).map(|i| (i * i % vocab) as u32).collect();
                let tape = Tape::new();
                let w = tape.leaf(inputs[0].clone());
                let out = embedding(&tape, &w, &crate::Ids::new(inputs[0].device(), &[tokens], &ids).unwrap()).unwrap();
                let grads = tape.backward_from(&out, inputs[1].clone()).unwrap();
                let on = super::Ids::new(device.cuda(), &ids, vocab).unwrap();
                let name = format!("{vocab} x {width}, {tokens} {kind:?}");
                let y = super::forward(&device.tensor(&inputs[0], kind), &on, width).unwrap();
                compare(&name, &y, &out.value, Bound::exact());
                let mut dw = device.cuda().zeros("dw", kind, vocab * width).unwrap();
                super::backward(&device.tensor(&inputs[1], kind), &on, width, &mut dw).unwrap();
                compare(&name, &dw, grads.get(&w).unwrap(), Bound::of(kind, kind, tokens));
            }
        }
    }
}
