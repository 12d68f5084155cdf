//! What a variant reads, and the attention ops as it calls them: over the tokens of the pass alone, or over those that a
//! [`LayerCache`] keeps of earlier passes, too. A variant is written once for both.

use std::cell::RefCell;

use dash_core::ops::attention::{
    Routes, Seen, Span, Top, block_attention, cached_attention, dense_attention, span_attention,
};
use dash_core::ops::{RopeTable, index_select, linear, reshape, rope};
use dash_core::{Error, Ids, Result, Tape, Tensor, Var};

use super::Reroute;
use crate::budget::Budget;
use crate::cache::LayerCache;
use crate::config::ModelConfig;

/// What a variant makes its own projections from.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// The normalised input `[b, t, c]`.
    pub x: &'a Var,
    /// The variant's parameters, in the order of [`super::Variant::params`].
    pub params: &'a [Var],
    /// Extents.
    pub config: &'a ModelConfig,
    /// Rotary angles.
    pub rope: &'a RopeTable,
    /// Position of the first token.
    pub first: usize,
}

impl Layer<'_> {
    /// `x` times `weight [n * d, c]` as heads, `[b, t, n, d]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn heads(&self, tape: &Tape, weight: &Var, n: usize) -> Result<Var> {
        let [b, t, _] = self.x.value.dims("heads")?;
        reshape(tape, &linear(tape, self.x, weight)?, &[b, t, n, self.config.head_dim])
    }

    /// [`Layer::heads`], then rope.
    ///
    /// # Errors
    /// As [`Layer::heads`], or when there are more tokens than angles.
    pub fn rotated_heads(&self, tape: &Tape, weight: &Var, n: usize) -> Result<Var> {
        rope(tape, &self.heads(tape, weight, n)?, self.rope, self.first)
    }
}

/// How many chunks each query attends, its own included.
pub(super) enum Tops {
    /// The same number for all.
    All(usize),
    /// `[g, t]`
    Each(Vec<u32>),
}

impl Tops {
    /// For the ops.
    pub(super) fn top(&self) -> Top<'_> {
        match self {
            Tops::All(top) => Top::All(*top),
            Tops::Each(tops) => Top::Each(tops),
        }
    }
}

/// Names under which a layer's keys and values are kept.
const KEYS: [&str; 2] = ["k", "v"];

/// What attention reads.
pub struct Inputs<'a> {
    /// Queries `[b, t, h, d]`, after rope.
    pub q: &'a Var,
    /// Keys `[b, t, g, d]`, after rope.
    pub k: &'a Var,
    /// Values `[b, t, g, d]`.
    pub v: &'a Var,
    /// What [`super::Variant::project`] returned.
    pub own: &'a [Var],
    /// Number of the layer.
    pub layer: usize,
    /// How many chunks another run attended, where the number of chunks is that and not the variant's.
    pub budget: Option<&'a Budget>,
    /// Who chooses the chunks in the place of the variant's own router.
    pub reroute: Option<&'a Reroute>,
    /// What the tokens of this pass are of the tokens of an update, where the pass is of a loss: the weight of a loss that a variant has of its
    /// own, see [`dash_core::ops::attach`].
    pub loss_share: Option<f64>,
    /// What is kept of tokens before these, and will be of these: generation has it.
    pub cache: Option<&'a RefCell<LayerCache>>,
}

impl Inputs<'_> {
    /// Tokens before the first query whose keys and values are kept.
    pub fn past(&self) -> usize {
        self.cache.map_or(0, |cache| cache.borrow().past())
    }

    /// How many chunks each query attends: `top`, or what the budget says.
    ///
    /// # Errors
    /// When the budget has no layer or no position like these.
    pub(super) fn tops(&self, top: usize) -> Result<Tops> {
        let (t, kv_heads) = (self.q.value.shape()[1], self.k.value.shape()[2]);
        match self.budget {
            None => Ok(Tops::All(top)),
            Some(budget) => budget.tops(self.layer, kv_heads, self.past(), t).map(Tops::Each),
        }
    }

    /// `x [b, rows, g, d]` with a copy of its kv head for every query head, `[b, rows, h, d]`: what lets each choose chunks of its own.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub(super) fn for_each_head(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let (h, g) = (self.q.value.shape()[2], x.value.shape()[2]);
        let heads: Vec<usize> = (0..h).map(|head| head / (h / g.max(1)).max(1)).collect();
        index_select(tape, x, 2, &Ids::places(x.value.device(), &heads)?)
    }

    /// Softmax attention to every token up to the query's own.
    pub(super) fn attend_all(&self, tape: &Tape) -> Result<Var> {
        let seen = Seen::Span(Span::Causal, 1.0);
        match self.kept(tape, KEYS, (self.k, self.v), seen)? {
            Some(out) => Ok(out),
            None => dense_attention(tape, self.q, self.k, self.v),
        }
    }

    /// Attention to the chosen chunks, or to what [`Inputs::reroute`] puts in their place, and who was attended.
    pub(super) fn attend_to(&self, tape: &Tape, routes: Routes, bias: Option<Var>) -> Result<(Var, Routes)> {
        let (routes, bias) = match self.reroute {
            None => (routes, bias),
            Some(_) if self.past() > 0 => {
                return Err(Error::invalid("attention", "another router chooses for whole sequences only"));
            }
            Some(other) => other.apply(tape, &routes, bias.as_ref())?,
        };
        let seen = Seen::Routes(&routes, bias.as_ref().map(|bias| &bias.value));
        if let Some(out) = self.kept(tape, KEYS, (self.k, self.v), seen)? {
            return Ok((out, routes));
        }
        Ok((block_attention(tape, self.q, self.k, self.v, &routes, bias.as_ref())?, routes))
    }

    /// Attention to a span of the layer's keys and values.
    pub(super) fn attend_span(&self, tape: &Tape, span: Span, alpha: f64) -> Result<Var> {
        self.attend_span_of(tape, KEYS, (self.k, self.v), span, alpha)
    }

    /// Attention to a span of other keys and values of the pass's tokens, which are kept under these names.
    pub(super) fn attend_span_of(
        &self,
        tape: &Tape,
        names: [&'static str; 2],
        (k, v): (&Var, &Var),
        span: Span,
        alpha: f64,
    ) -> Result<Var> {
        match self.kept(tape, names, (k, v), Seen::Span(span, alpha))? {
            Some(out) => Ok(out),
            None => span_attention(tape, self.q, k, v, span, alpha),
        }
    }

    /// Attention to windows that [`Inputs::pooled`] made.
    pub(super) fn attend_windows(&self, tape: &Tape, (k, v): (&Var, &Var), span: Span) -> Result<Var> {
        match self.past() {
            0 => span_attention(tape, self.q, k, v, span, 1.0),
            past => {
                let out = cached_attention(&self.q.value, &k.value, &v.value, past, Seen::Span(span, 1.0))?;
                Ok(tape.leaf(out))
            }
        }
    }

    /// Keeps the keys and values of the pass, and attends to them and the earlier ones where there are some. The tokens of a first
    /// pass have the op that training has.
    fn kept(&self, tape: &Tape, names: [&'static str; 2], (k, v): (&Var, &Var), seen: Seen) -> Result<Option<Var>> {
        let Some(cache) = self.cache else { return Ok(None) };
        let mut cache = cache.borrow_mut();
        let past = cache.past();
        let heads = self.q.value.shape()[2];
        cache.keep(names[0], &k.value, heads, tape.compute())?;
        cache.keep(names[1], &v.value, heads, tape.compute())?;
        if past == 0 {
            return Ok(None);
        }
        let (k, v): (&Tensor, &Tensor) = (cache.kept(names[0])?, cache.kept(names[1])?);
        Ok(Some(tape.leaf(cached_attention(&self.q.value, k, v, past, seen)?)))
    }

    /// One vector for each complete window of `length` tokens, of which one starts every `stride`: what `pool` makes of tokens
    /// `[b, t, g, d]`, `[b, windows, g, d]`. With a cache a window is pooled once, when its last token is there, and kept under this
    /// name.
    pub(super) fn pooled(
        &self,
        tape: &Tape,
        name: &'static str,
        x: &Var,
        (length, stride): (usize, usize),
        pool: impl Fn(&Var) -> Result<Var>,
    ) -> Result<Var> {
        match self.cache {
            None => pool(x),
            Some(cache) => {
                let pool = |tokens: Tensor| Ok(pool(&tape.leaf(tokens))?.value);
                Ok(tape.leaf(cache.borrow_mut().pool(name, &x.value, (length, stride), pool)?))
            }
        }
    }
}
