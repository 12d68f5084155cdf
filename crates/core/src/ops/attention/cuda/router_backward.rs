//! The gradient through the router on a CUDA device: from the bias of every entry to the queries and the chunk summaries.

use super::plain::RoutedGradients;
use super::router::{BACKWARD, PLACEBO, factor};
use super::scored::{SOFTMAX, Scored, beside_scores};
use super::{BlockMask, Strided, check_chunk};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source};
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

/// The kernels of a gradient.
fn source(settings: Entmax) -> &'static Source {
    match settings.gradient {
        RouterGradient::Placebo => &PLACEBO,
        RouterGradient::Full | RouterGradient::Stopped | RouterGradient::StraightThrough | RouterGradient::Flipped => {
            &BACKWARD
        }
    }
}

/// Gradients of the scores behind the bias of every entry; see the kernels for the formula.
// Above 60 lines: the arguments of a launch in the order of the kernel, which a function more would only take apart.
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
    // of every row what draws its placebo: two words of 64 bits
    let placebo = settings.gradient == RouterGradient::Placebo;
    let draws = placebo.then(|| device.alloc(op, Kind::U64, 2 * b * t * h)).transpose()?;
    let draws = [draws.as_ref().map_or(Arg::Null, Arg::Buffer)];
    let inputs = [shifts, mask.cells(), mask.first(), sums, dbias].map(Arg::Buffer);
    let outputs = [&dq, &means, &offsets, &own, &squares].map(Arg::Buffer);
    let (_, sizes, rest) = scored.cut();
    let chunk = [Arg::int(settings.chunk_size)];
    let numbers = [factor(settings, d), Arg::F32(settings.alpha as f32), Arg::F32(settings.backward_sigma() as f32)];
    let flag = |x: bool| Arg::Int(i32::from(x));
    let flags = [flag(settings.center == Center::Mean), slope.arg(), flag(stopped)];
    let args = [
        &scored.operands()[..],
        &inputs,
        &outputs,
        &[kept_scores, pairs],
        &draws,
        &sizes,
        &chunk,
        &rest,
        &numbers,
        &flags,
    ]
    .concat();
    scored.launch((source(settings), slope.alpha(settings)), "router_rows", &args)?;
    let total = |x: &CudaBuffer| sum_axis(x, (1, x.len(), 1));
    let operands = match stopped {
        true => None,
        false => {
            let inputs = [shifts, mask.cells(), mask.first(), sums, dbias, &means, &offsets].map(Arg::Buffer);
            Some((dq, key_side(&scored, &[&inputs[..], &draws].concat(), settings, slope)?))
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
    let kernel = device.kernel(&scored.unit(source(settings), slope.alpha(settings)), "router_keys")?;
    // SAFETY: the kernel's parameters in order; extents were compared with the buffers by the caller.
    unsafe { kernel.launch(grid.shared(shared), &args)? };
    sum_axis(&partial, (1, segments, b * n * g * d))
}

#[cfg(test)]
mod tests;
