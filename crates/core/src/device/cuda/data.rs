//! The numbers of a tensor on a card: in full (f32 or f64), rounded to bf16, or both. Each form is made from the other where an op
//! asks for it, once, and kept: three products of one input round it once, and what was made in bf16 is widened only for an op
//! that has no kernel for bf16. A tensor of either form is f32 to whoever asks for its element type.

use std::sync::OnceLock;

use super::{CudaBuffer, CudaDevice, Kind};
use crate::error::{Error, Result};
use crate::number::DType;
use crate::ops::cuda::elementwise::cast;

/// See the module's page.
#[derive(Debug)]
pub struct CudaData {
    dtype: DType,
    len: usize,
    full: OnceLock<CudaBuffer>,
    rounded: OnceLock<CudaBuffer>,
}

impl CudaData {
    /// From numbers of kind f32, f64 or bf16.
    ///
    /// # Panics
    /// When the buffer holds whole numbers: ops keep those apart.
    pub(crate) fn new(numbers: CudaBuffer) -> Self {
        let (len, kind) = (numbers.len(), numbers.kind());
        let (full, rounded, dtype) = match kind {
            Kind::F32 => (OnceLock::from(numbers), OnceLock::new(), DType::F32),
            Kind::F64 => (OnceLock::from(numbers), OnceLock::new(), DType::F64),
            Kind::Bf16 => (OnceLock::new(), OnceLock::from(numbers), DType::F32),
            Kind::U32 | Kind::U64 => panic!("{kind:?} are no numbers of a tensor"),
        };
        CudaData { dtype, len, full, rounded }
    }

    /// From both forms of the same numbers.
    pub(crate) fn both(full: CudaBuffer, rounded: CudaBuffer) -> Self {
        let data = CudaData::new(full);
        assert_eq!((rounded.kind(), rounded.len()), (Kind::Bf16, data.len), "the same numbers");
        CudaData { rounded: OnceLock::from(rounded), ..data }
    }

    /// Element type; f32 for what is rounded, too.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No element at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The card.
    pub(crate) fn device(&self) -> &CudaDevice {
        self.as_made().device()
    }

    /// Whether they are there rounded, which happens only where operands of products are.
    pub(crate) fn is_rounded(&self) -> bool {
        self.rounded.get().is_some()
    }

    /// In the element type.
    ///
    /// # Errors
    /// When the card has no memory left.
    pub(crate) fn full(&self) -> Result<&CudaBuffer> {
        if let Some(full) = self.full.get() {
            return Ok(full);
        }
        let rounded = self.rounded.get().expect("numbers are there in one form at least");
        let full = cast(rounded, Kind::F32)?;
        Ok(self.full.get_or_init(|| full))
    }

    /// Rounded to bf16.
    ///
    /// # Errors
    /// When the numbers are f64, or the card has no memory left.
    pub(crate) fn rounded(&self) -> Result<&CudaBuffer> {
        if let Some(rounded) = self.rounded.get() {
            return Ok(rounded);
        }
        if self.dtype == DType::F64 {
            return Err(Error::invalid("round", "f64 numbers are not rounded to bf16"));
        }
        let rounded = cast(self.full()?, Kind::Bf16)?;
        Ok(self.rounded.get_or_init(|| rounded))
    }

    /// The form that it was made in; the full one where both are there. For ops that read either and round nothing.
    pub(crate) fn as_made(&self) -> &CudaBuffer {
        self.full.get().or(self.rounded.get()).expect("numbers are there in one form at least")
    }

    /// Whether they are there rounded and in no other form: what made them gave them to products alone.
    pub(crate) fn is_operand(&self) -> bool {
        self.full.get().is_none()
    }

    /// Keeps the rounded form of the numbers that were just written in full, where a kernel made it on the way.
    pub(crate) fn keep_rounded(&mut self, rounded: Option<CudaBuffer>) {
        let Some(rounded) = rounded else { return };
        assert_eq!((rounded.kind(), rounded.len()), (Kind::Bf16, self.len), "the same numbers");
        self.rounded = OnceLock::from(rounded);
    }

    /// What an op multiplies, of that kind.
    ///
    /// # Errors
    /// As [`CudaData::rounded`].
    pub(crate) fn of_kind(&self, kind: Kind) -> Result<&CudaBuffer> {
        if kind == Kind::Bf16 { self.rounded() } else { self.full() }
    }

    /// The numbers, to be overwritten or changed; a rounded form is forgotten.
    ///
    /// # Errors
    /// As [`CudaData::full`].
    pub(crate) fn full_mut(&mut self) -> Result<&mut CudaBuffer> {
        self.full()?;
        self.rounded.take();
        Ok(self.full.get_mut().expect("made above"))
    }

    /// The numbers in the form that they were made in, to be changed in part; the other form is forgotten.
    pub(crate) fn made_mut(&mut self) -> &mut CudaBuffer {
        if self.full.get().is_some() {
            self.rounded.take();
        }
        self.full.get_mut().or(self.rounded.get_mut()).expect("numbers are there in one form at least")
    }

    /// Both forms to be overwritten together, the rounded one where it is there.
    ///
    /// # Errors
    /// As [`CudaData::full`].
    pub(crate) fn both_mut(&mut self) -> Result<(&mut CudaBuffer, Option<&mut CudaBuffer>)> {
        self.full()?;
        Ok((self.full.get_mut().expect("made above"), self.rounded.get_mut()))
    }

    /// A copy on the same card.
    ///
    /// # Errors
    /// When the card has no memory left.
    pub(crate) fn copy(&self) -> Result<Self> {
        let from = self.as_made();
        let mut copy = from.device().alloc("copy", from.kind(), from.len())?;
        copy.copy_from(from)?;
        Ok(CudaData::new(copy))
    }
}
