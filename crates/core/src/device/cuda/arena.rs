//! Device memory in slabs that are asked of the driver and cut into blocks of size classes. A freed block goes onto its class's
//! list and is handed out again in stream order, so a training step in its steady state asks the driver for nothing.

use std::collections::BTreeMap;

use super::api::Address;

/// What the driver is asked for at a time.
const SLAB: usize = 256 << 20;
/// Larger blocks get a slab of their own.
const OWN_SLAB: usize = SLAB / 4;
/// Every block begins at a multiple of it: what tensor maps and vector loads need, and a whole number of cache lines.
const ALIGN: usize = 256;

/// Where slabs come from; in tests, not from a driver.
pub(super) trait Source {
    /// New memory, or `None` when there is none left.
    fn reserve(&self, bytes: usize) -> Option<Address>;
    /// Gives back what [`Source::reserve`] gave. No kernel may still use it.
    fn release(&self, at: Address);
}

/// A piece of a slab.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Block {
    pub at: Address,
    slab: usize,
    class: usize,
}

struct Slab {
    at: Address,
    bytes: usize,
    /// Bytes cut off so far.
    cut: usize,
    /// Blocks in use.
    live: usize,
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Arena {
    slabs: Vec<Option<Slab>>,
    free: BTreeMap<usize, Vec<Block>>,
    usage: Usage,
}

/// Bytes of device memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// In blocks in use, rounded up to their classes.
    pub now: usize,
    /// The most that `now` has been.
    pub peak: usize,
    /// Asked of the driver.
    pub reserved: usize,
}

/// Rounds up to one of eight classes an octave: at most an eighth of a block is unused.
pub(super) fn class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    bytes.max(1).div_ceil(step) * step
}

impl Arena {
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Starts the peak figure again.
    pub fn reset_peak(&mut self) {
        self.usage.peak = self.usage.now;
    }

    /// A block of at least `bytes`, or `None` when the source has no more.
    pub fn alloc(&mut self, bytes: usize, source: &impl Source) -> Option<Block> {
        let class = class(bytes);
        let recycled = self.free.get_mut(&class).and_then(Vec::pop);
        let block = recycled
            .or_else(|| self.cut(class))
            .or_else(|| self.grow(class, source).then(|| self.cut(class).expect("a new slab has room")))?;
        self.slab(block).live += 1;
        self.usage.now += block.class;
        self.usage.peak = self.usage.peak.max(self.usage.now);
        Some(block)
    }

    /// Takes a block back.
    pub fn free(&mut self, block: Block) {
        self.slab(block).live -= 1;
        self.usage.now -= block.class;
        self.free.entry(block.class).or_default().push(block);
    }

    fn slab(&mut self, block: Block) -> &mut Slab {
        self.slabs[block.slab].as_mut().expect("a slab outlives its blocks")
    }

    /// From the end of a slab that has room.
    fn cut(&mut self, class: usize) -> Option<Block> {
        let fits = |s: &Option<Slab>| s.as_ref().is_some_and(|s| s.bytes - s.cut >= class);
        let i = self.slabs.iter().position(fits)?;
        let slab = self.slabs[i].as_mut()?;
        slab.cut += class;
        Some(Block { at: slab.at + (slab.cut - class) as Address, slab: i, class })
    }

    /// A new slab. Where the source refuses, slabs without a block in use go back first; then a slab of one block must do.
    fn grow(&mut self, class: usize, source: &impl Source) -> bool {
        let whole = if class > OWN_SLAB { class } else { SLAB };
        let ask = |bytes: usize| source.reserve(bytes).map(|at| (at, bytes));
        let found = ask(whole).or_else(|| {
            self.release_unused(source);
            ask(whole).or_else(|| ask(class))
        });
        let Some((at, bytes)) = found else { return false };
        self.usage.reserved += bytes;
        let slab = Some(Slab { at, bytes, cut: 0, live: 0 });
        match self.slabs.iter().position(Option::is_none) {
            Some(i) => self.slabs[i] = slab,
            None => self.slabs.push(slab),
        }
        true
    }

    /// Gives every slab back that has no block in use.
    pub fn release_unused(&mut self, source: &impl Source) {
        for (i, place) in self.slabs.iter_mut().enumerate() {
            if let Some(slab) = place.take_if(|s| s.live == 0) {
                source.release(slab.at);
                self.usage.reserved -= slab.bytes;
                self.free.values_mut().for_each(|list| list.retain(|b| b.slab != i));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A source of `limit` bytes that counts what is out.
    struct Fake {
        limit: usize,
        out: RefCell<BTreeMap<Address, usize>>,
        next: RefCell<Address>,
    }

    impl Fake {
        fn new(limit: usize) -> Self {
            Fake { limit, out: RefCell::default(), next: RefCell::new(1 << 20) }
        }
    }

    impl Source for Fake {
        fn reserve(&self, bytes: usize) -> Option<Address> {
            if self.out.borrow().values().sum::<usize>() + bytes > self.limit {
                return None;
            }
            let at = *self.next.borrow();
            *self.next.borrow_mut() += (bytes + SLAB) as Address;
            self.out.borrow_mut().insert(at, bytes);
            Some(at)
        }
        fn release(&self, at: Address) {
            self.out.borrow_mut().remove(&at).expect("what is released was reserved");
        }
    }

    #[test]
    fn classes_waste_at_most_an_eighth_and_are_aligned() {
        for bytes in (1..200_000).step_by(37).chain([SLAB - 1, SLAB, SLAB + 1, 3 << 30]) {
            let class = class(bytes);
            assert!(class >= bytes && class.is_multiple_of(ALIGN), "{bytes}: {class}");
            assert!(class - bytes < (bytes / 8).max(ALIGN), "{bytes}: {class}");
        }
        assert_eq!(class(0), ALIGN);
    }

    #[test]
    fn live_blocks_never_overlap_and_freed_ones_come_back() {
        let (source, mut arena) = (Fake::new(8 * SLAB), Arena::default());
        let mut rng = crate::rng::Rng::new(1);
        let mut live: Vec<(Block, usize)> = Vec::new();
        for _ in 0..2000 {
            if live.len() > 40 {
                let i = (rng.uniform() * live.len() as f64) as usize;
                arena.free(live.swap_remove(i).0);
            }
            let bytes = (rng.uniform() * 9e6) as usize + 1;
            let block = arena.alloc(bytes, &source).unwrap();
            for (other, size) in &live {
                let apart = block.at + bytes as Address <= other.at || other.at + *size as Address <= block.at;
                assert!(apart, "{block:?} of {bytes} overlaps {other:?} of {size}");
            }
            live.push((block, bytes));
        }
        let before = arena.usage();
        assert!(before.reserved <= 4 * SLAB, "{before:?}");
        live.drain(..).for_each(|(b, _)| arena.free(b));
        assert_eq!(arena.usage().now, 0);
        assert_eq!(arena.usage().peak, before.peak);
        arena.release_unused(&source);
        assert_eq!(arena.usage().reserved, 0);
        assert!(source.out.borrow().is_empty());
    }

    #[test]
    fn a_full_source_first_gets_back_what_is_unused() {
        let (source, mut arena) = (Fake::new(SLAB), Arena::default());
        let small = arena.alloc(1000, &source).unwrap();
        assert!(arena.alloc(SLAB, &source).is_none(), "the slab is in use");
        arena.free(small);
        let large = arena.alloc(SLAB, &source).expect("the slab went back");
        arena.free(large);
        assert_eq!(arena.usage(), Usage { now: 0, peak: SLAB, reserved: SLAB });
    }
}
