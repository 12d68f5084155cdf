//! One output, written by many tasks at places of their own.

use std::marker::PhantomData;

/// An output that tasks share, each of which writes places of its own.
pub struct Shared<'a, T> {
    first: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: whoever writes through the pointer vouches that no two tasks write the same place.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; the pointer itself is only read.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a slice.
    pub fn new(x: &'a mut [T]) -> Self {
        Shared { len: x.len(), first: x.as_mut_ptr(), of: PhantomData }
    }

    /// The place of an element, or the end.
    pub fn at(&self, offset: usize) -> *mut T {
        assert!(offset <= self.len, "element {offset} of {}", self.len);
        self.first.wrapping_add(offset)
    }

    /// A piece that nobody else uses meanwhile.
    ///
    /// # Safety
    /// No other access to the piece may happen while it lives.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that pieces are disjoint")]
    pub unsafe fn piece(&self, offset: usize, len: usize) -> &mut [T] {
        assert!(offset <= self.len && len <= self.len - offset, "{len} elements from {offset} of {}", self.len);
        // SAFETY: the piece is inside the slice, which is borrowed mutably; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(offset), len) }
    }
}

/// Consecutive pieces of `len` elements of an output (the last may be shorter), each for one task.
pub(super) struct Pieces<'a, T> {
    all: Shared<'a, T>,
    len: usize,
}

impl<'a, T> Pieces<'a, T> {
    pub(super) fn new(x: &'a mut [T], len: usize) -> Self {
        assert!(len > 0 || x.is_empty(), "pieces of an output have elements");
        Pieces { len, all: Shared::new(x) }
    }

    pub(super) fn count(&self) -> usize {
        if self.all.len == 0 { 0 } else { self.all.len.div_ceil(self.len) }
    }

    /// # Panics
    /// When there is no piece `i`.
    ///
    /// # Safety
    /// Each piece may be taken once.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that pieces are disjoint")]
    pub(super) unsafe fn get(&self, i: usize) -> &mut [T] {
        assert!(i < self.count(), "piece {i} of {}", self.count());
        let first = i * self.len;
        // SAFETY: piece i lies inside the slice, others elsewhere.
        unsafe { self.all.piece(first, self.len.min(self.all.len - first)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_inside_or_refused() {
        let mut x = [1, 2, 3, 4, 5];
        let shared = Shared::new(&mut x);
        // SAFETY: the two pieces have no element in common.
        let (a, b) = unsafe { (shared.piece(0, 2), shared.piece(3, 2)) };
        std::mem::swap(&mut a[0], &mut b[1]);
        // SAFETY: the pieces that are asked for here are refused.
        let refused = |offset, len| std::panic::catch_unwind(|| unsafe { shared.piece(offset, len).len() }).is_err();
        assert!(refused(3, 3) && refused(6, 0) && refused(1, usize::MAX) && refused(usize::MAX, 1));
        assert_eq!(x, [5, 2, 3, 4, 1]);
    }

    #[test]
    fn pieces_cover_the_output_once_and_there_are_no_others() {
        let mut x = vec![0u32; 17];
        let pieces = Pieces::new(&mut x, 5);
        assert_eq!(pieces.count(), 4);
        for i in 0..4 {
            // SAFETY: every piece is taken once.
            unsafe { pieces.get(i) }.iter_mut().for_each(|n| *n += 1 + i as u32);
        }
        // the second begins at 0 again if the product of number and length wraps
        for i in [4, usize::MAX / 5 + 1] {
            // SAFETY: what is asked for here is refused.
            let refused = std::panic::catch_unwind(|| unsafe { pieces.get(i).len() });
            let told = refused.expect_err("no such piece").downcast::<String>().expect("a message");
            assert_eq!(*told, format!("piece {i} of 4"));
        }
        assert_eq!(x, (0..17).map(|i| 1 + i / 5).collect::<Vec<u32>>());
    }
}
