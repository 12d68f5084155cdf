//! The CPU device: a thread pool of its own and free lists, so that a training step in its steady state asks the
//! operating system for nothing.
//!
//! Work is cut by shape, never by the number of threads, and partial sums are added in a fixed order: the bits of a
//! result are the same for any number of threads.

mod element;
pub mod gemm;
pub mod kernel_bf16;
pub mod kernel_f32;
pub mod level;
pub mod matrix;
mod peak;
mod pool;
mod shared;
pub mod simd;
pub mod softmax;
#[cfg(test)]
mod tests;
pub mod transpose;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

pub use element::{CpuData, CpuElement, CpuNumber};
pub use matrix::{MatMut, MatRef};
pub use peak::multiply_add_probe;
pub(crate) use pool::out_of_memory;
pub use pool::{Buffer, Pool, Pools};
use shared::Pieces;
pub use shared::Shared;

use crate::error::{Error, Result};

/// Handle to the threads and the memory of the host. Clones share both.
#[derive(Clone)]
pub struct CpuDevice(Arc<Inner>);

struct Inner {
    threads: rayon::ThreadPool,
    pools: Pools,
    poison: bool,
}

impl CpuDevice {
    /// `threads` workers (0: one per logical core). `poison` fills every new buffer with NaN, so that a test sees an
    /// element that no kernel wrote.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn new(threads: usize, poison: bool) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("dash-{i}")).build();
        let threads = pool.map_err(|e| {
            Error::invalid("cpu", format!("the operating system refuses {threads} worker threads ({e}); ask for fewer"))
        })?;
        Ok(CpuDevice(Arc::new(Inner { threads, pools: Pools::default(), poison })))
    }

    /// Whether both handles are of one device.
    pub fn is(&self, other: &CpuDevice) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// A device for tests, whose threads run the kernels of this instruction set: see [`level::available`].
    #[cfg(test)]
    pub(crate) fn at_level(threads: usize, level: level::Level) -> Self {
        let device = CpuDevice::new(threads, true).unwrap();
        device.0.threads.broadcast(|_| level::forced::set(level));
        device
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        self.0.threads.current_num_threads()
    }

    /// Runs `f` on a worker: [`crate::Device::enter`].
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.0.threads.install(f)
    }

    /// Runs `f(i)` for every `i < tasks` on all threads, a single task on the caller's. They take tasks in ascending order, one at
    /// a time, so that threads end together where the last tasks are short.
    ///
    /// All work goes through here, and through a pointer: with the thread pool compiled for every closure, 45 % of this crate's
    /// code was the pool's.
    pub(crate) fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    break;
                }
                f(i);
            }
        };
        if tasks < 2 {
            return work();
        }
        self.enter(|| {
            rayon::scope(|scope| {
                for _ in 1..self.threads().min(tasks) {
                    scope.spawn(|_| work());
                }
                work();
            });
        });
    }

    /// Runs `f(i, piece)` for consecutive pieces of `out` of `len` elements (the last may be shorter), on all threads.
    pub fn for_pieces<T: CpuElement>(&self, out: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
        let out = Pieces::new(out, len);
        // SAFETY: a task has its own number.
        self.run(out.count(), &|i| f(i, unsafe { out.get(i) }));
    }

    /// [`CpuDevice::for_pieces`] over two outputs cut at the same places.
    pub fn for_pieces2<T: CpuElement, U: CpuElement>(
        &self,
        (a, a_len): (&mut [T], usize),
        (b, b_len): (&mut [U], usize),
        f: impl Fn(usize, &mut [T], &mut [U]) + Sync + Send,
    ) {
        let (a, b) = (Pieces::new(a, a_len), Pieces::new(b, b_len));
        assert_eq!(a.count(), b.count(), "outputs are cut at the same places");
        // SAFETY: a task has its own number.
        self.run(a.count(), &|i| unsafe { f(i, a.get(i), b.get(i)) });
    }

    /// [`CpuDevice::for_pieces`] over three outputs cut at the same places.
    pub fn for_pieces3<T: CpuElement>(
        &self,
        (a, a_len): (&mut [T], usize),
        (b, b_len): (&mut [T], usize),
        (c, c_len): (&mut [T], usize),
        f: impl Fn(usize, &mut [T], &mut [T], &mut [T]) + Sync + Send,
    ) {
        let (a, b, c) = (Pieces::new(a, a_len), Pieces::new(b, b_len), Pieces::new(c, c_len));
        assert!(a.count() == b.count() && b.count() == c.count(), "outputs are cut at the same places");
        // SAFETY: a task has its own number.
        self.run(a.count(), &|i| unsafe { f(i, a.get(i), b.get(i), c.get(i)) });
    }

    /// Runs `f` on every item, each item a task of its own, in order.
    pub fn for_each<I: Send>(&self, items: Vec<I>, f: impl Fn(I) + Sync + Send) {
        let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
        self.run(items.len(), &|i| {
            let item = items[i].lock().expect("nobody else locks it").take();
            f(item.expect("a task has its own number"));
        });
    }

    /// Runs `f(i)` for every `i < tasks` on all threads and returns the results in order.
    pub fn map<R: Send>(&self, tasks: usize, f: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
        let results: Vec<_> = (0..tasks).map(|_| Mutex::new(None)).collect();
        self.run(tasks, &|i| {
            let result = f(i);
            *results[i].lock().expect("nobody else locks it") = Some(result);
        });
        let result = |slot: Mutex<Option<R>>| slot.into_inner().expect("no task failed").expect("all tasks ran");
        results.into_iter().map(result).collect()
    }

    /// Sum over fixed pieces of `len` items, pieces added in order: `f(range)` gives one piece.
    pub fn ordered_sum(&self, n: usize, len: usize, f: impl Fn(std::ops::Range<usize>) -> f64 + Sync + Send) -> f64 {
        self.map(n.div_ceil(len), |i| f(i * len..((i + 1) * len).min(n))).into_iter().sum()
    }
}

impl std::fmt::Debug for CpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "cpu with {} threads", self.threads())
    }
}
