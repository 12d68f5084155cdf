//! What generation keeps of the tokens so far, so that a new one is computed alone: every layer's keys and values, and what its
//! router made of them (summaries of complete chunks, pooled windows).

use std::cell::RefCell;

use dash_core::ops::attention::{keep_rows, room_for_keys, room_for_rows};
use dash_core::ops::index_select;
use dash_core::{Compute, Error, Ids, Result, Tape, Tensor};

/// Rows that are made room for at first.
const ROOM: usize = 64;

/// Of one sequence, for one model.
pub struct Cache {
    layers: Vec<RefCell<LayerCache>>,
}

impl Cache {
    /// Of no token yet, for a model of so many layers.
    pub(crate) fn new(layers: usize) -> Self {
        Cache { layers: (0..layers).map(|_| RefCell::default()).collect() }
    }

    /// Tokens whose keys and values are kept.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.borrow().past)
    }

    /// No token yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a layer keeps.
    pub(crate) fn layer(&self, layer: usize) -> &RefCell<LayerCache> {
        &self.layers[layer]
    }

    /// Ends a pass over `tokens` tokens.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.layers.iter_mut().for_each(|layer| layer.get_mut().past += tokens);
    }
}

/// What one layer keeps, by name.
#[derive(Default)]
pub struct LayerCache {
    /// tokens of earlier passes
    past: usize,
    rows: Vec<(&'static str, Rows)>,
    pooled: Vec<(&'static str, Pooled)>,
}

/// Rows `[1, capacity, g, d]`, of which the first `len` are there.
struct Rows {
    tensor: Tensor,
    len: usize,
}

/// Windows of tokens, pooled.
struct Pooled {
    /// of the complete windows, `[1, n, g, d]`
    windows: Tensor,
    /// the tokens from the first one of the next window on
    rest: Rows,
}

/// The place of a name in a list.
fn place<T>(list: &[(&'static str, T)], name: &str) -> Option<usize> {
    list.iter().position(|(n, _)| *n == name)
}

impl LayerCache {
    /// Tokens of earlier passes.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Keeps keys or values `[1, t, g, d]` of so many query heads behind those of this name, as products of this kind take them.
    pub(crate) fn keep(&mut self, name: &'static str, rows: &Tensor, heads: usize, compute: Compute) -> Result<()> {
        match place(&self.rows, name) {
            Some(i) => self.rows[i].1.append(rows),
            None => {
                let room = room_for_keys(rows, rows.shape()[1] + ROOM, heads, compute)?;
                self.rows.push((name, Rows::new(room, rows)?));
                Ok(())
            }
        }
    }

    /// The rows of a name; behind the kept ones there is room without meaning.
    pub(crate) fn kept(&self, name: &str) -> Result<&Tensor> {
        let i = place(&self.rows, name).ok_or_else(|| Error::invalid("cache", format!("nothing is kept as {name}")))?;
        Ok(&self.rows[i].1.tensor)
    }

    /// All complete windows of this name after `x [1, t, g, d]` has followed the tokens so far; `pool` makes those of tokens.
    pub(crate) fn pool(
        &mut self,
        name: &'static str,
        x: &Tensor,
        (length, stride): (usize, usize),
        pool: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let complete = |count: usize| (count + stride).saturating_sub(length) / stride;
        let (i, tokens) = match place(&self.pooled, name) {
            Some(i) => {
                let Pooled { windows, rest } = &mut self.pooled[i].1;
                rest.append(x)?;
                if complete(rest.len) == 0 {
                    return Ok(windows.clone());
                }
                (i, rows_of(&rest.tensor, 0..rest.len)?)
            }
            None => {
                let none = rows_of(x, 0..0)?;
                let rest = Rows { tensor: none.clone(), len: 0 };
                self.pooled.push((name, Pooled { windows: none, rest }));
                (self.pooled.len() - 1, x.clone())
            }
        };
        let Pooled { windows, rest } = &mut self.pooled[i].1;
        let count = tokens.shape()[1];
        let new = complete(count);
        let left = rows_of(&tokens, (new * stride).min(count)..count)?;
        *rest = Rows::new(room_for_rows(&left, left.shape()[1] + ROOM)?, &left)?;
        if new > 0 {
            *windows = joined(windows, &pool(tokens)?)?;
        }
        Ok(windows.clone())
    }
}

impl Rows {
    /// The first ones of a tensor that has room for more.
    fn new(tensor: Tensor, rows: &Tensor) -> Result<Self> {
        let mut new = Rows { tensor, len: 0 };
        new.append(rows)?;
        Ok(new)
    }

    /// In place while there is room, which doubles when it ends.
    fn append(&mut self, rows: &Tensor) -> Result<()> {
        let (capacity, len) = (self.tensor.shape()[1], self.len + rows.shape()[1]);
        if len > capacity {
            let mut larger = room_for_rows(&self.tensor, len.max(2 * capacity))?;
            keep_rows(&mut larger, 0, &self.tensor)?;
            self.tensor = larger;
        }
        keep_rows(&mut self.tensor, self.len, rows)?;
        self.len = len;
        Ok(())
    }
}

/// Some rows of `x [1, t, ..]`.
fn rows_of(x: &Tensor, rows: std::ops::Range<usize>) -> Result<Tensor> {
    let tape = Tape::inference();
    let places = Ids::places(x.device(), &rows.collect::<Vec<_>>())?;
    Ok(index_select(&tape, &tape.leaf(x.clone()), 1, &places)?.value)
}

/// The rows of a, then those of b.
fn joined(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (n, m) = (a.shape()[1], b.shape()[1]);
    if n == 0 {
        return Ok(b.clone());
    }
    let mut all = room_for_rows(a, n + m)?;
    keep_rows(&mut all, 0, a)?;
    keep_rows(&mut all, n, b)?;
    Ok(all)
}
