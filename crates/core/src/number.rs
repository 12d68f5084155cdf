//! Element types and their arithmetic. Nothing here knows a device.

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float: training.
    F32,
    /// 64-bit float: gradient checks and golden files.
    F64,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F64 => 8,
        }
    }
}

/// How the operands of products with parameters, and of dense and block attention, are rounded. Sums, activations and
/// weights keep their type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compute {
    /// Not at all.
    #[default]
    Full,
    /// To bf16, where the device multiplies bf16; elsewhere not at all.
    Bf16,
}

mod sealed {
    /// Kernels trust the bits of an element, so no other crate has one.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for u32 {}
}

/// What memory of a device is made of.
pub trait Element: sealed::Sealed + Copy + Send + Sync + std::fmt::Debug + 'static {
    /// All bits zero.
    const ZEROED: Self;
    /// What a poisoning device fills new buffers with: a value that no computation should meet.
    const POISON: Self;
}

macro_rules! element {
    ($t:ident, $zero:expr, $poison:expr) => {
        impl Element for $t {
            const ZEROED: Self = $zero;
            const POISON: Self = $poison;
        }
    };
}

element!(f32, 0.0, f32::NAN);
element!(f64, 0.0, f64::NAN);
element!(u32, 0, u32::MAX);

/// The arithmetic that kernels use, for `f32` and `f64`, so that the f64 gradient check runs the code that trains in f32.
pub trait Number:
    Element
    + Default
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Minus infinity.
    const NEG_INF: Self;
    /// Element type tag.
    const DTYPE: DType;
    /// Rounds a double.
    fn of(x: f64) -> Self;
    /// Widens to a double.
    fn f64(self) -> f64;
    /// `self * b + c` with one rounding.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// e to the power of `self`. f32: a polynomial that vectorises, within 1.5 ulp; f64: the standard library.
    fn exp(self) -> Self;
    /// 2 to the power of `self`, in three quarters of the time of [`Number::exp`]. f32: within 1.5 ulp, 0 below -126.5.
    fn exp2(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Power.
    fn powf(self, e: Self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The larger one, compiled to one instruction (NaN in `self` is lost).
    fn max(self, b: Self) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Numbers of this type in host memory, under the name of the type.
    fn host(numbers: &[Self]) -> Host<'_>;
    /// Numbers in host memory, if they are of this type.
    fn of_host(numbers: Host<'_>) -> Option<&[Self]>;
}

/// Numbers in host memory: what goes up to a device, and what comes down.
#[derive(Debug, Clone, Copy)]
pub enum Host<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 64-bit floats.
    F64(&'a [f64]),
}

macro_rules! number {
    ($t:ty, $dtype:ident, $other:ident, $exp:path, $exp2:path) => {
        impl Number for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INF: Self = <$t>::NEG_INFINITY;
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn mul_add(self, b: Self, c: Self) -> Self {
                <$t>::mul_add(self, b, c)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn exp2(self) -> Self {
                $exp2(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn powf(self, e: Self) -> Self {
                <$t>::powf(self, e)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn max(self, b: Self) -> Self {
                if self > b { self } else { b }
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
            fn host(numbers: &[Self]) -> Host<'_> {
                Host::$dtype(numbers)
            }
            fn of_host(numbers: Host<'_>) -> Option<&[Self]> {
                match numbers {
                    Host::$dtype(numbers) => Some(numbers),
                    Host::$other(_) => None,
                }
            }
        }
    };
}

number!(f32, F32, F64, exp_f32, exp2_f32);
number!(f64, F64, F32, f64::exp, f64::exp2);

/// exp(x) for f32 in straight-line arithmetic, so that a loop over it vectorises: x = n ln 2 + r with |r| <= ln 2 / 2, a
/// polynomial for exp(r), the exponent field for 2^n. The coefficients minimise the largest relative error, 2e-9. Below
/// -86.9 (1.6 times the smallest normal number) the result is 0; above 88.7 the product overflows to infinity by itself,
/// and NaN passes through the polynomial.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
    let small = x < -86.9;
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts: the first has 9 trailing zero bits, so n * hi is exact
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    // 2 exp(r), so that the other factor is 2^(n - 1), whose exponent field exists for every n in -125..=128
    let mut p = 2.0 * 0.001_383_684_6_f32;
    p = p.mul_add(r, 2.0 * 0.008_374_816);
    p = p.mul_add(r, 2.0 * 0.041_668_225);
    p = p.mul_add(r, 2.0 * 0.166_664_2);
    p = p.mul_add(r, 2.0 * 0.499_999_9);
    p = p.mul_add(r, 2.0);
    p = p.mul_add(r, 2.0);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126);
    if small { 0.0 } else { p * f32::from_bits(exponent << 23) }
}

/// What 2^x for f32 is made of: x = n + r exactly, a polynomial for 2^r, the exponent field for 2^n.
pub(crate) struct Exp2 {
    /// Adding it leaves the rounded integer in the low mantissa bits.
    pub round: f32,
    /// Range of x: the field of -127 stands for 0, that of 128 for infinity.
    pub lowest: f32,
    pub highest: f32,
    /// Coefficients, the highest power first.
    pub polynomial: [f32; 7],
}

/// The coefficients minimise the largest relative error, 2e-9.
pub(crate) const EXP2: Exp2 = Exp2 {
    round: 12_582_912.0, // 1.5 * 2^23
    lowest: -127.0,
    highest: 128.0,
    polynomial: [1.534_581_2e-4, 1.339_993_1e-3, 9.618_489e-3, 5.550_328_7e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0],
};

/// 2^x in straight-line arithmetic, like [`exp_f32`]. NaN passes through the polynomial. The registers' version is in
/// `device/softmax.rs`.
#[inline(always)]
fn exp2_f32(x: f32) -> f32 {
    let x = if x < EXP2.lowest { EXP2.lowest } else { x };
    let x = if x > EXP2.highest { EXP2.highest } else { x };
    let shifted = x + EXP2.round;
    let r = x - (shifted - EXP2.round);
    let mut p = EXP2.polynomial[0];
    for &c in &EXP2.polynomial[1..] {
        p = p.mul_add(r, c);
    }
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Runs the body with `$t` bound to the element type.
macro_rules! with_number {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                #[allow(unused_imports)]
                use $crate::number::Number as _;
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                #[allow(unused_imports)]
                use $crate::number::Number as _;
                type $t = f64;
                $body
            }
        }
    };
}
pub(crate) use with_number;

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `f` on `from..to` in units of the last place.
    fn worst(f: fn(f32) -> f32, exact: fn(f64) -> f64, from: f32, to: f32) -> f64 {
        let mut worst = 0.0f64;
        let mut x = from;
        while x < to {
            let want = exact(x as f64);
            let ulp = (want as f32).to_bits();
            let ulp = (f32::from_bits(ulp + 1) - f32::from_bits(ulp)) as f64;
            worst = worst.max((f(x) as f64 - want).abs() / ulp);
            x += 0.000_37;
        }
        worst
    }

    #[test]
    fn exp_is_within_one_and_a_half_ulp_and_exact_at_the_ends() {
        let worst = worst(exp_f32, f64::exp, -86.89, 88.7);
        assert!(worst < 1.5, "{worst} ulp");
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-100.0), 0.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(89.0), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_is_within_one_and_a_half_ulp_and_exact_at_the_ends() {
        let worst = worst(exp2_f32, f64::exp2, -126.0, 127.49);
        assert!(worst < 1.5, "{worst} ulp");
        for n in -126..=127 {
            assert_eq!(exp2_f32(n as f32), (n as f64).exp2() as f32);
        }
        assert_eq!(exp2_f32(-127.0), 0.0);
        assert_eq!(exp2_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2_f32(128.0), f32::INFINITY);
        assert_eq!(exp2_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp2_f32(f32::NAN).is_nan());
    }
}
