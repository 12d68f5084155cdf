//! One pass of attention: who attends what, and the launches.

use super::joint::Order;
use super::{BlockMask, CHUNKS, Gradients, Operands, WIDTHS, key_side, padded};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, TensorMap, Unit};
use crate::error::{Result, ensure};
use crate::ops::attention::{Dims, Span};
use crate::ops::entmax::check_alpha_or_softmax;

static FORWARD: Source =
    Source { name: "attention_forward", text: concat!(include_str!("tiles.cu"), include_str!("forward.cu")) };
static ROWS: Source =
    Source { name: "attention_rows", text: concat!(include_str!("tiles.cu"), include_str!("rows.cu")) };
static SOLVE: Source =
    Source { name: "attention_solve", text: concat!(include_str!("tiles.cu"), include_str!("solve.cu")) };

/// Keys of a block of them, in shared memory at a time.
pub(super) const KEYS: usize = 64;
/// Tokens of a sequence with lists at most where a block counts or lists their chunks in shared memory.
pub(super) const MOST_LISTED: usize = 1 << 17;
/// Blocks of keys and values in shared memory at most: warps run ahead of each other by as many.
const SLOTS: usize = 12;

/// What the kernels are compiled for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    /// Head width, and what it takes in shared memory.
    pub head: usize,
    pub wide: usize,
    pub chunk: Option<usize>,
    pub span: bool,
    /// 0 softmax, 1 entmax with alpha 1.5, 2 with any alpha.
    pub power: usize,
}

/// How a kernel is cut.
pub(super) struct Cut {
    /// Warps of a block, and slabs of 16 rows a warp.
    pub warps: usize,
    pub slabs: usize,
    /// Keys (on the key side rows) whose scores exist at a time.
    pub scores: usize,
}

impl Cut {
    /// Two slabs a warp where every row attends every key, so that a fragment serves both. One slab and more warps for lists: a
    /// slab's tokens then skip what they do not attend, and other warps fill the time. All of it within the registers of a thread.
    fn forward(form: Form) -> Self {
        let (warps, slabs, scores) = match (form.wide, form.chunk) {
            (128, None) => (8, 2, 32),
            (_, None) => (8, 2, 64),
            (128, Some(..16)) => (8, 1, 16),
            (128, Some(16)) => (12, 1, 16),
            (128, Some(32)) => (12, 1, 32),
            (128, Some(_)) => (12, 1, 64),
            (_, Some(64 | 128)) => (16, 1, 64),
            (_, Some(_)) => (12, 1, 64),
        };
        Cut { warps, slabs, scores }
    }

    /// Backward keeps the scores of a row and their gradients: one slab a warp, because two take twice the registers.
    fn rows(form: Form) -> Self {
        let (warps, scores) = match (form.wide, form.chunk) {
            (128, _) | (_, Some(..64)) => (8, 64),
            (64, Some(64)) | (_, None) => (12, 64),
            (_, Some(_)) => (12, 32),
        };
        Cut { warps, slabs: 1, scores }
    }

    fn solve(form: Form) -> Self {
        Cut { warps: 8, slabs: 1, scores: if form.wide == 128 { 32 } else { 64 } }
    }

    /// Rows of a block.
    fn height(&self) -> usize {
        self.warps * self.slabs * 16
    }

    /// The blocks over the rows of all kv heads.
    fn grid(&self, dims: Dims) -> Grid {
        let tokens = self.warps * self.slabs * (16 / dims.group());
        Grid { blocks: [dims.t.div_ceil(tokens), dims.b * dims.g, 1], ..Grid::line(1, self.warps as u32 * 32) }
    }
}

impl Form {
    pub(super) fn unit(self, source: &'static Source, cut: &Cut) -> Unit {
        let numbers = [
            ("D", self.wide),
            ("HEAD", self.head),
            ("WARPS", cut.warps),
            ("SLABS", cut.slabs),
            ("SUB", cut.scores),
            ("LISTED", usize::from(self.chunk.is_some())),
            ("CHUNK", self.chunk.unwrap_or(KEYS)),
            ("SPAN", usize::from(self.span)),
            ("POWER", self.power),
        ];
        Unit::new(source, numbers.map(|(name, value)| (name, value.to_string())))
    }

    fn units(self) -> Vec<Unit> {
        let forward = self.unit(&FORWARD, &Cut::forward(self));
        let units = [forward, self.unit(&ROWS, &Cut::rows(self)), key_side::unit(self)];
        let solve = (self.power > 0).then(|| self.unit(&SOLVE, &Cut::solve(self)));
        units.into_iter().chain(solve).collect()
    }
}

/// Every form at the widths that need no padding.
pub(super) fn units() -> Vec<Unit> {
    let forms = WIDTHS.into_iter().flat_map(|wide| {
        let form = Form { head: wide, wide, chunk: None, span: false, power: 0 };
        let chunks = CHUNKS.into_iter().map(move |chunk| Form { chunk: Some(chunk), ..form });
        let spans = (0..3).map(move |power| Form { span: true, power, ..form });
        // dense attention of wider heads is in wide.rs
        chunks.chain(spans).chain((wide < 64).then_some(form))
    });
    forms.flat_map(Form::units).collect()
}

/// Who attends what, and with which operands.
pub(super) struct Pass<'a> {
    pub op: &'static str,
    pub dims: Dims,
    pub operands: Operands<'a>,
    mask: Option<&'a BlockMask>,
    bias: Option<&'a CudaBuffer>,
    pub span: Option<Span>,
    /// Keys of a sequence.
    pub keys: usize,
    /// 1 for softmax.
    alpha: f64,
    pub form: Form,
}

impl<'a> Pass<'a> {
    /// Causal attention to every key, or to the chunks of a mask.
    pub fn listed(
        op: &'static str,
        dims: Dims,
        operands: Operands<'a>,
        mask: Option<&'a BlockMask>,
        bias: Option<&'a CudaBuffer>,
    ) -> Result<Self> {
        operands.check(op, dims, dims.t)?;
        if let Some(mask) = mask {
            mask.check(op, dims)?;
        }
        if let Some(bias) = bias {
            let entries = mask.map_or(0, BlockMask::entries);
            ensure!(mask.is_some(), op, "a bias without a mask");
            ensure!(bias.kind() == Kind::F32 && entries <= bias.len(), op, "{bias:?} for {entries} entries");
        }
        let chunk = mask.map(BlockMask::chunk_size);
        let form = Form { head: dims.d, wide: padded(op, dims.d)?, chunk, span: false, power: 0 };
        Ok(Pass { op, dims, operands, mask, bias, span: None, keys: dims.t, alpha: 1.0, form })
    }

    /// Attention to one range of keys a query, softmax (alpha 1) or entmax over it.
    pub fn span(op: &'static str, dims: Dims, operands: Operands<'a>, span: Span, alpha: f64) -> Result<Self> {
        let keys = span.keys(dims.t);
        operands.check(op, dims, keys)?;
        check_alpha_or_softmax(op, alpha)?;
        let power = if alpha == 1.0 { 0 } else { 2 - usize::from(alpha == 1.5) };
        let form = Form { head: dims.d, wide: padded(op, dims.d)?, chunk: None, span: true, power };
        Ok(Pass { op, dims, operands, mask: None, bias: None, span: Some(span), keys, alpha, form })
    }

    /// Whether any query may see a key.
    pub fn sees_nothing(&self) -> bool {
        self.keys == 0
    }

    /// scale, the span's `add`, `stride` and `width` (see `Reach` in tiles.cu), and what entmax raises to which power.
    pub fn tail(&self) -> Vec<Arg<'a>> {
        let [add, stride, width] = match self.span {
            None | Some(Span::Causal) => [1, 1, i64::from(i32::MAX)],
            Some(Span::Sliding(width)) => [1, 1, width as i64],
            Some(Span::Windows { length, stride }) => {
                [1 + stride as i64 - length as i64, stride as i64, i64::from(i32::MAX)]
            }
        }
        .map(|x| Arg::Int(x.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32));
        let share = self.alpha - 1.0;
        let powers = if share > 0.0 { [share, 1.0 / share, (2.0 - self.alpha) / share] } else { [1.0; 3] };
        [self.scale(), add, stride, width].into_iter().chain(powers.map(|x| Arg::F32(x as f32))).collect()
    }

    /// What scores are multiplied with.
    pub fn scale(&self) -> Arg<'static> {
        Arg::F32(1.0 / (self.dims.d as f32).sqrt())
    }

    /// Whether the rows that attend a chunk can be gathered, forward and backward: lists of chunks of 64 at width 64.
    pub fn rows_may_be_gathered(&self) -> bool {
        self.form.chunk == Some(KEYS) && self.form.wide == 64 && self.dims.t <= MOST_LISTED
    }

    /// Keys and values for the copy engine, a block of them a box.
    pub fn maps(&self) -> Result<(TensorMap, TensorMap)> {
        let Dims { b, g, d, .. } = self.dims;
        let device = self.operands.q.0.device();
        let [k, v] =
            [self.operands.k, self.operands.v].map(|x| device.tensor_map(x, [g * d, self.keys, b], KEYS as u32));
        Ok((k?, v?))
    }

    pub fn lists(&self) -> [Arg<'a>; 3] {
        let lists = [self.mask.map(BlockMask::cells), self.mask.map(BlockMask::first), self.bias];
        lists.map(|x| x.map_or(Arg::Null, Arg::Buffer))
    }

    pub fn chunks(&self) -> usize {
        self.mask.map_or(0, BlockMask::chunks)
    }

    /// Starts a kernel of the query side: `inputs` and `outputs` around the maps of keys and values behind q, whole `sizes` before the tail.
    fn query_side(
        &self,
        (source, name): (&'static Source, &'static str),
        cut: &Cut,
        tiles: usize,
        buffers: &[Arg],
        lists: &[Arg],
    ) -> Result<()> {
        let (Dims { t, g, .. }, (k, v)) = (self.dims, self.maps()?);
        let device = self.operands.q.0.device();
        // what a kernel declares itself: barriers and counters, and sums of heads a warp
        let own = 1024 + cut.warps * 64 * self.form.chunk.map_or(1, |chunk| KEYS.div_ceil(chunk));
        let limit = device.properties().shared_per_block as usize - own;
        let (slots, shared) = self.ring(tiles * cut.height(), limit);
        let first = [Arg::At(self.operands.q.0, self.operands.q.1), Arg::Map(&k), Arg::Map(&v)];
        let sizes = [t, g, self.dims.group(), self.operands.q.2].map(Arg::int);
        let chunks = [Arg::int(self.chunks())];
        let chunks = if lists.is_empty() { &chunks[..0] } else { &chunks };
        let args = [&first[..], buffers, lists, &sizes, chunks, &[Arg::int(slots)], &self.tail()].concat();
        let kernel = device.kernel(&self.form.unit(source, cut), name)?;
        // SAFETY: the kernel's parameters in order, for extents that were compared with the buffers when the pass was made and by
        // its methods.
        unsafe { kernel.launch(cut.grid(self.dims).shared(shared), &args) }
    }

    /// How many blocks of keys and values fit beside `rows` rows and the list of visited blocks, and the bytes of it all.
    fn ring(&self, rows: usize, limit: usize) -> (usize, usize) {
        let panels = self.form.wide.div_ceil(64) * 128;
        let slot = 2 * KEYS * panels;
        let rest = rows * panels + self.dims.t.div_ceil(KEYS).next_multiple_of(8) * 2;
        let slots = SLOTS.min(limit.saturating_sub(rest) / slot);
        (slots, rest + slots * slot)
    }

    /// o, bf16. Writes the rows' lse, or reads their thresholds where alpha is above 1.
    pub fn forward(&self, rows: &CudaBuffer) -> Result<CudaBuffer> {
        let Dims { b, t, h, d, .. } = self.dims;
        let o = self.operands.q.0.device().alloc(self.op, Kind::Bf16, b * t * h * d)?;
        match self.gathers_forward() {
            Some(cut) => self.gathered_forward(cut, &o, rows)?,
            None if self.forward_is_wide() => self.wide_forward(&o, rows)?,
            None => self.slabs_forward(&o, rows)?,
        }
        Ok(o)
    }

    /// o and every row's lse, by the kernel on `mma.sync`.
    pub fn slabs_forward(&self, o: &CudaBuffer, rows: &CudaBuffer) -> Result<()> {
        let buffers = [o, rows].map(Arg::Buffer);
        self.query_side((&FORWARD, "attention_forward"), &Cut::forward(self.form), 1, &buffers, &self.lists())
    }

    /// The threshold of every row, where alpha is above 1.
    pub fn solve(&self) -> Result<CudaBuffer> {
        let taus = self.floats(self.dims.b * self.dims.t * self.dims.h)?;
        let cut = Cut::solve(self.form);
        self.query_side((&SOLVE, "attention_solve"), &cut, 1, &[Arg::Buffer(&taus)], &[])?;
        Ok(taus)
    }

    /// o . dout of every row.
    pub fn delta(&self, o: &CudaBuffer, dout: &CudaBuffer) -> Result<CudaBuffer> {
        let rows = self.dims.b * self.dims.t * self.dims.h;
        self.check_outputs(o)?;
        self.check_outputs(dout)?;
        let delta = self.floats(rows)?;
        let args = [Arg::Buffer(o), Arg::Buffer(dout), Arg::Buffer(&delta), Arg::Long(rows as i64)];
        let kernel = delta.device().kernel(&self.form.unit(&ROWS, &Cut::rows(self.form)), "attention_delta")?;
        // SAFETY: the kernel's parameters in order; a warp a row.
        unsafe { kernel.launch(Grid::line(rows.div_ceil(8), 256), &args)? };
        Ok(delta)
    }

    /// Where alpha is above 1: of every row the mean of dout . v with the weights p^(2 - alpha).
    pub fn means(&self, taus: &CudaBuffer, dout: &CudaBuffer) -> Result<CudaBuffer> {
        self.check_rows(taus)?;
        self.check_outputs(dout)?;
        let means = self.floats(taus.len())?;
        let buffers = [dout, taus, &means].map(Arg::Buffer);
        self.query_side((&SOLVE, "attention_means"), &Cut::solve(self.form), 2, &buffers, &[])?;
        Ok(means)
    }

    /// Room for the bias's gradient, where there is a bias.
    pub(super) fn dbias(&self) -> Result<Option<CudaBuffer>> {
        self.bias.and(self.mask).map(|m| self.floats(m.entries())).transpose()
    }

    pub(super) fn floats(&self, len: usize) -> Result<CudaBuffer> {
        self.operands.q.0.device().alloc(self.op, Kind::F32, len)
    }

    fn check_rows(&self, x: &CudaBuffer) -> Result<()> {
        let rows = self.dims.b * self.dims.t * self.dims.h;
        ensure!((x.kind(), x.len()) == (Kind::F32, rows), self.op, "{x:?} for {rows} rows");
        Ok(())
    }

    fn check_outputs(&self, x: &CudaBuffer) -> Result<()> {
        let numbers = self.dims.b * self.dims.t * self.dims.h * self.dims.d;
        ensure!((x.kind(), x.len()) == (Kind::Bf16, numbers), self.op, "{x:?} for {:?}", self.dims);
        Ok(())
    }

    /// Both sides, from lse (or the thresholds) and delta (or the means) of every row.
    pub fn backward(&self, rows: &CudaBuffer, delta: &CudaBuffer, dout: &CudaBuffer) -> Result<Gradients> {
        let Dims { b, t, h, d, .. } = self.dims;
        self.check_rows(rows)?;
        self.check_outputs(dout)?;
        if self.sides_are_joint() {
            return self.joint([dout, rows, delta], Order::of(self.chunks()));
        }
        let dq = self.floats(b * t * h * d)?;
        let dbias = self.dbias()?;
        let buffers = [Arg::Buffer(dout), Arg::Buffer(rows), Arg::Buffer(delta), Arg::Buffer(&dq)];
        let buffers = [&buffers[..], &[dbias.as_ref().map_or(Arg::Null, Arg::Buffer)]].concat();
        match self.rows_are_wide() {
            true => self.wide_rows(&buffers)?,
            false => self.query_side((&ROWS, "attention_rows"), &Cut::rows(self.form), 2, &buffers, &self.lists())?,
        }
        let [dk, dv] = match self.keys_are_wide() {
            true => self.wide_keys([dout, rows, delta], self.tokens_of_part())?,
            false => self.key_side([dout, rows, delta], self.key_parts())?,
        };
        Ok(Gradients { dq, dk, dv, dbias })
    }
}
