//! Host memory: buffers that begin at a cache line, and the free lists that they return to.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{CpuDevice, CpuElement};
use crate::error::{Error, Result};

/// Free lists, one per element type.
#[derive(Default)]
pub struct Pools {
    pub(super) f32: Pool<f32>,
    pub(super) f64: Pool<f64>,
    pub(super) u32: Pool<u32>,
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

impl<T> Line<T> {
    /// Whether lines hold their elements and nothing else, so that lines that follow each other are a slice of elements. An element
    /// of 2 bytes would leave a gap of 32 at the end of each.
    const IS_FULL: bool = size_of::<Line<T>>() == LINE * size_of::<T>();
}

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

/// What `op` says where the system has no memory for `n` elements.
pub(crate) fn out_of_memory<T>(op: &'static str, n: usize) -> Error {
    let gigabytes = n as f64 * size_of::<T>() as f64 / 1e9;
    let what = format!("the system has no {gigabytes:.1} GB of memory for {n} numbers; use a smaller shape");
    Error::device(op, what)
}

impl CpuDevice {
    /// A buffer of `n` elements whose values are unspecified (NaN on a poisoning device). For what kernels work in: where the system
    /// has no memory for it, the process ends.
    pub fn alloc<T: CpuElement>(&self, n: usize) -> Buffer<T> {
        self.buffer(n, |lines| Some(Vec::with_capacity(lines))).expect("without memory the process has ended")
    }

    /// The same for `op`, whose extents a caller chooses.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub fn try_alloc<T: CpuElement>(&self, op: &'static str, n: usize) -> Result<Buffer<T>> {
        let reserved = |lines: usize| {
            let mut all = Vec::new();
            all.try_reserve_exact(lines).is_ok().then_some(all)
        };
        self.buffer(n, reserved).ok_or_else(|| out_of_memory::<T>(op, n))
    }

    /// From the pool, or from `fresh`, which is told how many lines.
    fn buffer<T: CpuElement>(&self, n: usize, fresh: fn(usize) -> Option<Vec<Line<T>>>) -> Option<Buffer<T>> {
        const { assert!(Line::<T>::IS_FULL, "elements of 4, 8, .. bytes") };
        let class = class(n);
        let reused =
            T::pool(&self.0.pools).0.lock().expect("no panic holds the lock").get_mut(&class).and_then(Vec::pop);
        // what a class has beyond n stays untouched, so that the system need not back it with memory
        let lines = match reused {
            Some(lines) => lines,
            None => fresh(class / LINE)?,
        };
        let bytes = class * size_of::<T>();
        let live = self.0.pools.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.0.pools.peak.fetch_max(live, Ordering::Relaxed);
        let mut buffer = Buffer { lines, len: 0, device: self.clone() };
        buffer.resize(n);
        if self.0.poison {
            buffer.fill(T::POISON);
        }
        Some(buffer)
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

    /// The same for `op`, of values that a caller has.
    ///
    /// # Errors
    /// As [`CpuDevice::try_alloc`].
    pub fn try_copy<T: CpuElement>(&self, op: &'static str, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.try_alloc(op, values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }

    /// Largest number of bytes in live buffers since the device was made or [`CpuDevice::reset_peak`].
    pub fn peak_bytes(&self) -> usize {
        self.0.pools.peak.load(Ordering::Relaxed)
    }

    /// Starts a new measurement of [`CpuDevice::peak_bytes`].
    pub fn reset_peak(&self) {
        self.0.pools.peak.store(self.0.pools.live.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl<T: CpuElement> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        const { assert!(Line::<T>::IS_FULL, "elements of 4, 8, .. bytes") };
        debug_assert!(self.len <= self.lines.len() * LINE, "{} elements in {} lines", self.len, self.lines.len());
        // SAFETY: lines are elements and nothing else (the assert above), all lines are initialised, and `len` never
        // exceeds them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: CpuElement> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        const { assert!(Line::<T>::IS_FULL, "elements of 4, 8, .. bytes") };
        debug_assert!(self.len <= self.lines.len() * LINE, "{} elements in {} lines", self.len, self.lines.len());
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
        let device = CpuDevice::new(1, true).unwrap();
        let first = device.alloc::<f32>(1000);
        assert!(first.iter().all(|x| x.is_nan()));
        let place = first.as_ptr();
        drop(first);
        let second = device.alloc::<f32>(990);
        assert_eq!((second.as_ptr(), second.len()), (place, 990));
    }

    #[test]
    fn buffers_begin_at_a_cache_line_and_grow() {
        let device = CpuDevice::new(1, false).unwrap();
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
}
