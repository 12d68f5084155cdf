//! Which chunks every query attends, as the ops pass it on: device data, whose form is the device's own. The host sees it
//! by name only, through [`Routes::to_host`].

use std::sync::Arc;

use super::cached::lists::ChunkLists;
use super::cuda::BlockMask;
use super::figures::AskedFigures;
use super::host_routes::{HostRoutes, mean_tokens};
use super::list::BlockList;
use super::{entries32, positions32};
use crate::device::{CpuDevice, CudaDevice, Device};
use crate::error::{Error, Result, ensure};
use crate::number::{DType, with_number};
use crate::shape::checked_numel;
use crate::tensor::Tensor;

/// Which chunks every (batch, kv head, query) attends: earlier ones, and always its own. An *entry* is one (query, chunk) pair;
/// a bias has one number an entry, in an order that is the device's. Cloning shares.
#[derive(Debug, Clone)]
pub struct Routes {
    lists: Arc<Lists>,
    extents: (usize, usize, usize),
    first: usize,
    chunk_size: usize,
    device: Device,
}

/// The pairs, by device.
#[derive(Debug)]
enum Lists {
    /// Lists by query, and the same pairs by chunk for tiles of queries.
    Cpu(BlockList),
    /// A bit a (query, chunk) pair.
    Cuda(BlockMask),
    /// A list a query, of queries after kept tokens.
    CudaKept(ChunkLists),
}

impl Routes {
    pub(super) fn cpu(list: BlockList) -> Self {
        let (extents, first, chunk_size) = (list.extents(), list.first(), list.chunk_size());
        let device = Device::Cpu(list.device().clone());
        Routes { lists: Arc::new(Lists::Cpu(list)), extents, first, chunk_size, device }
    }

    pub(super) fn cuda(mask: BlockMask) -> Self {
        let (extents, chunk_size) = (mask.extents(), mask.chunk_size());
        let device = Device::Cuda(mask.cells().device().clone());
        Routes { lists: Arc::new(Lists::Cuda(mask)), extents, first: 0, chunk_size, device }
    }

    pub(super) fn cuda_lists(lists: ChunkLists) -> Self {
        let (extents, first, chunk_size) = (lists.extents, lists.first, lists.chunk_size);
        let device = Device::Cuda(lists.chunks.device().clone());
        Routes { lists: Arc::new(Lists::CudaKept(lists)), extents, first, chunk_size, device }
    }

    /// Routes from any choice on the host: `choose(batch, kv head, query, chunks)` pushes earlier chunks in ascending order; the
    /// own chunk is added.
    ///
    /// # Errors
    /// When the chosen chunks do not ascend or are not all before the query's own, there are 2^32 pairs or more, or the device has
    /// no memory left.
    pub fn from_choice(
        device: &Device,
        extents: (usize, usize, usize),
        chunk_size: usize,
        choose: impl FnMut(usize, usize, usize, &mut Vec<u32>),
    ) -> Result<Self> {
        Self::from_choice_after(device, extents, (0, chunk_size), choose)
    }

    /// [`Routes::from_choice`] for queries of which the first stands at position `first`.
    pub(super) fn from_choice_after(
        device: &Device,
        extents: (usize, usize, usize),
        (first, chunk_size): (usize, usize),
        mut choose: impl FnMut(usize, usize, usize, &mut Vec<u32>),
    ) -> Result<Self> {
        let (batch, kv_heads, queries) = extents;
        ensure!(chunk_size > 0, "routes", "a chunk has at least one token");
        positions32("routes", first, queries)?;
        // each has its own chunk at least
        let lists = checked_numel("routes", &[batch, kv_heads, queries])?;
        entries32("routes", lists)?;
        let (mut offsets, mut chunks) = (vec![0u32], Vec::new());
        for i in 0..lists {
            let (row, query) = (i / queries, i % queries);
            let before = chunks.len();
            choose(row / kv_heads, row % kv_heads, query, &mut chunks);
            chunks.push(((first + query) / chunk_size) as u32);
            let ascend = chunks[before..].is_sorted_by(|a, b| a < b);
            ensure!(ascend, "routes", "query {query} chose {:?}: they must ascend to its own", &chunks[before..]);
            offsets.push(entries32("routes", chunks.len())?);
        }
        match device {
            Device::Cpu(cpu) => {
                let (offsets, chunks) = (cpu.copy(&offsets), cpu.copy(&chunks));
                Ok(Self::cpu(BlockList::new(cpu, extents, (first, chunk_size), offsets, chunks)))
            }
            Device::Cuda(gpu) => {
                if first > 0 {
                    return Ok(Self::cuda_lists(ChunkLists::from_host(
                        gpu,
                        (&offsets, &chunks),
                        extents,
                        (first, chunk_size),
                    )?));
                }
                let host = HostRoutes { extents, first, chunk_size, offsets, chunks };
                Ok(Self::cuda(BlockMask::from_host(gpu, &host)?))
            }
        }
    }

    /// Tokens of a chunk.
    pub fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// (batch, kv heads, queries).
    pub fn extents(&self) -> (usize, usize, usize) {
        self.extents
    }

    /// Position of the first query: 0 but where earlier tokens are kept from an earlier pass.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Where they live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Of each of `all`, which live on one device, the mean number of tokens that a query attends (whole earlier chunks, and its own up to
    /// itself): f64 `[all]` on the device, for whoever logs or steers by it. `None` of none.
    ///
    /// # Errors
    /// When they live on several devices, or one has no memory left.
    pub fn mean_tokens(all: &[&Routes]) -> Result<Option<Tensor>> {
        let Some(first) = all.first() else { return Ok(None) };
        Ok(Some(match &first.device {
            Device::Cpu(cpu) => {
                let of = |routes: &&Routes| {
                    let list = routes.on_cpu("mean_tokens", cpu)?;
                    Ok(mean_tokens(routes.extents, routes.first, routes.chunk_size, list.len()))
                };
                Tensor::from_vec(&first.device, &[all.len()], all.iter().map(of).collect::<Result<Vec<f64>>>()?)?
            }
            Device::Cuda(gpu) => {
                let masks = all.iter().map(|routes| routes.on_cuda("mean_tokens", gpu)).collect::<Result<Vec<_>>>()?;
                Tensor::from_cuda(&[all.len()], BlockMask::mean_tokens(gpu, &masks)?)
            }
        }))
    }

    /// What a run logs of the choice; a card finds it without a copy of the lists on the host. `bias` has a number an entry.
    ///
    /// # Errors
    /// When the bias is of other routes, or the device fails.
    pub fn figures(&self, bias: Option<&Tensor>) -> Result<AskedFigures> {
        match &*self.lists {
            Lists::Cpu(_) => Ok(AskedFigures::found(self.to_host()?.figures(bias)?)),
            Lists::Cuda(mask) => {
                let bias = bias.map(|bias| bias.on_cuda("routes", mask.cells().device())?.full()).transpose()?;
                let numbers = mask.figures(bias)?;
                Ok(AskedFigures::on_device(Tensor::from_cuda(&[numbers.len()], numbers)))
            }
            Lists::CudaKept(_) => Err(no_kernel("figures")),
        }
    }

    /// Chunks that each (batch, kv head, query) attends, its own included: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn counts(&self) -> Result<Vec<u32>> {
        match &*self.lists {
            Lists::Cpu(list) => Ok(list.lists().0.windows(2).map(|pair| pair[1] - pair[0]).collect()),
            Lists::Cuda(mask) => mask.counts(),
            Lists::CudaKept(lists) => lists.counts.download(),
        }
    }

    /// A copy on the host: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_host(&self) -> Result<HostRoutes> {
        let (extents, first, chunk_size) = (self.extents, self.first, self.chunk_size);
        match &*self.lists {
            Lists::Cpu(list) => {
                let (offsets, chunks) = list.lists();
                Ok(HostRoutes { extents, first, chunk_size, offsets: offsets.to_vec(), chunks: chunks.to_vec() })
            }
            Lists::Cuda(mask) => {
                let (offsets, chunks) = mask.lists()?;
                Ok(HostRoutes { extents, first, chunk_size, offsets, chunks })
            }
            Lists::CudaKept(lists) => {
                let (offsets, chunks) = lists.lists()?;
                Ok(HostRoutes { extents, first, chunk_size, offsets, chunks })
            }
        }
    }

    /// A tensor of one number an entry, from numbers in the order of [`HostRoutes`].
    ///
    /// # Errors
    /// When there is not one number an entry, or the device has no memory left.
    pub fn entries_from_host(&self, numbers: &[f64], dtype: DType) -> Result<Tensor> {
        match &*self.lists {
            Lists::Cpu(list) => {
                ensure!(numbers.len() == list.len(), "routes", "{} numbers, {} entries", numbers.len(), list.len());
                with_number!(dtype, T => {
                    Tensor::from_vec(&self.device, &[list.len()], numbers.iter().map(|&x| T::of(x)).collect())
                })
            }
            Lists::Cuda(mask) => {
                let host = self.to_host()?;
                ensure!(numbers.len() == host.len(), "routes", "{} numbers, {} entries", numbers.len(), host.len());
                let mut by_cell: Vec<f64> = host.by_cell().into_iter().map(|entry| numbers[entry as usize]).collect();
                by_cell.resize(mask.entries(), 0.0);
                with_number!(dtype, T => {
                    let numbers = by_cell.into_iter().map(T::of).collect();
                    Tensor::from_vec(&self.device, &[mask.entries()], numbers)
                })
            }
            Lists::CudaKept(lists) => {
                let filled = lists.filled()?;
                ensure!(numbers.len() == filled.len(), "routes", "{} numbers, {} entries", numbers.len(), filled.len());
                let mut all = vec![0.0; lists.entries()];
                filled.iter().zip(numbers).for_each(|(&at, &x)| all[at] = x);
                with_number!(dtype, T => {
                    Tensor::from_vec(&self.device, &[all.len()], all.into_iter().map(T::of).collect())
                })
            }
        }
    }

    /// The lists, for a kernel of this CPU.
    ///
    /// # Errors
    /// When they live elsewhere.
    pub(super) fn on_cpu(&self, op: &'static str, cpu: &CpuDevice) -> Result<&BlockList> {
        match &*self.lists {
            Lists::Cpu(list) if list.device().is(cpu) => Ok(list),
            Lists::Cpu(_) | Lists::Cuda(_) | Lists::CudaKept(_) => Err(self.elsewhere(op, &format!("{cpu:?}"))),
        }
    }

    /// The bits, for a kernel of this card.
    ///
    /// # Errors
    /// When they live elsewhere.
    pub(super) fn on_cuda(&self, op: &'static str, gpu: &CudaDevice) -> Result<&BlockMask> {
        match &*self.lists {
            Lists::Cuda(mask) if mask.cells().device().is(gpu) => Ok(mask),
            Lists::CudaKept(_) => Err(no_kernel(op)),
            Lists::Cpu(_) | Lists::Cuda(_) => Err(self.elsewhere(op, &format!("{gpu:?}"))),
        }
    }

    /// The lists of queries after kept tokens, for a kernel of this card.
    ///
    /// # Errors
    /// When they live elsewhere, or are of whole sequences.
    pub(super) fn on_cuda_listed(&self, op: &'static str, gpu: &CudaDevice) -> Result<&ChunkLists> {
        match &*self.lists {
            Lists::CudaKept(lists) if lists.chunks.device().is(gpu) => Ok(lists),
            Lists::Cpu(_) | Lists::Cuda(_) | Lists::CudaKept(_) => Err(self.elsewhere(op, &format!("{gpu:?}"))),
        }
    }

    fn elsewhere(&self, op: &'static str, others: &str) -> Error {
        Error::invalid(op, format!("the routes live on {}, the other inputs on {others}", self.device))
    }
}

fn no_kernel(op: &'static str) -> Error {
    Error::invalid(op, "CUDA has no kernel of it for queries after kept tokens")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cpu, device};

    #[test]
    fn a_choice_comes_back_and_a_bad_one_is_told() {
        let d = device();
        let routes = Routes::from_choice(&d, (1, 2, 5), 2, |_, kv, query, chunks| {
            if kv == 1 && query >= 2 {
                chunks.push(0);
            }
        });
        let routes = routes.unwrap();
        let host = routes.to_host().unwrap();
        assert_eq!((host.chunks_of(0, 0, 4), host.chunks_of(0, 1, 4)), (&[2][..], &[0, 2][..]));
        assert_eq!((host.entries_of(0, 1, 2), host.len()), (7..9, 13));
        // own chunks: 1 + 2 + 1 + 2 + 1 tokens a head; three chunks of two tokens more in the second
        assert_eq!(
            Routes::mean_tokens(&[&routes; 2]).unwrap().unwrap().to_f64().unwrap(),
            [(2.0 * 7.0 + 6.0) / 10.0; 2]
        );
        assert!(Routes::mean_tokens(&[]).unwrap().is_none());
        assert_eq!(host.mean_tokens(), 2.0);
        let numbers: Vec<f64> = (0..13).map(f64::from).collect();
        let x = routes.entries_from_host(&numbers, DType::F64).unwrap();
        assert_eq!(host.per_entry(&x).unwrap(), numbers);
        assert!(routes.entries_from_host(&numbers[1..], DType::F64).is_err());
        let one =
            |batch, kv, query, chunks: &mut Vec<u32>| chunks.extend(((batch, kv, query) == (1, 0, 4)).then_some(1));
        let host = Routes::from_choice(&d, (2, 2, 5), 2, one).unwrap().to_host().unwrap();
        assert_eq!((host.chunks_of(1, 0, 4), host.chunks_of(0, 1, 4)), (&[1, 2][..], &[2][..]));
        let later = Routes::from_choice(&d, (1, 1, 5), 2, |_, _, _, chunks| chunks.push(1));
        assert!(later.unwrap_err().to_string().contains("query 0 chose [1, 0]"));
        let twice =
            Routes::from_choice(&d, (1, 1, 5), 2, |_, _, query, chunks| chunks.extend([0; 2].iter().take(query / 2)));
        assert!(twice.unwrap_err().to_string().contains("query 4 chose [0, 0, 2]"));
        assert!(routes.on_cpu("op", cpu(&device())).unwrap_err().to_string().contains("the routes live on"));
    }
}
