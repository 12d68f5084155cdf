//! A training step in its steady state asks the system for nothing: what holds numbers is reused, and what is left are
//! closures, shapes and task lists, a few hundred small blocks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use dash_core::Device;
use dash_data::Batch;
use dash_model::VARIANTS;
use train::config::Config;
use train::trainer::Trainer;

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_reuses_the_memory_of_the_step_before() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/bench-cpu.toml");
    let sizes = ["model.layers=2", "data.seq_len=256", "data.batch_size=2"].map(String::from);
    for compute in ["f32", "bf16"] {
        let kinds = VARIANTS.iter().map(|v| (v.kind, "adamw")).chain([("dense", "muon")]);
        for (kind, optimiser) in kinds {
            let attention = [("model.attention.kind", kind), ("model.compute", compute), ("optim.kind", optimiser)];
            let attention = attention.map(|(key, value)| format!("{key}={value}"));
            let config = Config::load(&path, &[&sizes[..], &attention[..]].concat()).unwrap();
            // one thread, so that which tasks hold scratch memory at once does not vary
            let mut trainer = Trainer::new(&config, &Device::cpu(1).unwrap()).unwrap();
            let ids = |factor: u32| (0..512).map(move |i| i * factor % 4096);
            let (inputs, targets) = (ids(7919).collect(), ids(7907).collect());
            let batch = Batch {
                inputs,
                targets,
                batch: 2,
                state: Default::default(),
                questions: Vec::new(),
                documents: Vec::new(),
            };
            // (bytes, largest block) of a step
            let mut step = || {
                let before = BYTES.load(Relaxed);
                LARGEST.store(0, Relaxed);
                trainer.step(&config, std::slice::from_ref(&batch), false).unwrap();
                (BYTES.load(Relaxed) - before, LARGEST.load(Relaxed))
            };
            let first = step();
            (0..3).for_each(|_| {
                step();
            });
            let steady = step();
            assert!(first.0 > 10 << 20, "{kind}: the first step makes the memory, {first:?}");
            assert!(steady.0 < 1 << 20 && steady.1 < 64 << 10, "{kind}, {compute}, {optimiser}: {steady:?}");
        }
    }
}
