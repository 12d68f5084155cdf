//! Whole numbers on a device: token ids, targets, places in an axis, masks.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::device::cuda::CudaBuffer;
use crate::device::{Buffer, CpuDevice, CudaDevice, Device};
use crate::error::{Error, Result, ensure};
use crate::shape::{checked_numel, numel};

/// A target that takes no part in a loss.
pub const IGNORE: u32 = u32::MAX;

/// Whole numbers on a device, with a shape. Their range is found once, when they are made, and stays on the host, so that an op
/// refuses what is out of range without reading them back. Cloning shares the numbers.
#[derive(Debug, Clone)]
pub struct Ids {
    shape: Vec<usize>,
    storage: Arc<IdStorage>,
    device: Device,
    /// one more than the largest, [`IGNORE`] apart
    bound: usize,
    /// how many are [`IGNORE`]
    ignored: usize,
    /// where documents begin, of tokens that hold several which must not see each other
    documents: Option<Arc<[usize]>>,
}

/// The memory, by device.
#[derive(Debug)]
enum IdStorage {
    Cpu(Buffer<u32>),
    Cuda(CudaIds),
}

/// Whole numbers on a card. The host keeps its copy, from which it sorts them without reading anything back.
#[derive(Debug)]
pub(crate) struct CudaIds {
    /// In order.
    pub ids: CudaBuffer,
    host: Vec<u32>,
    by_id: OnceLock<ById>,
}

/// The places of ids, sorted by id: `tokens[i]` stands at `places[starts[i]..starts[i + 1]]`, ascending.
#[derive(Debug)]
pub(crate) struct ById {
    /// The ids that occur, ascending.
    pub tokens: CudaBuffer,
    /// First place of each, and the end.
    pub starts: CudaBuffer,
    /// Places.
    pub places: CudaBuffer,
}

/// The documents of `[b, t]` tokens that begin at `starts`, of b * t in all, ascending; one more begins with every sequence.
pub(crate) fn document_ranges([b, t]: [usize; 2], starts: &[usize]) -> Result<Vec<Range<usize>>> {
    let op = "documents";
    let tokens = checked_numel(op, &[b, t])?;
    ensure!(starts.is_sorted_by(|a, b| a < b), op, "their first tokens do not ascend");
    let last = starts.last().copied().unwrap_or(0);
    ensure!(starts.is_empty() || last < tokens, op, "one begins at token {last} of {tokens}");
    let mut all: Vec<usize> = (0..b).map(|sequence| sequence * t).chain(starts.iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    let ends = all.iter().skip(1).copied().chain([tokens]);
    Ok(all.iter().copied().zip(ends).map(|(from, to)| from..to).filter(|r| !r.is_empty()).collect())
}

impl CudaIds {
    fn new(gpu: &CudaDevice, ids: &[u32]) -> Result<Self> {
        Ok(CudaIds { ids: gpu.upload("ids", ids)?, host: ids.to_vec(), by_id: OnceLock::new() })
    }

    /// On the host.
    pub fn host(&self) -> &[u32] {
        &self.host
    }

    /// Sorted by id: what gives the sums of a gradient their order. [`IGNORE`] is not among them.
    ///
    /// # Errors
    /// When the card has no memory left.
    pub fn by_id(&self) -> Result<&ById> {
        if let Some(sorted) = self.by_id.get() {
            return Ok(sorted);
        }
        let gpu = self.ids.device();
        let ids = || self.host.iter().enumerate().filter(|&(_, &id)| id != IGNORE);
        let bound = ids().map(|(_, &id)| id as usize + 1).max().unwrap_or(0);
        let mut next = vec![0u32; bound + 1];
        ids().for_each(|(_, &id)| next[id as usize + 1] += 1);
        (0..bound).for_each(|id| next[id + 1] += next[id]);
        let mut places = vec![0u32; next[bound] as usize];
        let (mut tokens, mut starts) = (Vec::new(), Vec::new());
        for id in (0..bound).filter(|&id| next[id + 1] > next[id]) {
            tokens.push(id as u32);
            starts.push(next[id]);
        }
        starts.push(places.len() as u32);
        for (place, &id) in ids() {
            places[next[id as usize] as usize] = place as u32;
            next[id as usize] += 1;
        }
        let upload = |x: &[u32]| gpu.upload("ids", x);
        let sorted = ById { tokens: upload(&tokens)?, starts: upload(&starts)?, places: upload(&places)? };
        Ok(self.by_id.get_or_init(|| sorted))
    }
}

impl Ids {
    /// These numbers, copied to the device.
    ///
    /// # Errors
    /// When their number does not fit the shape, or the device has no memory left.
    pub fn new(device: &Device, shape: &[usize], ids: &[u32]) -> Result<Self> {
        ensure!(ids.len() == checked_numel("ids", shape)?, "ids", "{} ids do not fill shape {shape:?}", ids.len());
        let bound = ids.iter().filter(|&&id| id != IGNORE).max().map_or(0, |&max| max as usize + 1);
        let ignored = ids.iter().filter(|&&id| id == IGNORE).count();
        let storage = match device {
            Device::Cpu(cpu) => IdStorage::Cpu(cpu.copy(ids)),
            Device::Cuda(gpu) => IdStorage::Cuda(CudaIds::new(gpu, ids)?),
        };
        let storage = Arc::new(storage);
        Ok(Ids { shape: shape.to_vec(), storage, device: device.clone(), bound, ignored, documents: None })
    }

    /// The same tokens `[b, t]`, of which documents begin at `starts` of the b * t, ascending, that must not see each other; one begins with every
    /// sequence. A model then runs each as a sequence of its own.
    ///
    /// # Errors
    /// When they have another shape, or the starts do not ascend or are not among the tokens.
    pub fn of_documents(self, starts: &[usize]) -> Result<Self> {
        let &[b, t] = self.shape() else {
            return Err(Error::invalid("ids", format!("documents are of tokens [b, t], not {:?}", self.shape)));
        };
        // where every document is a sequence there is nothing to part
        let parts = document_ranges([b, t], starts)?.len() > b;
        Ok(Ids { documents: parts.then(|| starts.into()), ..self })
    }

    /// Where documents begin, where a sequence holds several that must not see each other.
    pub fn documents(&self) -> Option<&[usize]> {
        self.documents.as_deref()
    }

    /// A list `[n]` of places in an axis.
    ///
    /// # Errors
    /// When a place is 2^32 - 1 or more, or the device has no memory left.
    pub fn places(device: &Device, places: &[usize]) -> Result<Self> {
        let narrow = |&place: &usize| u32::try_from(place).ok().filter(|&place| place != IGNORE);
        let ids: Option<Vec<u32>> = places.iter().map(narrow).collect();
        let ids = ids.ok_or_else(|| Error::invalid("ids", "a place in an axis is below 2^32 - 1"))?;
        Self::new(device, &[ids.len()], &ids)
    }

    /// A mask: 1 where it is true, 0 elsewhere.
    ///
    /// # Errors
    /// As [`Ids::new`].
    pub fn mask(device: &Device, shape: &[usize], mask: &[bool]) -> Result<Self> {
        Self::new(device, shape, &mask.iter().map(|&m| m as u32).collect::<Vec<_>>())
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        numel(&self.shape)
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One more than the largest id, [`IGNORE`] apart; 0 if there is none.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// How many are [`IGNORE`].
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    /// Where they live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The same ids under another shape.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let n = checked_numel("ids", shape)?;
        ensure!(n == self.len(), "ids", "{:?} to {shape:?} changes the number of ids", self.shape);
        Ok(Ids { shape: shape.to_vec(), documents: None, ..self.clone() })
    }

    /// A copy on the host: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_vec(&self) -> Result<Vec<u32>> {
        match &*self.storage {
            IdStorage::Cpu(ids) => Ok(ids.to_vec()),
            IdStorage::Cuda(ids) => Ok(ids.host().to_vec()),
        }
    }

    /// Refuses ids, called `what`, that are not below `bound`, which is `of` something.
    pub(crate) fn check_below(&self, op: &'static str, what: &str, bound: usize, of: &str) -> Result<()> {
        ensure!(self.bound <= bound, op, "{what} {} is not below {of} {bound}", self.bound - 1);
        Ok(())
    }

    /// Refuses [`IGNORE`] among them.
    pub(crate) fn check_counted(&self, op: &'static str, what: &str) -> Result<()> {
        ensure!(self.ignored == 0, op, "{} {what} are IGNORE ({IGNORE}), which only a target may be", self.ignored);
        Ok(())
    }

    /// The ids, for a kernel of this CPU.
    ///
    /// # Errors
    /// When they live elsewhere.
    pub(crate) fn on_cpu(&self, op: &'static str, cpu: &CpuDevice) -> Result<&[u32]> {
        match &*self.storage {
            IdStorage::Cpu(ids) if ids.device().is(cpu) => Ok(ids),
            IdStorage::Cpu(_) | IdStorage::Cuda(_) => Err(self.elsewhere(op, &format!("{cpu:?}"))),
        }
    }

    /// The ids, for a kernel of this card.
    ///
    /// # Errors
    /// When they live elsewhere.
    pub(crate) fn on_cuda(&self, op: &'static str, gpu: &CudaDevice) -> Result<&CudaIds> {
        match &*self.storage {
            IdStorage::Cuda(ids) if ids.ids.device().is(gpu) => Ok(ids),
            IdStorage::Cpu(_) | IdStorage::Cuda(_) => Err(self.elsewhere(op, &format!("{gpu:?}"))),
        }
    }

    fn elsewhere(&self, op: &'static str, others: &str) -> Error {
        Error::invalid(op, format!("the ids live on {}, the other inputs on {others}", self.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cpu, device};

    #[test]
    fn the_range_is_known_and_checked_without_the_numbers() {
        let d = device();
        let ids = Ids::new(&d, &[2, 2], &[3, IGNORE, 0, 7]).unwrap();
        assert_eq!((ids.bound(), ids.ignored(), ids.len()), (8, 1, 4));
        assert_eq!(ids.to_vec().unwrap(), [3, IGNORE, 0, 7]);
        assert!(ids.check_below("op", "target", 8, "the vocabulary size").is_ok());
        let error = ids.check_below("op", "target", 7, "the vocabulary size").unwrap_err().to_string();
        assert_eq!(error, "op: target 7 is not below the vocabulary size 7");
        assert!(ids.check_counted("op", "ids").unwrap_err().to_string().contains("1 ids are IGNORE"));
        assert!(Ids::new(&d, &[3], &[1]).unwrap_err().to_string().contains("1 ids do not fill shape [3]"));
        assert!(Ids::places(&d, &[u32::MAX as usize]).is_err());
        assert_eq!(Ids::new(&d, &[0], &[]).unwrap().bound(), 0);
        assert_eq!(Ids::mask(&d, &[2], &[true, false]).unwrap().to_vec().unwrap(), [1, 0]);
    }

    #[test]
    fn ids_of_another_device_are_refused() {
        let (a, b) = (device(), device());
        let ids = Ids::new(&a, &[1], &[0]).unwrap();
        assert!(ids.on_cpu("op", cpu(&a)).is_ok());
        assert!(ids.on_cpu("op", cpu(&b)).unwrap_err().to_string().contains("the ids live on cpu"));
    }
}
