//! A tensor: a run-time shape over a shared, contiguous, row-major buffer.

use std::sync::Arc;

use crate::device::cpu::simd::add_into;
use crate::device::{Buffer, Device};
use crate::device::{CpuData, CpuNumber};
use crate::error::{Error, Result, ensure};
use crate::number::{DType, Host, Number, with_number};
use crate::rng::Rng;
use crate::shape::numel;
use crate::storage::Storage;

/// A value. Cloning shares the numbers; writing to a shared one copies first.
#[derive(Debug, Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Arc<Storage>,
    device: Device,
}

impl Tensor {
    /// A tensor of these elements, copied to the device.
    ///
    /// # Errors
    /// When the length does not fit the shape.
    pub fn from_vec<T: Number>(device: &Device, shape: &[usize], data: Vec<T>) -> Result<Self> {
        ensure!(data.len() == numel(shape), "from_vec", "{} elements do not fill shape {shape:?}", data.len());
        Ok(match T::host(&data) {
            Host::F32(data) => Self::from_buffer(shape, device.as_cpu().copy(data)),
            Host::F64(data) => Self::from_buffer(shape, device.as_cpu().copy(data)),
        })
    }

    /// Takes over a buffer whose length fits the shape.
    pub(crate) fn from_buffer<T: CpuNumber>(shape: &[usize], buffer: Buffer<T>) -> Self {
        assert_eq!(buffer.len(), numel(shape), "a kernel fills the shape it announces");
        let device = Device::Cpu(buffer.device().clone());
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::Cpu(T::wrap(buffer))), device }
    }

    /// All elements `value`.
    pub fn full(device: &Device, shape: &[usize], dtype: DType, value: f64) -> Self {
        with_number!(dtype, T => {
            let mut buffer = device.as_cpu().alloc::<T>(numel(shape));
            buffer.fill(T::of(value));
            Self::from_buffer(shape, buffer)
        })
    }

    /// All elements zero.
    pub fn zeros(device: &Device, shape: &[usize], dtype: DType) -> Self {
        Self::full(device, shape, dtype, 0.0)
    }

    /// Independent normals with standard deviation `std`.
    pub fn normal(device: &Device, shape: &[usize], dtype: DType, std: f64, rng: &mut Rng) -> Self {
        with_number!(dtype, T => {
            let mut buffer = device.as_cpu().alloc::<T>(numel(shape));
            buffer.iter_mut().for_each(|x| *x = T::of(std * rng.normal()));
            Self::from_buffer(shape, buffer)
        })
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        numel(&self.shape)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// Where it lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn cpu(&self) -> &crate::device::CpuDevice {
        self.device.as_cpu()
    }

    /// The extents as an array.
    ///
    /// # Errors
    /// When the rank is not `N`.
    pub fn dims<const N: usize>(&self, op: &'static str) -> Result<[usize; N]> {
        self.shape
            .clone()
            .try_into()
            .map_err(|_| Error::invalid(op, format!("expected {N} axes, got shape {:?}", self.shape)))
    }

    /// (rows, width) with the last axis as width.
    pub(crate) fn rows(&self) -> (usize, usize) {
        let width = self.shape.last().copied().unwrap_or(1);
        (self.numel().checked_div(width).unwrap_or(0), width)
    }

    /// The numbers.
    ///
    /// # Errors
    /// When the element type is another.
    pub fn as_slice<T: Number>(&self) -> Result<&[T]> {
        let Storage::Cpu(data) = &*self.storage;
        let host = match data {
            CpuData::F32(buffer) => Host::F32(buffer),
            CpuData::F64(buffer) => Host::F64(buffer),
        };
        T::of_host(host).ok_or_else(|| {
            Error::invalid("as_slice", format!("tensor is {:?}, asked for {:?}", self.dtype(), T::DTYPE))
        })
    }

    /// The numbers, inside a kernel that was dispatched on the element type.
    pub(crate) fn data<T: CpuNumber>(&self) -> &[T] {
        let Storage::Cpu(data) = &*self.storage;
        T::buffer(data).expect("dispatched on this element type")
    }

    /// Whether no other tensor shares the memory.
    pub(crate) fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.storage).is_some()
    }

    /// The numbers, to be overwritten; copies them first if they are shared.
    pub(crate) fn data_mut<T: CpuNumber>(&mut self) -> &mut [T] {
        if !self.is_unique() {
            let mut buffer = self.cpu().alloc::<T>(self.numel());
            buffer.copy_from_slice(self.data::<T>());
            self.storage = Arc::new(Storage::Cpu(T::wrap(buffer)));
        }
        let Storage::Cpu(data) = Arc::get_mut(&mut self.storage).expect("not shared any more");
        T::buffer_mut(data).expect("dispatched on this element type")
    }

    /// A copy of the numbers.
    ///
    /// # Errors
    /// When the element type is another.
    pub fn to_vec<T: Number>(&self) -> Result<Vec<T>> {
        self.as_slice().map(<[T]>::to_vec)
    }

    /// A copy of the numbers as doubles.
    pub fn to_f64(&self) -> Vec<f64> {
        with_number!(self.dtype(), T => self.data::<T>().iter().map(|x| x.f64()).collect())
    }

    /// The only element.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub fn item(&self) -> Result<f64> {
        ensure!(self.numel() == 1, "item", "shape {:?} has {} elements", self.shape, self.numel());
        Ok(self.to_f64()[0])
    }

    /// The same numbers under another shape.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        ensure!(
            numel(shape) == self.numel(),
            "reshape",
            "{:?} to {shape:?} changes the number of elements",
            self.shape
        );
        Ok(Tensor { shape: shape.to_vec(), ..self.clone() })
    }

    /// The same numbers in another element type.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        with_number!(dtype, T => {
            let mut buffer = self.cpu().alloc::<T>(self.numel());
            with_number!(self.dtype(), S => {
                for (y, x) in buffer.iter_mut().zip(self.data::<S>()) {
                    *y = T::of(x.f64());
                }
            });
            Self::from_buffer(&self.shape, buffer)
        })
    }

    /// Whether every element is finite.
    pub fn is_finite(&self) -> bool {
        with_number!(self.dtype(), T => self.data::<T>().iter().all(|x| x.is_finite()))
    }

    /// Adds `other` in place (copying first if the numbers are shared).
    ///
    /// # Errors
    /// When shapes or element types differ.
    pub fn accumulate(&mut self, other: &Tensor) -> Result<()> {
        ensure!(self.shape == other.shape, "accumulate", "gradient {:?} against {:?}", self.shape, other.shape);
        let device = self.cpu().clone();
        with_number!(self.dtype(), T => {
            let x = other.as_slice::<T>()?;
            device.for_chunks(self.data_mut::<T>(), ELEMENTWISE, |i, out| {
                add_into(&x[i * ELEMENTWISE..], out);
            });
        });
        Ok(())
    }
}

/// Elements a task of an elementwise kernel handles: 64 KiB of f32, long against the microsecond that a task costs.
pub(crate) const ELEMENTWISE: usize = 16 * 1024;

/// Checks that two tensors have the same element type and returns it.
pub(crate) fn same_dtype(op: &'static str, a: &Tensor, b: &Tensor) -> Result<DType> {
    ensure!(a.dtype() == b.dtype(), op, "element types {:?} and {:?} differ", a.dtype(), b.dtype());
    Ok(a.dtype())
}
