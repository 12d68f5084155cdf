//! The bias of chunks that were chosen by other means, and its gradient, on a CUDA device: the op `softmax_bias`. Scores are computed again in
//! backward, as those of entmax routing are.

use super::plain::RoutedGradients;
use super::router::ROUTER;
use super::router_backward::{Slope, gradients};
use super::scored::Scored;
use super::{BlockMask, Strided, check_chunk};
use crate::device::cuda::{Arg, CudaBuffer, Kind};
use crate::error::Result;
use crate::ops::attention::routing::LEAST;
use crate::ops::attention::{Center, Dims, Entmax, RouterGradient};

/// As no entmax is solved, the definition that tells the router's kernels apart is given a fixed value.
const SOFTMAX: f64 = 1.5;

/// A number an entry of the mask, f32, 0 for the own chunk.
#[derive(Debug)]
pub struct ListedBias {
    /// w, the mean over the group of softmax over the listed chunks before the own one.
    pub weights: CudaBuffer,
    /// log w.
    pub bias: CudaBuffer,
    /// p of every head, `[entries, group]`, where it was asked for.
    pub heads: Option<CudaBuffer>,
}

/// The bias of the entries of `mask` for `q [b, t, h, d]` and the summaries `kbar [b, n, g, d]`, in bf16.
///
/// # Errors
/// When extents do not fit, or a sequence has more chunks than a block has room for.
pub fn softmax_bias(
    dims: Dims,
    q: Strided,
    kbar: &CudaBuffer,
    mask: &BlockMask,
    gamma: f64,
    watch: bool,
) -> Result<ListedBias> {
    let (op, device, chunk) = ("softmax_bias", kbar.device(), mask.chunk_size());
    check_chunk(op, chunk)?;
    mask.check(op, dims)?;
    let scored = Scored::new(op, dims, q, (kbar, dims.t / chunk), |_| 0)?;
    let floats = |width: usize| device.alloc(op, Kind::F32, mask.entries() * width);
    let (weights, bias) = (floats(1)?, floats(1)?);
    let heads = watch.then(|| floats(dims.group())).transpose()?;
    let (_, sizes, rest) = scored.cut();
    let lists = [mask.cells(), mask.first(), &weights, &bias].map(Arg::Buffer);
    let heads_arg = heads.as_ref().map_or(Arg::Null, Arg::Buffer);
    let numbers = [Arg::F32((gamma / (dims.d as f64).sqrt()) as f32), Arg::F32(LEAST as f32)];
    let args = [&scored.operands()[..], &lists, &[heads_arg], &sizes, &[Arg::int(chunk)], &rest, &numbers].concat();
    scored.launch((&ROUTER, SOFTMAX), "router_listed", &args)?;
    Ok(ListedBias { weights, bias, heads })
}

/// Gradients of [`softmax_bias`] from those of the bias of every entry, `dbias` (f32). `watch` asks for the gradients of the scores themselves.
///
/// # Errors
/// As [`softmax_bias`].
pub fn softmax_bias_backward(
    dims: Dims,
    q: Strided,
    kbar: &CudaBuffer,
    mask: &BlockMask,
    dbias: &CudaBuffer,
    gamma: f64,
    watch: bool,
) -> Result<RoutedGradients> {
    let settings = Entmax {
        chunk_size: mask.chunk_size(),
        alpha: SOFTMAX,
        gamma,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::Full,
    };
    gradients(("softmax_bias", dims), (q, kbar), (mask, Slope::Listed), dbias, settings, watch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Kind::{Bf16, F32};
    use crate::ops::attention::{Routes, softmax_bias as on_cpu};
    use crate::ops::cuda::testing::{cuda, tensors};
    use crate::tape::Tape;
    use crate::{Tensor, testing};

    /// The bias of lists that no score has chosen, and its gradients, against the CPU in f64 on the same operands. A score is a sum of d products
    /// in f32 and reaches some 3; p, w and log w are as far off relatively; a gradient of a score is p / w times that of log w.
    #[test]
    fn the_bias_of_given_chunks_and_its_gradients_agree_with_the_cpu() {
        let Some(gpu) = cuda() else { return };
        for ([b, t, h, g, d], chunk) in [
            ([1, 5, 2, 1, 32], 4),
            ([2, 130, 4, 2, 16], 4),
            ([1, 300, 6, 2, 64], 16),
            ([1, 1100, 16, 1, 128], 64),
            ([1, 300, 3, 3, 24], 8),
        ] {
            let (dims, n, gamma) = (Dims { b, t, h, g, d }, t / chunk, 0.9);
            let host = tensors(&[(&[b, t, h, d], Bf16), (&[b, n, g, d], Bf16)]);
            let mut rng = crate::rng::Rng::new(3);
            let choose = |_, _, query: usize, chosen: &mut Vec<u32>| {
                chosen.extend((0..(query / chunk) as u32).filter(|_| rng.uniform() < 0.4));
            };
            let routes = Routes::from_choice(host[0].device(), (b, g, t), chunk, choose).unwrap();
            let list = routes.to_host().unwrap();
            let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
            let tape = Tape::new();
            let vars: Vec<_> = host.iter().map(|x| tape.leaf(x.clone())).collect();
            let want = on_cpu(&tape, &vars[0], &vars[1], routes.clone(), gamma).unwrap();
            let seed = testing::normal(host[0].device(), &[list.len()], 9);
            let grads = tape.backward_from(&want.bias, seed.clone()).unwrap();

            let (q, kbar) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
            let got = softmax_bias(dims, (&q, 0, h * d), &kbar, &mask, gamma, true).unwrap();
            let order = list.by_cell();
            let by_cell = |x: &Tensor| -> Vec<f64> {
                let (x, wide) = (x.to_f64().unwrap(), x.numel() / list.len());
                order.iter().flat_map(|&e| x[e as usize * wide..][..wide].to_vec()).collect()
            };
            let name = format!("{dims:?} chunk {chunk}");
            let bound = 2.0 * 3.0 * (8.0 + d as f64) / f64::from(1 << 24);
            let check = |what: &str, got: &[f64], want: &[f64], bound: f64| {
                assert_eq!(got.len(), want.len(), "{what} of {name}");
                let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
                let off = |(g, w): (&f64, &f64)| if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
                let far = got.iter().zip(want).map(off).fold(0.0, f64::max);
                assert!(far <= bound, "{what} of {name}: {far:e} > {bound:e}");
            };
            check("w", &gpu.numbers(&got.weights), &by_cell(&want.weights), bound);
            check("bias", &gpu.numbers(&got.bias), &by_cell(&want.bias.value), bound);
            check("p", &gpu.numbers(got.heads.as_ref().unwrap()), &by_cell(want.heads.as_ref().unwrap()), bound);
            let dbias = by_cell(&seed);
            let dbias = gpu.tensor(&Tensor::from_vec(seed.device(), &[dbias.len()], dbias).unwrap(), F32);
            let d = softmax_bias_backward(dims, (&q, 0, h * d), &kbar, &mask, &dbias, gamma, true).unwrap();
            let (dq, dkbar) = d.operands.expect("it is not stopped");
            // as many roundings again on the way back, and ds as two bf16 (16 bits); sums of up to t of them
            let bound = 4.0 * bound + 1.0 / f64::from(1 << 16);
            check("dq", &gpu.numbers(&dq), &grads.get(&vars[0]).unwrap().to_f64().unwrap(), bound);
            check("dkbar", &gpu.numbers(&dkbar), &grads.get(&vars[1]).unwrap().to_f64().unwrap(), bound);
            check("norm", &[gpu.numbers(&d.squares)[0].sqrt()], &[want.score_gradient.read().unwrap()], bound);
        }
    }
}
