//! Every op as it is called, on a card and on the CPU: in f64 the same source of equations must give the same numbers, output and
//! gradients. With operands rounded to bf16 they agree to that rounding.

use std::sync::Arc;

use crate::device::Device;
use crate::error::Result;
use crate::number::{Compute, DType};
use crate::ops::attention::{
    Center, Entmax, Pooling, RouteFigures, RouterGradient, Routes, Span, Top, WindowChoice, block_attention,
    chunk_summary, dense_attention, entmax_routing, indexer_kl, landmark_bias, mass_routing, softmax_bias,
    span_attention, topk_routing, topk_routing_after, window_routing,
};
use crate::ops::cuda::testing::cuda;
use crate::ops::{self, Documents, Grouping, RopeTable, join_documents, split_documents};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::testing::{device, normal};
use crate::{IGNORE, Ids};

type Op<'a> = &'a dyn Fn(&Tape, &[Var]) -> Result<Var>;

/// Output and gradients of every input for <seed, f(inputs)>, on `device`.
fn run(device: &Device, compute: Compute, dtype: DType, inputs: &[Tensor], f: Op) -> Vec<Vec<f64>> {
    let on = |x: &Tensor| Tensor::from_vec(device, x.shape(), x.to_f64().unwrap()).unwrap().to_dtype(dtype).unwrap();
    let tape = Tape::new().computing(compute);
    let leaves: Vec<Var> = inputs.iter().map(|x| tape.leaf(on(x))).collect();
    let out = f(&tape, &leaves).unwrap();
    let seed = on(&normal(&crate::testing::device(), out.value.shape(), 77));
    let mut all = vec![out.value.to_f64().unwrap()];
    let grads = tape.backward_from(&out, seed).unwrap();
    all.extend(leaves.iter().map(|leaf| grads.get(leaf).map_or(Vec::new(), |g| g.to_f64().unwrap())));
    all
}

/// The largest difference over the largest number of each result.
fn far(got: &[Vec<f64>], want: &[Vec<f64>]) -> f64 {
    assert_eq!(got.len(), want.len());
    let of = |(got, want): (&Vec<f64>, &Vec<f64>)| {
        assert_eq!(got.len(), want.len());
        let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
        let one = |(g, w): (&f64, &f64)| if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
        got.iter().zip(want).map(one).fold(0.0, f64::max)
    };
    got.iter().zip(want).map(of).fold(0.0, f64::max)
}

/// Sums of at most some thousand products, in another order.
const SAME: f64 = 1e-11;

fn agrees(name: &str, shapes: &[&[usize]], f: Op) {
    let cpu = device();
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, shape)| normal(&cpu, shape, i as u64 + 1)).collect();
    // without a card, too: a case that no op takes would wait for one to be found
    let want = run(&cpu, Compute::Full, DType::F64, &inputs, f);
    let Some(gpu) = cuda() else { return };
    let got = run(&gpu.device(), Compute::Full, DType::F64, &inputs, f);
    let error = far(&got, &want);
    assert!(error <= SAME, "{name} {shapes:?}: off by {error:e}");
}

#[test]
fn primitives() {
    agrees("add", &[&[2, 3, 4], &[4]], &|t, x| ops::add(t, &x[0], &x[1]));
    agrees("sub", &[&[2, 1, 4], &[3, 1]], &|t, x| ops::sub(t, &x[0], &x[1]));
    agrees("mul", &[&[5, 1, 7, 3], &[6, 1, 3]], &|t, x| ops::mul(t, &x[0], &x[1]));
    agrees("mul", &[&[37], &[37]], &|t, x| ops::mul(t, &x[0], &x[1]));
    agrees("scale, exp, sigmoid", &[&[5, 7]], &|t, x| ops::sigmoid(t, &ops::exp(t, &ops::scale(t, &x[0], 0.3)?)?));
    agrees("ln", &[&[5, 7]], &|t, x| ops::ln(t, &ops::exp(t, &x[0])?));
    agrees("mask_fill", &[&[3, 5]], &|t, x| {
        let mask = Ids::mask(x[0].value.device(), &[5], &[true, false, true, false, false])?;
        ops::mask_fill(t, &x[0], &mask, 0.5)
    });
    agrees("transpose, reshape", &[&[2, 3, 5]], &|t, x| {
        ops::reshape(t, &ops::transpose(t, &x[0], &[2, 0, 1])?, &[10, 3])
    });
    agrees("index_select", &[&[3, 5, 2]], &|t, x| {
        ops::index_select(t, &x[0], 1, &Ids::places(x[0].value.device(), &[4, 0, 4])?)
    });
    agrees("sum_axis", &[&[3, 5, 2]], &|t, x| ops::sum_axis(t, &x[0], 1));
    agrees("gated_sum", &[&[2, 5, 3], &[2, 5, 7], &[2, 5, 7], &[2, 5, 7]], &|t, x| {
        ops::gated_sum(t, &x[0], [&x[1], &x[2], &x[3]])
    });
    agrees("softmax", &[&[3, 65]], &|t, x| ops::softmax(t, &x[0]));
    agrees("entmax", &[&[3, 65]], &|t, x| ops::entmax(t, &x[0], 1.5));
    agrees("matmul", &[&[2, 3, 5], &[2, 5, 7]], &|t, x| ops::matmul(t, &x[0], &x[1]));
}

#[test]
fn layers() {
    agrees("linear", &[&[2, 9, 5], &[7, 5]], &|t, x| ops::linear(t, &x[0], &x[1]));
    // one weight in two products: the second gradient is added in place
    agrees("linear_add", &[&[9, 5], &[5, 5], &[9, 5]], &|t, x| {
        let y = ops::linear_add(t, &x[0], &x[1], &x[2])?;
        ops::linear(t, &ops::rmsnorm(t, &y, &ops::sum_axis(t, &x[1], 0)?, 1e-6)?, &x[1])
    });
    agrees("swiglu", &[&[2, 9, 6], &[10, 6], &[10, 6], &[6, 10]], &|t, x| {
        ops::swiglu(t, &x[0], [&x[1], &x[2], &x[3]], Some(&x[0]))
    });
    agrees("rope", &[&[2, 9, 3, 6]], &|t, x| {
        ops::rope(t, &x[0], &RopeTable::new(x[0].value.device(), x[0].value.dtype(), 20, 6, 1e4)?, 3)
    });
    // a tied embedding: its gradient is added to that of the output projection
    agrees("embedding, cross_entropy", &[&[11, 6]], &|t, x| {
        let device = x[0].value.device();
        let hidden = ops::embedding(t, &x[0], &Ids::new(device, &[5], &[3, 0, 3, 10, 7])?)?;
        let targets = Ids::new(device, &[5], &[1, 10, IGNORE, 3, 3])?;
        ops::linear_cross_entropy(t, &hidden, &x[0], &targets, 4.0)
    });
}

#[test]
fn spans() {
    for alpha in [1.0, 1.25, 1.5, 2.0] {
        for span in [Span::Causal, Span::Sliding(5), Span::Windows { length: 6, stride: 3 }] {
            let (t, m) = (37, span.keys(37));
            agrees(&format!("{span:?} {alpha}"), &[&[2, t, 4, 6], &[2, m, 2, 6], &[2, m, 2, 6]], &|tape, x| {
                span_attention(tape, &x[0], &x[1], &x[2], span, alpha)
            });
        }
    }
    agrees("dense", &[&[2, 37, 4, 6], &[2, 37, 2, 6], &[2, 37, 2, 6]], &|t, x| dense_attention(t, &x[0], &x[1], &x[2]));
}

/// DashAttention from q, k, v, the summary query and the diagonal.
fn dash(tape: &Tape, x: &[Var], settings: Entmax) -> Result<Var> {
    let kbar = chunk_summary(tape, &x[1], &x[3], settings.chunk_size)?;
    let routing = entmax_routing(tape, &x[0], &kbar, Some(&x[4]), settings)?;
    block_attention(tape, &x[0], &x[1], &x[2], &routing.routes, Some(&routing.bias))
}

#[test]
fn dash_with_every_gradient() {
    for gradient in [RouterGradient::Full, RouterGradient::Stopped, RouterGradient::StraightThrough] {
        for (center, alpha) in [(Center::None, 1.5), (Center::Mean, 1.25), (Center::MeanDetached, 2.0)] {
            let settings = Entmax { chunk_size: 5, alpha, gamma: 1.5, sigma: 1.3, center, gradient };
            let shapes: [&[usize]; 5] = [&[2, 38, 4, 6], &[2, 38, 2, 6], &[2, 38, 2, 6], &[12], &[2]];
            agrees(&format!("{gradient:?} {center:?} {alpha}"), &shapes, &|t, x| dash(t, x, settings));
        }
    }
}

#[test]
fn hard_choices() {
    let shapes: [&[usize]; 4] = [&[2, 70, 4, 6], &[2, 70, 2, 6], &[2, 70, 2, 6], &[12]];
    for (chunk_size, top) in [(5, 3), (16, 2), (7, 100)] {
        agrees(&format!("topk {chunk_size} {top}"), &shapes, &|t, x| {
            let kbar = chunk_summary(t, &x[1], &x[3], chunk_size)?;
            let routes = topk_routing(&x[0].value, &kbar.value, chunk_size, top, 1.5)?;
            block_attention(t, &x[0], &x[1], &x[2], &routes, None)
        });
    }
    let own: [&[usize]; 4] = [&[2, 38, 3, 6], &[2, 38, 3, 6], &[2, 38, 3, 6], &[18]];
    agrees("landmark", &own, &|t, x| {
        let kbar = chunk_summary(t, &x[1], &x[3], 5)?;
        let routes = topk_routing(&x[0].value, &kbar.value, 5, 4, 1.5)?;
        let bias = landmark_bias(t, [&x[0], &x[1], &kbar], &routes, 1.5)?;
        block_attention(t, &x[0], &x[1], &x[2], &routes, Some(&bias))
    });
    // as many as each query of each kv head is given
    let tops: Vec<u32> = (0..2 * 70).map(|i| 1 + i * 5 % 7).collect();
    for top in [Top::All(3), Top::Each(&tops)] {
        agrees(&format!("mass {top:?}"), &shapes[..3], &|t, x| {
            let routes = mass_routing(0, &x[0].value, &x[1].value, 5, top)?;
            block_attention(t, &x[0], &x[1], &x[2], &routes, None)
        });
        agrees(&format!("topk with a trained bias {top:?}"), &shapes, &|t, x| {
            let kbar = chunk_summary(t, &x[1], &x[3], 5)?;
            let routes = topk_routing_after(0, &x[0].value, &kbar.value, 5, top, 1.5)?;
            let routing = softmax_bias(t, &x[0], &kbar, routes, 1.5)?;
            block_attention(t, &x[0], &x[1], &x[2], &routing.routes, Some(&routing.bias))
        });
    }
    // a scalar and the gradients of the indexer, whose width is its own; queries and keys of attention have none
    let shapes: [&[usize]; 4] = [&[2, 70, 2, 5], &[2, 70, 2, 5], &[2, 70, 4, 6], &[2, 70, 2, 6]];
    for (chunk_size, top) in [(5, 3), (16, 2), (40, 2), (7, 100)] {
        agrees(&format!("indexer_kl {chunk_size} {top}"), &shapes, &|t, x| {
            let routes = mass_routing(0, &x[0].value, &x[1].value, chunk_size, Top::All(top))?;
            indexer_kl(t, [&x[0], &x[1]], [&x[2].value, &x[3].value], &routes)
        });
    }
    for (pooling, init, local, length, stride) in [(Pooling::Max, 1, 2, 6, 3), (Pooling::Overlap, 0, 1, 4, 4)] {
        let choice = WindowChoice { chunk_size: 6, top: 4, length, stride, init, local, pooling };
        let m = Span::Windows { length, stride }.keys(70);
        let shapes: [&[usize]; 4] = [&[2, 70, 4, 6], &[2, 70, 2, 6], &[2, 70, 2, 6], &[2, m, 2, 6]];
        agrees(&format!("{choice:?}"), &shapes, &|t, x| {
            let routes = window_routing(&x[0].value, &x[3].value, choice)?;
            block_attention(t, &x[0], &x[1], &x[2], &routes, None)
        });
    }
}

/// No chunk is complete, so there is nothing to choose: every query attends its own.
#[test]
fn sequences_shorter_than_a_chunk() {
    let settings = Entmax {
        chunk_size: 5,
        alpha: 1.5,
        gamma: 1.0,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::Full,
    };
    for t in [1, 4] {
        let shapes: [&[usize]; 5] = [&[2, t, 4, 6], &[2, t, 2, 6], &[2, t, 2, 6], &[12], &[2]];
        agrees("dash", &shapes, &|tape, x| dash(tape, x, settings));
        agrees("topk", &shapes[..4], &|tape, x| {
            let kbar = chunk_summary(tape, &x[1], &x[3], 5)?;
            let routes = topk_routing(&x[0].value, &kbar.value, 5, 3, 1.5)?;
            let routing = softmax_bias(tape, &x[0], &kbar, routes, 1.5)?;
            block_attention(tape, &x[0], &x[1], &x[2], &routing.routes, Some(&routing.bias))
        });
        agrees("mass", &shapes[..3], &|tape, x| {
            let routes = mass_routing(0, &x[0].value, &x[1].value, 5, Top::All(3))?;
            block_attention(tape, &x[0], &x[1], &x[2], &routes, None)
        });
        let shapes: [&[usize]; 4] = [&[2, t, 2, 5], &[2, t, 2, 5], &[2, t, 4, 6], &[2, t, 2, 6]];
        agrees("indexer_kl", &shapes, &|tape, x| {
            let routes = mass_routing(0, &x[0].value, &x[1].value, 5, Top::All(3))?;
            indexer_kl(tape, [&x[0], &x[1]], [&x[2].value, &x[3].value], &routes)
        });
        let windows = Span::Windows { length: 6, stride: 3 };
        agrees("windows", &[&[2, t, 4, 6], &[2, 0, 2, 6], &[2, 0, 2, 6]], &|tape, x| {
            span_attention(tape, &x[0], &x[1], &x[2], windows, 1.0)
        });
    }
}

#[test]
fn routes_come_and_go() {
    let Some(gpu) = cuda() else { return };
    let choose = |_: usize, kv: usize, query: usize, chunks: &mut Vec<u32>| {
        chunks.extend((0..query as u32 / 5).filter(|c| (*c as usize + kv + query).is_multiple_of(3)));
    };
    let [a, b] = [device(), gpu.device()].map(|d| Routes::from_choice(&d, (2, 2, 70), 5, choose).unwrap());
    let host = a.to_host().unwrap();
    assert_eq!(host, b.to_host().unwrap());
    let tokens = |routes: &Routes| Routes::mean_tokens(&[routes; 2]).unwrap().unwrap().to_f64().unwrap();
    assert_eq!(tokens(&a), tokens(&b));
    assert_eq!(a.counts().unwrap(), b.counts().unwrap());
    let numbers: Vec<f64> = (0..host.len()).map(|i| i as f64).collect();
    let entries = b.entries_from_host(&numbers, DType::F64).unwrap();
    assert_eq!(host.per_entry(&entries).unwrap(), numbers);
    for entries in [Some(&entries), None] {
        let (got, want) = (b.figures(entries).unwrap().read().unwrap(), host.figures(entries).unwrap());
        // sums of whole numbers are exact, those of quotients end in another bit in another order
        assert!((got.density - want.density).abs() <= 1e-12 * want.density, "{got:?} {want:?}");
        assert!(want.density > 0.0 && want.histogram.iter().any(|&n| n > 0));
        assert_eq!(RouteFigures { density: want.density, ..got }, want);
    }
}

/// Dense attention of each document to itself. On a card documents of similar lengths share a batch, with room behind the shorter ones.
fn apart(t: &Tape, x: &[Var], starts: &[usize]) -> Result<Var> {
    let &[b, tokens, ..] = x[0].value.shape() else { unreachable!("queries are [b, t, h, d]") };
    let device = x[0].value.device();
    let grouping = if device.is_asynchronous() { Grouping::Similar(1) } else { Grouping::Exact };
    let documents = Arc::new(Documents::new(device, [b, tokens], starts, grouping)?);
    let parts = x[..3].iter().map(|x| split_documents(t, x, &documents)).collect::<Result<Vec<_>>>()?;
    let groups = 0..documents.groups().len();
    let outs = groups.map(|i| dense_attention(t, &parts[0][i], &parts[1][i], &parts[2][i]));
    join_documents(t, &outs.collect::<Result<Vec<Var>>>()?, &documents)
}

#[test]
fn documents() {
    let starts = [3, 70, 100, 131, 140, 259];
    agrees("split and join", &[&[2, 130, 3]], &|t, x| {
        let of = Documents::new(x[0].value.device(), [2, 130], &starts, Grouping::Similar(1))?;
        let of = Arc::new(of);
        join_documents(t, &split_documents(t, &x[0], &of)?, &of)
    });
    // of one group nothing is used
    agrees("split", &[&[2, 130, 3]], &|t, x| {
        let of = Arc::new(Documents::new(x[0].value.device(), [2, 130], &starts, Grouping::Exact)?);
        Ok(split_documents(t, &x[0], &of)?.remove(1))
    });
    let shapes: [&[usize]; 3] = [&[2, 130, 4, 32], &[2, 130, 2, 32], &[2, 130, 2, 32]];
    agrees("attention of documents", &shapes, &|t, x| apart(t, x, &starts));
    agrees("angles in another order", &[&[1, 9, 3, 6]], &|t, x| {
        let (device, dtype) = (x[0].value.device(), x[0].value.dtype());
        let places = Ids::places(device, &[0, 1, 2, 0, 1, 0, 0, 1, 2])?;
        ops::rope(t, &x[0], &RopeTable::new(device, dtype, 4, 6, 1e4)?.at(&places)?, 0)
    });
}

#[test]
fn tensors_come_and_go() {
    let Some(gpu) = cuda() else { return };
    let d = gpu.device();
    let x = Tensor::from_vec(&d, &[2, 2], vec![1.0f32, -2.0, 0.5, 4.0]).unwrap();
    assert_eq!(x.to_vec::<f32>().unwrap(), [1.0, -2.0, 0.5, 4.0]);
    assert!(x.to_vec::<f64>().is_err() && x.as_slice::<f32>().is_err());
    let mut sum = x.clone();
    sum.accumulate(&x).unwrap();
    assert_eq!(sum.to_f64().unwrap(), [2.0, -4.0, 1.0, 8.0]);
    assert_eq!(x.to_f64().unwrap(), [1.0, -2.0, 0.5, 4.0], "a shared tensor is copied before it changes");
    assert_eq!(x.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap(), [1.0, -2.0, 0.5, 4.0]);
    assert_eq!(Tensor::full(&d, &[], DType::F64, 2.5).unwrap().item().unwrap(), 2.5);
    assert!(x.is_finite().unwrap());
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(!Tensor::from_vec(&d, &[3], vec![1.0, bad, 2.0]).unwrap().is_finite().unwrap());
    }
    let host = Tensor::from_vec(&device(), &[2, 2], vec![1.0f32; 4]).unwrap();
    assert!(sum.accumulate(&host).is_err());
}

/// A decoder's attention and feed-forward layer with rounded operands: every result is off by a few roundings of its operands.
#[test]
fn rounded_operands_agree_to_their_rounding() {
    let Some(gpu) = cuda() else { return };
    let cpu = device();
    let settings = Entmax {
        chunk_size: 16,
        alpha: 1.5,
        gamma: 1.0,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::Full,
    };
    let shapes: [&[usize]; 6] = [&[2, 130, 4, 32], &[2, 130, 2, 32], &[2, 130, 2, 32], &[64], &[2], &[128, 128]];
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| normal(&cpu, s, i as u64 + 1)).collect();
    let cases: [(&str, Op); 3] = [
        ("documents", &|t, x| {
            let o = ops::reshape(t, &apart(t, x, &[3, 70, 100, 131, 140, 259])?, &[260, 128])?;
            ops::linear(t, &o, &x[5])
        }),
        ("dense", &|t, x| {
            let o = ops::reshape(t, &dense_attention(t, &x[0], &x[1], &x[2])?, &[260, 128])?;
            ops::linear(t, &o, &x[5])
        }),
        ("dash", &|t, x| {
            let o = ops::reshape(t, &dash(t, x, settings)?, &[260, 128])?;
            ops::linear(t, &o, &x[5])
        }),
    ];
    for (name, f) in cases {
        let want = run(&cpu, Compute::Full, DType::F64, &inputs, f);
        let got = run(&gpu.device(), Compute::Bf16, DType::F32, &inputs, f);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // the mean error, because a chunk at the edge of a support may come or go with the rounding
            let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt().max(1e-3);
            let error = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>() / want.len().max(1) as f64;
            assert!(error.sqrt() / size <= 0.03, "{name}, result {i}: off by {:e} of its size", error.sqrt() / size);
        }
    }
}
