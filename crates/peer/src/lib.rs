//! One decoder block in dfdx 0.13, an independent tape: the second opinion on gradients and a peer in speed. It is a crate of its own so that
//! dfdx's kernels, which are compiled where they are used, stay optimised while what only calls them is not.
//!
//! Batch 4, 256 tokens, width 256, 4 heads, MLP 704, without rope (dfdx has none).

use std::time::Instant;

use dfdx::prelude::*;

/// Sequences.
pub const B: usize = 4;
/// Tokens of a sequence.
pub const T: usize = 256;
/// Width.
pub const C: usize = 256;
/// Heads.
pub const H: usize = 4;
/// Width of a head.
pub const D: usize = C / H;
/// Width of the MLP.
pub const F: usize = 704;
/// What the norms add to the mean square.
pub const EPS: f64 = 1e-6;
/// Tokens of a chunk.
pub const S: usize = 32;
/// Chunks of a sequence.
pub const N: usize = T / S;
/// Factor of the router's scores.
pub const GAMMA: f64 = 4.0;

/// Rows and columns of what [`gradients`] is given: x, the first norm, q, k, v, o, the second norm, gate, up, down, the upstream gradient,
/// and the query of the summaries. Weights are [in, out].
pub const SHAPES: [(usize, usize); 12] =
    [(B * T, C), (1, C), (C, C), (C, C), (C, C), (C, C), (1, C), (C, F), (C, F), (F, C), (B * T, C), (1, C)];

/// Which attention the block has: the two that the comparison is about. The others would have to be written with dfdx operations, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Causal softmax.
    Dense,
    /// DashAttention with chunks of [`S`], alpha 1.5, sigma 1, written with dfdx operations.
    Dash,
}

/// The threshold of 1.5-entmax of one row (scores already halved), by bisection in f64; `f32::MAX` where nothing is visible.
fn threshold(row: &[f32]) -> f32 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    if row.is_empty() {
        return f32::MAX;
    }
    let (mut low, mut high) = (top - 1.0, top);
    for _ in 0..60 {
        let tau = 0.5 * (low + high);
        let sum: f64 = row.iter().map(|&x| (x as f64 - tau).max(0.0).powi(2)).sum();
        if sum >= 1.0 { low = tau } else { high = tau }
    }
    (0.5 * (low + high)) as f32
}

/// A value on dfdx's tape.
type Traced<Shape> = Tensor<Shape, f32, Cpu, OwnedTape<f32, Cpu>>;
/// By head: `[b, h, t, d]`.
type Heads = Rank4<B, H, T, D>;

/// 1 / sqrt d.
fn score_scale() -> f32 {
    1.0 / (D as f32).sqrt()
}

fn rmsnorm_dfdx(x: Traced<Rank3<B, T, C>>, w: &Tensor<Rank1<C>, f32, Cpu>) -> Traced<Rank3<B, T, C>> {
    let mean = x.with_empty_tape().square().mean::<Rank2<B, T>, Axis<2>>();
    let root = (mean + EPS as f32).sqrt().broadcast::<Rank3<B, T, C>, Axis<2>>();
    let weight = w.retaped::<OwnedTape<f32, Cpu>>().broadcast::<Rank3<B, T, C>, Axes2<0, 1>>();
    x / root * weight
}

/// Summaries `[b, h, n, d]` of keys `[b, t, h, d]`: local attention of a learned query to the chunk's keys.
fn summaries_dfdx(
    k: Traced<Rank4<B, T, H, D>>,
    qbar: &Tensor<Rank2<H, D>, f32, Cpu>,
    scale: f32,
) -> Traced<Rank4<B, H, N, D>> {
    let keys = k.permute::<Rank4<B, H, T, D>, Axes4<0, 2, 1, 3>>();
    let query = qbar.retaped::<OwnedTape<f32, Cpu>>().broadcast::<Rank4<B, H, T, D>, Axes2<0, 2>>();
    let local = (keys.with_empty_tape() * query).sum::<Rank3<B, H, T>, Axis<3>>() * scale;
    let a = local.reshape::<Rank4<B, H, N, S>>().softmax::<Axis<3>>();
    let keys = keys.reshape::<Rank5<B, H, N, S, D>>();
    (a.broadcast::<Rank5<B, H, N, S, D>, Axis<4>>() * keys).sum::<Rank4<B, H, N, D>, Axis<3>>()
}

/// 1.5-entmax over the earlier chunks, of halved scores `[b, h, t, n]`: the threshold without a gradient, then one Newton step on
/// sum u^2 = 1, which carries it.
fn entmax_dfdx(dev: &Cpu, half: Traced<Rank4<B, H, T, N>>) -> Traced<Rank4<B, H, T, N>> {
    let values = half.as_vec();
    let (mut taus, mut slopes, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
    for (i, row) in values.chunks_exact(N).enumerate() {
        let visible = i % T / S;
        let tau = threshold(&row[..visible]);
        let u: f32 = row[..visible].iter().map(|x| (x - tau).max(0.0)).sum();
        taus.push(if visible == 0 { 0.0 } else { tau });
        slopes.push(if visible == 0 { 1.0 } else { 2.0 * u });
        hidden.extend((0..N).map(|c| if c < visible { 0.0 } else { -1e4f32 }));
    }
    let rows = (Const::<B>, Const::<H>, Const::<T>);
    let tau: Tensor<Rank3<B, H, T>, f32, _> = dev.tensor_from_vec(taus, rows);
    let slope: Tensor<Rank3<B, H, T>, f32, _> = dev.tensor_from_vec(slopes, rows);
    let wide = (Const::<B>, Const::<H>, Const::<T>, Const::<N>);
    let hidden: Tensor<Rank4<B, H, T, N>, f32, _> = dev.tensor_from_vec(hidden, wide);
    let x = half + hidden;
    let known = tau.clone().broadcast::<Rank4<B, H, T, N>, Axis<3>>();
    let excess = (x.with_empty_tape() - known).relu().square().sum::<Rank3<B, H, T>, Axis<3>>() - 1.0;
    let step = (excess / slope).broadcast::<Rank4<B, H, T, N>, Axis<3>>();
    let tau = tau.broadcast::<Rank4<B, H, T, N>, Axis<3>>();
    (x - tau - step).relu().square()
}

/// Causal softmax `[b, h, t, t]` of queries `[b, h, t, d]` and keys `[b, t, h, d]`.
fn dense_dfdx(
    q: Traced<Heads>,
    k: Traced<Rank4<B, T, H, D>>,
    mask: Tensor<Rank2<T, T>, f32, Cpu>,
) -> Traced<Rank4<B, H, T, T>> {
    let scores = q.matmul(k.permute::<Rank4<B, H, D, T>, Axes4<0, 2, 3, 1>>()) * score_scale();
    (scores + mask.broadcast::<Rank4<B, H, T, T>, Axes2<0, 1>>()).softmax::<Axis<3>>()
}

/// The same with the chunks that 1.5-entmax chooses and their bias log w.
fn dash_dfdx(
    dev: &Cpu,
    q: Traced<Heads>,
    k: Traced<Rank4<B, T, H, D>>,
    qbar: &Tensor<Rank2<H, D>, f32, Cpu>,
) -> Traced<Rank4<B, H, T, T>> {
    let scale = score_scale();
    let kt = k.with_empty_tape().permute::<Rank4<B, H, D, T>, Axes4<0, 2, 3, 1>>();
    let scores = q.with_empty_tape().matmul(kt) * scale;
    let kbar = summaries_dfdx(k, qbar, scale);
    let kbar = kbar.permute::<Rank4<B, H, D, N>, Axes4<0, 1, 3, 2>>();
    let half = q.matmul(kbar) * (0.5 * GAMMA as f32 * scale);
    let w = entmax_dfdx(dev, half);
    let wide = (Const::<B>, Const::<H>, Const::<T>, Const::<N>);
    // log w on the support, 0 elsewhere; from chunks to tokens by a matrix of zeros and ones
    let off: Vec<f32> = w.as_vec().iter().map(|&w| (w <= 0.0) as u8 as f32).collect();
    let chosen: Vec<bool> = off.iter().map(|&o| o == 0.0).collect();
    let off: Tensor<Rank4<B, H, T, N>, f32, _> = dev.tensor_from_vec(off, wide);
    let logw = (w + off).ln();
    let spread: Vec<f32> = (0..N * T).map(|i| (i % T / S == i / T) as u8 as f32).collect();
    let spread: Tensor<Rank2<N, T>, f32, _> = dev.tensor_from_vec(spread, (Const::<N>, Const::<T>));
    let bias = logw.matmul(spread.broadcast::<Rank4<B, H, N, T>, Axes2<0, 1>>());
    let allowed = |i: usize| {
        let (row, query, key) = (i / T, i / T % T, i % T);
        key <= query && (key / S == query / S || chosen[row * N + key / S])
    };
    let closed: Vec<f32> = (0..B * H * T * T).map(|i| if allowed(i) { 0.0 } else { -1e9 }).collect();
    let square = (Const::<B>, Const::<H>, Const::<T>, Const::<T>);
    let closed: Tensor<Rank4<B, H, T, T>, f32, _> = dev.tensor_from_vec(closed, square);
    (scores + bias + closed).softmax::<Axis<3>>()
}

/// Gradients of `numbers` in the order of [`SHAPES`], without the upstream gradient and, for [`Kind::Dense`], without the query of the
/// summaries; and the seconds that forward + backward took.
///
/// # Panics
/// When the numbers are not of [`SHAPES`].
pub fn gradients(numbers: &[Vec<f32>], kind: Kind) -> (Vec<Vec<f32>>, f64) {
    let dev: Cpu = Default::default();
    let n = |i: usize| numbers[i].clone();
    let wide = (Const::<B>, Const::<T>, Const::<C>);
    let x: Tensor<Rank3<B, T, C>, f32, _> = dev.tensor_from_vec(n(0), wide);
    let norm = |i| -> Tensor<Rank1<C>, f32, Cpu> { dev.tensor_from_vec(n(i), (Const::<C>,)) };
    let square = |i| -> Tensor<Rank2<C, C>, f32, Cpu> { dev.tensor_from_vec(n(i), (Const::<C>, Const::<C>)) };
    let (w1, wq, wk, wv, wo, w2) = (norm(1), square(2), square(3), square(4), square(5), norm(6));
    let wg: Tensor<Rank2<C, F>, f32, _> = dev.tensor_from_vec(n(7), (Const::<C>, Const::<F>));
    let wu: Tensor<Rank2<C, F>, f32, _> = dev.tensor_from_vec(n(8), (Const::<C>, Const::<F>));
    let wd: Tensor<Rank2<F, C>, f32, _> = dev.tensor_from_vec(n(9), (Const::<F>, Const::<C>));
    let seed: Tensor<Rank3<B, T, C>, f32, _> = dev.tensor_from_vec(n(10), wide);
    let qbar: Tensor<Rank2<H, D>, f32, _> = dev.tensor_from_vec(n(11), (Const::<H>, Const::<D>));
    let later: Vec<f32> = (0..T * T).map(|i| if i % T > i / T { -1e9 } else { 0.0 }).collect();
    let mask: Tensor<Rank2<T, T>, f32, _> = dev.tensor_from_vec(later, (Const::<T>, Const::<T>));

    let start = Instant::now();
    let input: Traced<Rank3<B, T, C>> = x.leaky_trace();
    let a = rmsnorm_dfdx(input.with_empty_tape(), &w1);
    let q = a
        .with_empty_tape()
        .matmul(wq.clone())
        .reshape::<Rank4<B, T, H, D>>()
        .permute::<Rank4<B, H, T, D>, Axes4<0, 2, 1, 3>>();
    let k = a.with_empty_tape().matmul(wk.clone()).reshape::<Rank4<B, T, H, D>>();
    let v = a.matmul(wv.clone()).reshape::<Rank4<B, T, H, D>>().permute::<Rank4<B, H, T, D>, Axes4<0, 2, 1, 3>>();
    let p = match kind {
        Kind::Dense => dense_dfdx(q, k, mask),
        Kind::Dash => dash_dfdx(&dev, q, k, &qbar),
    };
    let o = p.matmul(v).permute::<Rank4<B, T, H, D>, Axes4<0, 2, 1, 3>>().reshape::<Rank3<B, T, C>>();
    let middle = input + o.matmul(wo.clone());
    let m = rmsnorm_dfdx(middle.with_empty_tape(), &w2);
    let gate = m.with_empty_tape().matmul(wg.clone());
    let up = m.matmul(wu.clone());
    let gated = gate.with_empty_tape().sigmoid() * gate * up;
    let y = middle + gated.matmul(wd.clone());
    let grads = (y * seed).sum::<Rank0, _>().backward();
    let seconds = start.elapsed().as_secs_f64();
    let mut all = vec![grads.get(&x).as_vec(), grads.get(&w1).as_vec()];
    all.extend([&wq, &wk, &wv, &wo].map(|w| grads.get(w).as_vec()));
    all.extend([grads.get(&w2).as_vec(), grads.get(&wg).as_vec(), grads.get(&wu).as_vec(), grads.get(&wd).as_vec()]);
    if kind == Kind::Dash {
        all.push(grads.get(&qbar).as_vec());
    }
    (all, seconds)
}
