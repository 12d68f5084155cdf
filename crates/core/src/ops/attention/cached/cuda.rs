//! The launches: attention of a few queries to kept keys, split over the keys, and entmax routing among the chunks of kept keys.

use super::lists::ChunkLists;
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Error, Result, ensure};
use crate::number::{Compute, DType};
use crate::ops::attention::{Center, Dims, Entmax, Span};
use crate::ops::cuda::{infinity, real, wide};

static DECODE: Source = Source { name: "attention_decode", text: include_str!("decode.cu") };
static PLAIN: Source = Source { name: "attention_decode_plain", text: include_str!("plain.cu") };
static ROUTE: Source = Source { name: "attention_decode_route", text: include_str!("route.cu") };

/// Head widths that `decode.cu` is compiled for; others are padded.
const WIDTHS: [usize; 4] = [16, 32, 64, 128];
/// Query heads a kv head, at most, of `decode.cu`: the rows of its product.
const HEADS: usize = 16;
/// The same of `route.cu`.
pub const MOST_GROUP: usize = 64;
/// Blocks that are on the card at once: two a multiprocessor of an H100. Keys are cut by this number and not by the card's own, so that the order of
/// sums is the same on every card.
const BLOCKS: usize = 2 * 132;
/// Splits at most of a block that adds few of them, see `decode.cu`.
const FEW_SPLITS: usize = 64;
/// Stages and warps of `decode.cu`.
const STAGES: usize = 3;
const WARPS: usize = 4;

fn decode_unit(d: usize, listed: bool) -> Unit {
    Unit::new(&DECODE, [("D", d.to_string()), ("LISTED", usize::from(listed).to_string())])
}

fn plain_unit(kind: Kind) -> Unit {
    Unit::new(&PLAIN, [("R", kind.source_name().into()), ("INFINITY_OF_R", infinity(kind).into())])
}

/// Warps of a block that solves a row: as many as there are registers for.
fn warps(number: Kind) -> usize {
    if number == Kind::F64 { 16 } else { 32 }
}

/// Shared memory of a block that solves a row, for the scores near a head's largest.
const SOLVE_BYTES: usize = 64 << 10;

fn route_unit(kind: Kind, squares: bool) -> Unit {
    let number = wide(kind);
    // see route.cu
    let small = if number == Kind::F64 { "1e-9" } else { "1e-5f" };
    let defines = [
        ("STORED", kind.source_name().into()),
        ("R", number.source_name().into()),
        ("SQUARES", usize::from(squares).to_string()),
        ("SMALL", small.into()),
        ("MOST_GROUP", MOST_GROUP.to_string()),
        ("WARPS", warps(number).to_string()),
        ("LIST", (SOLVE_BYTES / number.size()).to_string()),
        ("ROUNDED", usize::from(kind == Kind::Bf16).to_string()),
        ("INFINITY_OF_R", infinity(number).into()),
    ];
    Unit::new(&ROUTE, defines)
}

/// Everything that is compiled for kept keys.
pub fn units() -> Vec<Unit> {
    let decode = WIDTHS.into_iter().flat_map(|d| [false, true].map(|listed| decode_unit(d, listed)));
    let plain = [Kind::F32, Kind::F64].map(plain_unit);
    let route = [Kind::Bf16, Kind::F32, Kind::F64].into_iter().flat_map(|k| [false, true].map(|s| route_unit(k, s)));
    decode.chain(plain).chain(route).collect()
}

/// Which kept keys a query sees.
#[derive(Clone, Copy)]
pub enum Sees<'a> {
    /// A range up to its own.
    Span(Span),
    /// Its list, with a bias an entry where there is one.
    Lists(&'a ChunkLists, Option<&'a CudaBuffer>),
}

/// What the kernels take of [`Sees`]: counts, chunks and bias; chunk size, places of a list, and the window, 0 for all.
fn seen_args<'a>(op: &'static str, sees: Sees<'a>, number: Kind) -> Result<([Arg<'a>; 3], [usize; 3])> {
    match sees {
        Sees::Span(Span::Causal) => Ok(([Arg::Null; 3], [1, 0, 0])),
        // a wider one sees all there is, which kernels count so far
        Sees::Span(Span::Sliding(window)) => Ok(([Arg::Null; 3], [1, 0, window.min(i32::MAX as usize)])),
        Sees::Span(Span::Windows { .. }) => {
            Err(Error::invalid(op, "CUDA has no kernel for windows of kept keys: generate without a cache there"))
        }
        Sees::Lists(lists, bias) => {
            if let Some(bias) = bias {
                let fits = (bias.kind(), bias.len()) == (number, lists.entries());
                ensure!(fits, op, "bias {bias:?} for {} entries", lists.entries());
            }
            let buffers = [Arg::Buffer(&lists.counts), Arg::Buffer(&lists.chunks), bias.map_or(Arg::Null, Arg::Buffer)];
            Ok((buffers, [lists.chunk_size, lists.most, 0]))
        }
    }
}

/// Whether the kernels that split the keys take queries and keys in bf16 of these extents.
pub fn splits(dims: Dims) -> bool {
    dims.d.is_multiple_of(8) && dims.d <= WIDTHS[3] && dims.group() <= HEADS
}

/// What queries, keys and summaries of one token are multiplied in: as in the pass over a whole text where kernels here take that, else in full.
pub fn kind_of_kept(compute: Compute, dtype: DType, dims: Dims) -> Kind {
    if splits(dims) { Kind::of_operands(compute, dtype) } else { Kind::of(dtype) }
}

/// Blocks that share a row's keys: as many as there is room for on a card, none with less than a step for each of its warps.
fn blocks_of_row(rows: usize, keys: usize) -> usize {
    (BLOCKS / rows.max(1)).min(keys.div_ceil(16 * WARPS)).max(1)
}

/// Blocks that come while the kernel before them ends: a token is a row of short kernels, each of which waits for the one before.
fn early(blocks: usize, threads: u32) -> Grid {
    Grid { early: true, ..Grid::line(blocks, threads) }
}

fn check(op: &'static str, dims: Dims, capacity: usize, [q, k, v]: [&CudaBuffer; 3]) -> Result<usize> {
    let Dims { b, t, h, g, d } = dims;
    let kind = q.kind();
    let fits = |x: &CudaBuffer, len: usize| (x.kind(), x.len()) == (kind, len);
    let all = fits(q, b * t * h * d) && fits(k, b * capacity * g * d) && fits(v, b * capacity * g * d);
    ensure!(all, op, "{q:?}, {k:?} and {v:?} for {dims:?} with room for {capacity} keys");
    let rows = b * g * t;
    ensure!(rows <= 65535, op, "{rows} (sequence, kv head, query): a card takes 65535 at once");
    Ok(rows)
}

/// Attention of `q [b, t, h, d]`, the first at position `past`, to kept keys and values `[b, capacity, g, d]`: `[b, t, h, d]`. All are bf16 and
/// [`splits`] takes them, or all f32 or f64.
///
/// # Errors
/// When extents do not fit, there is no kernel for what is seen, or memory runs out.
pub fn attention(
    dims: Dims,
    (past, capacity): (usize, usize),
    [q, k, v]: [&CudaBuffer; 3],
    sees: Sees,
) -> Result<CudaBuffer> {
    let (op, device, kind) = ("cached_attention", q.device(), q.kind());
    let rows = check(op, dims, capacity, [q, k, v])?;
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    let (buffers, [chunk, most, window]) = seen_args(op, sees, wide(kind))?;
    let out = device.alloc(op, kind, b * t * h * d)?;
    let scale = 1.0 / (d as f64).sqrt();
    let sizes = [t, g, group, d, capacity, past, chunk, most, window].map(Arg::int);
    let operands = [q, k, v].map(Arg::Buffer);
    if kind != Kind::Bf16 {
        let room = past + t;
        let scores = device.alloc(op, kind, rows * group * room)?;
        let outputs = [Arg::Buffer(&scores), Arg::Buffer(&out)];
        let args = [&operands[..], &buffers, &outputs, &sizes, &[Arg::int(room), real(kind, scale)]].concat();
        // SAFETY: the kernel's parameters in order; a block a row and head, whose scores have room for all keys.
        unsafe { device.kernel(&plain_unit(kind), "decode_plain")?.launch(Grid::line(rows * group, 256), &args)? };
        return Ok(out);
    }
    ensure!(splits(dims), op, "{dims:?} in bf16: heads of a multiple of 8 up to 128, 1 to {HEADS} a kv head");
    let width = WIDTHS.into_iter().find(|w| *w >= d).expect("`splits` found one");
    let count = blocks_of_row(rows, past + t);
    let sums = device.alloc(op, Kind::F32, rows * count * group * 2)?;
    let outs = device.alloc(op, Kind::F32, rows * count * group * d)?;
    let unit = decode_unit(width, matches!(sees, Sees::Lists(..)));
    let outputs = [Arg::Buffer(&sums), Arg::Buffer(&outs)];
    let log2e = std::f64::consts::LOG2_E;
    let args = [&operands[..], &buffers, &outputs, &sizes, &[Arg::F32((scale * log2e) as f32)]].concat();
    let tile = 16 * width.div_ceil(64) * 128;
    // of narrower heads more than two blocks fit a multiprocessor, and early ones crowd where it is free first: 190 us became 218
    let grid = Grid { blocks: [count, rows, 1], early: width == WIDTHS[3], ..Grid::line(1, 32 * WARPS as u32) };
    // SAFETY: the kernel's parameters in order; a block a split of a row, with its warps' stages of keys and values in shared memory, which have room for
    // the warps' sums [WARPS, 16, width] in f32, too.
    unsafe { device.kernel(&unit, "decode_split")?.launch(grid.shared(WARPS * STAGES * 2 * tile), &args)? };
    let sizes = [t, g, group, d, count, past, chunk, window].map(Arg::int);
    let args = [&[Arg::Buffer(&sums), Arg::Buffer(&outs), buffers[0], Arg::Buffer(&out)][..], &sizes].concat();
    let (name, threads) = if count <= FEW_SPLITS { ("decode_combine_few", 128) } else { ("decode_combine", 512) };
    // SAFETY: the kernel's parameters in order; a block a row and head, a thread a column of at most 128, no more splits than it has registers for.
    unsafe { device.kernel(&unit, name)?.launch(early(rows * group, threads), &args)? };
    Ok(out)
}

/// What routing found: the lists, and weights and biases an entry.
pub struct Routed {
    /// Who attends what.
    pub lists: ChunkLists,
    /// w, 0 for the own chunk.
    pub weights: CudaBuffer,
    /// `(log w - mu) / sigma`, of the own chunk what it was given.
    pub bias: CudaBuffer,
}

/// Routes `q [b, t, h, d]`, the first at position `past`, over the summaries `kbar [b, n, g, d]` of all complete chunks; `own [g]` is the own chunk's
/// bias. q and kbar are of one kind; what comes out, and `own`, of f32, or f64 for f64.
///
/// # Errors
/// When extents do not fit, or memory runs out.
pub fn route(
    dims: Dims,
    past: usize,
    (q, kbar): (&CudaBuffer, &CudaBuffer),
    own: Option<&CudaBuffer>,
    settings: Entmax,
) -> Result<Routed> {
    let (op, device, kind) = ("entmax_routing", q.device(), q.kind());
    let Dims { b, t, h, g, d } = dims;
    let (rows, group, number, chunk) = (b * g * t, dims.group(), wide(kind), settings.chunk_size);
    let n = (past + t) / chunk;
    let fits = |x: &CudaBuffer, kind: Kind, len: usize| (x.kind(), x.len()) == (kind, len);
    let all = fits(q, kind, b * t * h * d) && fits(kbar, kind, b * n * g * d) && own.is_none_or(|x| fits(x, number, g));
    ensure!(all, op, "{q:?}, {kbar:?} and {own:?} for {dims:?} after {past} tokens");
    ensure!(rows <= 65535 && group <= MOST_GROUP, op, "{rows} rows of {group} heads: at most 65535 of {MOST_GROUP}");
    let most = n + 1;
    let scores = device.alloc(op, number, rows * group * n)?;
    let lists = (device.alloc(op, Kind::U32, rows)?, device.alloc(op, Kind::U32, rows * most)?);
    let (weights, bias) = (device.alloc(op, number, rows * most)?, device.alloc(op, number, rows * most)?);
    let unit = route_unit(kind, settings.alpha == 1.5);
    let sizes = [t, g, group, d, n].map(Arg::int);
    let factor = real(number, settings.gamma / (d as f64).sqrt());
    let args = [&[q, kbar, &scores].map(Arg::Buffer)[..], &sizes, &[factor]].concat();
    // chunks of a block, and its threads
    let (name, each, threads) =
        if kind == Kind::Bf16 && splits(dims) { ("route_products", 4 * 16, 128) } else { ("route_scores", 8, 256) };
    let grid = Grid { blocks: [n.div_ceil(each), rows, 1], ..early(1, threads) };
    // SAFETY: the kernel's parameters in order; the blocks cover all chunks of a row.
    unsafe { device.kernel(&unit, name)?.launch(grid, &args)? };
    let buffers = [&lists.0, &lists.1, &weights, &bias].map(Arg::Buffer);
    let inputs = [Arg::Buffer(&scores), own.map_or(Arg::Null, Arg::Buffer)];
    let sizes = [t, g, group, n, chunk, past, most].map(Arg::int);
    let numbers = [settings.alpha, settings.sigma].map(|x| real(number, x));
    let center = [Arg::Int(i32::from(settings.center != Center::None))];
    let args = [&inputs[..], &buffers, &sizes, &numbers, &center].concat();
    let grid = early(rows, 32 * warps(number) as u32).shared(SOLVE_BYTES);
    // SAFETY: the kernel's parameters in order; a block a row, whose lists have room for every chunk, with shared memory for LIST scores.
    unsafe { device.kernel(&unit, "route_solve")?.launch(grid, &args)? };
    let lists = ChunkLists::new(lists, (b, g, t), (past, chunk))?;
    Ok(Routed { lists, weights, bias })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_split_for_any_number_of_rows_and_keys() {
        let of = |rows, keys| blocks_of_row(rows, keys);
        assert_eq!([of(0, 0), of(2, 0), of(2, 1), of(2, 65), of(2, 1 << 20), of(65535, 1 << 20)], [1, 1, 1, 2, 132, 1]);
        // what `decode_combine` has registers for
        assert!(of(1, usize::MAX / 2) <= 288);
    }

    #[test]
    fn a_window_wider_than_kernels_count_is_all_there_is() {
        let args = |window| seen_args("test", Sees::Span(Span::Sliding(window)), Kind::F32).map(|(_, sizes)| sizes);
        assert_eq!(args(usize::MAX).unwrap(), [1, 0, i32::MAX as usize]);
        assert_eq!(args(33).unwrap(), [1, 0, 33]);
    }
}
