//! The gradient through the router on a CUDA device: from the bias of every entry to the queries and the chunk summaries.

use super::plain::RoutedGradients;
use super::router::{BACKWARD, factor};
use super::scored::{SOFTMAX, Scored, beside_scores};
use super::{BlockMask, Strided, check_chunk};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind};
use crate::error::{Result, ensure};
use crate::ops::attention::{Center, Dims, Entmax, RouterGradient};
use crate::ops::cuda::reduce::sum_axis;

/// Blocks of the key side at most, where a segment is not all tokens: twice the three that each multiprocessor of a large card has at a time. A
/// constant, so that the order of sums follows from the shape alone.
const BLOCKS: usize = 792;

/// What backward needs of [`super::StreamedRouting`].
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    /// Who attends what.
    pub mask: &'a BlockMask,
    /// w of every entry.
    pub weights: &'a CudaBuffer,
    /// The threshold of every row.
    pub taus: &'a CudaBuffer,
}

/// Gradients of [`super::entmax_routing`] from those of the bias of every entry, `dbias` (f32), in the order of the mask. `watch` asks for the
/// gradients of the scores themselves.
///
/// # Errors
/// As [`super::entmax_routing`].
pub fn entmax_routing_backward(
    dims: Dims,
    q: Strided,
    kbar: &CudaBuffer,
    routing: Kept,
    dbias: &CudaBuffer,
    settings: Entmax,
    watch: bool,
) -> Result<RoutedGradients> {
    let slope = match settings.gradient {
        RouterGradient::StraightThrough => Slope::Visible,
        RouterGradient::Full | RouterGradient::Stopped | RouterGradient::Flipped | RouterGradient::Placebo => {
            Slope::Entmax { taus: routing.taus, weights: routing.weights }
        }
    };
    gradients(("entmax_routing", dims), (q, kbar), (routing.mask, slope), dbias, settings, watch)
}

/// What a head's weight of a chunk changes by with its score.
#[derive(Debug, Clone, Copy)]
pub(super) enum Slope<'a> {
    /// p^(2 - alpha) of entmax, from every row's threshold and every entry's w.
    Entmax { taus: &'a CudaBuffer, weights: &'a CudaBuffer },
    /// p of softmax over every visible chunk.
    Visible,
    /// p of softmax over the listed chunks.
    Listed,
}

impl Slope<'_> {
    /// The alpha that kernels are compiled for.
    fn alpha(self, settings: Entmax) -> f64 {
        match self {
            Slope::Entmax { .. } => settings.alpha,
            Slope::Visible | Slope::Listed => SOFTMAX,
        }
    }

    /// What the kernels call it.
    fn arg(self) -> Arg<'static> {
        Arg::Int(match self {
            Slope::Entmax { .. } => 0,
            Slope::Visible => 1,
            Slope::Listed => 2,
        })
    }
}

/// Gradients of the scores behind the bias of every entry; see the kernels for the formula.
pub(super) fn gradients(
    (op, dims): (&'static str, Dims),
    (q, kbar): (Strided, &CudaBuffer),
    (mask, slope): (&BlockMask, Slope),
    dbias: &CudaBuffer,
    settings: Entmax,
    watch: bool,
) -> Result<RoutedGradients> {
    let (device, Dims { b, t, h, g, d }) = (kbar.device(), dims);
    check_chunk(op, settings.chunk_size)?;
    mask.check(op, dims)?;
    let (entries, group) = (mask.entries(), dims.group());
    ensure!(dbias.kind() == Kind::F32 && dbias.len() >= entries, op, "{dbias:?} for {entries} entries");
    let n = t / settings.chunk_size;
    let scored = Scored::new(op, dims, q, (kbar, n), beside_scores(dims, n))?;
    let stopped = settings.gradient == RouterGradient::Stopped;
    let floats = |len| device.alloc(op, Kind::F32, len);
    // of softmax: the logarithm of each row's sum, and the heads' sum of every entry
    let own = match slope {
        Slope::Entmax { .. } => None,
        Slope::Visible | Slope::Listed => Some((floats(b * t * h)?, floats(entries)?)),
    };
    let (shifts, sums) = match (slope, &own) {
        (Slope::Entmax { taus, weights }, _) => (taus, weights),
        (Slope::Visible | Slope::Listed, own) => own.as_ref().map(|(shifts, sums)| (shifts, sums)).expect("made above"),
    };
    let (dq, means, offsets, own) =
        (floats(b * t * h * d)?, floats(b * t * h)?, floats(b * t * g)?, floats(b * t * g)?);
    let squares = device.alloc(op, Kind::F64, b * t * g)?;
    let kept = watch.then(|| Ok((floats(entries * group)?, device.alloc(op, Kind::F64, b * t * g)?))).transpose()?;
    let (kept_scores, pairs) = kept.as_ref().map_or((Arg::Null, Arg::Null), |(s, p)| (Arg::Buffer(s), Arg::Buffer(p)));
    let inputs = [shifts, mask.cells(), mask.first(), sums, dbias].map(Arg::Buffer);
    let outputs = [&dq, &means, &offsets, &own, &squares].map(Arg::Buffer);
    let (_, sizes, rest) = scored.cut();
    let chunk = [Arg::int(settings.chunk_size)];
    let numbers = [factor(settings, d), Arg::F32(settings.alpha as f32), Arg::F32(settings.backward_sigma() as f32)];
    let flag = |x: bool| Arg::Int(i32::from(x));
    let flags = [flag(settings.center == Center::Mean), slope.arg(), flag(stopped)];
    let args =
        [&scored.operands()[..], &inputs, &outputs, &[kept_scores, pairs], &sizes, &chunk, &rest, &numbers, &flags]
            .concat();
    scored.launch((&BACKWARD, slope.alpha(settings)), "router_rows", &args)?;
    let total = |x: &CudaBuffer| sum_axis(x, (1, x.len(), 1));
    let operands = match stopped {
        true => None,
        false => {
            let inputs = [shifts, mask.cells(), mask.first(), sums, dbias, &means, &offsets].map(Arg::Buffer);
            Some((dq, key_side(&scored, &inputs, settings, slope)?))
        }
    };
    Ok(RoutedGradients {
        operands,
        diagonal: sum_axis(&own, (1, b * t, g))?,
        squares: total(&squares)?,
        watched: kept.map(|(scores, pairs)| Ok((scores, total(&pairs)?))).transpose()?,
    })
}

/// dkbar.
fn key_side(scored: &Scored, inputs: &[Arg], settings: Entmax, slope: Slope) -> Result<CudaBuffer> {
    let (Dims { b, t, g, d, .. }, n) = (scored.dims, scored.n);
    let device = scored.device();
    if n == 0 {
        return device.zeros(scored.op, Kind::F32, 0);
    }
    let tiles = n.div_ceil(64);
    let segments = (BLOCKS / (tiles * b * g)).clamp(1, t.div_ceil(64));
    let partial = device.alloc(scored.op, Kind::F32, segments * b * n * g * d)?;
    let (_, sizes, rest) = scored.cut();
    let sizes = [&[Arg::int(b)], &sizes[..], &[Arg::int(settings.chunk_size), rest[0]]].concat();
    let numbers = [factor(settings, d), Arg::F32(settings.alpha as f32), Arg::F32(settings.backward_sigma() as f32)];
    let args = [&scored.operands()[..], inputs, &[Arg::Buffer(&partial)], &sizes, &numbers, &[slope.arg()]].concat();
    // summaries, two tiles of rows, and of two batches' tokens two numbers for each of 64 chunks, 72 apart
    let shared = 3 * scored.operand() + 2 * (64 / scored.dims.group()) * 72 * 8;
    let grid = Grid { blocks: [tiles, b * g, segments], ..Grid::line(1, 128) };
    let kernel = device.kernel(&scored.unit(&BACKWARD, slope.alpha(settings)), "router_keys")?;
    // SAFETY: the kernel's parameters in order; extents were compared with the buffers by the caller.
    unsafe { kernel.launch(grid.shared(shared), &args)? };
    sum_axis(&partial, (1, segments, b * n * g * d))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::Tensor;
    use crate::device::cuda::Kind::{Bf16, F32};
    use crate::ops::attention::cuda::{StreamedRouting, entmax_routing, head_weights};
    use crate::ops::attention::{HostRoutes, entmax_routing as on_cpu};
    use crate::ops::cuda::testing::{cuda, tensors};
    use crate::rng::Rng;
    use crate::tape::{Tape, Watcher};

    /// The numbers that a watcher is told, by name.
    #[derive(Default)]
    struct Told(RefCell<Vec<(String, Vec<f64>)>>);

    impl Watcher for Told {
        fn value(&self, _scope: &str, _name: &str, _value: &Tensor) -> Option<Tensor> {
            None
        }
        fn gradient(&self, _scope: &str, name: &str, value: &Tensor) {
            self.0.borrow_mut().push((name.into(), value.to_f64().unwrap()));
        }
    }

    /// For every query of the CPU's list: (row, token, its entries there, the numbers of its entries on the card), `None` where the
    /// supports differ.
    type Query = (usize, usize, std::ops::Range<usize>, Option<Vec<usize>>);

    fn queries(dims: Dims, chunk: usize, list: &HostRoutes, routing: &StreamedRouting) -> Vec<Query> {
        let cells: Vec<u64> = routing.mask.cells().download().unwrap();
        let first: Vec<u32> = routing.mask.first().download().unwrap();
        let (tiles, chunks) = (dims.t.div_ceil(64), dims.t.div_ceil(chunk));
        let one = |i: usize| {
            let (row, token) = (i / dims.t, i % dims.t);
            let cell = |c: usize| (row * tiles + token / 64) * chunks + c;
            let found: Vec<usize> = (0..chunks).filter(|&c| cells[cell(c)] >> (token % 64) & 1 == 1).collect();
            let listed = list.chunks_of(row / dims.g, row % dims.g, token);
            let same = found.len() == listed.len() && found.iter().zip(listed).all(|(&x, &y)| x == y as usize);
            let number = |&c: &usize| {
                first[cell(c)] as usize + (cells[cell(c)] & ((1 << (token % 64)) - 1)).count_ones() as usize
            };
            let places = same.then(|| found.iter().map(number).collect());
            (row, token, list.entries_of(row / dims.g, row % dims.g, token), places)
        };
        (0..dims.b * dims.g * dims.t).map(one).collect()
    }

    fn kept(of: &StreamedRouting) -> Kept<'_> {
        Kept { mask: &of.mask, weights: &of.weights, taus: &of.taus }
    }

    fn far(got: &[f64], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len());
        let scale = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
        let far = |(g, w): (&f64, &f64)| if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
        got.iter().zip(want).map(far).fold(0.0, f64::max)
    }

    /// A gradient of a score is r / w times that of log w. A score, a sum of d products of order one in f32, is off by up to 3 (8 + d) 2^-24
    /// (it reaches 3), and so is r, which near the edge of the support is as large as the distance to it: entries with a weight below 1e-3
    /// are given no gradient, so that r / w is off by that over 0.03 (alpha 1.5; for the others it is less, or the share is a constant), and
    /// queries whose supports differ are given none at all. As much again for the mean that is subtracted.
    fn bound(d: usize) -> f64 {
        2.0 * 3.0 * (8.0 + d as f64) / f64::from(1 << 24) / 0.03
    }

    const SHAPES: [([usize; 5], usize); 5] = [
        ([1, 5, 2, 1, 32], 16),
        ([2, 130, 4, 2, 16], 4),
        ([1, 300, 6, 2, 64], 16),
        ([1, 1100, 16, 1, 128], 64),
        ([1, 700, 3, 3, 24], 8),
    ];

    #[test]
    // Above 60 lines: every figure has the bound that its own roundings give, with its derivation beside it.
    fn gradients_agree_with_the_cpu() {
        let Some(gpu) = cuda() else { return };
        let mut compared = 0;
        for ([b, t, h, g, d], chunk) in SHAPES {
            let (dims, n) = (Dims { b, t, h, g, d }, t / chunk);
            let host = tensors(&[(&[b, t, h, d], Bf16), (&[b, n, g, d], Bf16), (&[g], F32)]);
            let (q, kbar) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
            let own = gpu.tensor(&host[2], F32);
            for (alpha, center, gradient) in [
                (1.5, Center::Mean, RouterGradient::Full),
                (1.5, Center::None, RouterGradient::Full),
                (1.5, Center::MeanDetached, RouterGradient::StraightThrough),
                (1.5, Center::Mean, RouterGradient::StraightThrough),
                (1.25, Center::None, RouterGradient::Full),
                (2.0, Center::Mean, RouterGradient::Full),
                (1.5, Center::None, RouterGradient::Stopped),
            ] {
                let settings = Entmax { chunk_size: chunk, alpha, gamma: 0.7, sigma: 2.0, center, gradient };
                let name = format!("{dims:?} {settings:?}");
                let told = std::rc::Rc::new(Told::default());
                let tape = Tape::new().watched(told.clone());
                let vars: Vec<_> = host.iter().map(|x| tape.leaf(x.clone())).collect();
                let want = on_cpu(&tape, &vars[0], &vars[1], Some(&vars[2]), settings).unwrap();
                let list = want.routes.to_host().unwrap();
                let weights = want.weights.to_f64().unwrap();
                let routing = entmax_routing(dims, (&q, 0, h * d), &kbar, Some(&own), settings).unwrap();
                let mut queries = queries(dims, chunk, &list, &routing);
                let heads = gpu.numbers(&head_weights(dims, (&q, 0, h * d), &kbar, &routing, settings).unwrap());
                let (want_heads, group) = (want.heads.as_ref().unwrap().to_f64().unwrap(), dims.group());
                for (_, _, entries, places) in &mut queries {
                    // the support of every head: with alpha 2 its edge is a step of the gradient
                    let agree = |places: &Vec<usize>| {
                        let of = |(entry, &place): (usize, &usize)| {
                            (0..group)
                                .all(|i| (heads[place * group + i] > 0.0) == (want_heads[entry * group + i] > 0.0))
                        };
                        entries.clone().zip(places).all(of)
                    };
                    *places = places.take().filter(agree);
                }
                let same = queries.iter().filter(|q| q.3.is_some()).count();
                assert!(same * 100 >= queries.len() * 98, "{name}: {same} of {} supports agree", queries.len());

                let (mut on_host, mut on_card) = (vec![0.0; list.len()], vec![0.0f32; routing.mask.entries()]);
                let mut rng = Rng::new(11);
                for (_, _, entries, places) in &queries {
                    let Some(places) = places else { continue };
                    // a mean that is differentiated gives every entry of a query a gradient, so none may have a small weight
                    let small = weights[entries.start..entries.end - 1].iter().any(|&w| w <= 1e-3);
                    if small && center == Center::Mean {
                        continue;
                    }
                    for (entry, &place) in entries.clone().zip(places) {
                        let own = entry + 1 == entries.end;
                        let x = if own || weights[entry] > 1e-3 { rng.normal() as f32 } else { 0.0 };
                        (on_host[entry], on_card[place]) = (f64::from(x), x);
                    }
                }
                let given = on_host.iter().zip(&weights).filter(|&(&x, &w)| x != 0.0 && w > 0.0).count();
                assert!(t < 100 || given > 100, "{name}: {given} entries of the support have a gradient");
                let seed = Tensor::from_vec(host[0].device(), &[list.len()], on_host).unwrap();
                let grads = tape.backward_from(&want.bias, seed).unwrap();
                let dbias = gpu.cuda().upload("test", &on_card).unwrap();
                let got = entmax_routing_backward(dims, (&q, 0, h * d), &kbar, kept(&routing), &dbias, settings, true)
                    .unwrap();
                let check = |what: &str, got: &[f64], want: &[f64]| {
                    let far = far(got, want);
                    assert!(far <= bound(dims.d), "{what} of {name}: {far:e}");
                };
                check("diagonal", &gpu.numbers(&got.diagonal), &grads.get(&vars[2]).unwrap().to_f64().unwrap());
                match &got.operands {
                    None => assert!(grads.get(&vars[0]).is_none() && grads.get(&vars[1]).is_none(), "{name}"),
                    Some((dq, dkbar)) => {
                        check("dq", &gpu.numbers(dq), &grads.get(&vars[0]).unwrap().to_f64().unwrap());
                        check("dkbar", &gpu.numbers(dkbar), &grads.get(&vars[1]).unwrap().to_f64().unwrap());
                        compared += dkbar.len();
                    }
                }
                let norm = gpu.numbers(&got.squares)[0].sqrt();
                check("norm", &[norm], &[want.score_gradient.read().unwrap()]);
                let (scores, pairs) = got.watched.as_ref().unwrap();
                let scores = gpu.numbers(scores);
                let mut by_entry = vec![0.0; list.len() * group];
                for (_, _, entries, places) in &queries {
                    for (entry, place) in entries.clone().zip(places.iter().flatten()) {
                        for head in 0..group {
                            by_entry[entry * group + head] = scores[place * group + head];
                            let (p, want) = (heads[place * group + head], want_heads[entry * group + head]);
                            assert!((p - want).abs() < 1e-4, "{name}: p of a head {p}, the CPU has {want}");
                        }
                    }
                }
                let told = told.0.borrow();
                let of = |name: &str| &told.iter().find(|(n, _)| n == name).unwrap().1;
                check("scores", &by_entry, of(crate::ops::attention::SCORES));
                let (pairs, want) = (gpu.numbers(pairs)[0], of(crate::ops::attention::PAIRS)[0]);
                // straight through with a mean, the sum of t is zero but for rounding, and so is every chunk's ds off the support
                let rounding = gradient == RouterGradient::StraightThrough && center == Center::Mean;
                assert!(rounding || (pairs - want).abs() <= 0.02 * want, "{name}: {pairs} pairs, the CPU has {want}");
            }
        }
        assert!(compared > 0, "gradients were compared");
    }

    #[test]
    fn same_bits_every_run() {
        let Some(gpu) = cuda() else { return };
        let (dims, chunk) = (Dims { b: 2, t: 700, h: 8, g: 2, d: 64 }, 16);
        let host = tensors(&[(&[2, 700, 8, 64], Bf16), (&[2, 43, 2, 64], Bf16)]);
        let (q, kbar) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
        for gradient in [RouterGradient::Full, RouterGradient::StraightThrough] {
            let settings =
                Entmax { chunk_size: chunk, alpha: 1.5, gamma: 0.7, sigma: 2.0, center: Center::Mean, gradient };
            let count = entmax_routing(dims, (&q, 0, 512), &kbar, None, settings).unwrap().mask.entries();
            let dbias = gpu.tensor(&tensors(&[(&[count], F32)])[0], F32);
            gpu.same_bits(|| {
                let routing = entmax_routing(dims, (&q, 0, 512), &kbar, None, settings)?;
                let d = entmax_routing_backward(dims, (&q, 0, 512), &kbar, kept(&routing), &dbias, settings, false)?;
                let (dq, dkbar) = d.operands.expect("not stopped");
                Ok(vec![routing.taus, dq, dkbar, d.diagonal, d.squares])
            });
        }
    }
}
