//! Versions of the driver and the libraries: besides the card, bits depend on them.

use std::ffi::c_int;
use std::path::PathBuf;

use super::{CudaDevice, blas};

impl CudaDevice {
    /// Names and versions of the driver's CUDA, of NVRTC and of cuBLASLt; `unknown` where one does not say.
    pub fn versions(&self) -> [(&'static str, String); 3] {
        let unknown = || "unknown".to_string();
        [
            ("CUDA of the driver", of_driver(self.properties().driver)),
            ("NVRTC", self.compiler().map_or_else(|_| unknown(), |compiler| compiler.version())),
            ("cuBLASLt", of_blas(&self.0.options.folders).unwrap_or_else(unknown)),
        ]
    }
}

/// `13.0` of 13000.
fn of_driver(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// `13.0.2`; none where the library is missing or does not say.
fn of_blas(folders: &[PathBuf]) -> Option<String> {
    type Property = unsafe extern "C" fn(c_int, *mut c_int) -> c_int;
    let file = blas::file(folders).ok()?;
    // SAFETY: the type is the one in CUDA's headers, versions 12 and 13.
    let property: Property = unsafe { file.function("cublasLtGetProperty") }.ok()?;
    let part = |which: c_int| {
        let mut value = 0;
        // SAFETY: the library writes one integer.
        (unsafe { property(which, &mut value) } == 0).then_some(value)
    };
    Some(format!("{}.{}.{}", part(0)?, part(1)?, part(2)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Compiler;
    use crate::ops::cuda::testing::folders;

    #[test]
    fn the_drivers_number_is_major_and_minor() {
        assert_eq!([12080, 13000, 13020].map(of_driver), ["12.8", "13.0", "13.2"]);
    }

    /// No GPU is needed.
    #[test]
    fn libraries_say_their_versions() {
        let all = [Compiler::open(&folders()).ok().map(|c| c.version()), of_blas(&folders())];
        for version in all.iter().flatten() {
            let parts: Vec<u32> = version.split('.').map(|part| part.parse().unwrap()).collect();
            assert!(parts.len() >= 2 && (12..20).contains(&parts[0]), "{version}");
        }
        if all.iter().any(Option::is_none) {
            eprintln!("not run in full: no NVRTC or no cuBLASLt: {all:?}");
        }
    }
}
