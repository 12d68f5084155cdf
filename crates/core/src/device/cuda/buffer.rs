//! Blocks of device memory that know what they hold and return to the arena when dropped.

use std::ffi::c_void;

use super::api::Address;
use super::arena::Block;
use super::{CudaDevice, lock};
use crate::error::{Error, Result, ensure};
use crate::number::{Compute, DType};

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 32-bit floats: masters, moments, gradients, the residual stream.
    F32,
    /// 64-bit floats: gradient checks.
    F64,
    /// The upper halves of 32-bit floats: operands of products.
    Bf16,
    /// 32-bit integers: token ids, counts.
    U32,
    /// 64-bit integers: bit matrices.
    U64,
}

impl Kind {
    /// That of an element type in full.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Kind::F32,
            DType::F64 => Kind::F64,
        }
    }

    /// What products multiply in that precision.
    pub(crate) fn of_operands(compute: Compute, dtype: DType) -> Self {
        match (compute, dtype) {
            (Compute::Bf16, DType::F32) => Kind::Bf16,
            (Compute::Full | Compute::Bf16, dtype) => Kind::of(dtype),
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Kind::Bf16 => 2,
            Kind::F32 | Kind::U32 => 4,
            Kind::F64 | Kind::U64 => 8,
        }
    }

    /// The type's name in the kernels' sources.
    pub fn source_name(self) -> &'static str {
        match self {
            Kind::F32 => "float",
            Kind::F64 => "double",
            Kind::Bf16 => "bf16",
            Kind::U32 => "u32",
            Kind::U64 => "u64",
        }
    }
}

mod sealed {
    /// Copies between host and device trust the size of the type, so no other crate has one.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

/// A type of the host with the bits of a [`Kind`].
pub trait CudaElement: sealed::Sealed + Copy + Default + 'static {
    /// What it is on the device.
    const KIND: Kind;
}

/// Copies move `len * KIND.size()` bytes: a build fails where that is not what the type has.
const fn check_layout<T: CudaElement>() {
    assert!(size_of::<T>() == T::KIND.size());
}

impl CudaElement for f32 {
    const KIND: Kind = Kind::F32;
}
impl CudaElement for f64 {
    const KIND: Kind = Kind::F64;
}
/// The bits of a bf16.
impl CudaElement for u16 {
    const KIND: Kind = Kind::Bf16;
}
impl CudaElement for u32 {
    const KIND: Kind = Kind::U32;
}
impl CudaElement for u64 {
    const KIND: Kind = Kind::U64;
}

/// Device memory of one kind. It returns to the arena when dropped; work that was asked for before may still use it, because
/// whoever gets it next comes later on the same stream.
pub struct CudaBuffer {
    device: CudaDevice,
    block: Block,
    kind: Kind,
    len: usize,
}

impl std::fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaBuffer({:?}; {})", self.kind, self.len)
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        lock(&self.device.0.arena).free(self.block);
    }
}

impl CudaBuffer {
    /// What it holds.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lives.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Address of its first element.
    pub(super) fn address(&self) -> Address {
        self.block.at
    }

    fn bytes(&self) -> usize {
        self.len * self.kind.size()
    }

    /// Waits for everything before it and copies the elements to the host.
    ///
    /// # Errors
    /// When the kind is another, or a kernel before it failed.
    pub fn download<T: CudaElement>(&self) -> Result<Vec<T>> {
        const { check_layout::<T>() };
        ensure!(T::KIND == self.kind, "download", "the buffer holds {:?}, asked for {:?}", self.kind, T::KIND);
        let mut host = vec![T::default(); self.len];
        let inner = &*self.device.0;
        inner.enter("download")?;
        if self.len > 0 {
            // SAFETY: both sides have `bytes` bytes, and the wait below ends before `host` is read.
            let status = unsafe {
                (inner.driver.copy_to_host)(host.as_mut_ptr().cast(), self.address(), self.bytes(), inner.stream)
            };
            inner.check("download", "cuMemcpyDtoHAsync", status)?;
        }
        self.device.wait("download")?;
        Ok(host)
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill_bytes(&mut self, byte: u8) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        let inner = &*self.device.0;
        inner.enter("fill")?;
        // SAFETY: the buffer has `bytes` bytes.
        let status = unsafe { (inner.driver.fill_bytes)(self.address(), byte, self.bytes(), inner.stream) };
        inner.check("fill", "cuMemsetD8Async", status)
    }

    /// Copies another buffer of the same kind and length over this one.
    ///
    /// # Errors
    /// When kinds or lengths differ.
    pub fn copy_from(&mut self, other: &CudaBuffer) -> Result<()> {
        let (to, from) = ((self.kind, self.len), (other.kind, other.len));
        ensure!(to == from, "copy", "{} {:?} to {} {:?}", from.1, from.0, to.1, to.0);
        if self.len == 0 {
            return Ok(());
        }
        let inner = &*self.device.0;
        inner.enter("copy")?;
        // SAFETY: both have `bytes` bytes on the same device.
        let status =
            unsafe { (inner.driver.copy_on_device)(self.address(), other.address(), self.bytes(), inner.stream) };
        inner.check("copy", "cuMemcpyDtoDAsync", status)
    }
}

impl CudaBuffer {
    /// Copies another buffer of the same kind over the elements from `at` on.
    ///
    /// # Errors
    /// When kinds differ, or there are not so many elements.
    pub fn copy_at(&mut self, at: usize, other: &CudaBuffer) -> Result<()> {
        let fits = at.checked_add(other.len).is_some_and(|end| end <= self.len);
        ensure!(self.kind == other.kind && fits, "copy", "{other:?} to {self:?} from {at} on");
        if other.len == 0 {
            return Ok(());
        }
        let inner = &*self.device.0;
        inner.enter("copy")?;
        let to = self.address() + (at * self.kind.size()) as Address;
        // SAFETY: both have the bytes of `other` on the same device.
        let status = unsafe { (inner.driver.copy_on_device)(to, other.address(), other.bytes(), inner.stream) };
        inner.check("copy", "cuMemcpyDtoDAsync", status)
    }

    /// The elements of some buffers of one kind, one after the other.
    ///
    /// # Errors
    /// When a buffer is of another kind, or memory runs out.
    pub fn concatenation(device: &CudaDevice, kind: Kind, parts: &[&CudaBuffer]) -> Result<CudaBuffer> {
        let op = "concatenation";
        let whole = device.alloc(op, kind, parts.iter().map(|part| part.len).sum())?;
        let (inner, mut at) = (&*device.0, whole.address());
        for part in parts.iter().filter(|part| part.len > 0) {
            ensure!(part.kind == kind && part.device.is(device), op, "{part:?} among {kind:?} of {device:?}");
            // SAFETY: `whole` has as many bytes as all parts, and `at` those of the parts before.
            let status = unsafe { (inner.driver.copy_on_device)(at, part.address(), part.bytes(), inner.stream) };
            inner.check(op, "cuMemcpyDtoDAsync", status)?;
            at += part.bytes() as Address;
        }
        Ok(whole)
    }
}

impl CudaDevice {
    /// Room for `len` elements; what is in it is undefined, NaN on a poisoning device.
    ///
    /// # Errors
    /// When the card has no more memory: the message names `op` and what would help.
    pub fn alloc(&self, op: &'static str, kind: Kind, len: usize) -> Result<CudaBuffer> {
        let inner = &*self.0;
        inner.enter(op)?;
        let bytes = len.checked_mul(kind.size()).ok_or_else(|| Error::invalid(op, format!("{len} elements")))?;
        let block = lock(&inner.arena).alloc(bytes, inner).ok_or_else(|| self.out_of_memory(op, bytes))?;
        let mut buffer = CudaBuffer { device: self.clone(), block, kind, len };
        if inner.options.poison {
            buffer.fill_bytes(0xff)?;
        }
        Ok(buffer)
    }

    fn out_of_memory(&self, op: &'static str, bytes: usize) -> Error {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two sizes.
        unsafe { (self.0.driver.memory_info)(&mut free, &mut total) };
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        let usage = self.usage();
        let what = format!(
            "out of memory on {}: {:.3} GiB more asked, {:.2} of {:.2} GiB in use here, {:.2} free on the card. A smaller \
             batch, gradient accumulation or recomputing activations needs less",
            self.properties().name,
            gib(bytes),
            gib(usage.now),
            gib(total),
            gib(free),
        );
        Error::device(op, what)
    }

    /// As [`CudaDevice::alloc`], all bits zero.
    ///
    /// # Errors
    /// As [`CudaDevice::alloc`].
    pub fn zeros(&self, op: &'static str, kind: Kind, len: usize) -> Result<CudaBuffer> {
        let mut buffer = self.alloc(op, kind, len)?;
        buffer.fill_bytes(0)?;
        Ok(buffer)
    }

    /// Copies elements of the host. The slice may be used again when this returns: the driver has read it.
    ///
    /// # Errors
    /// As [`CudaDevice::alloc`].
    pub fn upload<T: CudaElement>(&self, op: &'static str, host: &[T]) -> Result<CudaBuffer> {
        const { check_layout::<T>() };
        let buffer = self.alloc(op, T::KIND, host.len())?;
        if !host.is_empty() {
            let inner = &*self.0;
            let from = host.as_ptr().cast::<c_void>();
            // SAFETY: both sides have `bytes` bytes. From memory that is not pinned the driver copies before it returns.
            let status = unsafe { (inner.driver.copy_to_device)(buffer.address(), from, buffer.bytes(), inner.stream) };
            inner.check(op, "cuMemcpyHtoDAsync", status)?;
        }
        Ok(buffer)
    }
}
