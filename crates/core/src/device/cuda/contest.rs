//! Which of the algorithms that cuBLASLt ranks for a product is taken: the fastest on this card among those that give the bits of the
//! first. They add in the same order, so whichever wins, and clocks differ from run to run, results do not.
//!
//! A contest has operands of its own, numbers that look random: equal bits of products of zeros would say nothing. Its memory is the
//! driver's, not the arena's, and is given back; where there is none, or the product is small, the first is taken.

use super::api::Address;
use super::{Arg, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::Result;

static SOURCE: Source = Source { name: "contest", text: include_str!("contest.cu") };

/// Algorithms that take part at most.
pub(super) const RANKED: usize = 8;

/// Multiplications and additions below which there is no contest: some 3 us on an H100, where launches cost as much.
const LEAST_WORK: f64 = 2e9;

fn unit(x: Kind) -> Unit {
    Unit::new(&SOURCE, [("X", x.source_name().into())])
}

/// Everything that contests compile.
pub(crate) fn units() -> Vec<Unit> {
    [Kind::Bf16, Kind::F32, Kind::F64].map(unit).into()
}

/// Memory of the driver, given back when dropped.
struct Scratch<'a> {
    device: &'a CudaDevice,
    at: Address,
    bytes: usize,
}

impl<'a> Scratch<'a> {
    /// `None` where the card has no more.
    fn new(device: &'a CudaDevice, bytes: usize) -> Option<Self> {
        let (mut at, bytes) = (0, bytes.next_multiple_of(4).max(4));
        // SAFETY: the driver writes one address; the device's context is current (a product enters).
        let status = unsafe { (device.0.driver.memory_alloc)(&mut at, bytes) };
        (status == 0).then_some(Scratch { device, at, bytes })
    }

    fn zero(&self) -> Result<()> {
        let inner = &*self.device.0;
        // SAFETY: the memory has so many bytes.
        let status = unsafe { (inner.driver.fill_bytes)(self.at, 0, self.bytes, inner.stream) };
        inner.check("product", "cuMemsetD8Async", status)
    }

    fn noise(&self, kind: Kind, seed: i32) -> Result<()> {
        let n = self.bytes / kind.size();
        let args = [Arg::Long(self.at as i64), Arg::Long(n as i64), Arg::Int(seed)];
        let kernel = self.device.kernel(&unit(kind), "noise")?;
        // SAFETY: the kernel's parameters in order; a thread an element of the memory.
        unsafe { kernel.launch(Grid::over(n, 256), &args) }
    }

    fn has_bits_of(&self, other: &Scratch) -> Result<bool> {
        let found = self.device.zeros("product", Kind::U32, 1)?;
        let args = [self.at, other.at].map(|at| Arg::Long(at as i64));
        let rest = [Arg::Long(self.bytes.min(other.bytes) as i64 / 4), Arg::Buffer(&found)];
        let kernel = self.device.kernel(&unit(Kind::F32), "differ")?;
        // SAFETY: the kernel's parameters in order; both memories have so many words.
        unsafe { kernel.launch(Grid::line(1024, 256), &[&args[..], &rest].concat())? };
        Ok(found.download::<u32>()? == [0])
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let inner = &*self.device.0;
        // SAFETY: the address came from the driver; the stream is waited for, so nothing uses the memory any more. Errors have
        // nowhere to go.
        unsafe {
            (inner.driver.stream_synchronize)(inner.stream);
            (inner.driver.memory_free)(self.at);
        }
    }
}

/// A product as a contest sees it.
pub(super) struct Contest<'a> {
    pub device: &'a CudaDevice,
    /// Multiplications and additions.
    pub work: f64,
    /// Kind of A and B, kind of C.
    pub kinds: [Kind; 2],
    /// Elements from the first to the last of A, B and C.
    pub extents: [usize; 3],
    /// Algorithms.
    pub entrants: usize,
}

impl Contest<'_> {
    /// The number of the winner. `run` multiplies by an algorithm: addresses of A, B, the addend and the result.
    ///
    /// # Errors
    /// When a kernel or the first algorithm fails. Others that fail lose.
    pub fn winner(&self, run: impl Fn(usize, [Address; 4]) -> Result<()>) -> Result<usize> {
        if self.entrants < 2 || self.work < LEAST_WORK {
            return Ok(0);
        }
        let ([operand, sum], [a, b, c]) = (self.kinds, self.extents);
        let sizes = [(a, operand), (b, operand), (c, sum), (c, sum), (c, sum)];
        let scratch = sizes.map(|(n, kind)| Scratch::new(self.device, n * kind.size()));
        let [Some(a), Some(b), Some(addend), Some(first), Some(other)] = &scratch else { return Ok(0) };
        for (i, (x, kind)) in [(a, operand), (b, operand), (addend, sum)].into_iter().enumerate() {
            x.noise(kind, i as i32 + 1)?;
        }
        let into = |to: &Scratch| [a.at, b.at, addend.at, to.at];
        first.zero()?;
        run(0, into(first))?;
        let (mut winner, mut best) = (0, self.time(|| run(0, into(first)))?);
        for i in 1..self.entrants {
            other.zero()?;
            if run(i, into(other)).is_err() || !other.has_bits_of(first)? {
                continue;
            }
            let took = self.time(|| run(i, into(other)))?;
            if took < best {
                (winner, best) = (i, took);
            }
        }
        Ok(winner)
    }

    /// Milliseconds of two runs, the least of three times.
    fn time(&self, run: impl Fn() -> Result<()>) -> Result<f32> {
        let mut least = f32::INFINITY;
        for _ in 0..3 {
            least = least.min(self.device.time(|| run().and_then(|()| run()))?);
        }
        Ok(least)
    }
}

#[cfg(test)]
mod tests {
    use crate::device::cuda::{CudaDevice, CudaOptions, Kind, Operand};
    use crate::device::{Accumulate, Gemm};
    use crate::ops::cuda::testing::{Bound, compare, cuda, folders, tensors};
    use crate::{Tensor, testing};

    /// A product large enough for a contest has the numbers of f64, and the bits of another contest, on a device opened anew.
    #[test]
    fn winners_agree() {
        let Some(gpu) = cuda() else { return };
        let (m, n, k) = (1024, 1024, 1280);
        let inputs = tensors(&[(&[m, k], Kind::Bf16), (&[k, n], Kind::Bf16), (&[m, n], Kind::F32)]);
        let multiply = |device: &CudaDevice, kinds: [Kind; 2]| {
            let upload = |x: &Tensor, kind: Kind| -> crate::device::cuda::CudaBuffer {
                let x = x.to_f64().unwrap();
                let bits = |x: &f64| ((testing::bf16(*x) as f32).to_bits() >> 16) as u16;
                match kind {
                    Kind::Bf16 => device.upload("test", &x.iter().map(bits).collect::<Vec<_>>()),
                    Kind::F32 => device.upload("test", &x.iter().map(|&x| x as f32).collect::<Vec<_>>()),
                    _ => device.upload("test", &x),
                }
                .unwrap()
            };
            let [a, b, below] = [(0, kinds[0]), (1, kinds[0]), (2, kinds[1])].map(|(i, kind)| upload(&inputs[i], kind));
            let size = Gemm::new(m, n, k).with(Accumulate::Existing);
            device.gemm(size, Operand::rows(&a, k), Operand::rows(&b, n), Operand::rows(&below, n)).unwrap();
            below
        };
        let got = multiply(gpu.cuda(), [Kind::Bf16, Kind::F32]);
        let want = gpu.numbers(&multiply(gpu.cuda(), [Kind::F64, Kind::F64]));
        let want = Tensor::from_vec(inputs[0].device(), &[m, n], want).unwrap();
        compare("product", &got, &want, Bound::of(Kind::F32, Kind::F32, k));
        let anew = CudaDevice::new(CudaOptions { folders: folders(), ..CudaOptions::default() }).unwrap();
        assert!(gpu.numbers(&got) == gpu.numbers(&multiply(&anew, [Kind::Bf16, Kind::F32])), "other bits");
        assert!(!anew.algorithms().is_empty());
    }
}
