//! The functions that this crate calls: the driver, the run-time compiler (NVRTC) and cuBLASLt, declared from their public
//! manuals. Handles are opaque pointers; every function returns a status, 0 for success.

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::library::functions;

/// A handle, or memory of the host.
pub type Pointer = *mut c_void;
/// An address in the device's memory.
pub type Address = u64;

functions! {
    /// `libcuda`: contexts, memory, modules, launches.
    Driver {
        init = "cuInit"(c_uint);
        version = "cuDriverGetVersion"(*mut c_int);
        device_count = "cuDeviceGetCount"(*mut c_int);
        device_get = "cuDeviceGet"(*mut c_int, c_int);
        device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
        device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
        context_retain = "cuDevicePrimaryCtxRetain"(*mut Pointer, c_int);
        context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
        context_set = "cuCtxSetCurrent"(Pointer);
        memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        memory_alloc = "cuMemAlloc_v2"(*mut Address, usize);
        memory_free = "cuMemFree_v2"(Address);
        copy_to_device = "cuMemcpyHtoDAsync_v2"(Address, *const c_void, usize, Pointer);
        copy_to_host = "cuMemcpyDtoHAsync_v2"(Pointer, Address, usize, Pointer);
        copy_on_device = "cuMemcpyDtoDAsync_v2"(Address, Address, usize, Pointer);
        fill_bytes = "cuMemsetD8Async"(Address, u8, usize, Pointer);
        stream_create = "cuStreamCreate"(*mut Pointer, c_uint);
        stream_destroy = "cuStreamDestroy_v2"(Pointer);
        stream_synchronize = "cuStreamSynchronize"(Pointer);
        event_create = "cuEventCreate"(*mut Pointer, c_uint);
        event_destroy = "cuEventDestroy_v2"(Pointer);
        event_record = "cuEventRecord"(Pointer, Pointer);
        event_synchronize = "cuEventSynchronize"(Pointer);
        event_elapsed = "cuEventElapsedTime"(*mut f32, Pointer, Pointer);
        module_load = "cuModuleLoadData"(*mut Pointer, *const c_void);
        module_unload = "cuModuleUnload"(Pointer);
        module_function = "cuModuleGetFunction"(*mut Pointer, Pointer, *const c_char);
        function_get = "cuFuncGetAttribute"(*mut c_int, c_int, Pointer);
        function_set = "cuFuncSetAttribute"(Pointer, c_int, c_int);
        launch = "cuLaunchKernelEx"(*const LaunchConfig, Pointer, *mut Pointer, *mut Pointer);
        tensor_map = "cuTensorMapEncodeTiled"(
            *mut TensorMap, c_int, c_uint, Address, *const u64, *const u64, *const u32, *const u32, c_int, c_int, c_int, c_int,
        );
        error_name = "cuGetErrorName"(c_int, *mut *const c_char);
        error_text = "cuGetErrorString"(c_int, *mut *const c_char);
    }
}

functions! {
    /// `libnvrtc`: CUDA C++ to machine code.
    Nvrtc {
        version = "nvrtcVersion"(*mut c_int, *mut c_int);
        create = "nvrtcCreateProgram"(
            *mut Pointer, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char,
        );
        destroy = "nvrtcDestroyProgram"(*mut Pointer);
        compile = "nvrtcCompileProgram"(Pointer, c_int, *const *const c_char);
        log_size = "nvrtcGetProgramLogSize"(Pointer, *mut usize);
        log = "nvrtcGetProgramLog"(Pointer, *mut c_char);
        cubin_size = "nvrtcGetCUBINSize"(Pointer, *mut usize);
        cubin = "nvrtcGetCUBIN"(Pointer, *mut u8);
        ptx_size = "nvrtcGetPTXSize"(Pointer, *mut usize);
        ptx = "nvrtcGetPTX"(Pointer, *mut c_char);
    }
}

functions! {
    /// `libcublasLt`: matrix products.
    Blas {
        create = "cublasLtCreate"(*mut Pointer);
        destroy = "cublasLtDestroy"(Pointer);
        describe = "cublasLtMatmulDescCreate"(*mut Pointer, c_int, c_int);
        describe_set = "cublasLtMatmulDescSetAttribute"(Pointer, c_int, *const c_void, usize);
        describe_end = "cublasLtMatmulDescDestroy"(Pointer);
        layout = "cublasLtMatrixLayoutCreate"(*mut Pointer, c_int, u64, u64, i64);
        layout_set = "cublasLtMatrixLayoutSetAttribute"(Pointer, c_int, *const c_void, usize);
        layout_end = "cublasLtMatrixLayoutDestroy"(Pointer);
        preference = "cublasLtMatmulPreferenceCreate"(*mut Pointer);
        preference_set = "cublasLtMatmulPreferenceSetAttribute"(Pointer, c_int, *const c_void, usize);
        preference_end = "cublasLtMatmulPreferenceDestroy"(Pointer);
        heuristic = "cublasLtMatmulAlgoGetHeuristic"(
            Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, c_int, *mut Heuristic, *mut c_int,
        );
        algorithm_get = "cublasLtMatmulAlgoConfigGetAttribute"(*const [u64; 8], c_int, Pointer, usize, *mut usize);
        product = "cublasLtMatmul"(
            Pointer, Pointer, *const c_void, Address, Pointer, Address, Pointer, *const c_void, Address, Pointer, Address,
            Pointer, *const [u64; 8], Address, usize, Pointer,
        );
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    pub blocks: [c_uint; 3],
    pub threads: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: Pointer,
    pub attributes: *const LaunchAttribute,
    pub attribute_count: c_uint,
}

/// `CUlaunchAttribute` with a value of up to three whole numbers; the value is a union of 64 bytes.
#[repr(C)]
pub struct LaunchAttribute {
    pub id: c_int,
    pub pad: c_int,
    pub value: [c_uint; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
pub const CLUSTER_DIMENSION: c_int = 4;
/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
pub const PROGRAMMATIC_SERIALIZATION: c_int = 6;
/// `CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES`: what a kernel takes by itself.
pub const STATIC_SHARED: c_int = 1;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
pub const MAX_DYNAMIC_SHARED: c_int = 8;
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`, then compute capability, then shared memory a block may ask for.
pub const MULTIPROCESSORS: c_int = 16;
pub const CAPABILITY_MAJOR: c_int = 75;
pub const CAPABILITY_MINOR: c_int = 76;
pub const SHARED_PER_BLOCK: c_int = 97;
/// `CU_STREAM_NON_BLOCKING`.
pub const STREAM_NON_BLOCKING: c_uint = 1;

/// `CUtensorMap`: opaque, made by the driver, passed by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Heuristic {
    pub algorithm: [u64; 8],
    pub workspace: usize,
    pub state: c_int,
    pub waves: f32,
    pub reserved: [c_int; 4],
}
