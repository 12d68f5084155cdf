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
        let number =
            |&c: &usize| first[cell(c)] as usize + (cells[cell(c)] & ((1 << (token % 64)) - 1)).count_ones() as usize;
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
                        (0..group).all(|i| (heads[place * group + i] > 0.0) == (want_heads[entry * group + i] > 0.0))
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
            let got =
                entmax_routing_backward(dims, (&q, 0, h * d), &kbar, kept(&routing), &dbias, settings, true).unwrap();
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

/// (kv head of a sequence, token, chunk) of every entry, in their order.
fn entries(dims: Dims, chunk: usize, mask: &BlockMask) -> Vec<[usize; 3]> {
    let cells: Vec<u64> = mask.cells().download().unwrap();
    let (tiles, chunks) = (dims.t.div_ceil(64), dims.t.div_ceil(chunk));
    let of = |(i, &bits): (usize, &u64)| {
        let place = [i / (tiles * chunks), i / chunks % tiles * 64, i % chunks];
        let set = (0..64).filter(move |r| bits >> r & 1 == 1);
        set.map(move |r| [place[0], place[1] + r, place[2]]).collect::<Vec<_>>()
    };
    cells.iter().enumerate().flat_map(of).collect()
}

/// Of every head of a query the norm and the chunks of its gradient, another direction, the sum zero; and both sides multiply it. Rounding
/// of f32 scores is in the norm, 16 bits of a gradient in the products.
#[test]
// Above 60 lines: what both sides should give is made from one walk over the entries, which the norms are counted in, too.
fn a_placebo_has_the_norms_of_the_gradient_and_both_sides_multiply_it() {
    let Some(gpu) = cuda() else { return };
    for ([b, t, h, g, d], chunk) in &SHAPES[1..] {
        let (dims, n, chunk) = (Dims { b: *b, t: *t, h: *h, g: *g, d: *d }, t / chunk, *chunk);
        let host = tensors(&[(&[dims.b, dims.t, dims.h, dims.d], Bf16), (&[dims.b, n, dims.g, dims.d], Bf16)]);
        let (q, kbar) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
        let settings =
            |gradient| Entmax { chunk_size: chunk, alpha: 1.5, gamma: 0.7, sigma: 2.0, center: Center::None, gradient };
        let strided = (&q, 0, dims.h * dims.d);
        let routing = entmax_routing(dims, strided, &kbar, None, settings(RouterGradient::Full)).unwrap();
        let dbias = gpu.tensor(&tensors(&[(&[routing.mask.entries()], F32)])[0], F32);
        let of = |gradient| {
            let kept = kept(&routing);
            entmax_routing_backward(dims, strided, &kbar, kept, &dbias, settings(gradient), true).unwrap()
        };
        let (full, placebo) = (of(RouterGradient::Full), of(RouterGradient::Placebo));
        let [f, p] = [&full, &placebo].map(|d| gpu.numbers(&d.watched.as_ref().unwrap().0));
        let (group, factor) = (dims.group(), 0.7 / (dims.d as f64).sqrt());
        let mut heads: std::collections::BTreeMap<[usize; 3], Vec<(f64, f64)>> = Default::default();
        let [q, kbar] = [&host[0], &host[1]].map(|x| x.to_f64().unwrap());
        let (mut dq, mut dkbar) = (vec![0.0; q.len()], vec![0.0; kbar.len()]);
        for (entry, [row, token, c]) in entries(dims, chunk, &routing.mask).into_iter().enumerate() {
            if c == token / chunk {
                continue;
            }
            for e in 0..group {
                let ds = p[entry * group + e];
                heads.entry([row, token, e]).or_default().push((f[entry * group + e], ds));
                let (batch, kv) = (row / dims.g, row % dims.g);
                let from = ((batch * dims.t + token) * dims.h + kv * group + e) * dims.d;
                let to = ((batch * n + c) * dims.g + kv) * dims.d;
                for i in 0..dims.d {
                    dq[from + i] += factor * ds * kbar[to + i];
                    dkbar[to + i] += factor * ds * q[from + i];
                }
            }
        }
        let (got_dq, got_dkbar) = placebo.operands.as_ref().unwrap();
        let apart = [far(&gpu.numbers(got_dq), &dq), far(&gpu.numbers(got_dkbar), &dkbar)];
        assert!(apart.iter().all(|&x| x <= 1e-4), "{dims:?}: dq and dkbar off by {apart:?}");
        let size = f.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let (mut cosines, mut compared) = (0.0, 0);
        for (at, pairs) in &heads {
            let sum = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>();
            let (before, after) = (sum(|x| x.0 * x.0).sqrt(), sum(|x| x.1 * x.1).sqrt());
            assert!((before - after).abs() <= 1e-4 * before + 1e-5 * size, "{dims:?} {at:?}: {before} {after}");
            assert!(sum(|x| x.1).abs() <= 1e-4 * before + 1e-6 * size, "{dims:?} {at:?}: {pairs:?}");
            assert!(pairs.iter().all(|x| x.0 != 0.0 || x.1 == 0.0), "{dims:?} {at:?}: {pairs:?}");
            if pairs.iter().filter(|x| x.0 != 0.0).count() > 2 {
                (cosines, compared) = (cosines + sum(|x| x.0 * x.1) / (before * after), compared + 1);
            }
        }
        // the mean cosine of independent directions, whose deviation is below 1 / sqrt(compared)
        assert!(compared > 100, "{dims:?}: {compared}");
        let mean = cosines / f64::from(compared);
        assert!(mean.abs() < 4.0 / f64::from(compared).sqrt(), "{dims:?}: {mean}");
        let norms = [&full, &placebo].map(|d| gpu.numbers(&d.squares)[0].sqrt());
        assert!((norms[0] - norms[1]).abs() <= 1e-4 * norms[0], "{dims:?}: {norms:?}");
    }
}

#[test]
fn same_bits_every_run() {
    let Some(gpu) = cuda() else { return };
    let (dims, chunk) = (Dims { b: 2, t: 700, h: 8, g: 2, d: 64 }, 16);
    let host = tensors(&[(&[2, 700, 8, 64], Bf16), (&[2, 43, 2, 64], Bf16)]);
    let (q, kbar) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
    for gradient in [RouterGradient::Full, RouterGradient::StraightThrough, RouterGradient::Placebo] {
        let settings = Entmax { chunk_size: chunk, alpha: 1.5, gamma: 0.7, sigma: 2.0, center: Center::Mean, gradient };
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
