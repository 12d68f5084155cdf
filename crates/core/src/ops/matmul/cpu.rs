//! Threads around a library GEMM. `matrixmultiply` reaches 90 % of the f32 peak on one thread and 74 % with its own
//! threads; here C is cut into blocks by shape alone and every block is one single-threaded call, which scales and gives
//! the same bits for any number of threads.

use crate::device::CpuDevice;
use crate::device::tile::Mat;
use crate::storage::Real;

/// Tasks to cut a large product into: enough for 16 threads, few enough that packing B again in each costs under 5 %.
const TASKS: usize = 16;
/// No block is made narrower than this.
const MIN_BLOCK: usize = 64;

struct Out<T>(*mut T);
// SAFETY: each task writes its own block of C, and no block overlaps another.
unsafe impl<T: Send> Send for Out<T> {}
// SAFETY: as above; the pointer itself is only read.
unsafe impl<T: Send> Sync for Out<T> {}

impl<T> Out<T> {
    fn at(&self, offset: usize) -> *mut T {
        // SAFETY: callers pass offsets inside the slice that the pointer was taken from.
        unsafe { self.0.add(offset) }
    }
}

/// Halves the longer side of the block until there are enough tasks.
fn cut(m: usize, n: usize) -> (usize, usize) {
    let (mut rows, mut cols) = (m, n);
    while m.div_ceil(rows) * n.div_ceil(cols) < TASKS {
        if rows >= cols && rows >= 2 * MIN_BLOCK {
            rows = rows.div_ceil(2);
        } else if cols >= 2 * MIN_BLOCK {
            cols = cols.div_ceil(2);
        } else if rows >= 2 * MIN_BLOCK {
            rows = rows.div_ceil(2);
        } else {
            break;
        }
    }
    (rows, cols)
}

/// `c = a b` or `c += a b`: a [m, k], b [k, n] with any strides, c [m, n] row-major.
pub(crate) fn gemm<T: Real>(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
    c: &mut [T],
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !add {
            c.fill(T::ZERO);
        }
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a holds [{m}, {k}]");
    assert!(b.data.len() > (k - 1) * b.row + (n - 1) * b.col, "b holds [{k}, {n}]");
    assert!(c.len() >= m * n, "c holds [{m}, {n}]");
    let beta = if add { T::ONE } else { T::ZERO };
    let (rows, cols) = if m * n * k < 1 << 15 { (m, n) } else { cut(m, n) };
    let across = n.div_ceil(cols);
    let tasks = m.div_ceil(rows) * across;
    let out = Out(c.as_mut_ptr());
    let block = |task: usize| {
        let (i, j) = (task / across * rows, task % across * cols);
        let stride = |x: usize| x as isize;
        let (pa, pb) = (a.data[i * a.row..].as_ptr(), b.data[j * b.col..].as_ptr());
        // SAFETY: the asserts above bound every element read, blocks of C are disjoint and inside the slice, and C is
        // borrowed mutably, so it aliases neither operand.
        unsafe {
            T::gemm(
                rows.min(m - i),
                k,
                cols.min(n - j),
                (pa, stride(a.row), stride(a.col)),
                (pb, stride(b.row), stride(b.col)),
                beta,
                (out.at(i * n + j), stride(n), 1),
            );
        }
    };
    if tasks == 1 {
        block(0);
    } else {
        device.map(tasks, block);
    }
}
