//! Documents laid out so that few are cut: those longer than a sequence in pieces of one, the rest by best fit, the longest first (Ding et al. 2024, arXiv
//! 2404.10830). What a sequence has left is padding. The whole text is packed at once, and the same way at every start: which sequences an
//! epoch begins with is the order's matter.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::intake::tokens::Side;
use crate::shard::Shard;

/// Tokens of one document that stand in one sequence, as inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub shard: u32,
    pub start: u64,
    pub len: u32,
}

/// The pieces of each sequence.
#[derive(Debug)]
pub struct Packed {
    pieces: Vec<Piece>,
    /// first piece of each sequence, and the end
    first: Vec<usize>,
}

/// Where documents begin as inputs, the first token apart. The token that ends one begins the next: it is asked for that one's first token, and
/// the last token of a document is asked for it. So every token is a target, as where nothing parts the documents.
pub fn beginnings(starts: impl Iterator<Item = u64>, end: Side) -> impl Iterator<Item = u64> {
    let before = match end {
        Side::Before => 0,
        Side::After => 1,
    };
    let mut last = 0;
    starts.map(move |start| start.saturating_sub(before)).filter(move |&start| {
        let new = start > last;
        last = start.max(last);
        new
    })
}

/// The documents of shards as inputs, cut where they are longer than `most`.
fn pieces(shards: &[Arc<Shard>], most: usize, end: Side) -> Vec<Piece> {
    let mut out = Vec::new();
    for (shard, tokens) in (0..).zip(shards) {
        // the last token is a target only
        let inputs = tokens.len().saturating_sub(1) as u64;
        let starts = tokens.document_starts();
        let mut from = 0;
        let ends = beginnings(starts.into_iter(), end).take_while(|&start| start < inputs).chain([inputs]);
        for to in ends {
            while from < to {
                let len = (to - from).min(most as u64);
                out.push(Piece { shard, start: from, len: len as u32 });
                from += len;
            }
        }
    }
    out
}

impl Packed {
    /// The documents of shards in sequences of `seq_len`; `None` where that or their number is 2^32 or more.
    pub fn best_fit(shards: &[Arc<Shard>], seq_len: usize, end: Side) -> Option<Self> {
        u32::try_from(seq_len).ok()?;
        let mut pieces = pieces(shards, seq_len, end);
        // those of one length stay in the order of the text
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.len));
        // sequences by what they have left, and which of these are any
        let mut left: Vec<Vec<u32>> = vec![Vec::new(); seq_len + 1];
        let mut some: BTreeSet<usize> = BTreeSet::new();
        let (mut home, mut count) = (Vec::with_capacity(pieces.len()), 0u32);
        for piece in &pieces {
            let len = piece.len as usize;
            let (sequence, room) = match some.range(len..).next().copied() {
                Some(room) => {
                    let sequence = left[room].pop().expect("some have so much left");
                    if left[room].is_empty() {
                        some.remove(&room);
                    }
                    (sequence, room)
                }
                None => {
                    count = count.checked_add(1)?;
                    (count - 1, seq_len)
                }
            };
            home.push(sequence);
            if room > len {
                left[room - len].push(sequence);
                some.insert(room - len);
            }
        }
        let mut first = vec![0usize; count as usize + 1];
        home.iter().for_each(|&sequence| first[sequence as usize + 1] += 1);
        (0..count as usize).for_each(|i| first[i + 1] += first[i]);
        let (mut next, mut sorted) = (first.clone(), pieces.clone());
        for (piece, sequence) in pieces.into_iter().zip(home) {
            sorted[next[sequence as usize]] = piece;
            next[sequence as usize] += 1;
        }
        Some(Packed { pieces: sorted, first })
    }

    /// Sequences.
    pub fn len(&self) -> usize {
        self.first.len() - 1
    }

    /// All pieces.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Those of a sequence.
    pub fn of(&self, sequence: usize) -> &[Piece] {
        &self.pieces[self.first[sequence]..self.first[sequence + 1]]
    }
}
