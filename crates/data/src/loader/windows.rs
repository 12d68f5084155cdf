//! How a text is cut into sequences.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::packing::{Packed, beginnings};
use crate::error::{DataError, Result};
use crate::intake::tokens::Side;
use crate::shard::Shard;
use crate::task::{Example, IGNORE};

/// How documents are laid out in sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// One behind the other: a document that crosses the end of a sequence is cut there.
    #[default]
    Stream,
    /// As many whole ones as fit, with padding behind them.
    BestFit,
}

/// What sequences are cut from a text.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// How documents are laid out.
    pub packing: Packing,
    /// Whether batches tell where documents begin.
    pub marks_documents: bool,
    /// On which side of a document the token stands that parts it from others; before, too, where there is none.
    pub end: Side,
}

impl Layout {
    /// Sequences of the stream, which do not tell of documents.
    pub fn stream(seq_len: usize) -> Self {
        Layout { seq_len, packing: Packing::Stream, marks_documents: false, end: Side::After }
    }
}

/// What packing made of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PackedEpoch {
    /// Sequences of an epoch.
    pub sequences: u32,
    /// Documents and pieces of long ones.
    pub pieces: usize,
    /// Share of the tokens of all sequences that is padding.
    pub padding: f64,
}

/// A sequence, and where documents begin in it behind its first token, where that is told.
pub struct Sequence {
    pub example: Example,
    pub documents: Vec<usize>,
}

impl From<Example> for Sequence {
    fn from(example: Example) -> Self {
        Sequence { example, documents: Vec::new() }
    }
}

/// How the sequences are cut.
enum Cut {
    /// Windows of each shard, with those before it.
    Stream(Vec<usize>),
    BestFit(Packed),
}

/// The sequences of an epoch, by number.
pub struct Windows {
    shards: Vec<Arc<Shard>>,
    layout: Layout,
    cut: Cut,
    /// How many; an order of an epoch holds numbers of 32 bits.
    pub count: u32,
}

impl Windows {
    /// # Errors
    /// When the shards hold no sequence, or more than an order counts.
    pub fn of(shards: &[Arc<Shard>], layout: Layout) -> Result<Self> {
        let seq_len = layout.seq_len;
        let (mut first, mut total) = (Vec::new(), 0usize);
        for shard in shards {
            first.push(total);
            total += shard.len().saturating_sub(1) / seq_len;
        }
        let path = shards.first().map_or_else(|| "shards".into(), |s| s.path().to_path_buf());
        if total == 0 {
            let tokens: usize = shards.iter().map(|s| s.len()).sum();
            let what = format!(
                "{tokens} tokens hold no window of seq_len + 1 = {}; bring more text or shorten data.seq_len",
                seq_len.saturating_add(1)
            );
            return Err(DataError::content(path, what));
        }
        let cut = match layout.packing {
            Packing::Stream => Cut::Stream(first),
            Packing::BestFit => {
                let Some(packed) = Packed::best_fit(shards, seq_len, layout.end) else {
                    let what = format!(
                        "sequences of {seq_len} tokens, or their number, are above {}; use packing = \"stream\"",
                        u32::MAX
                    );
                    return Err(DataError::content(path, what));
                };
                total = packed.len();
                Cut::BestFit(packed)
            }
        };
        let count = u32::try_from(total).map_err(|_| {
            let what = format!("{total} windows are above the {} of an epoch; raise data.seq_len", u32::MAX);
            DataError::content(path, what)
        })?;
        Ok(Windows { shards: shards.to_vec(), layout, cut, count })
    }

    /// What packing made of the text, where documents are packed.
    pub fn packed_epoch(&self) -> Option<PackedEpoch> {
        let Cut::BestFit(packed) = &self.cut else { return None };
        let held: u64 = packed.pieces().iter().map(|piece| u64::from(piece.len)).sum();
        let all = f64::from(self.count) * self.layout.seq_len as f64;
        Some(PackedEpoch { sequences: self.count, pieces: packed.pieces().len(), padding: 1.0 - held as f64 / all })
    }

    /// Shard and first token of a window of the stream.
    fn place(first: &[usize], seq_len: usize, window: usize) -> (usize, usize) {
        let shard = first.partition_point(|&f| f <= window) - 1;
        (shard, (window - first[shard]) * seq_len)
    }

    /// Bytes of the original text behind the targets of a window of the stream, where the shard knows them.
    pub fn target_bytes(&self, window: usize) -> Option<u64> {
        let Cut::Stream(first) = &self.cut else { return None };
        let (shard, start) = Self::place(first, self.layout.seq_len, window);
        self.shards[shard].text_bytes(start + 1, self.layout.seq_len)
    }

    /// Inputs and targets.
    pub fn sequence(&self, i: usize) -> Sequence {
        match &self.cut {
            Cut::Stream(first) => self.window(Self::place(first, self.layout.seq_len, i)),
            Cut::BestFit(packed) => self.packed(packed, i),
        }
    }

    fn window(&self, (shard, start): (usize, usize)) -> Sequence {
        let (shard, seq_len) = (&self.shards[shard], self.layout.seq_len);
        let mut inputs = Vec::new();
        shard.read(start, seq_len + 1, &mut inputs);
        let targets = inputs[1..].to_vec();
        inputs.truncate(seq_len);
        let documents = if self.layout.marks_documents {
            // the end of the last one may be the token behind the window
            let starts = shard.document_starts_in(start as u64..(start + seq_len + 1) as u64);
            let inside = |&at: &usize| at > 0 && at < seq_len;
            let at = |begins: u64| (begins as usize).saturating_sub(start);
            beginnings(starts, self.layout.end).map(at).filter(inside).collect()
        } else {
            Vec::new()
        };
        Sequence { example: Example { inputs, targets, questions: Vec::new() }, documents }
    }

    /// The pieces of a sequence, and padding behind them whose targets do not count.
    fn packed(&self, packed: &Packed, i: usize) -> Sequence {
        let seq_len = self.layout.seq_len;
        let (mut inputs, mut targets, mut documents) = (Vec::new(), Vec::new(), Vec::new());
        let mut piece = Vec::new();
        for of in packed.of(i) {
            documents.push(inputs.len());
            self.shards[of.shard as usize].read(of.start as usize, of.len as usize + 1, &mut piece);
            targets.extend_from_slice(&piece[1..]);
            inputs.extend_from_slice(&piece[..piece.len() - 1]);
        }
        documents.push(inputs.len());
        inputs.resize(seq_len, 0);
        targets.resize(seq_len, IGNORE);
        documents.retain(|&at| self.layout.marks_documents && at > 0 && at < seq_len);
        Sequence { example: Example { inputs, targets, questions: Vec::new() }, documents }
    }
}
