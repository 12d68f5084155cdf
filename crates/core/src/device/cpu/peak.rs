//! What one core can do at best: the yardstick of the benchmarks.

use super::level::Level;

/// Fused multiply-adds in independent chains that touch no memory: what one core can do at best. Returns the number of
/// f32 operations done, 0 where this instruction set has no kernel. `work` is called with a value that depends on all.
pub fn multiply_add_probe(level: Level, rounds: usize, work: impl FnOnce(f32)) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn wide(rounds: usize) -> f32 {
            let (x, mut acc) = (_mm512_set1_ps(std::hint::black_box(0.5)), [_mm512_set1_ps(1.0); 16]);
            for _ in 0..rounds {
                for a in acc.iter_mut() {
                    *a = _mm512_fmadd_ps(*a, x, x);
                }
            }
            acc.into_iter().map(|a| _mm512_reduce_add_ps(a)).sum()
        }
        #[target_feature(enable = "avx2,fma")]
        fn narrow(rounds: usize) -> f32 {
            let (x, mut acc) = (_mm256_set1_ps(std::hint::black_box(0.5)), [_mm256_set1_ps(1.0); 12]);
            for _ in 0..rounds {
                for a in acc.iter_mut() {
                    *a = _mm256_fmadd_ps(*a, x, x);
                }
            }
            acc.into_iter().map(|a| _mm256_cvtss_f32(a)).sum()
        }
        match level {
            Level::Avx512 => {
                // SAFETY: the level says that the processor has it.
                work(unsafe { wide(rounds) });
                return rounds * 16 * 16 * 2;
            }
            Level::Avx2 => {
                // SAFETY: as above.
                work(unsafe { narrow(rounds) });
                return rounds * 12 * 8 * 2;
            }
            Level::Baseline => {}
        }
    }
    let _ = (level, rounds, work);
    0
}
