//! Kept keys on a card and on the CPU.

use super::*;
use crate::device::cuda::{CudaData, Kind};
use crate::number::{Compute, DType};
use crate::ops::attention::{Center, Entmax, RouterGradient, entmax_routing_after};
use crate::ops::cuda::testing::{Gpu, cuda as card};
use crate::tape::Tape;
use crate::testing::{bf16, device, normal};

/// Normals, on the CPU in f64 and on the card in `kind`, that both hold exactly.
fn pair((cpu, gpu): (&Device, &Gpu), shape: &[usize], kind: Kind, seed: u64) -> [Tensor; 2] {
    let round = |x: f64| match kind {
        Kind::Bf16 => bf16(x),
        Kind::F32 => f64::from(x as f32),
        _ => x,
    };
    let numbers = normal(cpu, shape, seed).to_f64().unwrap().into_iter().map(round).collect();
    let host = Tensor::from_vec(cpu, shape, numbers).unwrap();
    let on = Tensor::from_cuda_data(shape, CudaData::new(gpu.tensor(&host, kind)));
    [host, on]
}

/// The largest difference over the largest number.
fn far(got: &Tensor, want: &Tensor) -> f64 {
    let (got, want) = (got.to_f64().unwrap(), want.to_f64().unwrap());
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let one = |(g, w): (&f64, &f64)| if g.is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
    got.iter().zip(&want).map(one).fold(0.0, f64::max)
}

/// Sums in f64 in another order; of f32, of some thousand terms; p is rounded to bf16, and so is what comes out.
fn bound(kind: Kind) -> f64 {
    match kind {
        Kind::F64 => 1e-12,
        Kind::F32 => 1e-5,
        _ => 3.0 / 256.0,
    }
}

const KINDS: [Kind; 3] = [Kind::Bf16, Kind::F32, Kind::F64];

#[test]
fn spans_of_kept_keys_agree() {
    let Some(gpu) = card() else { return };
    let both = (&device(), gpu);
    // (batch, new, past, query heads, kv heads, width): splits that are empty, a group of one and of sixteen, widths that are padded
    let shapes = [
        (1, 1, 0, 4, 2, 128),
        (2, 1, 700, 8, 2, 64),
        (1, 3, 77, 16, 1, 40),
        (3, 1, 3000, 3, 3, 128),
        (1, 1, 40, 32, 2, 16),
    ];
    let mut odd = 0;
    for (b, t, past, h, g, d) in shapes {
        let capacity = past + t + 5;
        for kind in KINDS {
            let [q, on_q] = pair(both, &[b, t, h, d], kind, 1);
            let [k, on_k] = pair(both, &[b, capacity, g, d], kind, 2);
            let [v, on_v] = pair(both, &[b, capacity, g, d], kind, 3);
            for span in [Span::Causal, Span::Sliding(33)] {
                let want = cached_attention(&q, &k, &v, past, Seen::Span(span, 1.0)).unwrap();
                let got = cached_attention(&on_q, &on_k, &on_v, past, Seen::Span(span, 1.0)).unwrap();
                let off = far(&got, &want);
                assert!(off <= bound(kind), "{kind:?} {:?} {span:?}: {off:e}", (b, t, past, h, g, d));
                odd += usize::from(off > 0.0);
            }
            let error = cached_attention(&on_q, &on_k, &on_v, past, Seen::Span(Span::Causal, 1.5)).unwrap_err();
            assert!(error.to_string().contains("generate without a cache"), "{error}");
        }
    }
    assert!(odd > 0, "something was computed on the card");
}

// Above 60 lines: lists, weights and attention are compared on one set of operands.
#[test]
fn routes_after_kept_tokens_agree() {
    let Some(gpu) = card() else { return };
    let both = (&device(), gpu);
    let mut listed = 0;
    // the last: more heads than a block has teams, all of whose scores are near the largest and more than it has shared memory for
    for (b, t, past, h, g, d, chunk, gamma) in [
        (1, 1, 700, 8, 2, 64, 16, 2.0),
        (2, 2, 130, 4, 2, 32, 4, 2.0),
        (1, 1, 5, 2, 1, 16, 8, 2.0),
        (2, 1, 6000, 16, 4, 128, 64, 2.0),
        (1, 4, 90, 6, 2, 24, 5, 2.0),
        (1, 1, 3000, 32, 2, 40, 2, 0.5),
        (1, 1, 9000, 64, 1, 16, 4, 0.05),
    ] {
        for (kind, alpha, center) in
            KINDS.into_iter().zip([1.5, 1.5, 1.25]).flat_map(|(k, a)| [Center::None, Center::Mean].map(|c| (k, a, c)))
        {
            let name = format!("{kind:?} {:?} {alpha} {center:?}", (b, t, past, h, g, d, chunk));
            let (capacity, n) = (past + t + 5, (past + t) / chunk);
            let [q, on_q] = pair(both, &[b, t, h, d], kind, 1);
            let [k, on_k] = pair(both, &[b, capacity, g, d], kind, 2);
            let [v, on_v] = pair(both, &[b, capacity, g, d], kind, 3);
            let [kbar, on_kbar] = pair(both, &[b, n, g, d], kind, 4);
            let [own, on_own] = pair(both, &[g], if kind == Kind::F64 { Kind::F64 } else { Kind::F32 }, 5);
            let settings =
                Entmax { chunk_size: chunk, alpha, gamma, sigma: 1.3, center, gradient: RouterGradient::Full };
            let tape = Tape::inference();
            let route = |[q, kbar, own]: [&Tensor; 3]| {
                let [q, kbar, own] = [q, kbar, own].map(|x| tape.leaf(x.clone()));
                entmax_routing_after(past, &tape, &q, &kbar, Some(&own), settings).unwrap()
            };
            let (want, got) = (route([&q, &kbar, &own]), route([&on_q, &on_kbar, &on_own]));
            let (host, lists) = (want.routes.to_host().unwrap(), got.routes.to_host().unwrap());
            assert_eq!(got.routes.counts().unwrap().len(), b * g * t);
            // at the edge of a support a chunk may come or go with the rounding of its score
            let small = |w: f64| kind != Kind::F64 && w < 1e-3;
            let numbers = |x: &Tensor| x.to_f64().unwrap();
            let (w, gw) = (numbers(&want.weights), numbers(&got.weights));
            let most = n + 1;
            for row in 0..b * g * t {
                let at = (row / t / g, row / t % g, row % t);
                let (chunks, entries) = (host.chunks_of(at.0, at.1, at.2), host.entries_of(at.0, at.1, at.2));
                let found = lists.chunks_of(at.0, at.1, at.2);
                assert!(found.is_sorted_by(|a, b| a < b) && found.last() == chunks.last(), "{name}: {found:?}");
                for (i, c) in found.iter().enumerate() {
                    let w = chunks.binary_search(c).map_or(0.0, |p| w[entries.start + p]);
                    let close = (gw[row * most + i] - w).abs() <= if kind == Kind::F64 { 1e-10 } else { 1e-3 };
                    assert!(close, "{name}: chunk {c} has {} for {w}", gw[row * most + i]);
                }
                for (c, e) in chunks.iter().zip(entries) {
                    assert!(found.contains(c) || small(w[e]), "{name}: chunk {c} with {} is missing", w[e]);
                }
                listed += found.len();
            }
            // attention over the CPU's own choice, so that the same keys are read
            let bias = want.bias.value.to_f64().unwrap();
            let choose = |batch: usize, kv: usize, query: usize, all: &mut Vec<u32>| {
                let chunks = host.chunks_of(batch, kv, query);
                all.extend_from_slice(&chunks[..chunks.len() - 1]);
            };
            let (first, extents) = ((past, chunk), (b, g, t));
            let same = Routes::from_choice_after(&gpu.device(), extents, first, choose).unwrap();
            let on_bias =
                same.entries_from_host(&bias, if kind == Kind::F64 { DType::F64 } else { DType::F32 }).unwrap();
            let want = cached_attention(&q, &k, &v, past, Seen::Routes(&want.routes, Some(&want.bias.value))).unwrap();
            let seen = Seen::Routes(&same, Some(&on_bias));
            let off = far(&cached_attention(&on_q, &on_k, &on_v, past, seen).unwrap(), &want);
            assert!(off <= bound(kind), "{name}: off by {off:e}");
        }
    }
    assert!(listed > 100, "chunks were chosen");
}

#[test]
fn a_key_of_nan_is_not_hidden_and_no_query_is_no_fault() {
    let Some(gpu) = card() else { return };
    let both = (&device(), gpu);
    for kind in KINDS {
        let [_, q] = pair(both, &[1, 1, 4, 16], kind, 1);
        let [_, v] = pair(both, &[1, 200, 2, 16], kind, 2);
        let k = Tensor::full(&device(), &[1, 200, 2, 16], DType::F64, f64::NAN).unwrap();
        let k = Tensor::from_cuda_data(&[1, 200, 2, 16], CudaData::new(gpu.tensor(&k, kind)));
        let seen = Seen::Span(Span::Causal, 1.0);
        let out = cached_attention(&q, &k, &v, 190, seen).unwrap().to_f64().unwrap();
        assert!(out.iter().all(|x| x.is_nan()), "{kind:?}: {out:?}");
        let [_, none] = pair(both, &[1, 0, 4, 16], kind, 3);
        assert_eq!(cached_attention(&none, &v, &v, 0, seen).unwrap().numel(), 0, "{kind:?}");
    }
}

#[test]
fn kept_rows_keep_their_form() {
    let Some(gpu) = card() else { return };
    let both = (&device(), gpu);
    for kind in KINDS {
        let [rows, on] = pair(both, &[1, 3, 2, 8], kind, 1);
        let mut kept = room_for_rows(&on, 7).unwrap();
        keep_rows(&mut kept, 2, &on).unwrap();
        let shared = kept.clone();
        keep_rows(&mut kept, 4, &on).unwrap();
        // before anyone asks for the other form
        assert_eq!(kept.on_cuda("test", gpu.cuda()).unwrap().is_operand(), kind == Kind::Bf16);
        let (all, before) = (kept.to_f64().unwrap(), shared.to_f64().unwrap());
        let x = rows.to_f64().unwrap();
        assert_eq!((&all[32..64], &all[64..112]), (&x[..32], &x[..]), "{kind:?}");
        assert_eq!(&before[32..80], &x[..], "what is shared stays as it was");
        assert!(all[112..].iter().chain(&all[..32]).all(|x| *x == 0.0));
        assert!(keep_rows(&mut kept, 5, &on).is_err());
    }
}

#[test]
fn operands_in_full_of_a_model_that_rounds_give_what_rounded_ones_give() {
    let Some(gpu) = card() else { return };
    let both = (&device(), gpu);
    // normals that bf16 does not hold, as norms and rope leave them; heads of 16 take the products of bf16, of 12 do not
    for (d, rounds) in [(16, true), (12, false)] {
        let of = |rows: usize, heads: usize, seed| {
            let full = pair(both, &[1, rows, heads, d], Kind::F32, seed)[1].clone();
            (full.clone(), Tensor::from_cuda_data(full.shape(), CudaData::new(gpu.tensor(&full, Kind::Bf16))))
        };
        let [(q, rounded_q), (k, _), (kbar, rounded_kbar)] = [of(1, 4, 1), of(41, 2, 2), of(10, 2, 3)];
        for compute in [Compute::Full, Compute::Bf16] {
            let mut kept = room_for_keys(&k, 50, 4, compute).unwrap();
            keep_rows(&mut kept, 0, &k).unwrap();
            let rounds = rounds && compute == Compute::Bf16;
            assert_eq!(kept.on_cuda("test", gpu.cuda()).unwrap().is_operand(), rounds, "{d} {compute:?}");
            let tape = Tape::inference().computing(compute);
            let settings = Entmax {
                chunk_size: 4,
                alpha: 1.5,
                gamma: 2.0,
                sigma: 1.0,
                center: Center::None,
                gradient: RouterGradient::Full,
            };
            let numbers = |q: &Tensor, kbar: &Tensor| {
                let [q, kbar] = [q, kbar].map(|x| tape.leaf(x.clone()));
                entmax_routing_after(40, &tape, &q, &kbar, None, settings).unwrap().weights.to_f64().unwrap()
            };
            let (full, rounded) = (numbers(&q, &kbar), numbers(&rounded_q, &rounded_kbar));
            let len = full.iter().take_while(|w| **w > 0.0).count();
            assert_eq!(full[..len] == rounded[..len], rounds, "{d} {compute:?}: {full:?} {rounded:?}");
        }
    }
}

#[test]
fn the_same_bits_twenty_times() {
    let Some(gpu) = card() else { return };
    let both = (&device(), gpu);
    let dims = Dims { b: 2, t: 1, h: 8, g: 2, d: 128 };
    let past = 5000;
    let [q, k, v] = [(&[2, 1, 8, 128][..], 1), (&[2, 5001, 2, 128], 2), (&[2, 5001, 2, 128], 3)]
        .map(|(shape, seed)| gpu.tensor(&pair(both, shape, Kind::Bf16, seed)[0], Kind::Bf16));
    let kbar = gpu.tensor(&pair(both, &[2, 78, 2, 128], Kind::Bf16, 4)[0], Kind::Bf16);
    let settings = Entmax {
        chunk_size: 64,
        alpha: 1.5,
        gamma: 2.0,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::Full,
    };
    gpu.same_bits(|| {
        let dense = cuda::attention(dims, (past, 5001), [&q, &k, &v], cuda::Sees::Span(Span::Causal))?;
        let routed = cuda::route(dims, past, (&q, &kbar), None, settings)?;
        let sees = cuda::Sees::Lists(&routed.lists, Some(&routed.bias));
        let sparse = cuda::attention(dims, (past, 5001), [&q, &k, &v], sees)?;
        Ok(vec![dense, sparse, routed.lists.counts])
    });
}
