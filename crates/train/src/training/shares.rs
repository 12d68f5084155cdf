//! How several processes share an update: each makes the gradients of its micro-batches, each owns some parameters with their optimiser
//! state (ZeRO stage 1, Rajbhandari et al. 2020, arXiv 1910.02054), and weights go back to all.
//!
//! The sums are those of one process. A process holds the partial sum of a whole subtree of micro-batches; the owner adds those of all
//! processes in the same tree ([`super::accumulate`]). The norm is the root of partial sums of squares in the order of the parameters, and
//! each process owns neighbours in that order.

use std::ops::Range;

use dash_core::communicator::Incoming;
use dash_core::ops::grad_norm::{grad_norm, parts, root_of_sum, squares_of};
use dash_core::{DType, Device, Tensor};
use dash_model::Params;

use super::accumulate::Tree;
use crate::failure::Result;
use crate::peers::Peers;

/// A gradient a parameter; none where the loss does not reach it.
pub type Grads = Vec<Option<Tensor>>;

/// Which parameters each process owns: neighbours, about as many elements each, and every parameter once. Whole parameters, so that an
/// optimiser sees a matrix as a matrix.
pub fn owned(sizes: &[usize], world: usize) -> Vec<Range<usize>> {
    let total: usize = sizes.iter().sum();
    let mut before = 0;
    // a parameter is where its middle falls
    let owner = |size: &usize| {
        let middle = before + size / 2;
        before += size;
        (middle * world / total.max(1)).min(world - 1)
    };
    let owners: Vec<usize> = sizes.iter().map(owner).collect();
    (0..world).map(|r| owners.partition_point(|o| *o < r)..owners.partition_point(|o| *o <= r)).collect()
}

/// The shares of one process.
#[derive(Clone)]
pub struct Shares {
    peers: Peers,
    ranges: Vec<Range<usize>>,
}

/// What an update comes to.
pub struct Reduced {
    /// Of the parameters that this process owns; none for the others.
    pub grads: Grads,
    /// Of every micro-batch of the update, in order.
    pub losses: Vec<Tensor>,
    /// Which parameters have a gradient in any process.
    pub reached: Vec<bool>,
    /// Norm of all gradients: an f64 scalar on the device.
    pub norm: Tensor,
}

impl Shares {
    /// Of the only process.
    pub fn alone() -> Self {
        Shares { peers: Peers::Alone, ranges: Vec::new() }
    }

    /// Of one of some processes.
    pub fn of(peers: Peers, params: &Params) -> Self {
        let sizes: Vec<usize> = params.iter().map(|p| p.value.numel()).collect();
        Shares { ranges: owned(&sizes, peers.world()), peers }
    }

    /// The processes.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    fn is_alone(&self) -> bool {
        matches!(self.peers, Peers::Alone)
    }

    /// Parameters that this process owns; none where it owns all because it is alone.
    pub fn own(&self) -> Option<Range<usize>> {
        (!self.is_alone()).then(|| self.ranges[self.peers.rank()].clone())
    }

    /// What the gradients and losses of this process's micro-batches come to with those of the others.
    ///
    /// # Errors
    /// When another process does not answer, or memory runs out.
    pub fn reduce(&self, params: &Params, mut grads: Grads, losses: Vec<Tensor>) -> Result<Reduced> {
        grads.resize(params.len(), None);
        let device = device(params);
        if self.is_alone() {
            let reached = grads.iter().map(Option::is_some).collect();
            let norm = grad_norm(&device, grads.iter().flatten())?;
            return Ok(Reduced { grads, losses, reached, norm });
        }
        let (rank, world) = self.peers.place();
        let has: Vec<bool> = grads.iter().map(Option::is_some).collect();
        let all: Vec<Vec<bool>> = self.peers.agree(&has)?;
        let reached: Vec<bool> = (0..params.len()).map(|i| all.iter().any(|has| has[i])).collect();
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        let others = || (0..world).filter(|r| *r != rank);
        for other in others() {
            let of_other = self.ranges[other].clone().filter_map(|i| grads[i].as_ref());
            sends.extend(of_other.chain(&losses).map(|x| (other, x)));
            let own = self.ranges[rank].clone().filter(|&i| all[other][i]).map(|i| params_at(params, i));
            receives.extend(own.map(|x| like(other, x)).chain(losses.iter().map(|x| like(other, x))));
        }
        let mut got = self.peers.exchange(&device, &sends, &receives)?.into_iter();
        let mut partial: Vec<Option<(Grads, Vec<Tensor>)>> = (0..world).map(|_| None).collect();
        for other in others() {
            let own = self.ranges[rank].clone().map(|i| all[other][i].then(|| got.next().expect("one a gradient")));
            let own: Grads = own.collect();
            partial[other] = Some((own, got.by_ref().take(losses.len()).collect()));
        }
        let own = grads.splice(self.ranges[rank].clone(), vec![None; self.ranges[rank].len()]).collect();
        partial[rank] = Some((own, losses));
        let (mut sums, mut losses) = (Tree::new(1), Vec::new());
        for (part, of_rank) in partial.into_iter().flatten() {
            sums.push(part)?;
            losses.extend(of_rank);
        }
        let mut grads: Grads = vec![None; params.len()];
        grads.splice(self.ranges[rank].clone(), sums.finish()?.unwrap_or_default());
        let norm = self.norm(&device, params, &grads, &reached)?;
        Ok(Reduced { grads, losses, reached, norm })
    }

    fn norm(&self, device: &Device, params: &Params, grads: &Grads, reached: &[bool]) -> Result<Tensor> {
        let (rank, world) = self.peers.place();
        let own = squares_of(device, grads.iter().flatten())?;
        let count = |r: usize| -> usize {
            self.ranges[r].clone().filter(|&i| reached[i]).map(|i| parts(device, params_at(params, i).numel())).sum()
        };
        let others = (0..world).filter(|r| *r != rank);
        let sends: Vec<_> = others.clone().filter(|_| own.numel() > 0).map(|r| (r, &own)).collect();
        let coming = others.filter(|&r| count(r) > 0);
        let coming: Vec<_> =
            coming.map(|from| Incoming { from, shape: vec![count(from)], dtype: DType::F64 }).collect();
        let got = self.peers.exchange(device, &sends, &coming)?;
        let mut sums: Vec<(usize, Tensor)> = coming.iter().map(|i| i.from).zip(got).collect();
        sums.push((rank, own));
        sums.sort_by_key(|(r, _)| *r);
        Ok(root_of_sum(device, &sums.into_iter().map(|(_, x)| x).collect::<Vec<_>>())?)
    }

    /// Gives all processes the parameters that their owners have changed.
    ///
    /// # Errors
    /// When another process does not answer, or memory runs out.
    pub fn spread(&self, params: &mut Params, reached: &[bool]) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let device = device(params);
        let (rank, world) = self.peers.place();
        let of = |r: usize| self.ranges[r].clone().filter(|&i| reached[i]);
        let others = || (0..world).filter(|r| *r != rank);
        let coming: Vec<(usize, usize)> = others().flat_map(|r| of(r).map(move |i| (r, i))).collect();
        let fixed: &Params = params;
        let sends: Vec<_> = others().flat_map(|r| of(rank).map(move |i| (r, params_at(fixed, i)))).collect();
        let receives: Vec<_> = coming.iter().map(|&(r, i)| like(r, params_at(fixed, i))).collect();
        let got = self.peers.exchange(&device, &sends, &receives)?;
        for ((_, i), value) in coming.into_iter().zip(got) {
            params.iter_mut().nth(i).expect("a parameter of the model").value = value;
        }
        Ok(())
    }

    /// All optimiser state, in host memory, where this is the first process; elsewhere nothing. `own` has names and tensors in the order of the
    /// parameters that this process owns.
    ///
    /// # Errors
    /// When another process does not answer, or memory runs out.
    pub fn gather(&self, params: &Params, own: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        if self.is_alone() {
            return Ok(own);
        }
        let names: Vec<Vec<(String, Vec<usize>)>> =
            self.peers.agree(&own.iter().map(|(name, x)| (name.clone(), x.shape().to_vec())).collect())?;
        let (rank, device) = (self.peers.rank(), device(params));
        let host = Device::cpu(1)?;
        let mut all = Vec::new();
        // one at a time: what all have together may not fit one device
        for (from, names) in names.into_iter().enumerate() {
            for (at, (name, shape)) in names.into_iter().enumerate() {
                let tensor = match (from == rank, rank) {
                    (true, 0) => Some(own[at].1.clone()),
                    (true, _) => {
                        self.peers.exchange(&device, &[(0, &own[at].1)], &[])?;
                        None
                    }
                    (false, 0) => {
                        let coming =
                            Incoming { from, shape, dtype: own.first().map_or(DType::F32, |(_, x)| x.dtype()) };
                        self.peers.exchange(&device, &[], &[coming])?.pop()
                    }
                    (false, _) => None,
                };
                if let Some(tensor) = tensor {
                    let numbers = tensor.to_vec::<f32>()?;
                    all.push((name, Tensor::from_vec(&host, tensor.shape(), numbers)?));
                }
            }
        }
        Ok(all)
    }
}

fn device(params: &Params) -> Device {
    params_at(params, 0).device().clone()
}

fn params_at(params: &Params, i: usize) -> &Tensor {
    &params.iter().nth(i).expect("a parameter of the model").value
}

fn like(from: usize, x: &Tensor) -> Incoming {
    Incoming { from, shape: x.shape().to_vec(), dtype: x.dtype() }
}

#[cfg(test)]
mod tests;
