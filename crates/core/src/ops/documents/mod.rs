//! Several documents that share the sequences of a batch, taken apart into batches of their own: [`split_documents`] makes of `x [b, t, ..]` for each
//! length of document one `[documents, length, ..]`, [`join_documents`] puts such pieces back. What is computed between the two sees each document as
//! a sequence of its own, so whatever attends, chunks or routes cannot cross a document, whichever way it does so. Numbers only move.
//! Kept for backward: nothing.
//!
//! A document may be given room for some tokens behind its last. They are zeros, they come after everything that counts, and what is computed of
//! them is dropped.

pub mod cuda;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::device::{CpuDevice, CpuNumber, Device};
use crate::dispatch::{on_device, same_place};
use crate::error::{Error, Result, ensure};
use crate::ids::{IGNORE, Ids, document_ranges};
use crate::number::with_number;
use crate::shape::{checked_numel, count32, numel};
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor};

/// Which documents have a batch together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// Those of one length: no room behind any.
    Exact,
    /// Those of similar lengths, with room for up to a quarter more tokens, or for 63 where that is more, and for so many in all at least: fewer and
    /// larger batches, for a device that starts slowly and computes many rows at once.
    Similar(usize),
}

impl Grouping {
    /// Tokens that a document of `length` in sequences of `t` has room for.
    fn room(self, length: usize, t: usize) -> usize {
        match self {
            Grouping::Exact => length,
            Grouping::Similar(least) => {
                length.next_multiple_of((length.next_power_of_two() / 8).max(64)).max(least).min(t)
            }
        }
    }
}

/// Documents that have a batch together on a card at most: its kernels take 65535 (sequence, kv head) at once, so these for up to 127 kv heads.
const MOST_TOGETHER: usize = 512;

/// Documents that have a batch together.
#[derive(Debug)]
pub struct Group {
    count: usize,
    length: usize,
    /// The row of the b * t that each of the count * length is, [`IGNORE`] where it is room.
    rows: Ids,
}

impl Group {
    /// Documents.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tokens of each, room included.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// Where the documents of `[b, t]` tokens stand, on a device.
#[derive(Debug)]
pub struct Documents {
    extents: [usize; 2],
    groups: Vec<Group>,
    /// Group and row in it of each of the b * t rows.
    homes: Vec<(u32, u32)>,
}

impl Documents {
    /// Those that begin at `starts`, of the b * t tokens of all sequences, ascending; one more begins with every sequence.
    ///
    /// # Errors
    /// When the starts do not ascend or are not among the tokens, there are 2^32 tokens or more, or the device has no memory left.
    pub fn new(device: &Device, extents: [usize; 2], starts: &[usize], grouping: Grouping) -> Result<Self> {
        let most = match device {
            Device::Cpu(_) => usize::MAX,
            Device::Cuda(_) => MOST_TOGETHER,
        };
        Self::grouped(device, extents, starts, grouping, most)
    }

    /// The same with at most `most` documents a group.
    fn grouped(
        device: &Device,
        extents: [usize; 2],
        starts: &[usize],
        grouping: Grouping,
        most: usize,
    ) -> Result<Self> {
        let t = extents[1];
        let mut by_length: BTreeMap<usize, Vec<Range<usize>>> = BTreeMap::new();
        for document in document_ranges(extents, starts)? {
            by_length.entry(grouping.room(document.len(), t)).or_default().push(document);
        }
        let tokens = count32("documents", numel(&extents), "tokens")?;
        let (mut groups, mut homes) = (Vec::new(), vec![(0, 0); tokens as usize]);
        let pieces = by_length.iter().flat_map(|(&length, all)| all.chunks(most).map(move |piece| (length, piece)));
        for (length, documents) in pieces {
            let mut rows = Vec::with_capacity(documents.len() * length);
            for document in documents {
                for row in document.clone() {
                    homes[row] = (groups.len() as u32, rows.len() as u32);
                    rows.push(row as u32);
                }
                rows.resize(rows.len() + length - document.len(), IGNORE);
            }
            count32("documents", rows.len(), "tokens and room behind them")?;
            groups.push(Group { count: documents.len(), length, rows: Ids::new(device, &[rows.len()], &rows)? });
        }
        Ok(Documents { extents, groups, homes })
    }

    /// By length, ascending.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Where each of the b * t tokens stands in its document.
    pub fn positions(&self) -> Vec<usize> {
        self.homes.iter().map(|&(group, row)| row as usize % self.groups[group as usize].length).collect()
    }

    /// The extents of what stands behind b and t.
    fn inner<'a>(&self, op: &'static str, shape: &'a [usize]) -> Result<&'a [usize]> {
        ensure!(shape.starts_with(&self.extents), op, "{shape:?} for documents of {:?} tokens", self.extents);
        Ok(&shape[2..])
    }

    /// What a group has of `x [b, t, ..]`.
    fn take(&self, op: &'static str, x: &Tensor, group: &Group) -> Result<Tensor> {
        let inner = self.inner(op, x.shape())?;
        let (width, shape) = (numel(inner), [&[group.count, group.length], inner].concat());
        let size = checked_numel(op, &shape)?;
        on_device!(op, [x]; Cpu<T>(cpu, [data]) => {
            let rows = group.rows.on_cpu(op, cpu)?;
            let mut out = cpu.alloc::<T>(size);
            let of_task = (ELEMENTWISE / width.max(1)).max(1);
            cpu.for_pieces(&mut out, of_task * width, |task, out| {
                for (out, &row) in out.chunks_exact_mut(width).zip(&rows[task * of_task..]) {
                    match row {
                        IGNORE => out.fill(T::ZERO),
                        row => out.copy_from_slice(&data[row as usize * width..][..width]),
                    }
                }
            });
            Ok(Tensor::from_buffer(&shape, out))
        }, Cuda(gpu, [data]) => {
            Ok(Tensor::from_cuda(&shape, cuda::take(data.as_made(), group.rows.on_cuda(op, gpu)?, width)?))
        })
    }

    /// What all groups have, as `[b, t, ..]`; zero where one has nothing.
    fn put(&self, op: &'static str, parts: &[Option<&Tensor>], inner: &[usize]) -> Result<Tensor> {
        ensure!(parts.len() == self.groups.len(), op, "{} pieces, {} groups", parts.len(), self.groups.len());
        let first = parts.iter().flatten().next().ok_or_else(|| Error::invalid(op, "there is nothing to join"))?;
        for (part, group) in parts.iter().zip(&self.groups).filter_map(|(part, group)| Some(((*part)?, group))) {
            same_place(op, first, part)?;
            let want = [&[group.count, group.length], inner].concat();
            ensure!(part.shape() == want, op, "a piece is {:?}, its documents need {want:?}", part.shape());
        }
        let shape = [&self.extents[..], inner].concat();
        match first.device() {
            Device::Cpu(cpu) => with_number!(first.dtype(), T => self.put_on_cpu::<T>(op, cpu, parts, &shape)),
            Device::Cuda(gpu) => {
                let size = checked_numel(op, &shape)?;
                let kind = first.on_cuda(op, gpu)?.as_made().kind();
                let mut out = gpu.alloc(op, kind, size)?;
                if parts.iter().any(Option::is_none) {
                    out.fill_bytes(0)?;
                }
                for (part, group) in parts.iter().zip(&self.groups).filter_map(|(part, group)| Some(((*part)?, group)))
                {
                    let part = part.on_cuda(op, gpu)?.of_kind(kind)?;
                    cuda::put(part, group.rows.on_cuda(op, gpu)?, numel(inner), &mut out)?;
                }
                Ok(Tensor::from_cuda(&shape, out))
            }
        }
    }

    fn put_on_cpu<T: CpuNumber>(
        &self,
        op: &'static str,
        cpu: &CpuDevice,
        parts: &[Option<&Tensor>],
        shape: &[usize],
    ) -> Result<Tensor> {
        let width = numel(&shape[2..]);
        let slices = parts.iter().map(|part| part.map(|part| part.on_cpu::<T>(op, cpu)).transpose());
        let slices = slices.collect::<Result<Vec<Option<&[T]>>>>()?;
        let mut out = cpu.alloc::<T>(checked_numel(op, shape)?);
        let of_task = (ELEMENTWISE / width.max(1)).max(1);
        cpu.for_pieces(&mut out, of_task * width, |task, out| {
            for (out, &(group, row)) in out.chunks_exact_mut(width).zip(&self.homes[task * of_task..]) {
                match slices[group as usize] {
                    None => out.fill(T::ZERO),
                    Some(part) => out.copy_from_slice(&part[row as usize * width..][..width]),
                }
            }
        });
        Ok(Tensor::from_buffer(shape, out))
    }
}

/// For each group of documents what it has of `x [b, t, ..]`, `[documents, length, ..]`; room is zero.
///
/// # Errors
/// When the documents are of other extents, or the device has no memory left.
pub fn split_documents(tape: &Tape, x: &Var, documents: &std::sync::Arc<Documents>) -> Result<Vec<Var>> {
    let op = "split_documents";
    let inner = documents.inner(op, x.value.shape())?.to_vec();
    ensure!(numel(&inner) > 0, op, "{:?} has no numbers", x.value.shape());
    let parts = documents.groups.iter().map(|group| documents.take(op, &x.value, group)).collect::<Result<_>>()?;
    let (id, documents) = (x.id(), documents.clone());
    tape.record_list(op, parts, move |dys, grads| {
        let dys: Vec<Option<&Tensor>> = dys.iter().map(Option::as_ref).collect();
        grads.add(id, documents.put(op, &dys, &inner)?)
    })
}

/// `[b, t, ..]` of what [`split_documents`] makes; what stands in the room behind a document is dropped.
///
/// # Errors
/// When a piece has another shape than its group, or the device has no memory left.
pub fn join_documents(tape: &Tape, parts: &[Var], documents: &std::sync::Arc<Documents>) -> Result<Var> {
    let op = "join_documents";
    let inner = parts.first().and_then(|part| part.value.shape().get(2..)).unwrap_or_default().to_vec();
    ensure!(numel(&inner) > 0, op, "the pieces have no numbers");
    let values: Vec<Option<&Tensor>> = parts.iter().map(|part| Some(&part.value)).collect();
    let value = documents.put(op, &values, &inner)?;
    let (ids, documents): (Vec<_>, _) = (parts.iter().map(Var::id).collect(), documents.clone());
    tape.record(op, value, move |dy, grads| {
        for (id, group) in ids.into_iter().zip(&documents.groups) {
            grads.add(id, documents.take(op, &dy, group)?)?;
        }
        Ok(())
    })
}
