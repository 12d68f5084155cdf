//! Shape arithmetic: row-major, contiguous, run-time rank.

use crate::error::{Error, Result, ensure};

/// Number of elements of a shape that a tensor has: [`checked_numel`] let it through.
pub fn numel(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Number of elements of a shape that a tensor is to have. Axes without elements are left out of the count that is checked, so that
/// no product of some of the axes wraps either.
///
/// # Errors
/// When memory cannot address so many numbers of 8 bytes.
pub fn checked_numel(op: &'static str, shape: &[usize]) -> Result<usize> {
    let size = shape.iter().filter(|&&n| n > 0).try_fold(1usize, |size, &n| size.checked_mul(n));
    let fits = size.is_some_and(|size| size <= isize::MAX as usize / 8);
    ensure!(fits, op, "shape {shape:?} has more elements than memory can address");
    Ok(numel(shape))
}

/// `n` of something that is counted in 32 bits.
///
/// # Errors
/// When there are 2^32 or more.
pub fn count32(op: &'static str, n: usize, what: &str) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::invalid(op, format!("{n} {what}: they are counted in 32 bits")))
}

/// Row-major strides, in elements.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

/// The shape that both sides broadcast to: ranks are aligned at the right and an axis of one is repeated.
///
/// # Errors
/// When an axis differs and is one on neither side, or memory cannot address so many elements.
pub fn broadcast(op: &'static str, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let axis = |s: &[usize], i: usize| if i + s.len() < rank { 1 } else { s[i + s.len() - rank] };
    let mut out = Vec::with_capacity(rank);
    for i in 0..rank {
        let (x, y) = (axis(a, i), axis(b, i));
        ensure!(x == y || x == 1 || y == 1, op, "shapes {a:?} and {b:?} do not broadcast: {x} against {y}");
        out.push(if x == 1 { y } else { x });
    }
    checked_numel(op, &out)?;
    Ok(out)
}

/// Strides with which elements of `shape` are read as `out`: 0 along the axes that are repeated.
pub fn broadcast_strides(shape: &[usize], out: &[usize]) -> Vec<usize> {
    let own = strides(shape);
    let lead = out.len() - shape.len();
    (0..out.len()).map(|i| if i < lead || shape[i - lead] == 1 { 0 } else { own[i - lead] }).collect()
}

/// For every index of `shape` in row-major order, from element `first` on and round again after the last, the sum of index
/// times `stride`. Where an axis is empty there is no index, and nothing may be taken.
pub fn walk<'a>(shape: &'a [usize], stride: &'a [usize], first: usize) -> impl Iterator<Item = usize> + 'a {
    let mut index = vec![0; shape.len()];
    let mut rest = first;
    for axis in (0..shape.len()).rev() {
        index[axis] = rest.checked_rem(shape[axis]).unwrap_or(0);
        rest = rest.checked_div(shape[axis]).unwrap_or(0);
    }
    let mut offset: usize = index.iter().zip(stride).map(|(i, s)| i * s).sum();
    std::iter::repeat_with(move || {
        let here = offset;
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += stride[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= shape[axis] * stride[axis];
            index[axis] = 0;
        }
        here
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_whose_size_wraps_is_refused() {
        let half = 1 << (usize::BITS / 2);
        for shape in [&[half, half][..], &[half, half, 0], &[usize::MAX], &[half, half, half]] {
            let told = checked_numel("op", shape).unwrap_err().to_string();
            assert_eq!(told, format!("op: shape {shape:?} has more elements than memory can address"));
        }
        for (shape, n) in [(&[][..], 1), (&[0], 0), (&[2, 0, 3], 0), (&[half, 5], 5 * half)] {
            assert_eq!(checked_numel("op", shape).unwrap(), n);
        }
        assert!(
            broadcast("add", &[half, 1], &[1, half]).unwrap_err().to_string().contains("more elements than memory")
        );
        assert_eq!(count32("op", u32::MAX as usize, "ids").unwrap(), u32::MAX);
        let told = count32("op", 1 << 32, "ids").unwrap_err().to_string();
        assert_eq!(told, "op: 4294967296 ids: they are counted in 32 bits");
    }

    #[test]
    fn a_walk_over_an_empty_axis_starts() {
        assert_eq!(walk(&[2, 0, 3], &[0, 3, 1], 0).take(0).count(), 0);
    }

    #[test]
    fn a_walk_may_start_anywhere() {
        // a [2, 3] matrix read as its transpose
        let all: Vec<usize> = walk(&[3, 2], &[1, 3], 0).take(6).collect();
        assert_eq!(all, [0, 3, 1, 4, 2, 5]);
        for first in 0..6 {
            assert!(walk(&[3, 2], &[1, 3], first).take(6 - first).eq(all[first..].iter().copied()));
        }
        assert_eq!(broadcast_strides(&[3, 1], &[2, 3, 4]), [0, 1, 0]);
        assert!(walk(&[], &[], 0).take(1).eq([0]));
    }
}
