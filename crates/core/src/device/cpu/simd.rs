//! One source, three instruction sets: a kernel written once is compiled for AVX-512, for AVX2 with FMA and for the
//! target's baseline, and the processor picks at run time. All three do the same operations in the same order (sums run
//! in [`LANES`] fixed lanes, every multiply-add is fused), so they give the same bits.

use crate::device::CpuNumber;

/// Independent partial sums of a reduction: one 512-bit register of f32.
pub const LANES: usize = 16;

/// Defines a function over `T: CpuNumber` that is compiled once per instruction set. Helpers called in the body must be
/// `#[inline(always)]`, or they stay at the baseline.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<T>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name<T: $crate::device::CpuNumber>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn generic<T: $crate::device::CpuNumber>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512<T: $crate::device::CpuNumber>($($arg: $ty),*) $(-> $ret)? {
                    generic::<T>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<T: $crate::device::CpuNumber>($($arg: $ty),*) $(-> $ret)? {
                    generic::<T>($($arg),*)
                }
                match $crate::device::cpu::level::level() {
                    // SAFETY: `level` found these features on this processor.
                    $crate::device::cpu::level::Level::Avx512 => return unsafe { avx512::<T>($($arg),*) },
                    // SAFETY: as above.
                    $crate::device::cpu::level::Level::Avx2 => return unsafe { avx2::<T>($($arg),*) },
                    $crate::device::cpu::level::Level::Baseline => {}
                }
            }
            generic::<T>($($arg),*)
        }
    };
}
pub(crate) use simd;

/// Prefetches the cache line at an address, inside an allocation or not.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch never faults; every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// Prefetches rows that are about to be read and written: a short visit is over before the processor has guessed what comes
/// next.
#[inline]
pub fn prefetch_rows<T>(rows: &[T]) {
    for line in rows.chunks(64 / size_of::<T>()) {
        prefetch(line.as_ptr());
    }
}

/// Adds the lanes pairwise: a fixed tree.
#[inline(always)]
pub fn sum_lanes<T: CpuNumber>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            let upper = lanes[l + width];
            lanes[l] += upper;
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of products.
#[inline(always)]
pub fn dot<T: CpuNumber>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (a16, b16) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (ra, rb) = (a16.remainder(), b16.remainder());
    for (x, y) in a16.zip(b16) {
        for l in 0..LANES {
            lanes[l] = x[l].mul_add(y[l], lanes[l]);
        }
    }
    for (l, (&x, &y)) in ra.iter().zip(rb).enumerate() {
        lanes[l] = x.mul_add(y, lanes[l]);
    }
    sum_lanes(lanes)
}

/// Sum.
#[inline(always)]
pub fn sum<T: CpuNumber>(a: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let a16 = a.chunks_exact(LANES);
    let rest = a16.remainder();
    for x in a16 {
        for l in 0..LANES {
            lanes[l] += x[l];
        }
    }
    for (l, &x) in rest.iter().enumerate() {
        lanes[l] += x;
    }
    sum_lanes(lanes)
}

/// Largest element; minus infinity for none.
#[inline(always)]
pub fn max<T: CpuNumber>(a: &[T]) -> T {
    let mut lanes = [T::NEG_INF; LANES];
    let a16 = a.chunks_exact(LANES);
    let rest = a16.remainder();
    for x in a16 {
        for l in 0..LANES {
            lanes[l] = lanes[l].max(x[l]);
        }
    }
    for (l, &x) in rest.iter().enumerate() {
        lanes[l] = lanes[l].max(x);
    }
    let mut top = lanes[0];
    for &x in &lanes[1..] {
        top = top.max(x);
    }
    top
}

/// `y += a x`.
#[inline(always)]
pub fn axpy<T: CpuNumber>(a: T, x: &[T], y: &mut [T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

simd! {
    /// Adds element by element, as far as the shorter one reaches.
    pub(crate) fn add_into<T>(x: &[T], out: &mut [T]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o += x;
        }
    }
}
