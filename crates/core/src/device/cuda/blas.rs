//! Matrix products by cuBLASLt, with one algorithm a shape.
//!
//! The rule: the first that the library's own ranking returns among those that need at most [`WORKSPACE`] bytes and, where they
//! cut the inner axis, add the parts in the type of the sum. It is asked once a shape, so a product has the same bits in every step
//! and in every run on the same card with the same library; [`CudaDevice::algorithms`] lists what was taken.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::Mutex;

use super::api::{Address, Blas, Heuristic, Pointer};
use super::library::Library as File;
use super::{CudaBuffer, CudaDevice, Kind, lock};
use crate::device::cpu::matrix::reach;
use crate::device::{Accumulate, Gemm};
use crate::error::{Error, Result, ensure};

/// Bytes that an algorithm may use beside the matrices: what NVIDIA's manual advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// One operand: a row-major matrix somewhere in a buffer.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// Where it lies.
    pub buffer: &'a CudaBuffer,
    /// Its first element.
    pub first: usize,
    /// Elements from row to row.
    pub row_stride: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
    /// Elements from one matrix of a batch to the next.
    pub batch_stride: usize,
}

impl<'a> Operand<'a> {
    /// A whole buffer of rows `width` elements wide.
    pub fn rows(buffer: &'a CudaBuffer, width: usize) -> Self {
        Operand { buffer, first: 0, row_stride: width, transposed: false, batch_stride: 0 }
    }

    /// A batch of matrices `[rows, columns]`, one behind the other.
    pub fn matrices(buffer: &'a CudaBuffer, rows: usize, columns: usize) -> Self {
        Operand { batch_stride: rows * columns, ..Operand::rows(buffer, columns) }
    }

    /// The transpose of it.
    pub fn t(self) -> Self {
        Operand { transposed: !self.transposed, ..self }
    }

    /// The same from another element on.
    pub fn from(self, first: usize) -> Self {
        Operand { first, ..self }
    }

    /// Where its first element lies on the device.
    fn address(&self) -> Address {
        self.buffer.address() + (self.first * self.buffer.kind().size()) as Address
    }

    /// The last element that a product reads, one past; `None` if the number overflows.
    fn end(&self, rows: usize, columns: usize, batch: usize) -> Option<usize> {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        reach([(batch, self.batch_stride), (rows, self.row_stride), (columns, 1)])?.checked_add(self.first)
    }
}

/// What tells products apart for the choice of an algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Shape {
    size: (usize, usize, usize),
    batch: usize,
    transposed: (bool, bool),
    row_strides: [usize; 3],
    batch_strides: [usize; 3],
    kinds: [u8; 2],
    /// Bytes that divide the addresses of a, b and c, 256 at most.
    aligned: [u32; 3],
    added: bool,
}

impl Shape {
    /// The shape of a product that is checked: kinds go together and every matrix fits its buffer.
    fn of(size: (usize, usize, usize), batch: usize, [a, b, c]: [Operand; 3], addend: Option<Operand>) -> Result<Self> {
        let (m, n, k) = size;
        let (kind, to, added) = (a.buffer.kind(), c.buffer.kind(), addend.unwrap_or(c));
        let alike = b.buffer.kind() == kind && (to == kind || (kind, to) == (Kind::Bf16, Kind::F32));
        ensure!(alike, "product", "{kind:?} times {:?} into {to:?}", b.buffer.kind());
        let like = (added.buffer.kind(), added.row_stride, added.batch_stride, added.transposed);
        ensure!(like == (to, c.row_stride, c.batch_stride, false), "product", "{added:?} does not lie as {c:?}");
        for (name, o, rows, columns) in
            [("a", &a, m, k), ("b", &b, k, n), ("c", &c, m, n), ("the residual", &added, m, n)]
        {
            let (end, buffer) = (o.end(rows, columns, batch), o.buffer);
            let fits = end.is_some_and(|end| end <= buffer.len());
            ensure!(fits, "product", "{name} [{rows}, {columns}] ends at {end:?} of {buffer:?}");
        }
        let aligned = |address: Address| 1u32 << address.trailing_zeros().min(8);
        Ok(Shape {
            size,
            batch,
            transposed: (a.transposed, b.transposed),
            row_strides: [a.row_stride, b.row_stride, c.row_stride],
            batch_strides: [a.batch_stride, b.batch_stride, c.batch_stride],
            kinds: [kind as u8, to as u8],
            aligned: [aligned(a.address()), aligned(b.address()), aligned(c.address() | added.address())],
            added: addend.is_some(),
        })
    }
}

/// The algorithm of a shape, for logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Algorithm {
    /// m, n, k and the batch.
    pub size: (usize, usize, usize, usize),
    /// The library's numbers: algorithm, tile, split of the inner axis, reduction, stages.
    pub numbers: [i32; 5],
    /// Bytes it uses beside the matrices.
    pub workspace: usize,
}

/// The opened library with what it has chosen.
pub(super) struct Library {
    blas: Blas,
    handle: Pointer,
    /// By address: a buffer would hold the device that holds this library.
    pub workspace: Address,
    plans: Mutex<HashMap<Shape, Plan>>,
}

struct Plan {
    describe: Pointer,
    layouts: [Pointer; 3],
    chosen: Heuristic,
}

// SAFETY: the handle and the descriptors may be used from any thread; plans change behind the mutex.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// `cudaDataType`.
fn data_type(kind: Kind) -> Result<c_int> {
    match kind {
        Kind::F32 => Ok(0),
        Kind::F64 => Ok(1),
        Kind::Bf16 => Ok(14),
        Kind::U32 | Kind::U64 => Err(Error::invalid("product", format!("{kind:?} cannot be multiplied"))),
    }
}

fn check(call: &str, status: c_int) -> Result<()> {
    let fail = || Error::device("product", format!("{call} failed with cuBLAS status {status}"));
    if status == 0 { Ok(()) } else { Err(fail()) }
}

/// Opens the library's file.
pub(super) fn file(folders: &[PathBuf]) -> Result<File> {
    let names = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "cublasLt64_13.dll"];
    File::open("cuBLASLt of CUDA 12 or 13 (pip install nvidia-cublas has it)", &names, folders)
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Self> {
        let blas = Blas::load(&file(&device.0.options.folders)?)?;
        let (mut handle, mut workspace) = (std::ptr::null_mut(), 0);
        // SAFETY: the library writes one handle, the driver one address; the device's context is current.
        unsafe {
            check("cublasLtCreate", (blas.create)(&mut handle))?;
            let status = (device.0.driver.memory_alloc)(&mut workspace, WORKSPACE);
            device.0.check("product", "cuMemAlloc of the workspace", status)?;
        }
        Ok(Library { blas, handle, workspace, plans: Mutex::default() })
    }

    fn plan(&self, shape: &Shape, kinds: [Kind; 2]) -> Result<Plan> {
        let (m, n, k) = shape.size;
        let b = &self.blas;
        // row-major matrices are column-major transposes: c^T = b^T a^T, so b comes first
        let stored =
            |rows: usize, columns: usize, transposed: bool| if transposed { (columns, rows) } else { (rows, columns) };
        let (a, bb) = (stored(m, k, shape.transposed.0), stored(k, n, shape.transposed.1));
        let mut plan =
            Plan { describe: std::ptr::null_mut(), layouts: [std::ptr::null_mut(); 3], chosen: NO_ALGORITHM };
        let (compute, scale) = if kinds[1] == Kind::F64 { (70, 1) } else { (68, 0) };
        // SAFETY: attributes are written from values of the size that is passed with them, and the handles were just created.
        unsafe {
            check("cublasLtMatmulDescCreate", (b.describe)(&mut plan.describe, compute, scale))?;
            const TRANS_A: c_int = 3;
            const TRANS_B: c_int = 4;
            for (attribute, transposed) in [(TRANS_A, shape.transposed.1), (TRANS_B, shape.transposed.0)] {
                set(b.describe_set, plan.describe, attribute, &c_int::from(transposed))?;
            }
            let sides = [(bb, kinds[0]), (a, kinds[0]), ((m, n), kinds[1])];
            for (i, ((rows, columns), kind)) in sides.into_iter().enumerate() {
                let to = [1, 0, 2][i];
                let layout = &mut plan.layouts[i];
                let stride = shape.row_strides[to] as i64;
                check(
                    "cublasLtMatrixLayoutCreate",
                    (b.layout)(layout, data_type(kind)?, columns as u64, rows as u64, stride),
                )?;
                const BATCH: c_int = 5;
                const BATCH_STRIDE: c_int = 6;
                set(b.layout_set, *layout, BATCH, &(shape.batch as c_int))?;
                set(b.layout_set, *layout, BATCH_STRIDE, &(shape.batch_strides[to] as i64))?;
            }
        }
        plan.chosen = self.choose(&plan, shape)?;
        Ok(plan)
    }

    fn choose(&self, plan: &Plan, shape: &Shape) -> Result<Heuristic> {
        let (b, [first, second, third]) = (&self.blas, plan.layouts);
        let (mut preference, mut found, mut count) = (std::ptr::null_mut(), NO_ALGORITHM, 0);
        // SAFETY: handles are live, the library writes at most one result.
        unsafe {
            check("cublasLtMatmulPreferenceCreate", (b.preference)(&mut preference))?;
            const MAX_WORKSPACE: c_int = 1;
            const REDUCTIONS: c_int = 3;
            const IN_TYPE_OF_SUM: u32 = 2;
            set(b.preference_set, preference, MAX_WORKSPACE, &(WORKSPACE as u64))?;
            set(b.preference_set, preference, REDUCTIONS, &IN_TYPE_OF_SUM)?;
            const ALIGNMENT: c_int = 5;
            for (i, of) in [1, 0, 2, 2].into_iter().enumerate() {
                set(b.preference_set, preference, ALIGNMENT + i as c_int, &shape.aligned[of])?;
            }
            let status = (b.heuristic)(
                self.handle,
                plan.describe,
                first,
                second,
                third,
                third,
                preference,
                1,
                &mut found,
                &mut count,
            );
            (b.preference_end)(preference);
            check("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        ensure!(count > 0 && found.state == 0, "product", "cuBLASLt has no algorithm for {shape:?}");
        Ok(found)
    }
}

const NO_ALGORITHM: Heuristic = Heuristic { algorithm: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };

/// # Safety
/// The handle must be live and the attribute of type `T`.
unsafe fn set<T>(
    f: unsafe extern "C" fn(Pointer, c_int, *const c_void, usize) -> c_int,
    handle: Pointer,
    attribute: c_int,
    value: &T,
) -> Result<()> {
    // SAFETY: the caller's contract.
    let status = unsafe { f(handle, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
    check(&format!("attribute {attribute}"), status)
}

impl Drop for Library {
    fn drop(&mut self) {
        for plan in lock(&self.plans).values() {
            // SAFETY: the handles are live and used by nobody else any more.
            unsafe {
                (self.blas.describe_end)(plan.describe);
                plan.layouts.iter().for_each(|&l| {
                    (self.blas.layout_end)(l);
                });
            }
        }
        // SAFETY: as above.
        unsafe { (self.blas.destroy)(self.handle) };
    }
}

impl CudaDevice {
    pub(super) fn blas(&self) -> Result<&Library> {
        if let Some(blas) = self.0.blas.get() {
            return Ok(blas);
        }
        let opened = Library::open(self)?;
        Ok(self.0.blas.get_or_init(|| opened))
    }

    /// Multiplies row-major matrices. A and B are both bf16 (C then f32 or bf16, sums f32), both f32 or both f64 (C alike). A residual
    /// has the kind and the strides of C.
    ///
    /// # Errors
    /// When kinds do not go together, a matrix does not fit its buffer, or the library has no algorithm.
    pub fn gemm(&self, gemm: Gemm<Accumulate<Operand>>, a: Operand, b: Operand, c: Operand) -> Result<()> {
        self.gemm_batched(1, gemm, a, b, c)
    }

    /// [`CudaDevice::gemm`] of `batch` products, whose operands follow each other by their `batch_stride`.
    ///
    /// # Errors
    /// As [`CudaDevice::gemm`].
    pub fn gemm_batched(
        &self,
        batch: usize,
        gemm: Gemm<Accumulate<Operand>>,
        a: Operand,
        b: Operand,
        c: Operand,
    ) -> Result<()> {
        let Gemm { m, n, k, accumulate } = gemm;
        let addend = match accumulate {
            Accumulate::Overwrite => None,
            Accumulate::Existing => Some(c),
            Accumulate::Residual(residual) => Some(residual),
        };
        let shape = Shape::of((m, n, k), batch, [a, b, c], addend)?;
        if m == 0 || n == 0 || batch == 0 {
            return Ok(());
        }
        ensure!(k > 0, "product", "the inner axis is empty");
        self.0.enter("product")?;
        let library = self.blas()?;
        let mut plans = lock(&library.plans);
        let plan = match plans.entry(shape) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(library.plan(&shape, [a.buffer.kind(), c.buffer.kind()])?),
        };
        let beta = f64::from(u8::from(shape.added));
        let (single, double) = ([1.0, beta as f32], [1.0, beta]);
        let factors: [*const c_void; 2] = match c.buffer.kind() {
            Kind::F64 => [(&raw const double[0]).cast(), (&raw const double[1]).cast()],
            Kind::F32 | Kind::Bf16 | Kind::U32 | Kind::U64 => {
                [(&raw const single[0]).cast(), (&raw const single[1]).cast()]
            }
        };
        let ([first, second, third], algorithm) = (plan.layouts, &plan.chosen.algorithm);
        let (workspace, stream) = (library.workspace, self.0.stream);
        let (at_a, at_b, at_c, added) = (a.address(), b.address(), c.address(), addend.unwrap_or(c).address());
        // SAFETY: the matrices fit their buffers, as `Shape::of` checked; descriptors and workspace are live.
        #[rustfmt::skip]
        let status = unsafe {
            (library.blas.product)(
                library.handle, plan.describe,
                factors[0], at_b, first, at_a, second,
                factors[1], added, third, at_c, third,
                algorithm, workspace, WORKSPACE, stream,
            )
        };
        check(&format!("cublasLtMatmul of {shape:?}"), status)
    }

    /// What was chosen for every shape multiplied so far, in order of shape.
    pub fn algorithms(&self) -> Vec<Algorithm> {
        let Some(library) = self.0.blas.get() else { return Vec::new() };
        let plans = lock(&library.plans);
        let mut shapes: Vec<_> = plans.iter().collect();
        shapes.sort_by_key(|(shape, _)| **shape);
        let number = |chosen: &Heuristic, attribute: c_int| {
            let (mut value, mut written) = (0i32, 0);
            // SAFETY: the library writes four bytes at most.
            unsafe {
                (library.blas.algorithm_get)(&chosen.algorithm, attribute, (&raw mut value).cast(), 4, &mut written);
            }
            value
        };
        let numbers = |chosen: &Heuristic| [0, 1, 2, 3, 6].map(|attribute| number(chosen, attribute));
        shapes
            .into_iter()
            .map(|(shape, plan)| {
                let (m, n, k) = shape.size;
                Algorithm {
                    size: (m, n, k, shape.batch),
                    numbers: numbers(&plan.chosen),
                    workspace: plan.chosen.workspace,
                }
            })
            .collect()
    }
}
