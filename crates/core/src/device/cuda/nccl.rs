//! NCCL moves buffers between the cards of several processes, and adds nothing: whose sums they are is decided elsewhere, in an order that
//! does not depend on the number of processes. So of its functions only send and receive are called, which are exact.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;

use super::api::{Address, Pointer};
use super::library::{Library, functions};
use super::{CudaBuffer, CudaDevice, Kind};
use crate::error::{Error, Result};

/// What the processes of a communicator have in common (`ncclUniqueId`): made by one and carried to the others.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct NcclId(pub [u8; 128]);

functions! {
    /// `libnccl`, declared from its public manual, version 2.
    Nccl {
        version = "ncclGetVersion"(*mut c_int);
        unique_id = "ncclGetUniqueId"(*mut NcclId);
        init = "ncclCommInitRank"(*mut Pointer, c_int, NcclId, c_int);
        async_error = "ncclCommGetAsyncError"(Pointer, *mut c_int);
        destroy = "ncclCommDestroy"(Pointer);
        group_start = "ncclGroupStart"();
        group_end = "ncclGroupEnd"();
        send = "ncclSend"(Address, usize, c_int, c_int, Pointer, Pointer);
        receive = "ncclRecv"(Address, usize, c_int, c_int, Pointer, Pointer);
    }
}

/// The functions that return text.
struct Words {
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    last: unsafe extern "C" fn(*mut c_void) -> *const c_char,
}

/// The opened library.
pub struct NcclLibrary {
    nccl: Nccl,
    words: Words,
    path: PathBuf,
}

/// `ncclInProgress`: of a communicator that works asynchronously, which none here is.
const IN_PROGRESS: c_int = 7;

impl NcclLibrary {
    /// Opens `libnccl.so.2`, in `folders` first.
    ///
    /// # Errors
    /// When it is not there: what was searched where.
    pub fn open(folders: &[PathBuf]) -> Result<Self> {
        let library = Library::open("NCCL", &["libnccl.so.2", "libnccl.so"], folders)?;
        // SAFETY: the types are those of NCCL's manual.
        let words = unsafe {
            Words { error: library.function("ncclGetErrorString")?, last: library.function("ncclGetLastError")? }
        };
        let (nccl, path) = (Nccl::load(&library)?, library.path.clone());
        Ok(NcclLibrary { nccl, words, path })
    }

    fn check(&self, call: &str, status: c_int) -> Result<()> {
        if status == 0 || status == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return constant strings that end with 0, or nothing.
        let text = |at: *const c_char| unsafe {
            if at.is_null() { String::new() } else { CStr::from_ptr(at).to_string_lossy().trim().to_string() }
        };
        // SAFETY: an unknown status has a string of its own; the communicator of the last error is not read.
        let (what, last) = unsafe { (text((self.words.error)(status)), text((self.words.last)(std::ptr::null_mut()))) };
        let last = if last.is_empty() { "NCCL_DEBUG=WARN tells more".to_string() } else { last };
        Err(Error::device("nccl", format!("{call} failed with {status}, {what}: {last}")))
    }

    /// Its version, 22703 for 2.27.3, and where it was found.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn version(&self) -> Result<(i32, &PathBuf)> {
        let mut version = 0;
        // SAFETY: one number is written.
        self.check("ncclGetVersion", unsafe { (self.nccl.version)(&mut version) })?;
        Ok((version, &self.path))
    }

    /// A new identity, for one process to make and all to use.
    ///
    /// # Errors
    /// When the library finds no network interface.
    pub fn new_id(&self) -> Result<NcclId> {
        let mut id = NcclId([0; 128]);
        // SAFETY: 128 bytes are written.
        self.check("ncclGetUniqueId", unsafe { (self.nccl.unique_id)(&mut id) })?;
        Ok(id)
    }
}

/// One process among those that move tensors between their cards.
pub struct Communicator {
    library: NcclLibrary,
    device: CudaDevice,
    handle: Pointer,
}

// SAFETY: a communicator may be used from any thread, one at a time: whoever moves something holds it exclusively (`&mut`).
unsafe impl Send for Communicator {}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Communicator on {:?}", self.device)
    }
}

impl Communicator {
    /// Joins the others, and waits for them.
    ///
    /// # Errors
    /// When NCCL cannot connect the cards, for example when two processes took one.
    pub fn new(library: NcclLibrary, device: &CudaDevice, id: NcclId, (rank, world): (usize, usize)) -> Result<Self> {
        device.0.enter("nccl")?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current, one pointer is written, and the identity comes from this library in another process.
        let status = unsafe { (library.nccl.init)(&mut handle, world as c_int, id, rank as c_int) };
        library.check("ncclCommInitRank", status)?;
        Ok(Communicator { library, device: device.clone(), handle })
    }

    /// Sends buffers to other processes, and receives what they send to this one (from whom, what and how many elements): between two
    /// processes in the order of both lists. Returns as soon as it is asked for.
    ///
    /// # Errors
    /// When a buffer holds no f32 or f64, memory runs out, or NCCL fails.
    pub fn exchange(
        &mut self,
        sends: &[(usize, &CudaBuffer)],
        receives: &[(usize, Kind, usize)],
    ) -> Result<Vec<CudaBuffer>> {
        let (op, inner) = ("exchange", &*self.device.0);
        let room = |&(_, kind, len): &_| self.device.alloc(op, kind, len);
        let got = receives.iter().map(room).collect::<Result<Vec<CudaBuffer>>>()?;
        let of =
            |(to, buffer): (usize, &CudaBuffer)| Ok((to as c_int, buffer.address(), buffer.len(), type_of(buffer)?));
        let out = sends.iter().map(|&(to, buffer)| of((to, buffer))).collect::<Result<Vec<_>>>()?;
        let into =
            receives.iter().zip(&got).map(|((from, ..), buffer)| of((*from, buffer))).collect::<Result<Vec<_>>>()?;
        inner.enter(op)?;
        let nccl = &self.library.nccl;
        // SAFETY: no argument.
        self.library.check("ncclGroupStart", unsafe { (nccl.group_start)() })?;
        let mut result = Ok(());
        for (to, at, len, kind) in out {
            // SAFETY: that many elements of that type are there, and whoever gets the memory next comes later on this stream.
            let status = unsafe { (nccl.send)(at, len, kind, to, self.handle, inner.stream) };
            result = result.and(self.library.check("ncclSend", status));
        }
        for (from, at, len, kind) in into {
            // SAFETY: as above.
            let status = unsafe { (nccl.receive)(at, len, kind, from, self.handle, inner.stream) };
            result = result.and(self.library.check("ncclRecv", status));
        }
        // SAFETY: ends the group that was begun above, also after an error inside.
        result.and(self.library.check("ncclGroupEnd", unsafe { (nccl.group_end)() }))?;
        let mut failed = 0;
        // SAFETY: one status is written.
        self.library.check("ncclCommGetAsyncError", unsafe { (nccl.async_error)(self.handle, &mut failed) })?;
        self.library.check("an exchange before", failed)?;
        Ok(got)
    }

    /// Ends it in order: all processes do, after their last exchange. One that is dropped without is left to the end of the process, because
    /// the library would wait for others that may be gone.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn finish(self) -> Result<()> {
        self.device.wait("nccl")?;
        // SAFETY: nothing uses the handle after this.
        self.library.check("ncclCommDestroy", unsafe { (self.library.nccl.destroy)(self.handle) })
    }
}

/// `ncclDataType_t`.
fn type_of(buffer: &CudaBuffer) -> Result<c_int> {
    match buffer.kind() {
        Kind::F32 => Ok(7),
        Kind::F64 => Ok(8),
        kind @ (Kind::Bf16 | Kind::U32 | Kind::U64) => {
            Err(Error::invalid("exchange", format!("{kind:?} are no numbers in full")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_says_where_it_was_looked_for() {
        let Err(e) = NcclLibrary::open(&["/nowhere".into()]) else { return };
        assert!(e.to_string().contains("NCCL was not found") && e.to_string().contains("/nowhere/libnccl.so.2"), "{e}");
    }
}
