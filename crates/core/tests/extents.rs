//! Ops of the public interface at the edges of their extents: where an axis has no elements or 2^31, a value or an error in words,
//! forward and backward; where a sum or a product of extents wraps around, an error.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dash_core::ops::attention::{
    Center, Entmax, Pooling, Random, RouterGradient, Routes, Seen, Span, Top, WindowChoice, block_attention,
    cached_attention, chunk_summary, dense_attention, entmax_routing, entmax_routing_after, keep_rows, landmark_bias,
    mass_routing, random_routing, softmax_bias, span_attention, topk_routing, topk_routing_after, window_routing,
    window_routing_after,
};
use dash_core::ops::{self, RopeTable};
use dash_core::rng::Rng;
use dash_core::{Compute, DType, Device, Ids, Result, Tape, Tensor, Var};

/// Extents, one of which is 0.
#[derive(Debug, Clone, Copy)]
struct Extents {
    b: usize,
    t: usize,
    h: usize,
    g: usize,
    d: usize,
    chunk: usize,
}

struct Case<'a> {
    device: &'a Device,
    dtype: DType,
    tape: Tape,
    x: Extents,
}

impl Case<'_> {
    fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        Tensor::full(self.device, shape, self.dtype, 0.5)
    }

    fn var(&self, shape: &[usize]) -> Result<Var> {
        Ok(self.tape.leaf(self.tensor(shape)?))
    }

    fn queries(&self) -> Result<Var> {
        self.var(&[self.x.b, self.x.t, self.x.h, self.x.d])
    }

    fn keys(&self) -> Result<Var> {
        self.var(&[self.x.b, self.x.t, self.x.g, self.x.d])
    }

    fn chunks(&self) -> usize {
        self.x.t.checked_div(self.x.chunk).unwrap_or(0)
    }

    fn kbar(&self) -> Result<Var> {
        self.var(&[self.x.b, self.chunks(), self.x.g, self.x.d])
    }

    fn routes(&self) -> Result<Routes> {
        Routes::from_choice(self.device, (self.x.b, self.x.g, self.x.t), self.x.chunk, |_, _, _, _| {})
    }

    fn entmax(&self, gradient: RouterGradient) -> Entmax {
        Entmax { chunk_size: self.x.chunk, alpha: 1.5, gamma: 1.0, sigma: 1.0, center: Center::None, gradient }
    }
}

type Op = (&'static str, fn(&Case) -> Result<Option<Var>>);

/// Those that make memory for every token, whatever the batch is.
const OF_TOKENS: [&str; 5] = ["random_routing", "window_routing", "cached_attention", "keep_rows", "rope"];

/// What makes a variable is walked backwards, too.
const OPS: &[Op] = &[
    ("dense_attention", |c| dense_attention(&c.tape, &c.queries()?, &c.keys()?, &c.keys()?).map(Some)),
    ("block_attention", |c| {
        let routes = c.routes()?;
        let bias = c.var(&[c.x.b * c.x.g * c.x.t])?;
        block_attention(&c.tape, &c.queries()?, &c.keys()?, &c.keys()?, &routes, Some(&bias)).map(Some)
    }),
    ("span_attention, causal", |c| {
        span_attention(&c.tape, &c.queries()?, &c.keys()?, &c.keys()?, Span::Causal, 1.5).map(Some)
    }),
    ("span_attention, sliding", |c| {
        span_attention(&c.tape, &c.queries()?, &c.keys()?, &c.keys()?, Span::Sliding(2), 1.0).map(Some)
    }),
    ("chunk_summary", |c| chunk_summary(&c.tape, &c.keys()?, &c.var(&[c.x.g * c.x.d])?, c.x.chunk).map(Some)),
    ("entmax_routing", |c| {
        let settings = c.entmax(RouterGradient::Full);
        let diagonal = c.var(&[c.x.g])?;
        entmax_routing(&c.tape, &c.queries()?, &c.kbar()?, Some(&diagonal), settings).map(|r| Some(r.bias))
    }),
    ("entmax_routing, straight through", |c| {
        let settings = c.entmax(RouterGradient::StraightThrough);
        entmax_routing(&c.tape, &c.queries()?, &c.kbar()?, None, settings).map(|r| Some(r.bias))
    }),
    ("softmax_bias", |c| softmax_bias(&c.tape, &c.queries()?, &c.kbar()?, c.routes()?, 1.0).map(|r| Some(r.bias))),
    ("landmark_bias", |c| {
        let (q, k) = (c.queries()?, c.var(&[c.x.b, c.x.t, c.x.h, c.x.d])?);
        let kbar = c.var(&[c.x.b, c.chunks(), c.x.h, c.x.d])?;
        let routes = Routes::from_choice(c.device, (c.x.b, c.x.h, c.x.t), c.x.chunk, |_, _, _, _| {})?;
        landmark_bias(&c.tape, [&q, &k, &kbar], &routes, 1.0).map(Some)
    }),
    ("topk_routing", |c| {
        topk_routing(&c.queries()?.value, &c.kbar()?.value, c.x.chunk, 2, 1.0)?.to_host().map(|_| None)
    }),
    ("mass_routing", |c| {
        mass_routing(0, &c.queries()?.value, &c.keys()?.value, c.x.chunk, Top::All(2))?.to_host().map(|_| None)
    }),
    ("window_routing", |c| {
        let span = Span::Windows { length: 2, stride: 1 };
        let keys = c.tensor(&[c.x.b, span.keys(c.x.t), c.x.g, c.x.d])?;
        let choice = WindowChoice {
            chunk_size: c.x.chunk,
            top: 2,
            length: 2,
            stride: 1,
            init: 1,
            local: 1,
            pooling: Pooling::Overlap,
        };
        window_routing(&c.queries()?.value, &keys, choice)?.figures(None).map(|_| None)
    }),
    ("random_routing", |c| {
        let random = Random { seed: 1, layer: 0, chunk_size: c.x.chunk };
        random_routing(c.device, (c.x.b, c.x.g, c.x.t), 0, random, Top::All(2))?.to_host().map(|_| None)
    }),
    ("cached_attention", |c| {
        let q = c.tensor(&[1, c.x.t, c.x.h, c.x.d])?;
        let k = c.tensor(&[1, c.x.t, c.x.g, c.x.d])?;
        cached_attention(&q, &k, &k, 0, Seen::Span(Span::Causal, 1.0)).map(|_| None)
    }),
    ("keep_rows", |c| {
        let mut kept = c.tensor(&[1, c.x.t, c.x.g, c.x.d])?;
        keep_rows(&mut kept, 0, &c.tensor(&[1, c.x.t, c.x.g, c.x.d])?).map(|()| None)
    }),
    ("rope", |c| {
        let table = RopeTable::new(c.device, c.dtype, c.x.t, c.x.d, 1e4)?;
        ops::rope(&c.tape, &c.queries()?, &table, 0).map(Some)
    }),
    ("linear", |c| ops::linear(&c.tape, &c.var(&[c.x.b, c.x.t, c.x.d])?, &c.var(&[c.x.h, c.x.d])?).map(Some)),
    ("linear_add", |c| {
        let residual = c.var(&[c.x.b, c.x.t, c.x.h])?;
        ops::linear_add(&c.tape, &c.var(&[c.x.b, c.x.t, c.x.d])?, &c.var(&[c.x.h, c.x.d])?, &residual).map(Some)
    }),
    ("matmul", |c| ops::matmul(&c.tape, &c.var(&[c.x.b, c.x.t, c.x.d])?, &c.var(&[c.x.b, c.x.d, c.x.h])?).map(Some)),
    ("swiglu", |c| {
        let (x, gate, up) = (c.var(&[c.x.b, c.x.t, c.x.d])?, c.var(&[c.x.h, c.x.d])?, c.var(&[c.x.h, c.x.d])?);
        ops::swiglu(&c.tape, &x, [&gate, &up, &c.var(&[c.x.d, c.x.h])?], Some(&x)).map(Some)
    }),
    ("rmsnorm", |c| ops::rmsnorm(&c.tape, &c.var(&[c.x.b, c.x.t, c.x.d])?, &c.var(&[c.x.d])?, 1e-6).map(Some)),
    ("embedding", |c| {
        let ids = Ids::new(c.device, &[c.x.b, c.x.t], &vec![0; c.x.b * c.x.t])?;
        ops::embedding(&c.tape, &c.var(&[c.x.h, c.x.d])?, &ids).map(Some)
    }),
    ("linear_cross_entropy", |c| {
        let ids = Ids::new(c.device, &[c.x.b, c.x.t], &vec![0; c.x.b * c.x.t])?;
        ops::linear_cross_entropy(&c.tape, &c.var(&[c.x.b, c.x.t, c.x.d])?, &c.var(&[c.x.h, c.x.d])?, &ids, 1.0)
            .map(Some)
    }),
    ("token_nll", |c| {
        let ids = Ids::new(c.device, &[c.x.b, c.x.t], &vec![0; c.x.b * c.x.t])?;
        ops::token_nll(&c.tensor(&[c.x.b, c.x.t, c.x.d])?, &c.tensor(&[c.x.h, c.x.d])?, &ids, Compute::Full)
            .map(|_| None)
    }),
    ("gated_sum", |c| {
        let (x, gates) = (c.queries()?, c.var(&[c.x.b, c.x.t, c.x.h, 3])?);
        ops::gated_sum(&c.tape, &gates, [&x, &x, &x]).map(Some)
    }),
    ("softmax", |c| ops::softmax(&c.tape, &c.queries()?).map(Some)),
    ("entmax", |c| ops::entmax(&c.tape, &c.queries()?, 1.5).map(Some)),
    ("elementwise", |c| {
        let sum = ops::add(&c.tape, &c.queries()?, &c.var(&[c.x.d])?)?;
        ops::mul(&c.tape, &ops::exp(&c.tape, &sum)?, &ops::sigmoid(&c.tape, &sum)?).map(Some)
    }),
    ("sum_axis", |c| ops::sum_axis(&c.tape, &c.queries()?, 1).map(Some)),
    ("sum_all", |c| ops::sum_all(&c.tape, &c.queries()?).map(Some)),
    ("transpose", |c| ops::transpose(&c.tape, &c.queries()?, &[0, 2, 1, 3]).map(Some)),
    ("index_select", |c| {
        ops::index_select(&c.tape, &c.queries()?, 1, &Ids::places(c.device, &vec![0; c.x.t.min(2)])?).map(Some)
    }),
    ("grad_norm", |c| ops::grad_norm(c.device, [&c.tensor(&[c.x.b, c.x.t, c.x.h, c.x.d])?]).map(|_| None)),
];

#[test]
fn an_axis_without_elements_gives_a_value_or_an_error() {
    let device = Device::cpu(2).unwrap();
    let full = Extents { b: 2, t: 5, h: 4, g: 2, d: 6, chunk: 2 };
    let cases = [
        Extents { b: 0, ..full },
        Extents { t: 0, ..full },
        Extents { h: 0, ..full },
        Extents { g: 0, ..full },
        Extents { d: 0, ..full },
        Extents { chunk: 0, ..full },
        Extents { h: 0, g: 0, ..full },
        Extents { t: 1, ..full },
        Extents { b: 0, t: 1 << 31, ..full },
        full,
    ];
    let (mut values, mut panics) = (0, Vec::new());
    for (name, op) in OPS {
        for x in cases.into_iter().filter(|x| x.t < 1 << 31 || !OF_TOKENS.contains(name)) {
            for (dtype, compute) in
                [(DType::F32, Compute::Full), (DType::F32, Compute::Bf16), (DType::F64, Compute::Full)]
            {
                let run = || -> Result<()> {
                    let case = Case { device: &device, dtype, tape: Tape::new().computing(compute), x };
                    let Some(y) = op(&case)? else { return Ok(()) };
                    let seed = Tensor::full(&device, y.value.shape(), dtype, 1.0)?;
                    case.tape.backward_from(&y, seed).map(drop)
                };
                match catch_unwind(AssertUnwindSafe(run)) {
                    Ok(Ok(())) => values += 1,
                    Ok(Err(told)) => assert!(told.to_string().contains(": "), "{name}, {x:?}: {told}"),
                    Err(_) => panics.push(format!("{name}, {dtype:?} {compute:?}, {x:?}")),
                }
            }
        }
    }
    assert!(values > OPS.len() * 6, "{values} values");
    assert!(panics.is_empty(), "{} panics:\n{}", panics.len(), panics.join("\n"));
}

#[test]
fn a_sum_or_a_product_of_extents_that_wraps_around_is_refused() {
    let device = Device::cpu(1).unwrap();
    let tape = Tape::inference();
    let tensor = |shape: &[usize]| Tensor::full(&device, shape, DType::F32, 0.5).unwrap();
    let (q, one) = (tensor(&[1, 4, 2, 2]), tensor(&[1, 1, 2, 2]));
    // wrapped, the last of these tokens is the first of all, and one key is enough
    let past = usize::MAX - 2;
    let choice = WindowChoice { chunk_size: 1, top: 2, length: 1, stride: 1, init: 1, local: 1, pooling: Pooling::Max };
    let settings = Entmax {
        chunk_size: 1,
        alpha: 1.5,
        gamma: 1.0,
        sigma: 1.0,
        center: Center::None,
        gradient: RouterGradient::Full,
    };
    let random = Random { seed: 1, layer: 0, chunk_size: 1 };
    let table = RopeTable::new(&device, DType::F32, 4, 2, 1e4).unwrap();
    let half = 1 << (usize::BITS / 2);
    let told = [
        mass_routing(past, &q, &one, 1, Top::All(2)).map(drop),
        topk_routing_after(past, &q, &one, 1, Top::All(2), 1.0).map(drop),
        window_routing_after(past, &q, &one, choice).map(drop),
        entmax_routing_after(past, &tape, &tape.leaf(q.clone()), &tape.leaf(one.clone()), None, settings).map(drop),
        random_routing(&device, (1, 2, 4), past, random, Top::All(2)).map(drop),
        random_routing(&device, (1, half, half), 0, random, Top::All(2)).map(drop),
        cached_attention(&q, &one, &one, past, Seen::Span(Span::Causal, 1.0)).map(drop),
        keep_rows(&mut one.clone(), usize::MAX, &one),
        ops::rope(&tape, &tape.leaf(q.clone()), &table, past).map(drop),
        Routes::from_choice(&device, (half, half, 1), 1, |_, _, _, _| {}).map(drop),
        Routes::from_choice(&device, (1, 1, half), 1, |_, _, _, _| {}).map(drop),
    ];
    for (i, told) in told.into_iter().enumerate() {
        let told = told.expect_err("it wraps around").to_string();
        let says =
            ["counted in 32 bits", "do not fit into", "from 18446744073709551613 on", "more elements than memory"];
        assert!(says.iter().any(|said| told.contains(said)), "{i}: {told}");
    }
}

/// 2^50 elements: more than a process can address, whatever the machine has.
#[test]
fn a_tensor_that_memory_cannot_hold_is_an_error_that_names_op_and_bytes() {
    let (device, shape) = (Device::cpu(1).unwrap(), [1 << 25, 1 << 25]);
    let full = Tensor::full(&device, &shape, DType::F32, 1.0).unwrap_err();
    let what = "the system has no 4503599.6 GB of memory for 1125899906842624 numbers; use a smaller shape";
    assert_eq!(full.to_string(), format!("full: {what}"));
    let normal = Tensor::normal(&device, &shape, DType::F32, 1.0, &mut Rng::new(1)).unwrap_err();
    assert_eq!(normal.to_string(), format!("normal: {what}"));
}
