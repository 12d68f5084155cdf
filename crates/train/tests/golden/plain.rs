//! The attention variants composed from primitives, with t x t matrices and nothing clever: what the fused ops are
//! compared with, and in f32 what their error is measured against.

use dash_core::ops::attention::{Center, HostRoutes, RouterGradient};
use dash_core::{Ids, Result, Tape, Tensor, Var, ops};
use dash_model::attention::{self, GradientTo, Inputs};
use dash_model::{Attention, Dash, KlIndexer, Landmark, Nsa, TopKBias};

/// The plain twin of a variant. A hard choice is data: the plain formula attends what the engine chose.
pub fn attend(t: &Tape, a: &Attention, x: &Inputs) -> Result<Var> {
    let chosen = || attention::attend(&Tape::inference(), a, x).map(|o| o.1.expect("it routes"));
    match a {
        Attention::Dense(_) => dense(t, x.q, x.k, x.v),
        Attention::TokenEntmax(c) => token_entmax(t, x.q, x.k, x.v, c.alpha),
        Attention::Dash(c) => dash(t, x.q, x.k, x.v, &x.own[0], x.own.get(1), c),
        Attention::Landmark(c) => landmark(t, x, &chosen()?.routes()?.to_host()?, c),
        Attention::TopKBias(c) => topk_bias(t, x, &chosen()?.routes()?.to_host()?, c),
        Attention::TopK(_) | Attention::InfLlmV2(_) | Attention::Mass(_) | Attention::RandomChunks(_) => {
            listed(t, x.q, x.k, x.v, &chosen()?.routes()?.to_host()?)
        }
        Attention::KlIndexer(c) => kl_indexer(t, x, &chosen()?.routes()?.to_host()?, c),
        Attention::Nsa(c) => nsa(t, x, &chosen()?.routes()?.to_host()?, c),
        Attention::Custom(c) => panic!("{c:?} is not in the registry, so no golden file names it"),
    }
}

/// Rows of an axis, by a list on the host.
fn select(t: &Tape, x: &Var, axis: usize, places: &[usize]) -> Result<Var> {
    ops::index_select(t, x, axis, &Ids::places(x.value.device(), places)?)
}

/// `value` where a mask on the host is true.
fn fill(t: &Tape, x: &Var, mask: &[bool], value: f64) -> Result<Var> {
    ops::mask_fill(t, x, &Ids::mask(x.value.device(), &[mask.len()], mask)?, value)
}

/// Extents; tensors here are `[b, heads, t, d]`.
#[derive(Clone, Copy)]
struct Dims {
    b: usize,
    h: usize,
    g: usize,
    t: usize,
    d: usize,
}

fn dims(q: &Var, k: &Var) -> Dims {
    let (q, k) = (q.value.shape(), k.value.shape());
    Dims { b: q[0], t: q[1], h: q[2], g: k[2], d: q[3] }
}

impl Dims {
    fn head_of(&self) -> Vec<usize> {
        (0..self.h).map(|i| i / (self.h / self.g)).collect()
    }
}

fn heads_first(t: &Tape, x: &Var) -> Result<Var> {
    ops::transpose(t, x, &[0, 2, 1, 3])
}

/// Softmax of `q k^T / sqrt d + bias` where `allowed [t, t]` (or more leading axes) is true, times v.
fn masked(t: &Tape, q: &Var, k: &Var, v: &Var, allowed: &[bool], bias: Option<&Var>) -> Result<Var> {
    let s = dims(q, k);
    let (q, k, v) = (heads_first(t, q)?, heads_first(t, k)?, heads_first(t, v)?);
    let k = ops::transpose(t, &select(t, &k, 1, &s.head_of())?, &[0, 1, 3, 2])?;
    let v = select(t, &v, 1, &s.head_of())?;
    let mut z = ops::scale(t, &ops::matmul(t, &q, &k)?, 1.0 / (s.d as f64).sqrt())?;
    if let Some(bias) = bias {
        z = ops::add(t, &z, bias)?;
    }
    let masked: Vec<bool> = allowed.iter().map(|a| !a).collect();
    let p = ops::softmax(t, &fill(t, &z, &masked, f64::NEG_INFINITY)?)?;
    heads_first(t, &ops::matmul(t, &p, &v)?)
}

pub fn dense(t: &Tape, q: &Var, k: &Var, v: &Var) -> Result<Var> {
    let n = q.value.shape()[1];
    masked(t, q, k, v, &(0..n * n).map(|i| i % n <= i / n).collect::<Vec<_>>(), None)
}

/// Attention to a given list without a bias.
pub fn listed(t: &Tape, q: &Var, k: &Var, v: &Var, list: &HostRoutes) -> Result<Var> {
    masked(t, q, k, v, &tokens_of(dims(q, k), list), None)
}

/// The tokens of each query's chunks, `[b, h, t, t]`.
fn tokens_of(s: Dims, list: &HostRoutes) -> Vec<bool> {
    let mut allowed = Vec::with_capacity(s.b * s.h * s.t * s.t);
    for i in 0..s.b * s.h * s.t {
        let (batch, head, query) = (i / (s.h * s.t), i / s.t % s.h, i % s.t);
        // a list a kv head, or a query head
        let chunks = list.chunks_of(batch, head * list.extents().1 / s.h, query);
        allowed.extend((0..s.t).map(|j| j <= query && chunks.contains(&((j / list.chunk_size()) as u32))));
    }
    allowed
}

fn summaries(t: &Tape, k: &Var, qbar: &Var, s: usize) -> Result<Var> {
    let [b, tokens, g, d] = k.value.dims("summaries")?;
    let n = tokens / s;
    let k = heads_first(t, k)?;
    let k = select(t, &k, 2, &(0..n * s).collect::<Vec<_>>())?;
    let k = ops::reshape(t, &k, &[b, g, n, s, d])?;
    let z = ops::sum_axis(t, &ops::mul(t, &k, &ops::reshape(t, qbar, &[g, 1, 1, d])?)?, 4)?;
    let a = ops::softmax(t, &ops::scale(t, &z, 1.0 / (d as f64).sqrt())?)?;
    ops::sum_axis(t, &ops::mul(t, &ops::reshape(t, &a, &[b, g, n, s, 1])?, &k)?, 3)
}

/// DashAttention, arXiv 2605.18753, line by line.
pub fn dash(t: &Tape, q: &Var, k: &Var, v: &Var, qbar: &Var, diagonal: Option<&Var>, c: &Dash) -> Result<Var> {
    let e = dims(q, k);
    let (s, n, group) = (c.chunk_size, e.t / c.chunk_size, e.h / e.g);
    if n == 0 {
        return dense_with_diagonal(t, q, k, v, diagonal);
    }
    let constant = |x: Tensor| t.leaf(x);
    let [of_q, of_k, of_qbar] = who_gets(t, [q, k, qbar], c.gradient_to);
    let kbar = select(t, &summaries(t, &of_k, &of_qbar, s)?, 1, &e.head_of())?;
    let scores = ops::matmul(t, &heads_first(t, &of_q)?, &ops::transpose(t, &kbar, &[0, 1, 3, 2])?)?;
    let scores = ops::scale(t, &scores, c.gamma / (e.d as f64).sqrt())?;
    let hidden: Vec<bool> = (0..e.t * n).map(|i| i % n >= i / n / s).collect();
    let scores = fill(t, &scores, &hidden, f64::NEG_INFINITY)?;
    let group_mean = |p: &Var| {
        let p = ops::reshape(t, p, &[e.b, e.g, group, e.t, n])?;
        ops::scale(t, &ops::sum_axis(t, &p, 2)?, 1.0 / group as f64)
    };
    let w = group_mean(&ops::entmax(t, &scores, c.alpha)?)?;
    let off: Vec<bool> = w.value.to_f64()?.iter().map(|&x| x <= 0.0).collect();
    let log_on_support = |w: &Var| ops::ln(t, &fill(t, w, &off, 1.0)?);
    let mut logw = log_on_support(&w)?;
    if c.router_gradient == RouterGradient::StraightThrough {
        let soft = log_on_support(&group_mean(&ops::softmax(t, &scores)?)?)?;
        let difference = ops::sub(t, &soft, &constant(soft.value.clone()))?;
        logw = ops::add(t, &constant(logw.value.clone()), &difference)?;
    }
    if c.center != Center::None {
        let counts: Vec<f64> = off.chunks(n).map(|r| 1.0 / (r.iter().filter(|o| !**o).count().max(1) as f64)).collect();
        let counts = Tensor::from_vec(w.value.device(), &[e.b, e.g, e.t], counts)?.to_dtype(w.value.dtype())?;
        let mut mu = ops::mul(t, &ops::sum_axis(t, &logw, 3)?, &constant(counts))?;
        if c.center == Center::MeanDetached {
            mu = constant(mu.value.clone());
        }
        logw = ops::sub(t, &logw, &ops::reshape(t, &mu, &[e.b, e.g, e.t, 1])?)?;
    }
    let mut bias = ops::scale(t, &fill(t, &logw, &off, 0.0)?, 1.0 / c.sigma)?;
    bias = with_gradient(t, bias, c)?;
    // from chunks to tokens; the own chunk has no bias, or the diagonal's
    let chunk_of: Vec<usize> = (0..e.t).map(|j| (j / s).min(n - 1)).collect();
    let on = |i: usize, j: usize| j / s < n && !off[i * n + j / s];
    let routed: Vec<bool> = (0..e.b * e.g * e.t * e.t).map(|i| on(i / e.t, i % e.t)).collect();
    let unrouted: Vec<bool> = routed.iter().map(|r| !r).collect();
    let bias = fill(t, &select(t, &bias, 3, &chunk_of)?, &unrouted, 0.0)?;
    let bias = with_diagonal(t, &bias, diagonal, e, s)?;
    let bias = select(t, &bias, 1, &e.head_of())?;
    let mut allowed = Vec::with_capacity(e.b * e.h * e.t * e.t);
    for i in 0..e.b * e.h * e.t {
        let (batch, head, query) = (i / (e.h * e.t), i / e.t % e.h, i % e.t);
        let row = (batch * e.g + e.head_of()[head]) * e.t + query;
        allowed.extend((0..e.t).map(|j| j <= query && (j / s == query / s || routed[row * e.t + j])));
    }
    masked(t, q, k, v, &allowed, Some(&bias))
}

/// The bias with the gradient, and with the value, that the settings leave it.
fn with_gradient(t: &Tape, mut bias: Var, c: &Dash) -> Result<Var> {
    let constant = |x: &Var| t.leaf(x.value.clone());
    if c.router_gradient == RouterGradient::Stopped {
        bias = constant(&bias);
    }
    if c.router_gradient == RouterGradient::Flipped {
        bias = ops::sub(t, &ops::scale(t, &constant(&bias), 2.0)?, &bias)?;
    }
    if !c.forward_bias {
        bias = ops::sub(t, &bias, &constant(&bias))?;
    }
    Ok(bias)
}

/// Queries, keys and the summaries' query for the scores, each a constant where it gets no gradient of theirs.
fn who_gets(t: &Tape, x: [&Var; 3], to: GradientTo) -> [Var; 3] {
    let gets = match to {
        GradientTo::All => [true, true, true],
        GradientTo::Queries => [true, false, false],
        GradientTo::Summaries => [false, true, true],
        GradientTo::Indexer => [false, false, true],
        GradientTo::AllButIndexer => [true, true, false],
    };
    std::array::from_fn(|i| if gets[i] { x[i].clone() } else { t.leaf(x[i].value.clone()) })
}

/// The chosen chunks with the logarithm of softmax over the earlier ones of them as a bias.
fn topk_bias(t: &Tape, x: &Inputs, list: &HostRoutes, c: &TopKBias) -> Result<Var> {
    let e = dims(x.q, x.k);
    let (s, n, group) = (c.chunk_size, e.t / c.chunk_size, e.h / e.g);
    if n == 0 {
        return dense(t, x.q, x.k, x.v);
    }
    let kbar = select(t, &summaries(t, x.k, &x.own[0], s)?, 1, &e.head_of())?;
    let scores = ops::matmul(t, &heads_first(t, x.q)?, &ops::transpose(t, &kbar, &[0, 1, 3, 2])?)?;
    let scores = ops::scale(t, &scores, c.gamma / (e.d as f64).sqrt())?;
    // [b, g, t, n]
    let mut off = Vec::with_capacity(e.b * e.g * e.t * n);
    for i in 0..e.b * e.g * e.t {
        let query = i % e.t;
        let chunks = list.chunks_of(i / (e.g * e.t), i / e.t % e.g, query);
        off.extend((0..n).map(|chunk| chunk >= query / s || !chunks.contains(&(chunk as u32))));
    }
    let row = |head: usize| (head / e.h * e.g + e.head_of()[head % e.h]) * e.t * n;
    let hidden: Vec<bool> = (0..e.b * e.h).flat_map(|head| off[row(head)..][..e.t * n].iter().copied()).collect();
    let p = ops::softmax(t, &fill(t, &scores, &hidden, f64::NEG_INFINITY)?)?;
    let p = ops::sum_axis(t, &ops::reshape(t, &p, &[e.b, e.g, group, e.t, n])?, 2)?;
    let w = ops::scale(t, &p, 1.0 / group as f64)?;
    let mut bias = ops::ln(t, &fill(t, &w, &off, 1.0)?)?;
    if c.router_gradient == RouterGradient::Stopped {
        bias = t.leaf(bias.value.clone());
    }
    let chunk_of: Vec<usize> = (0..e.t).map(|j| (j / s).min(n - 1)).collect();
    let bare: Vec<bool> =
        (0..e.b * e.g * e.t * e.t).map(|i| i % e.t / s >= n || off[i / e.t * n + i % e.t / s]).collect();
    let bias = fill(t, &select(t, &bias, 3, &chunk_of)?, &bare, 0.0)?;
    let bias = select(t, &bias, 1, &e.head_of())?;
    masked(t, x.q, x.k, x.v, &tokens_of(e, list), Some(&bias))
}

/// Chosen chunks whose tokens share the weight of their summary: the bias r_c - log sum exp of a chunk's scores.
fn landmark(t: &Tape, x: &Inputs, list: &HostRoutes, c: &Landmark) -> Result<Var> {
    let e = dims(x.q, x.k);
    let (s, n) = (c.chunk_size, e.t / c.chunk_size);
    if n == 0 {
        return dense(t, x.q, x.k, x.v);
    }
    let scale = 1.0 / (e.d as f64).sqrt();
    let by_head = |x: &Var| select(t, x, 1, &e.head_of());
    let (q, k) = (heads_first(t, x.q)?, by_head(&heads_first(t, x.k)?)?);
    let kbar = by_head(&summaries(t, x.k, &x.own[0], s)?)?;
    let of =
        |keys: &Var, factor: f64| ops::scale(t, &ops::matmul(t, &q, &ops::transpose(t, keys, &[0, 1, 3, 2])?)?, factor);
    let inside = of(&select(t, &k, 2, &(0..n * s).collect::<Vec<_>>())?, scale)?;
    let inside = ops::exp(t, &ops::reshape(t, &inside, &[e.b, e.h, e.t, n, s])?)?;
    let lse = ops::ln(t, &ops::sum_axis(t, &inside, 4)?)?;
    let bias = ops::sub(t, &of(&kbar, scale * c.gamma)?, &ops::reshape(t, &lse, &[e.b, e.h, e.t, n])?)?;
    let chunk_of: Vec<usize> = (0..e.t).map(|j| (j / s).min(n - 1)).collect();
    let own: Vec<bool> = (0..e.t * e.t).map(|i| i % e.t / s >= i / e.t / s).collect();
    let bias = fill(t, &select(t, &bias, 3, &chunk_of)?, &own, 0.0)?;
    masked(t, x.q, x.k, x.v, &tokens_of(e, list), Some(&bias))
}

/// What softmax of `q k^T / sqrt d` over the allowed tokens puts on each chunk, `[b, h, t, n]`; q has as many heads as k.
fn mass_by_chunk(t: &Tape, q: &Var, k: &Var, allowed: &[bool], s: usize) -> Result<Var> {
    let e = dims(q, k);
    let (q, k) = (heads_first(t, q)?, ops::transpose(t, k, &[0, 2, 3, 1])?);
    let z = ops::scale(t, &ops::matmul(t, &q, &k)?, 1.0 / (e.d as f64).sqrt())?;
    let off: Vec<bool> = allowed.iter().map(|a| !a).collect();
    let p = ops::softmax(t, &fill(t, &z, &off, f64::NEG_INFINITY)?)?;
    let n = e.t.div_ceil(s);
    let of_chunk = (0..e.t * n).map(|i| f64::from(i / n / s == i % n)).collect();
    let sums = Tensor::from_vec(q.value.device(), &[e.t, n], of_chunk)?.to_dtype(q.value.dtype())?;
    ops::matmul(t, &ops::reshape(t, &p, &[e.b * e.h * e.t, e.t])?, &t.leaf(sums))
        .and_then(|p| ops::reshape(t, &p, &[e.b, e.h, e.t, n]))
}

/// The listed chunks, and the divergence from what attention puts on each to what the indexer puts on it.
fn kl_indexer(t: &Tape, x: &Inputs, list: &HostRoutes, c: &KlIndexer) -> Result<Var> {
    let (e, s) = (dims(x.q, x.k), c.chunk_size);
    let out = listed(t, x.q, x.k, x.v, list)?;
    let compared = |h: usize| match c.all_chunks {
        true => (0..e.b * h * e.t * e.t).map(|i| i % e.t <= i / e.t % e.t).collect(),
        false => tokens_of(Dims { h, ..e }, list),
    };
    let constants = Tape::inference();
    let of = |x: &Var| constants.leaf(x.value.clone());
    let k = select(&constants, &of(x.k), 2, &e.head_of())?;
    let teacher = mass_by_chunk(&constants, &of(x.q), &k, &compared(e.h), s)?.value;
    let n = e.t.div_ceil(s);
    let teacher = constants.leaf(teacher.reshape(&[e.b, e.g, e.h / e.g, e.t, n])?);
    let teacher = ops::scale(&constants, &ops::sum_axis(&constants, &teacher, 2)?, (e.g as f64) / (e.h as f64))?;
    let none: Vec<bool> = teacher.value.to_f64()?.iter().map(|&p| p == 0.0).collect();
    let student = mass_by_chunk(t, &x.own[0], &x.own[1], &compared(e.g), s)?;
    let cross = ops::mul(t, &ops::ln(t, &fill(t, &student, &none, 1.0)?)?, &t.leaf(teacher.value))?;
    let cross = ops::scale(t, &ops::sum_all(t, &cross)?, -1.0 / (e.b * e.g * e.t) as f64)?;
    // without the entropy of what attention does, which is a constant
    ops::attach(t, &out, &cross, c.weight * x.loss_share.expect("a share"))
}

/// Adds `diagonal [g]` to the bias `[b, g, t, t]` of the own chunk's tokens.
fn with_diagonal(t: &Tape, bias: &Var, diagonal: Option<&Var>, e: Dims, s: usize) -> Result<Var> {
    let Some(diagonal) = diagonal else { return Ok(bias.clone()) };
    let here: Vec<f64> = (0..e.t * e.t).map(|i| (i % e.t / s == i / e.t / s) as u8 as f64).collect();
    let here = Tensor::from_vec(bias.value.device(), &[e.t, e.t], here)?.to_dtype(bias.value.dtype())?;
    ops::add(t, bias, &ops::mul(t, &ops::reshape(t, diagonal, &[e.g, 1, 1])?, &t.leaf(here))?)
}

/// A sequence shorter than one chunk: the diagonal shifts every logit alike.
fn dense_with_diagonal(t: &Tape, q: &Var, k: &Var, v: &Var, diagonal: Option<&Var>) -> Result<Var> {
    let e = dims(q, k);
    let zeros = t.leaf(Tensor::zeros(q.value.device(), &[e.b, e.g, e.t, e.t], q.value.dtype())?);
    let bias = select(t, &with_diagonal(t, &zeros, diagonal, e, e.t)?, 1, &e.head_of())?;
    masked(t, q, k, v, &(0..e.t * e.t).map(|i| i % e.t <= i / e.t).collect::<Vec<_>>(), Some(&bias))
}

/// Dense alpha-entmax attention over tokens.
pub fn token_entmax(t: &Tape, q: &Var, k: &Var, v: &Var, alpha: f64) -> Result<Var> {
    let s = dims(q, k);
    let (q, k, v) = (heads_first(t, q)?, heads_first(t, k)?, heads_first(t, v)?);
    let k = ops::transpose(t, &select(t, &k, 1, &s.head_of())?, &[0, 1, 3, 2])?;
    let v = select(t, &v, 1, &s.head_of())?;
    let z = ops::scale(t, &ops::matmul(t, &q, &k)?, 1.0 / (s.d as f64).sqrt())?;
    let later: Vec<bool> = (0..s.t * s.t).map(|i| i % s.t > i / s.t).collect();
    let p = ops::entmax(t, &fill(t, &z, &later, f64::NEG_INFINITY)?, alpha)?;
    heads_first(t, &ops::matmul(t, &p, &v)?)
}

/// Native sparse attention, arXiv 2502.11089, with the chosen chunks given.
pub fn nsa(t: &Tape, i: &Inputs, list: &HostRoutes, c: &Nsa) -> Result<Var> {
    let [k_compressed, v_compressed, k_window, v_window, compress_k, compress_v, position, gates] = i.own else {
        panic!("nsa has eight inputs of its own")
    };
    let s = dims(i.q, i.k);
    let (length, stride) = (c.length, c.stride);
    let m = if s.t < length { 0 } else { (s.t - length) / stride + 1 };
    let gate = |y: &Var, branch: usize| ops::mul(t, y, &select(t, gates, 3, &[branch])?);
    let mut out = gate(&listed(t, i.q, i.k, i.v, list)?, 1)?;
    let near: Vec<bool> = (0..s.t * s.t).map(|j| j % s.t <= j / s.t && j / s.t - j % s.t < c.window).collect();
    out = ops::add(t, &out, &gate(&masked(t, i.q, k_window, v_window, &near, None)?, 2)?)?;
    // window by window: [b, g, length * d] times [g, length * d, d]
    let compressed = |y: &Var, weight: &Var, position: Option<&Var>| -> Result<Vec<Var>> {
        let weight = ops::reshape(t, weight, &[s.g, length * s.d, s.d])?;
        let one = |w: usize| {
            let tokens: Vec<usize> = (w * stride..w * stride + length).collect();
            let mut y = ops::transpose(t, &select(t, y, 1, &tokens)?, &[2, 0, 1, 3])?;
            if let Some(position) = position {
                y = ops::add(t, &y, &ops::reshape(t, position, &[s.g, 1, length, s.d])?)?;
            }
            ops::matmul(t, &ops::reshape(t, &y, &[s.g, s.b, length * s.d])?, &weight)
        };
        (0..m).map(one).collect()
    };
    let keys = compressed(k_compressed, compress_k, Some(position))?;
    let values = compressed(v_compressed, compress_v, None)?;
    if m == 0 {
        return Ok(out);
    }
    // rows of windows put side by side: one column of scores a window, gathered by a selection matrix
    let q = heads_first(t, i.q)?;
    let side_by_side = |parts: &[Var]| -> Result<Var> {
        let mut sum: Option<Var> = None;
        for (w, part) in parts.iter().enumerate() {
            let part = ops::reshape(t, &ops::transpose(t, part, &[1, 0, 2])?, &[s.b, s.g, 1, s.d])?;
            let place: Vec<f64> = (0..m).map(|j| (j == w) as u8 as f64).collect();
            let place = Tensor::from_vec(q.value.device(), &[m, 1], place)?.to_dtype(q.value.dtype())?;
            let part = ops::mul(t, &part, &t.leaf(place))?;
            sum = Some(match sum {
                Some(sum) => ops::add(t, &sum, &part)?,
                None => part,
            });
        }
        select(t, &sum.expect("m > 0"), 1, &s.head_of())
    };
    let (k, v) = (side_by_side(&keys)?, side_by_side(&values)?);
    let z = ops::matmul(t, &q, &ops::transpose(t, &k, &[0, 1, 3, 2])?)?;
    let z = ops::scale(t, &z, 1.0 / (s.d as f64).sqrt())?;
    let hidden: Vec<bool> = (0..s.t * m).map(|j| j % m * stride + length > j / m + 1).collect();
    let p = ops::softmax(t, &fill(t, &z, &hidden, f64::NEG_INFINITY)?)?;
    ops::add(t, &out, &gate(&heads_first(t, &ops::matmul(t, &p, &v)?)?, 0)?)
}
