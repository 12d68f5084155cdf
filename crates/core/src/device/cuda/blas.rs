//! Matrix products by cuBLASLt, with one algorithm a shape.
//!
//! The rule: of the library's own ranking, among those that need at most [`WORKSPACE`] bytes and, where they cut the inner axis, add
//! the parts in the type of the sum, the fastest that has the bits of the first ([`super::contest`]). It is asked once a shape, so a
//! product has the same bits in every step and in every run on the same card with the same library; [`CudaDevice::algorithms`] lists
//! what was taken.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::Mutex;

use super::api::{Address, Blas, Heuristic, Pointer};
use super::contest::{Contest, RANKED};
use super::library::Library as File;
use super::operand::{Operand, Shape};
use super::{CudaDevice, Kind, lock};
use crate::device::{Accumulate, Gemm};
use crate::error::{Error, Result, ensure};

/// Bytes that an algorithm may use beside the matrices: what NVIDIA's manual advises for Hopper.
const WORKSPACE: usize = 32 << 20;

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

    fn plan(&self, device: &CudaDevice, shape: &Shape, kinds: [Kind; 2]) -> Result<Plan> {
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
        let ranked = self.ranking(&plan, shape)?;
        let extents = shape.extents();
        let work = 2.0 * (m * n) as f64 * k as f64 * shape.batch as f64;
        let contest = Contest { device, work, kinds, extents, entrants: ranked.len() };
        let winner = contest.winner(|i, [a, b, addend, c]| {
            // SAFETY: the contest's memory has the extents of the operands.
            unsafe { self.multiply(&plan, &ranked[i], kinds[1], shape.added, [a, b, addend, c], device.0.stream) }
        })?;
        plan.chosen = ranked[winner];
        Ok(plan)
    }

    /// Asks for a product by an algorithm, with the factors 1 and, of the addend, 0 or 1.
    ///
    /// # Safety
    /// A, B, the addend and the result must reach as far as the plan's shape does.
    unsafe fn multiply(
        &self,
        plan: &Plan,
        by: &Heuristic,
        to: Kind,
        added: bool,
        [at_a, at_b, addend, at_c]: [Address; 4],
        stream: Pointer,
    ) -> Result<()> {
        let beta = f64::from(u8::from(added));
        let (single, double) = ([1.0, beta as f32], [1.0, beta]);
        let factors: [*const c_void; 2] = match to {
            Kind::F64 => [(&raw const double[0]).cast(), (&raw const double[1]).cast()],
            Kind::F32 | Kind::Bf16 | Kind::U32 | Kind::U64 => {
                [(&raw const single[0]).cast(), (&raw const single[1]).cast()]
            }
        };
        let [first, second, third] = plan.layouts;
        // SAFETY: descriptors and workspace are live; the rest is the caller's contract.
        #[rustfmt::skip]
        let status = unsafe {
            (self.blas.product)(
                self.handle, plan.describe,
                factors[0], at_b, first, at_a, second,
                factors[1], addend, third, at_c, third,
                &by.algorithm, self.workspace, WORKSPACE, stream,
            )
        };
        check("cublasLtMatmul", status)
    }

    /// The library's ranking, at least one.
    fn ranking(&self, plan: &Plan, shape: &Shape) -> Result<Vec<Heuristic>> {
        let (b, [first, second, third]) = (&self.blas, plan.layouts);
        let (mut preference, mut found, mut count) = (std::ptr::null_mut(), [NO_ALGORITHM; RANKED], 0);
        // SAFETY: handles are live, the library writes at most `RANKED` results.
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
                RANKED as c_int,
                found.as_mut_ptr(),
                &mut count,
            );
            (b.preference_end)(preference);
            check("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        let ranked: Vec<Heuristic> = found.into_iter().take(count as usize).filter(|found| found.state == 0).collect();
        ensure!(!ranked.is_empty(), "product", "cuBLASLt has no algorithm for {shape:?}");
        Ok(ranked)
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
            Entry::Vacant(place) => place.insert(library.plan(self, &shape, [a.buffer.kind(), c.buffer.kind()])?),
        };
        let addresses = [a.address(), b.address(), addend.unwrap_or(c).address(), c.address()];
        // SAFETY: the matrices fit their buffers, as `Shape::of` checked.
        unsafe { library.multiply(plan, &plan.chosen, c.buffer.kind(), shape.added, addresses, self.0.stream) }
            .map_err(|e| Error::device("product", format!("{e} for {shape:?}")))
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
