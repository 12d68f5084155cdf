//! A tensor: a run-time shape over a shared, contiguous, row-major buffer.

use std::sync::Arc;

use crate::device::cpu::simd::add_into;
use crate::device::cuda::{CudaBuffer, Kind};
use crate::device::{Buffer, CpuData, CpuDevice, CpuNumber, CudaData, CudaDevice, Device, out_of_memory};
use crate::dispatch::{on_device, same_place};
use crate::error::{Error, Result, ensure};
use crate::number::{DType, Host, Number, with_number};
use crate::ops::cuda::{elementwise, reduce};
use crate::rng::Rng;
use crate::shape::{checked_numel, numel};
use crate::storage::Storage;

/// A value on a device. Cloning shares the numbers; writing to a shared one copies first.
///
/// Its numbers reach the host by name only: [`Tensor::to_vec`], [`Tensor::to_f64`] and [`Tensor::item`] copy and wait for the
/// device, [`Tensor::as_slice`] borrows and works on the CPU alone. No op reads them.
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
    /// When the length does not fit the shape, memory cannot address so many elements, or the device has no memory left.
    pub fn from_vec<T: Number>(device: &Device, shape: &[usize], data: Vec<T>) -> Result<Self> {
        let op = "from_vec";
        ensure!(data.len() == checked_numel(op, shape)?, op, "{} elements do not fill shape {shape:?}", data.len());
        match (device, T::host(&data)) {
            (Device::Cpu(cpu), Host::F32(data)) => Ok(Self::from_buffer(shape, cpu.try_copy(op, data)?)),
            (Device::Cpu(cpu), Host::F64(data)) => Ok(Self::from_buffer(shape, cpu.try_copy(op, data)?)),
            (Device::Cuda(gpu), Host::F32(data)) => Ok(Self::from_cuda(shape, gpu.upload("from_vec", data)?)),
            (Device::Cuda(gpu), Host::F64(data)) => Ok(Self::from_cuda(shape, gpu.upload("from_vec", data)?)),
        }
    }

    /// Takes over a buffer of the CPU whose length fits the shape.
    pub(crate) fn from_buffer<T: CpuNumber>(shape: &[usize], buffer: Buffer<T>) -> Self {
        assert_eq!(buffer.len(), numel(shape), "a kernel fills the shape it announces");
        let device = Device::Cpu(buffer.device().clone());
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::Cpu(T::wrap(buffer))), device }
    }

    /// Takes over a buffer of a card whose length fits the shape: f32, f64, or bf16, which reads as f32.
    pub(crate) fn from_cuda(shape: &[usize], buffer: CudaBuffer) -> Self {
        Self::from_cuda_data(shape, CudaData::new(buffer))
    }

    /// Takes over numbers on a card that fit the shape.
    pub(crate) fn from_cuda_data(shape: &[usize], data: CudaData) -> Self {
        assert_eq!(data.len(), numel(shape), "a kernel fills the shape it announces");
        let device = Device::Cuda(data.device().clone());
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::Cuda(data)), device }
    }

    /// Memory for a kernel to fill: the elements are unspecified.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub(crate) fn empty(device: &Device, shape: &[usize], dtype: DType) -> Result<Self> {
        let n = checked_numel("empty", shape)?;
        match device {
            Device::Cpu(cpu) => with_number!(dtype, T => Ok(Self::from_buffer(shape, cpu.try_alloc::<T>("empty", n)?))),
            Device::Cuda(gpu) => Ok(Self::from_cuda(shape, gpu.alloc("tensor", Kind::of(dtype), n)?)),
        }
    }

    /// All elements `value`.
    ///
    /// # Errors
    /// When memory cannot address so many elements, or the device has no memory left.
    pub fn full(device: &Device, shape: &[usize], dtype: DType, value: f64) -> Result<Self> {
        let n = checked_numel("full", shape)?;
        match device {
            Device::Cpu(cpu) => with_number!(dtype, T => {
                let mut buffer = cpu.try_alloc::<T>("full", n)?;
                buffer.fill(T::of(value));
                Ok(Self::from_buffer(shape, buffer))
            }),
            Device::Cuda(gpu) => {
                Ok(Self::from_cuda(shape, elementwise::full(gpu, Kind::of(dtype), numel(shape), value)?))
            }
        }
    }

    /// All elements zero.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn zeros(device: &Device, shape: &[usize], dtype: DType) -> Result<Self> {
        Self::full(device, shape, dtype, 0.0)
    }

    /// Independent normals with standard deviation `std`, drawn on the host: the same on every device.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn normal(device: &Device, shape: &[usize], dtype: DType, std: f64, rng: &mut Rng) -> Result<Self> {
        let n = checked_numel("normal", shape)?;
        with_number!(dtype, T => {
            let mut values: Vec<T> = Vec::new();
            values.try_reserve_exact(n).map_err(|_| out_of_memory::<T>("normal", n))?;
            values.extend((0..n).map(|_| T::of(std * rng.normal())));
            Self::from_vec(device, shape, values)
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

    /// Its memory.
    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
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

    /// The numbers, borrowed: on the CPU alone.
    ///
    /// # Errors
    /// When the element type is another, or the tensor is not in host memory.
    pub fn as_slice<T: Number>(&self) -> Result<&[T]> {
        let host = match &*self.storage {
            Storage::Cpu(CpuData::F32(buffer)) => Host::F32(buffer),
            Storage::Cpu(CpuData::F64(buffer)) => Host::F64(buffer),
            Storage::Cuda(_) => {
                let what = format!("the numbers are on {}: only those in host memory are borrowed", self.device);
                return Err(Error::invalid("as_slice", what));
            }
        };
        T::of_host(host).ok_or_else(|| self.not_of("as_slice", T::DTYPE))
    }

    fn not_of(&self, op: &'static str, dtype: DType) -> Error {
        Error::invalid(op, format!("the tensor is {:?} on {}, asked for {dtype:?}", self.dtype(), self.device))
    }

    /// Whether no other tensor shares the memory.
    pub(crate) fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.storage).is_some()
    }

    /// The numbers, to be overwritten by a kernel of the CPU; copies them first if they are shared.
    ///
    /// # Errors
    /// When the element type is another, or the tensor is not in host memory.
    pub(crate) fn cpu_mut<T: CpuNumber>(&mut self, op: &'static str) -> Result<&mut [T]> {
        let error = self.not_of(op, T::DTYPE);
        if !self.is_unique() {
            self.storage = match &*self.storage {
                Storage::Cpu(data) => Arc::new(Storage::Cpu(data.copy())),
                Storage::Cuda(_) => return Err(error),
            };
        }
        match Arc::get_mut(&mut self.storage).expect("its only owner") {
            Storage::Cpu(data) => T::buffer_mut(data).map(|buffer| &mut buffer[..]).ok_or(error),
            Storage::Cuda(_) => Err(error),
        }
    }

    /// The numbers on this card, to be changed by a kernel; copies them first if they are shared.
    ///
    /// # Errors
    /// When they live elsewhere, or the card has no memory left.
    pub(crate) fn cuda_mut(&mut self, op: &'static str, gpu: &CudaDevice) -> Result<&mut CudaData> {
        self.on_cuda(op, gpu)?;
        if !self.is_unique() {
            self.storage = Arc::new(Storage::Cuda(self.on_cuda(op, gpu)?.copy()?));
        }
        let elsewhere = self.elsewhere(op, &format!("{gpu:?}"));
        match Arc::get_mut(&mut self.storage).expect("its only owner") {
            Storage::Cuda(data) => Ok(data),
            Storage::Cpu(_) => Err(elsewhere),
        }
    }

    /// The numbers, for a kernel of this CPU that takes them beside inputs of another type.
    ///
    /// # Errors
    /// When they live elsewhere, or the element type is another.
    pub(crate) fn on_cpu<T: CpuNumber>(&self, op: &'static str, cpu: &CpuDevice) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(data) if self.device.is_cpu(cpu) => {
                T::buffer(data).map(|buffer| &buffer[..]).ok_or_else(|| self.not_of(op, T::DTYPE))
            }
            Storage::Cpu(_) | Storage::Cuda(_) => Err(self.elsewhere(op, &format!("{cpu:?}"))),
        }
    }

    /// The numbers, for a kernel of this card that takes them beside inputs of another type.
    ///
    /// # Errors
    /// When they live elsewhere.
    pub(crate) fn on_cuda(&self, op: &'static str, gpu: &CudaDevice) -> Result<&CudaData> {
        match &*self.storage {
            Storage::Cuda(data) if data.device().is(gpu) => Ok(data),
            Storage::Cpu(_) | Storage::Cuda(_) => Err(self.elsewhere(op, &format!("{gpu:?}"))),
        }
    }

    fn elsewhere(&self, op: &'static str, others: &str) -> Error {
        Error::invalid(op, format!("an input lives on {}, the others on {others}", self.device))
    }

    /// A copy of the numbers, on the host: waits for the device.
    ///
    /// # Errors
    /// When the element type is another.
    pub fn to_vec<T: Number>(&self) -> Result<Vec<T>> {
        match &*self.storage {
            Storage::Cpu(_) => self.as_slice().map(<[T]>::to_vec),
            Storage::Cuda(data) => {
                let of = |host| T::of_host(host).map(<[T]>::to_vec);
                let numbers = match data.dtype() {
                    DType::F32 => of(Host::F32(&data.full()?.download::<f32>()?)),
                    DType::F64 => of(Host::F64(&data.full()?.download::<f64>()?)),
                };
                numbers.ok_or_else(|| self.not_of("to_vec", T::DTYPE))
            }
        }
    }

    /// A copy of the numbers as doubles, on the host: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        match self.dtype() {
            DType::F32 => Ok(self.to_vec::<f32>()?.into_iter().map(f64::from).collect()),
            DType::F64 => self.to_vec(),
        }
    }

    /// The only element, on the host: waits for the device.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub fn item(&self) -> Result<f64> {
        ensure!(self.numel() == 1, "item", "shape {:?} has {} elements", self.shape, self.numel());
        Ok(self.to_f64()?[0])
    }

    /// The same numbers under another shape.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        ensure!(
            checked_numel("reshape", shape)? == self.numel(),
            "reshape",
            "{:?} to {shape:?} changes the number of elements",
            self.shape
        );
        Ok(Tensor { shape: shape.to_vec(), ..self.clone() })
    }

    /// The same numbers in another element type.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        on_device!("to_dtype", [self]; Cpu<S>(cpu, [x]) => with_number!(dtype, T => {
            let mut buffer = cpu.try_alloc::<T>("to_dtype", x.len())?;
            buffer.iter_mut().zip(x).for_each(|(y, x): (_, &S)| *y = T::of(x.f64()));
            Ok(Self::from_buffer(&self.shape, buffer))
        }), Cuda(_, [x]) => Ok(Self::from_cuda(&self.shape, elementwise::cast(x.full()?, Kind::of(dtype))?)))
    }

    /// Whether every element is finite: the host waits for the answer.
    ///
    /// # Errors
    /// When the device fails.
    pub fn is_finite(&self) -> Result<bool> {
        on_device!("is_finite", [self];
            Cpu<T>(_, [x]) => Ok(x.iter().all(|x: &T| x.is_finite())),
            Cuda(_, [x]) => reduce::is_finite(x.full()?))
    }

    /// Adds `other` in place (copying first if the numbers are shared).
    ///
    /// # Errors
    /// When shapes, element types or devices differ.
    pub fn accumulate(&mut self, other: &Tensor) -> Result<()> {
        let op = "accumulate";
        ensure!(self.shape == other.shape, op, "gradient {:?} against {:?}", self.shape, other.shape);
        same_place(op, self, other)?;
        on_device!(op, [other]; Cpu<T>(cpu, [x]) => {
            cpu.for_pieces(self.cpu_mut::<T>(op)?, ELEMENTWISE, |i, out| {
                add_into(&x[i * ELEMENTWISE..], out);
            });
        }, Cuda(gpu, [x]) => elementwise::add_into(self.cuda_mut(op, gpu)?.full_mut()?, x.full()?)?);
        Ok(())
    }
}

/// Elements a task of an elementwise kernel handles: 64 KiB of f32, long against the microsecond that a task costs.
pub(crate) const ELEMENTWISE: usize = 16 * 1024;
