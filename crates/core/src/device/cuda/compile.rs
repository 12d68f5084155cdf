//! CUDA C++ to machine code for one architecture, and the folder that keeps it.
//!
//! Machine code (a cubin) and never PTX: a driver refuses PTX that is newer than itself, but runs the cubins of any compiler of
//! its major version. Sources include nothing: `prelude.cuh` is put in front of every one.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};

use super::api::Nvrtc;
use super::library::Library;
use crate::error::{Error, Result};

const PRELUDE: &str = include_str!("prelude.cuh");

/// Kernels that lie beside an op.
#[derive(Debug)]
pub struct Source {
    /// For messages and file names.
    pub name: &'static str,
    /// CUDA C++ without an include.
    pub text: &'static str,
}

/// A source with its definitions: what is compiled into one module.
#[derive(Debug, Clone)]
pub struct Unit {
    /// The kernels.
    pub source: &'static Source,
    /// Macros in front of them.
    pub defines: Vec<(&'static str, String)>,
}

impl Unit {
    /// The source under these definitions.
    pub fn new<const N: usize>(source: &'static Source, defines: [(&'static str, String); N]) -> Self {
        Unit { source, defines: defines.into() }
    }

    /// Name and definitions, which tell units apart.
    pub fn key(&self) -> String {
        let defines: String = self.defines.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        format!("{}{defines}", self.source.name)
    }

    fn text(&self) -> String {
        let defines: String = self.defines.iter().map(|(name, value)| format!("#define {name} {value}\n")).collect();
        format!("{defines}{PRELUDE}\n#line 1 \"{}.cu\"\n{}", self.source.name, self.source.text)
    }
}

/// What the assembler says of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of registers that went to memory, written and read.
    pub spills: u32,
    /// Bytes of stack a thread.
    pub stack: u32,
    /// Whether each product of four warps waits for the one before: the assembler did not see that all of them take the same way.
    pub serialized: bool,
}

/// Machine code and what the assembler says of it.
#[derive(Debug)]
pub struct Compiled {
    /// The module.
    pub cubin: Vec<u8>,
    /// What it was assembled from: the compiler's choices in words. Never loaded.
    pub ptx: String,
    /// Of every kernel in it.
    pub resources: Vec<Resources>,
}

/// NVRTC, opened.
pub struct Compiler {
    nvrtc: Nvrtc,
    version: (c_int, c_int),
    path: PathBuf,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NVRTC {}.{} at {}", self.version.0, self.version.1, self.path.display())
    }
}

impl Compiler {
    /// Opens NVRTC in one of the folders, or where the loader finds it. No GPU is needed.
    ///
    /// # Errors
    /// When it is not there: what was searched where.
    pub fn open(folders: &[PathBuf]) -> Result<Self> {
        let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];
        let what = "NVRTC, the compiler of CUDA 12 or 13 (pip install nvidia-cuda-nvrtc has it)";
        let library = Library::open(what, &names, folders)?;
        let nvrtc = Nvrtc::load(&library)?;
        let mut version = (0, 0);
        // SAFETY: NVRTC writes two integers.
        let status = unsafe { (nvrtc.version)(&mut version.0, &mut version.1) };
        let compiler = Compiler { nvrtc, version, path: library.path };
        compiler.check("nvrtcVersion", status)?;
        // NVRTC opens its builtins by a bare name, which the loader answers with what is open already. Where they do not lie beside
        // it, it finds them by itself or says so in the first log.
        let builtins = format!("libnvrtc-builtins.so.{}.{}", version.0, version.1);
        let beside: Vec<PathBuf> =
            compiler.path.parent().filter(|p| p.is_absolute()).map(PathBuf::from).into_iter().collect();
        let _ = Library::open("NVRTC's builtins", &[&builtins], &beside);
        Ok(compiler)
    }

    /// `13.0`.
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    fn check(&self, call: &str, status: c_int) -> Result<()> {
        let fail = || Error::device("cuda", format!("{call} failed with status {status} in {self:?}"));
        if status == 0 { Ok(()) } else { Err(fail()) }
    }

    fn options(&self, arch: &str) -> Vec<String> {
        // 177 would warn of what a source does not use of the prelude, 128 of what a definition leaves out
        let plain =
            ["--std=c++17", "-default-device", "--ptxas-options=-v", "--diag-suppress=177,128"].map(String::from);
        // NVRTC's own cache, which began with 12.9, answers without the assembler's report
        let fresh = (self.version >= (12, 9)).then(|| "--no-cache".to_string());
        [format!("--gpu-architecture={arch}")].into_iter().chain(plain).chain(fresh).collect()
    }

    /// Compiles for an architecture such as `sm_90a`.
    ///
    /// # Errors
    /// When the source has an error: the compiler's words.
    pub fn compile(&self, unit: &Unit, arch: &str) -> Result<Compiled> {
        let c = |s: String| CString::new(s).expect("sources hold no zero byte");
        let (text, name) = (c(unit.text()), c(format!("{}.cu", unit.source.name)));
        let options: Vec<CString> = self.options(arch).into_iter().map(c).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: strings end with a zero and outlive the calls, sizes are those NVRTC names, and the program is destroyed once.
        unsafe {
            let none = std::ptr::null();
            let status = (self.nvrtc.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, none, none);
            self.check("nvrtcCreateProgram", status)?;
            let compiled = (self.nvrtc.compile)(program, pointers.len() as c_int, pointers.as_ptr());
            let (mut size, mut log) = (0, Vec::<u8>::new());
            if (self.nvrtc.log_size)(program, &mut size) == 0 && size > 0 {
                log.resize(size, 0);
                (self.nvrtc.log)(program, log.as_mut_ptr().cast::<c_char>());
            }
            let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
            let mut cubin = Vec::new();
            if compiled == 0 {
                let status = (self.nvrtc.cubin_size)(program, &mut size);
                cubin.resize(size, 0);
                let status = status | (self.nvrtc.cubin)(program, cubin.as_mut_ptr());
                let status = status | (self.nvrtc.ptx_size)(program, &mut size);
                let mut ptx = vec![0u8; size];
                let status = status | (self.nvrtc.ptx)(program, ptx.as_mut_ptr().cast::<c_char>());
                (self.nvrtc.destroy)(&mut program);
                self.check("nvrtcGetCUBIN", status)?;
                let ptx = CStr::from_bytes_until_nul(&ptx).unwrap_or_default().to_string_lossy().into_owned();
                return Ok(Compiled { cubin, ptx, resources: resources(&log) });
            }
            (self.nvrtc.destroy)(&mut program);
            Err(Error::device("cuda", format!("{} does not compile for {arch} by {self:?}:\n{log}", unit.key())))
        }
    }

    /// The machine code from the folder, compiled and put there if it is not yet.
    ///
    /// # Errors
    /// As [`Compiler::compile`], and when the folder cannot be written.
    pub fn cached(&self, unit: &Unit, arch: &str, folder: Option<&Path>) -> Result<Vec<u8>> {
        let Some(folder) = folder else {
            return Ok(self.compile(unit, arch)?.cubin);
        };
        if let Ok(cubin) = std::fs::read(self.place(unit, arch, folder)) {
            return Ok(cubin);
        }
        let cubin = self.compile(unit, arch)?.cubin;
        self.keep(unit, arch, folder, &cubin)?;
        Ok(cubin)
    }

    fn place(&self, unit: &Unit, arch: &str, folder: &Path) -> PathBuf {
        let version = format!("{:?} {:?}", self.version, self.options(arch));
        folder.join(format!("{}-{:032x}.cubin", unit.source.name, hash(&[&version, &unit.text()])))
    }

    /// Puts machine code into the folder, where [`Compiler::cached`] finds it.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn keep(&self, unit: &Unit, arch: &str, folder: &Path, cubin: &[u8]) -> Result<()> {
        let file = self.place(unit, arch, folder);
        // written aside and renamed: a process that is killed, or another one at the same time, never leaves half a file
        let aside = file.with_extension(format!("{}.tmp", std::process::id()));
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&aside, cubin))
            .and_then(|()| std::fs::rename(&aside, &file));
        written.map_err(|e| Error::device("cuda", format!("kernels cannot be kept in {}: {e}", folder.display())))
    }
}

/// FNV-1a of 128 bits over the parts, each followed by a zero byte.
fn hash(parts: &[&str]) -> u128 {
    let bytes = parts.iter().flat_map(|p| p.bytes().chain([0]));
    bytes.fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |h, b| {
        (h ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

/// Reads the assembler's report.
fn resources(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    let told = |kernel: &str| {
        let named = format!("in the function '{kernel}'");
        log.lines().any(|line| line.contains("instructions are serialized") && line.contains(&named))
    };
    for line in log.lines() {
        let numbers = || line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
        if let Some(kernel) = line.split("Compiling entry function '").nth(1).and_then(|l| l.split('\'').next()) {
            let serialized = told(kernel);
            all.push(Resources { kernel: kernel.into(), registers: 0, spills: 0, stack: 0, serialized });
        } else if let Some(last) = all.last_mut() {
            if line.contains("bytes stack frame") {
                let mut numbers = numbers();
                last.stack = numbers.next().unwrap_or(0);
                last.spills = numbers.sum();
            } else if line.contains("Used ") {
                last.registers = numbers().next().unwrap_or(0);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_report_is_read() {
        let waits = "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to program dependence \
                     on compiler-inserted WG.DP in divergent path in the function 'k2' in line 1776\n";
        let log = "ptxas info    : 24 bytes gmem\nptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
                   ptxas info    : Function properties for k\n\
                   ptxas         .     8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n\
                   ptxas info    : Used 22 registers, used 1 barriers\n";
        let first = Resources { kernel: "k".into(), registers: 22, spills: 16, stack: 8, serialized: false };
        assert_eq!(resources(log), std::slice::from_ref(&first));
        let second = "ptxas info    : Compiling entry function 'k2' for 'sm_90a'\nptxas info    : Used 8 registers\n";
        let of_second = Resources { kernel: "k2".into(), registers: 8, spills: 0, stack: 0, serialized: true };
        assert_eq!(resources(&[waits, log, second].concat()), [first, of_second]);
    }

    #[test]
    fn the_hash_is_fnv_1a_and_keeps_parts_apart() {
        assert_eq!(hash(&[]), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
    }
}
