//! Finds and opens CUDA's shared libraries at run time. A library or a function that is missing is an error that says where
//! it was looked for; nothing of CUDA is needed to build.

use std::ffi::c_void;
use std::mem::transmute_copy;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// An opened library, never closed: what it has started (threads, exit handlers) outlives any handle to it.
pub(super) struct Library {
    handle: std::mem::ManuallyDrop<libloading::Library>,
    /// What was opened, for messages.
    pub path: PathBuf,
}

impl Library {
    /// Opens the first of `names` that exists in `folders`, then the first that the system's loader finds by itself.
    ///
    /// # Errors
    /// When none opens: every attempt with the loader's own words.
    pub fn open(what: &'static str, names: &[&str], folders: &[PathBuf]) -> Result<Self> {
        let inside = folders.iter().flat_map(|f| names.iter().map(move |n| f.join(n)));
        let candidates = inside.chain(names.iter().map(PathBuf::from));
        let mut tried = String::new();
        for path in candidates {
            // SAFETY: these are NVIDIA's libraries, whose initialisers ask nothing of the caller.
            match unsafe { libloading::Library::new(&path) } {
                Ok(handle) => return Ok(Library { handle: std::mem::ManuallyDrop::new(handle), path }),
                Err(e) => tried.push_str(&format!("\n  {}: {e}", path.display())),
            }
        }
        let advice = "install it, or name its folder among the folders to search";
        Err(Error::device("cuda", format!("{what} was not found; {advice}. Tried in this order:{tried}")))
    }

    /// The function of that name.
    ///
    /// # Errors
    /// When the library has none.
    ///
    /// # Safety
    /// `T` must be the type of that function.
    pub unsafe fn function<T: Copy>(&self, name: &str) -> Result<T> {
        const { assert!(size_of::<T>() == size_of::<*mut c_void>()) };
        let address = self.address(name)?;
        // SAFETY: the caller vouches that a T is at the address, and a T is as large as one.
        Ok(unsafe { transmute_copy(&address) })
    }

    /// Where a function is: of no type, so that looking up is compiled once and not for each of the tables' functions.
    fn address(&self, name: &str) -> Result<*mut c_void> {
        // SAFETY: an address is read, and nothing is called.
        unsafe { self.handle.get::<*mut c_void>(name) }.map(|address| *address).map_err(|e| {
            let what = format!("{} has no function {name}; a newer version is needed ({e})", self.path.display());
            Error::device("cuda", what)
        })
    }
}

/// A table of functions, each with its type and the name it has in the library.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($field:ident = $symbol:literal ($($t:ty),* $(,)?);)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub $field: unsafe extern "C" fn($($t),*) -> i32,)*
        }

        impl $table {
            /// Looks every function up, so that a missing one is told before anything runs.
            pub fn load(library: &$crate::device::cuda::library::Library) -> $crate::Result<Self> {
                Ok($table {
                    $(
                        // SAFETY: the type is the one in CUDA's headers, versions 12 and 13.
                        $field: unsafe { library.function($symbol)? },
                    )*
                })
            }
        }
    };
}
pub(super) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_lists_every_attempt() {
        let folders = [PathBuf::from("/nowhere/a"), PathBuf::from("/nowhere/b")];
        let Err(e) = Library::open("NVRTC", &["libabsent.so.1", "libabsent.so"], &folders) else {
            panic!("it does not exist");
        };
        let text = e.to_string();
        for part in
            ["cuda: NVRTC was not found", "/nowhere/a/libabsent.so.1", "/nowhere/b/libabsent.so", "\n  libabsent.so"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
