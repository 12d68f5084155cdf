//! One NVIDIA GPU through the driver, NVRTC and cuBLASLt, all opened at run time ([`library`]). Kernels are CUDA C++ sources that
//! lie beside their ops; they are compiled to machine code for the card at hand and kept in a folder that the caller names.
//!
//! One stream: everything happens in the order in which it was asked for, so a buffer may be handed out again as soon as it is
//! dropped. Nothing here adds floats atomically: the same seed gives the same bits on the same card and libraries.

mod api;
mod arena;
mod blas;
mod buffer;
mod compile;
pub(crate) mod contest;
mod data;
mod launch;
mod library;
pub mod nccl;
mod operand;
mod versions;

use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use api::{Address, Driver, Pointer};
use library::Library;

pub use arena::Usage;
pub use blas::Algorithm;
pub use buffer::{CudaBuffer, CudaElement, Kind};
pub use compile::{Compiler, Resources, Source, Unit};
pub use data::CudaData;
pub use launch::{Arg, Grid, Kernel, Table, TensorMap};
pub use operand::Operand;

use crate::error::{Error, Result};

/// What a CUDA device is opened with. This crate reads no environment variable: whoever opens the device names the folders.
#[derive(Debug, Clone, Default)]
pub struct CudaOptions {
    /// Number of the card, as the driver counts.
    pub ordinal: usize,
    /// Folders in which the libraries are looked for, before the system's loader is asked.
    pub folders: Vec<PathBuf>,
    /// Folder that keeps compiled kernels; without it every process compiles what it uses.
    pub kernels: Option<PathBuf>,
    /// Fills new buffers with NaN, so that a test sees an element that no kernel wrote.
    pub poison: bool,
}

/// Facts about a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub shared_per_block: u32,
    /// Bytes of memory.
    pub memory: usize,
    /// The newest CUDA version that the driver knows, 13000 for 13.0.
    pub driver: u32,
}

/// Handle to one card. Clones share its context, stream and memory.
#[derive(Clone)]
pub struct CudaDevice(Arc<Inner>);

struct Inner {
    driver: Driver,
    ordinal: c_int,
    context: Pointer,
    stream: Pointer,
    properties: Properties,
    options: CudaOptions,
    arena: Mutex<arena::Arena>,
    compiler: OnceLock<Compiler>,
    modules: Mutex<HashMap<String, launch::Module>>,
    blas: OnceLock<blas::Library>,
}

// SAFETY: the context, the stream and the modules may be used from any thread that has made the context current, which every
// entry does (`Inner::enter`); what changes is behind a mutex.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.0.ordinal, self.0.properties.name)
    }
}

/// The guarded value; a thread that panicked while it held the lock left no half-written state behind that matters here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An error when a driver call failed.
fn check(driver: &Driver, op: &'static str, call: &str, status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let text = |f: unsafe extern "C" fn(c_int, *mut *const std::ffi::c_char) -> i32| {
        let mut text = std::ptr::null();
        // SAFETY: the driver writes the address of a constant string, or nothing.
        unsafe {
            f(status, &mut text);
            if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy() }
        }
    };
    let (name, what) = (text(driver.error_name), text(driver.error_text));
    Err(Error::device(op, format!("{call} failed with {name} ({status}): {what}")))
}

impl CudaDevice {
    /// Opens a card.
    ///
    /// # Errors
    /// When the driver is not there (with the places that were searched), when there is no such card, or when it is older than
    /// compute capability 8.0, the first with the instructions that the kernels use.
    pub fn new(options: CudaOptions) -> Result<Self> {
        let library =
            Library::open("NVIDIA's driver", &["libcuda.so.1", "libcuda.so", "nvcuda.dll"], &options.folders)?;
        let driver = Driver::load(&library)?;
        let check = |call, status| check(&driver, "cuda", call, status);
        let (mut count, mut ordinal, mut context, mut stream) = (0, 0, std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: every out-parameter lives on this stack frame, and the calls come in the order the driver asks for.
        unsafe {
            check("cuInit", (driver.init)(0))?;
            check("cuDeviceGetCount", (driver.device_count)(&mut count))?;
            if options.ordinal >= count as usize {
                let what = format!("there is no card {}: the driver sees {count}, counted from 0", options.ordinal);
                return Err(Error::device("cuda", what));
            }
            check("cuDeviceGet", (driver.device_get)(&mut ordinal, options.ordinal as c_int))?;
            check("cuDevicePrimaryCtxRetain", (driver.context_retain)(&mut context, ordinal))?;
            check("cuCtxSetCurrent", (driver.context_set)(context))?;
            check("cuStreamCreate", (driver.stream_create)(&mut stream, api::STREAM_NON_BLOCKING))?;
        }
        let properties = properties(&driver, ordinal)?;
        if properties.capability < (8, 0) {
            let (major, minor) = properties.capability;
            let what = format!("{} has compute capability {major}.{minor}; the kernels need 8.0", properties.name);
            return Err(Error::device("cuda", what));
        }
        Ok(CudaDevice(Arc::new(Inner {
            driver,
            ordinal,
            context,
            stream,
            properties,
            options,
            arena: Mutex::default(),
            compiler: OnceLock::new(),
            modules: Mutex::default(),
            blas: OnceLock::new(),
        })))
    }

    /// Whether both handles are of one device.
    pub fn is(&self, other: &CudaDevice) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Facts about the card.
    pub fn properties(&self) -> &Properties {
        &self.0.properties
    }

    /// Waits until everything asked for so far is done.
    ///
    /// # Errors
    /// When a kernel failed since the last wait.
    pub fn wait(&self, op: &'static str) -> Result<()> {
        self.0.enter(op)?;
        // SAFETY: the stream lives as long as the device.
        self.0.check(op, "cuStreamSynchronize", unsafe { (self.0.driver.stream_synchronize)(self.0.stream) })
    }

    /// Bytes of memory in use, their peak, and what the driver was asked for.
    pub fn usage(&self) -> Usage {
        lock(&self.0.arena).usage()
    }

    /// Starts the peak figure again.
    pub fn reset_peak(&self) {
        lock(&self.0.arena).reset_peak();
    }

    /// Milliseconds that the card takes for what `f` asks of it.
    ///
    /// # Errors
    /// Those of `f`, and when a kernel fails.
    pub fn time(&self, f: impl FnOnce() -> Result<()>) -> Result<f32> {
        let inner = &*self.0;
        inner.enter("time")?;
        let check = |call, status| inner.check("time", call, status);
        let (mut events, mut ms) = ([std::ptr::null_mut(); 2], 0.0f32);
        // SAFETY: events are created before use and destroyed after it; the out-parameters live on this stack frame.
        unsafe {
            for event in &mut events {
                check("cuEventCreate", (inner.driver.event_create)(event, 0))?;
            }
            check("cuEventRecord", (inner.driver.event_record)(events[0], inner.stream))?;
            let result = f();
            check("cuEventRecord", (inner.driver.event_record)(events[1], inner.stream))?;
            check("cuEventSynchronize", (inner.driver.event_synchronize)(events[1]))?;
            check("cuEventElapsedTime", (inner.driver.event_elapsed)(&mut ms, events[0], events[1]))?;
            for event in events {
                check("cuEventDestroy", (inner.driver.event_destroy)(event))?;
            }
            result.map(|()| ms)
        }
    }

    /// Opens the compiler and the library of products, which are opened at their first use otherwise.
    ///
    /// # Errors
    /// When one is missing: what was searched where.
    pub fn prepare(&self) -> Result<()> {
        self.0.enter("cuda")?;
        self.compiler()?;
        self.blas().map(|_| ())
    }

    /// Bytes that the card has free now, other processes' share taken off.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn free_memory(&self) -> Result<usize> {
        let inner = &*self.0;
        inner.enter("cuda")?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two sizes.
        let status = unsafe { (inner.driver.memory_info)(&mut free, &mut total) };
        inner.check("cuda", "cuMemGetInfo", status)?;
        Ok(free)
    }

    /// The run-time compiler, opened at its first use.
    fn compiler(&self) -> Result<&Compiler> {
        if let Some(compiler) = self.0.compiler.get() {
            return Ok(compiler);
        }
        let compiler = Compiler::open(&self.0.options.folders)?;
        Ok(self.0.compiler.get_or_init(|| compiler))
    }
}

fn properties(driver: &Driver, ordinal: c_int) -> Result<Properties> {
    let attribute = |id| {
        let mut value = 0;
        // SAFETY: the driver writes one integer.
        let status = unsafe { (driver.device_attribute)(&mut value, id, ordinal) };
        check(driver, "cuda", "cuDeviceGetAttribute", status).map(|()| value as u32)
    };
    let (mut name, mut version, mut free, mut total) = ([0; 256], 0, 0, 0);
    // SAFETY: the name is cut to the length of the array and ends with a zero; the others are one integer each.
    let name = unsafe {
        check(driver, "cuda", "cuDeviceGetName", (driver.device_name)(name.as_mut_ptr(), 255, ordinal))?;
        check(driver, "cuda", "cuDriverGetVersion", (driver.version)(&mut version))?;
        check(driver, "cuda", "cuMemGetInfo", (driver.memory_info)(&mut free, &mut total))?;
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    Ok(Properties {
        name,
        capability: (attribute(api::CAPABILITY_MAJOR)?, attribute(api::CAPABILITY_MINOR)?),
        multiprocessors: attribute(api::MULTIPROCESSORS)?,
        shared_per_block: attribute(api::SHARED_PER_BLOCK)?,
        memory: total,
        driver: version as u32,
    })
}

impl Inner {
    fn check(&self, op: &'static str, call: &str, status: c_int) -> Result<()> {
        check(&self.driver, op, call, status)
    }

    /// Makes the context current on this thread, as every call that follows needs.
    fn enter(&self, op: &'static str) -> Result<()> {
        // SAFETY: the context lives as long as this value.
        self.check(op, "cuCtxSetCurrent", unsafe { (self.driver.context_set)(self.context) })
    }
}

impl arena::Source for Inner {
    fn reserve(&self, bytes: usize) -> Option<Address> {
        let mut at = 0;
        // SAFETY: the driver writes one address; the context is current (`CudaDevice::alloc` enters).
        let status = unsafe { (self.driver.memory_alloc)(&mut at, bytes) };
        (status == 0).then_some(at)
    }

    fn release(&self, at: Address) {
        // SAFETY: the address came from `reserve`. The stream is waited for, so nothing uses the memory any more.
        unsafe {
            (self.driver.stream_synchronize)(self.stream);
            (self.driver.memory_free)(at);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: buffers and kernels hold the device, so none is left; errors have nowhere to go any more.
        unsafe {
            (self.driver.context_set)(self.context);
            (self.driver.stream_synchronize)(self.stream);
            let mut arena = std::mem::take(&mut *lock(&self.arena));
            if let Some(blas) = self.blas.take() {
                (self.driver.memory_free)(blas.workspace);
            }
            arena.release_unused(self);
            for module in lock(&self.modules).values() {
                (self.driver.module_unload)(module.handle);
            }
            (self.driver.stream_destroy)(self.stream);
            (self.driver.context_release)(self.ordinal);
        }
    }
}
