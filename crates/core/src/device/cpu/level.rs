//! The instruction sets that kernels are written for, and which of them this processor has.

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction set in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Baseline = 0,
    /// AVX2 and FMA.
    Avx2 = 1,
    /// AVX-512 F, BW, DQ and VL.
    Avx512 = 2,
}

/// The best instruction set of this processor, found once: kernels ask for every row.
#[inline]
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = forced::get() {
        return level;
    }
    static FOUND: AtomicU8 = AtomicU8::new(u8::MAX);
    match FOUND.load(Ordering::Relaxed) {
        0 => Level::Baseline,
        1 => Level::Avx2,
        2 => Level::Avx512,
        _ => {
            let level = detect();
            FOUND.store(level as u8, Ordering::Relaxed);
            level
        }
    }
}

/// Miri runs the baseline: it knows neither the intrinsics of the kernels nor their assembly.
#[cold]
fn detect() -> Level {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// Every instruction set of this processor, the baseline first.
#[cfg(test)]
pub(crate) fn available() -> impl Iterator<Item = Level> {
    [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|&level| level <= detect())
}

/// Tests run kernels at a lower level than the processor's: all of them at the one that the variable `DASH_TEST_LEVEL` names, or
/// the threads of one device at the one that [`super::CpuDevice::at_level`] is given.
#[cfg(test)]
pub(super) mod forced {
    use std::cell::Cell;
    use std::sync::LazyLock;

    use super::{Level, available};

    static ALL: LazyLock<Option<Level>> = LazyLock::new(|| {
        let name = std::env::var("DASH_TEST_LEVEL").ok()?;
        let level = available().find(|level| format!("{level:?}").eq_ignore_ascii_case(&name));
        Some(
            level
                .unwrap_or_else(|| panic!("DASH_TEST_LEVEL={name}: baseline, avx2 or avx512, as the processor has it")),
        )
    });

    thread_local! {
        static HERE: Cell<Option<Level>> = const { Cell::new(None) };
    }

    /// The level of this thread, if it is not the processor's.
    pub fn get() -> Option<Level> {
        HERE.get().or(*ALL)
    }

    /// Sets the level of this thread.
    pub fn set(level: Level) {
        HERE.set(Some(level));
    }
}
