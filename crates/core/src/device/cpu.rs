//! The CPU device: a thread pool of its own and free lists, so that a training step in its steady state asks the
//! operating system for nothing.
//!
//! Work is cut by shape, never by the number of threads, and partial sums are added in a fixed order: the bits of a
//! result are the same for any number of threads.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::CpuElement;

/// Handle to the threads and the memory of the host. Clones share both.
#[derive(Clone)]
pub struct CpuDevice(Arc<Inner>);

struct Inner {
    threads: rayon::ThreadPool,
    pools: Pools,
    poison: bool,
}

/// Free lists, one per element type.
#[derive(Default)]
pub struct Pools {
    pub(crate) f32: Pool<f32>,
    pub(crate) f64: Pool<f64>,
    pub(crate) u32: Pool<u32>,
    live: AtomicUsize,
    peak: AtomicUsize,
}

/// Buffers waiting to be used again, by capacity class.
pub struct Pool<T>(Mutex<BTreeMap<usize, Vec<Vec<Line<T>>>>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool(Mutex::new(BTreeMap::new()))
    }
}

/// Elements of a [`Line`].
const LINE: usize = 16;

/// What memory is asked for in: a buffer begins at a cache line, so that a vector of 16 f32 is in one line, never in two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line<T>([T; LINE]);

/// A block of host memory that returns to its device when dropped. It begins at a cache line.
pub struct Buffer<T: CpuElement> {
    lines: Vec<Line<T>>,
    len: usize,
    device: CpuDevice,
}

/// Rounds up to one of four classes per octave, so that lengths that vary from step to step (the number of attended
/// chunks) meet buffers of the same class: at most 25 % of a buffer is unused.
fn class(n: usize) -> usize {
    if n <= 64 {
        return 64;
    }
    let step = (n.next_power_of_two() / 8).max(1);
    n.div_ceil(step) * step
}

/// An output that tasks share, each of which writes places of its own.
pub struct Shared<'a, T>(*mut T, PhantomData<&'a mut [T]>);
// SAFETY: whoever writes through the pointer vouches that no two tasks write the same place.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; the pointer itself is only read.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a slice.
    pub fn new(x: &'a mut [T]) -> Self {
        Shared(x.as_mut_ptr(), PhantomData)
    }

    /// The place of an element; one that is used must be inside the slice.
    pub fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }

    /// A piece that nobody else uses meanwhile.
    ///
    /// # Safety
    /// The piece must be inside the slice, and no other access to it may happen while it lives.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that pieces are disjoint")]
    pub unsafe fn piece(&self, offset: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset), len) }
    }
}

/// Consecutive pieces of `len` elements of an output (the last may be shorter), each for one task.
struct Chunks<'a, T> {
    all: Shared<'a, T>,
    total: usize,
    len: usize,
}

impl<'a, T> Chunks<'a, T> {
    fn new(x: &'a mut [T], len: usize) -> Self {
        Chunks { total: x.len(), len, all: Shared::new(x) }
    }

    fn count(&self) -> usize {
        if self.total == 0 { 0 } else { self.total.div_ceil(self.len) }
    }

    /// # Safety
    /// Each piece may be taken once.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that pieces are disjoint")]
    unsafe fn get(&self, i: usize) -> &mut [T] {
        // SAFETY: piece i lies inside the slice, others elsewhere.
        unsafe { self.all.piece(i * self.len, self.len.min(self.total - i * self.len)) }
    }
}

impl CpuDevice {
    /// `threads` workers (0: one per logical core). `poison` fills every new buffer with NaN, so that a test sees an
    /// element that no kernel wrote.
    pub fn new(threads: usize, poison: bool) -> Self {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("dash-{i}"))
            .build()
            .expect("the operating system gives threads");
        CpuDevice(Arc::new(Inner { threads, pools: Pools::default(), poison }))
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        self.0.threads.current_num_threads()
    }

    /// Runs `f` on a worker: [`crate::Device::enter`].
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.0.threads.install(f)
    }

    /// A buffer of `n` elements whose values are unspecified (NaN on a poisoning device).
    pub fn alloc<T: CpuElement>(&self, n: usize) -> Buffer<T> {
        let class = class(n);
        let reused =
            T::pool(&self.0.pools).0.lock().expect("no panic holds the lock").get_mut(&class).and_then(Vec::pop);
        // what a class has beyond n stays untouched, so that the system need not back it with memory
        let lines = reused.unwrap_or_else(|| Vec::with_capacity(class / LINE));
        let bytes = class * size_of::<T>();
        let live = self.0.pools.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.0.pools.peak.fetch_max(live, Ordering::Relaxed);
        let mut buffer = Buffer { lines, len: 0, device: self.clone() };
        buffer.resize(n);
        if self.0.poison {
            buffer.fill(T::POISON);
        }
        buffer
    }

    /// An empty buffer with room for `capacity` elements, to be filled with [`Buffer::push`].
    pub fn list<T: CpuElement>(&self, capacity: usize) -> Buffer<T> {
        let mut buffer = self.alloc(capacity);
        buffer.resize(0);
        buffer
    }

    /// A buffer of zeros.
    pub fn zeros<T: CpuElement>(&self, n: usize) -> Buffer<T> {
        let mut buffer = self.alloc(n);
        buffer.fill(T::ZEROED);
        buffer
    }

    /// A buffer of these values.
    pub fn copy<T: CpuElement>(&self, values: &[T]) -> Buffer<T> {
        let mut buffer = self.alloc(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Largest number of bytes in live buffers since the device was made or [`CpuDevice::reset_peak`].
    pub fn peak_bytes(&self) -> usize {
        self.0.pools.peak.load(Ordering::Relaxed)
    }

    /// Starts a new measurement of [`CpuDevice::peak_bytes`].
    pub fn reset_peak(&self) {
        self.0.pools.peak.store(self.0.pools.live.load(Ordering::Relaxed), Ordering::Relaxed);
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
    pub fn for_chunks<T: CpuElement>(&self, out: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
        let out = Chunks::new(out, len);
        // SAFETY: a task has its own number.
        self.run(out.count(), &|i| f(i, unsafe { out.get(i) }));
    }

    /// [`CpuDevice::for_chunks`] over two outputs cut at the same places.
    pub fn for_chunks2<T: CpuElement, U: CpuElement>(
        &self,
        (a, a_len): (&mut [T], usize),
        (b, b_len): (&mut [U], usize),
        f: impl Fn(usize, &mut [T], &mut [U]) + Sync + Send,
    ) {
        let (a, b) = (Chunks::new(a, a_len), Chunks::new(b, b_len));
        assert_eq!(a.count(), b.count(), "outputs are cut at the same places");
        // SAFETY: a task has its own number.
        self.run(a.count(), &|i| unsafe { f(i, a.get(i), b.get(i)) });
    }

    /// [`CpuDevice::for_chunks`] over three outputs cut at the same places.
    pub fn for_chunks3<T: CpuElement>(
        &self,
        (a, a_len): (&mut [T], usize),
        (b, b_len): (&mut [T], usize),
        (c, c_len): (&mut [T], usize),
        f: impl Fn(usize, &mut [T], &mut [T], &mut [T]) + Sync + Send,
    ) {
        let (a, b, c) = (Chunks::new(a, a_len), Chunks::new(b, b_len), Chunks::new(c, c_len));
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

impl<T: CpuElement> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: a line is 16 elements and nothing else (`repr(C)`, and 16 elements fill whole lines), all lines are
        // initialised, and `len` never exceeds them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: CpuElement> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; the lines are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: CpuElement> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self[..].fmt(f)
    }
}

impl<T: CpuElement> Buffer<T> {
    fn capacity(&self) -> usize {
        self.lines.capacity() * LINE
    }

    fn resize(&mut self, n: usize) {
        self.lines.resize(n.div_ceil(LINE), Line([T::ZEROED; LINE]));
        self.len = n;
    }

    /// Appends; where the memory is too small, into a larger one from the device.
    pub fn extend(&mut self, values: &[T]) {
        let (old, len) = (self.len, self.len + values.len());
        if len > self.capacity() {
            let mut larger = self.device.list(len.max(2 * self.capacity()));
            larger.extend(self);
            std::mem::swap(self, &mut larger);
        }
        self.resize(len);
        self[old..].copy_from_slice(values);
    }

    /// Appends one.
    pub fn push(&mut self, value: T) {
        if self.len.is_multiple_of(LINE) {
            return self.extend(&[value]);
        }
        let last = self.len;
        self.len += 1;
        self[last] = value;
    }

    /// The device that owns the memory.
    pub fn device(&self) -> &CpuDevice {
        &self.device
    }
}

impl<T: CpuElement> Drop for Buffer<T> {
    fn drop(&mut self) {
        let class = self.capacity();
        let lines = std::mem::take(&mut self.lines);
        let pools = &self.device.0.pools;
        pools.live.fetch_sub(class * size_of::<T>(), Ordering::Relaxed);
        if let Ok(mut pool) = T::pool(pools).0.lock() {
            pool.entry(class).or_default().push(lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_and_poisoned() {
        let device = CpuDevice::new(1, true);
        let first = device.alloc::<f32>(1000);
        assert!(first.iter().all(|x| x.is_nan()));
        let place = first.as_ptr();
        drop(first);
        let second = device.alloc::<f32>(990);
        assert_eq!((second.as_ptr(), second.len()), (place, 990));
    }

    #[test]
    fn buffers_begin_at_a_cache_line_and_grow() {
        let device = CpuDevice::new(1, false);
        let mut list = device.list::<u32>(3);
        for i in 0..1000 {
            list.push(i);
            assert_eq!(list.as_ptr() as usize % 64, 0);
        }
        list.extend(&[7; 500]);
        assert!(list.iter().take(1000).copied().eq(0..1000) && list[1000..] == [7; 500]);
        assert_eq!(device.copy(&[1.0f64; 70]).as_ptr() as usize % 64, 0);
    }

    #[test]
    fn classes_waste_a_quarter_at_most() {
        for n in 65..100_000 {
            let c = class(n);
            assert!(c >= n && c as f64 <= 1.25 * n as f64 + 1.0, "{n} {c}");
            assert_eq!((class(c), c % LINE), (c, 0));
        }
    }

    #[test]
    fn every_task_runs_once_and_its_result_stands_in_its_place() {
        for threads in [1, 2, 5] {
            let device = CpuDevice::new(threads, false);
            for tasks in [0, 1, 2, 3, 64] {
                let mut counts = vec![0u32; 3 * tasks];
                // work inside work
                device.for_chunks(&mut counts, 3, |i, piece| {
                    let inner: usize = device.map(4, |j| i * j).into_iter().sum();
                    piece.iter_mut().for_each(|n| *n += (inner + 1) as u32);
                });
                let want: Vec<u32> = (0..3 * tasks).map(|n| (n / 3 * 6 + 1) as u32).collect();
                assert_eq!(counts, want, "{threads} threads, {tasks} tasks");
                assert_eq!(device.map(tasks, |i| 7 * i), (0..tasks).map(|i| 7 * i).collect::<Vec<_>>());
                let seen = Mutex::new(Vec::new());
                device.for_each((0..tasks).collect(), |i| seen.lock().unwrap().push(i));
                let mut seen = seen.into_inner().unwrap();
                seen.sort_unstable();
                assert_eq!(seen, (0..tasks).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn ordered_sum_does_not_depend_on_threads() {
        let x: Vec<f64> = (0..100_000).map(|i| ((i * 7919) % 1009) as f64 * 1e-3).collect();
        let sum = |threads| CpuDevice::new(threads, false).ordered_sum(x.len(), 977, |r| x[r].iter().sum());
        assert_eq!(sum(1).to_bits(), sum(5).to_bits());
    }
}
