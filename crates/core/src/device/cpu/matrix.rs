//! Strided matrices, the operands of products, and how many elements they reach over.

/// Elements from the first to the last, both included, of an array with these (extent, stride) axes: 0 if it is empty, `None`
/// if the number overflows. What a raw kernel may touch is checked with it.
#[inline(always)]
pub fn reach<const N: usize>(axes: [(usize, usize); N]) -> Option<usize> {
    if axes.iter().any(|&(extent, _)| extent == 0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (extent, stride) in axes {
        last = last.checked_add((extent - 1).checked_mul(stride)?)?;
    }
    last.checked_add(1)
}

/// Whether `len` elements hold an array with these (extent, stride) axes.
#[inline(always)]
pub fn holds<const N: usize>(len: usize, axes: [(usize, usize); N]) -> bool {
    reach(axes).is_some_and(|reach| reach <= len)
}

/// A strided read-only matrix: element (i, p) is `data[i * row_stride + p * col_stride]`.
#[derive(Clone, Copy)]
pub struct MatRef<'a, T> {
    /// Elements.
    pub data: &'a [T],
    /// Distance of rows.
    pub row_stride: usize,
    /// Distance of columns.
    pub col_stride: usize,
}

impl<'a, T> MatRef<'a, T> {
    /// Row-major, with `row_stride` elements from one row to the next.
    #[inline(always)]
    pub fn rows(data: &'a [T], row_stride: usize) -> Self {
        MatRef { data, row_stride, col_stride: 1 }
    }

    /// The transpose.
    #[inline(always)]
    pub fn t(self) -> Self {
        MatRef { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// What begins at element (i, p).
    ///
    /// # Panics
    /// When that is past the end of the data.
    #[inline(always)]
    pub fn from(self, i: usize, p: usize) -> Self {
        let offset = |n: usize, stride: usize| n.checked_mul(stride);
        let first = offset(i, self.row_stride).zip(offset(p, self.col_stride)).and_then(|(i, p)| i.checked_add(p));
        let Some(data) = first.and_then(|first| self.data.get(first..)) else {
            outside(i, p, self.data.len());
        };
        MatRef { data, ..self }
    }

    /// Whether rows or columns are contiguous.
    pub fn has_unit_stride(self) -> bool {
        self.row_stride == 1 || self.col_stride == 1
    }

    /// # Panics
    /// When the data does not hold `rows` by `cols` elements.
    #[inline(always)]
    pub fn assert_holds(self, name: &str, rows: usize, cols: usize) {
        let axes = [(rows, self.row_stride), (cols, self.col_stride)];
        assert!(holds(self.data.len(), axes), "{name} holds [{rows}, {cols}]");
    }
}

#[cold]
#[inline(never)]
fn outside(i: usize, p: usize, len: usize) -> ! {
    panic!("a matrix of {len} numbers holds no element ({i}, {p})")
}

/// A matrix to write, whose rows are contiguous and `row_stride` apart.
pub struct MatMut<'a, T> {
    /// Elements.
    pub data: &'a mut [T],
    /// Distance of rows.
    pub row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// Rows that are `row_stride` apart.
    #[inline(always)]
    pub fn rows(data: &'a mut [T], row_stride: usize) -> Self {
        MatMut { data, row_stride }
    }

    /// # Panics
    /// When the data does not hold `rows` by `cols` elements.
    #[inline(always)]
    pub fn assert_holds(&self, name: &str, rows: usize, cols: usize) {
        assert!(holds(self.data.len(), [(rows, self.row_stride), (cols, 1)]), "{name} holds [{rows}, {cols}]");
    }
}

/// Packed columns of a right operand: panels as wide as a register kernel, each `[k, width]` and contiguous, `stride` apart.
#[derive(Clone, Copy)]
pub struct Panels<'a, T> {
    /// Elements, from the first panel on.
    pub data: &'a [T],
    /// Distance of panels.
    pub stride: usize,
}

/// A matrix to write, kept in panels of columns as wide as a register kernel: column j of row i is element
/// `i * row_stride + j / width * panel_stride + j % width`. With a panel stride of `width` it is row-major.
pub struct PanelsMut<'a, T> {
    /// Elements.
    pub data: &'a mut [T],
    /// Distance of rows.
    pub row_stride: usize,
    /// Distance of panels.
    pub panel_stride: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_reaches_from_the_first_element_to_the_last() {
        for (rows, row_stride, cols, col_stride) in [(1, 0, 1, 0), (3, 7, 5, 1), (4, 1, 6, 9), (2, 3, 1, 100)] {
            let last = (0..rows * cols).map(|e| e / cols * row_stride + e % cols * col_stride).max().unwrap();
            assert_eq!(reach([(rows, row_stride), (cols, col_stride)]), Some(last + 1));
        }
        assert_eq!(reach([(0, usize::MAX), (3, usize::MAX)]), Some(0));
        assert_eq!(reach([(3, usize::MAX), (0, usize::MAX)]), Some(0));
    }

    /// Wrapped, each of these would fit into eight elements.
    #[test]
    fn a_span_that_overflows_is_held_by_nothing() {
        assert_eq!(reach([(3, 1 << (usize::BITS - 1)), (1, 1)]), None);
        assert_eq!(reach([(2, usize::MAX), (2, 1)]), None);
        assert!(!holds(8, [(3, 1 << (usize::BITS - 1)), (1, 1)]));
        assert!(!holds(8, [(2, usize::MAX - 3), (2, 4), (2, 2)]));
    }

    /// A part begins inside the matrix, also where the place of its first element would wrap around.
    #[test]
    fn a_part_that_begins_outside_is_refused() {
        let x = [0.0f32; 12];
        let a = MatRef::rows(&x, 4);
        assert_eq!((a.from(2, 3).data.len(), a.from(3, 0).data.len(), a.t().from(3, 2).data.len()), (1, 0, 1));
        let half = 1 << (usize::BITS - 1);
        let wide = MatRef { data: &x, row_stride: half, col_stride: half };
        for (m, i, p) in [(a, 3, 1), (a, usize::MAX, 4), (a, half, 0), (wide, 2, 0), (wide, 1, 1)] {
            let told = std::panic::catch_unwind(|| m.from(i, p).data.len()).expect_err("it is outside");
            assert_eq!(
                *told.downcast::<String>().unwrap(),
                format!("a matrix of 12 numbers holds no element ({i}, {p})")
            );
        }
    }
}
