//! Choices of a fixed number of chunks on a CUDA device: by softmax over summaries, or over overlapping windows. No choice has a gradient.

use super::router::ROUTER;
use super::scored::Scored;
use super::{BlockMask, Strided, check_chunk};
use crate::device::cuda::{Arg, CudaBuffer};
use crate::error::{Result, ensure};
use crate::ops::attention::{Dims, Pooling, Span, Top, WindowChoice};

/// As no entmax is solved, the definition that tells its kernels apart is given a fixed value.
const SOFTMAX: f64 = 1.5;

pub(super) fn mask(dims: Dims, cells: CudaBuffer, chunk: usize, top: Top) -> Result<BlockMask> {
    let queries = (0..dims.g).flat_map(|kv| (0..dims.t).map(move |token| (kv, token)));
    let most: usize = queries.map(|(kv, token)| (token / chunk + 1).min(top.of(kv, token, dims.t))).sum();
    BlockMask::new(cells, (dims.b, dims.g, dims.t), chunk, dims.b * most)
}

/// The op `topk_routing` on `q [b, t, h, d]` and summaries `kbar [b, n, g, d]`, in bf16: the `top` best chunks of every query, its own included,
/// by the group's softmax probabilities.
///
/// # Errors
/// When extents do not fit, `top` is 0, or a sequence has more chunks than a block has room for.
pub fn topk_routing(
    dims: Dims,
    q: Strided,
    kbar: &CudaBuffer,
    chunk: usize,
    top: Top,
    gamma: f64,
) -> Result<BlockMask> {
    let op = "topk_routing";
    check_chunk(op, chunk)?;
    top.check(op, dims.g, dims.t)?;
    let scored = Scored::new(op, dims, q, (kbar, dims.t / chunk), |_| 0)?;
    let cells = scored.cells(chunk)?;
    let (_, sizes, rest) = scored.cut();
    let factor = Arg::F32((gamma / (dims.d as f64).sqrt()) as f32);
    let each = top.upload(kbar.device())?;
    let numbers = [factor, Arg::int(top.most().min(dims.t)), each.as_ref().map_or(Arg::Null, Arg::Buffer)];
    let args = [&scored.operands()[..], &[Arg::Buffer(&cells)], &sizes, &[Arg::int(chunk)], &rest, &numbers].concat();
    scored.launch((&ROUTER, SOFTMAX), "router_top", &args)?;
    mask(dims, cells, chunk, top)
}

/// Bytes of a block beside its scores: eight warps pool those of a row of chunks.
pub fn window_scratch(t: usize, chunk: usize) -> usize {
    8 * 4 * t.div_ceil(chunk)
}

/// The op `window_routing` on `q [b, t, h, d]` and `keys [b, m, g, d]` of windows, in bf16.
///
/// # Errors
/// When extents do not fit, the forced chunks are more than `top`, or a sequence has more windows than a block has room for.
pub fn window_routing(dims: Dims, q: Strided, keys: &CudaBuffer, choice: WindowChoice) -> Result<BlockMask> {
    let op = "window_routing";
    let WindowChoice { chunk_size: chunk, top, length, stride, init, local, pooling } = choice;
    check_chunk(op, chunk)?;
    ensure!(stride > 0 && local > 0, op, "stride is {stride}, local is {local}: at least 1");
    ensure!(top >= init + local, op, "top is {top}, but {init} first and {local} last chunks are always attended");
    let m = Span::Windows { length, stride }.keys(dims.t);
    let scored = Scored::new(op, dims, q, (keys, m), |_| window_scratch(dims.t, chunk))?;
    let cells = scored.cells(chunk)?;
    let (_, sizes, rest) = scored.cut();
    let factor = Arg::F32(1.0 / (dims.d as f32).sqrt());
    let add = i32::try_from(1 + stride as i64 - length as i64).unwrap_or(i32::MIN);
    let fits = |n: usize| Arg::int(n.min(dims.t + 1));
    let sum = Arg::Int(i32::from(pooling == Pooling::Overlap));
    let numbers = [factor, Arg::Int(add), Arg::int(stride), Arg::int(chunk), fits(top), Arg::int(length)];
    let numbers = [&numbers[..], &[fits(init), fits(local), sum]].concat();
    let args = [&scored.operands()[..], &[Arg::Buffer(&cells)], &sizes, &rest, &numbers].concat();
    scored.launch((&ROUTER, SOFTMAX), "router_windows", &args)?;
    mask(dims, cells, chunk, Top::All(top))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Kind::Bf16;
    use crate::ops::attention::{
        HostRoutes, Routes, topk_routing_after as top_on_cpu, window_routing as windows_on_cpu,
    };
    use crate::ops::cuda::testing::{Gpu, cuda, tensors};

    /// Scores in f32 of bf16 operands may order two chunks otherwise than the CPU in f64 where they are as near as f32 rounds. So rows
    /// may differ, each by chunks of nearly equal score; random ones do so rarely.
    fn compare(gpu: &Gpu, name: &str, dims: Dims, chunk: usize, got: &BlockMask, want: &Routes) {
        let want: HostRoutes = want.to_host().unwrap();
        let cells: Vec<u64> = got.cells().download().unwrap();
        assert_eq!(gpu.numbers(got.first()).last().copied(), Some(want.len() as f64), "{name}: entries");
        let (tiles, chunks, mut other) = (dims.t.div_ceil(64), dims.t.div_ceil(chunk), 0);
        for (row, token) in (0..dims.b * dims.g * dims.t).map(|i| (i / dims.t, i % dims.t)) {
            let has = |c: &u32| cells[(row * tiles + token / 64) * chunks + *c as usize] >> (token % 64) & 1 == 1;
            let found: Vec<u32> = (0..chunks as u32).filter(has).collect();
            let listed = want.chunks_of(row / dims.g, row % dims.g, token);
            assert_eq!(found.len(), listed.len(), "{name}: token {token}");
            other += usize::from(found != listed);
        }
        assert!(other * 1000 <= dims.b * dims.g * dims.t, "{name}: {other} queries choose otherwise");
    }

    #[test]
    fn the_best_chunks_are_those_of_the_cpu() {
        let Some(gpu) = cuda() else { return };
        for ([b, t, h, g, d], chunk, top) in [
            ([1, 5, 2, 1, 32], 16, 1),
            ([2, 129, 3, 1, 64], 16, 3),
            ([1, 300, 8, 2, 16], 4, 5),
            ([1, 1100, 16, 1, 128], 64, 4),
            ([1, 700, 4, 4, 24], 8, 200),
        ] {
            let (dims, n) = (Dims { b, t, h, g, d }, t / chunk);
            let host = tensors(&[(&[b, t, h, d], Bf16), (&[b, n, g, d], Bf16)]);
            let (q, kbar) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
            let each: Vec<u32> = (0..g * t).map(|i| 1 + (i * 7 % (top + 3)) as u32).collect();
            for top in [Top::All(top), Top::Each(&each)] {
                let want = top_on_cpu(0, &host[0], &host[1], chunk, top, 1.5).unwrap();
                let got = topk_routing(dims, (&q, 0, h * d), &kbar, chunk, top, 1.5).unwrap();
                compare(gpu, &format!("{dims:?} chunk {chunk} {top:?}"), dims, chunk, &got, &want);
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_chunk() {
        let Some(gpu) = cuda() else { return };
        let (dims, chunk) = (Dims { b: 1, t: 640, h: 2, g: 1, d: 16 }, 4);
        let host = tensors(&[(&[1, 640, 2, 16], Bf16)]);
        let zeros = gpu.cuda().zeros("test", Bf16, 160 * 16).unwrap();
        let q = gpu.tensor(&host[0], Bf16);
        let got = topk_routing(dims, (&q, 0, 32), &zeros, chunk, Top::All(4), 1.0).unwrap();
        let cells: Vec<u64> = got.cells().download().unwrap();
        for token in 0..640usize {
            let own = token / chunk;
            let found = (0..160).filter(|c| cells[token / 64 * 160 + c] >> (token % 64) & 1 == 1).collect::<Vec<_>>();
            let want: Vec<usize> = (0..own.min(3)).chain([own]).collect();
            assert_eq!(found, want, "token {token}");
        }
    }

    #[test]
    fn windows_choose_as_on_the_cpu() {
        let Some(gpu) = cuda() else { return };
        let shapes = [
            ([1, 5, 2, 1, 32], (16, 4, 4, 4, 0, 1)),
            ([2, 130, 4, 2, 16], (4, 5, 4, 4, 0, 1)),
            ([1, 300, 6, 2, 64], (16, 4, 8, 4, 1, 2)),
            ([1, 1100, 16, 1, 128], (64, 6, 32, 16, 1, 2)),
            ([1, 257, 3, 1, 40], (8, 3, 7, 3, 1, 1)),
        ];
        for ([b, t, h, g, d], (chunk_size, top, length, stride, init, local)) in shapes {
            for pooling in [Pooling::Max, Pooling::Overlap] {
                let choice = WindowChoice { chunk_size, top, length, stride, init, local, pooling };
                let (dims, m) = (Dims { b, t, h, g, d }, Span::Windows { length, stride }.keys(t));
                let host = tensors(&[(&[b, t, h, d], Bf16), (&[b, m, g, d], Bf16)]);
                let want = windows_on_cpu(&host[0], &host[1], choice).unwrap();
                let (q, keys) = (gpu.tensor(&host[0], Bf16), gpu.tensor(&host[1], Bf16));
                let got = window_routing(dims, (&q, 0, h * d), &keys, choice).unwrap();
                compare(gpu, &format!("{dims:?} {choice:?}"), dims, chunk_size, &got, &want);
            }
        }
    }
}
