//! Modules, kernels and their launches.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_int, c_void};

use super::api::{self, Address, LaunchAttribute, LaunchConfig, Pointer};
use super::{CudaBuffer, CudaDevice, Unit, lock};
use crate::error::{Error, Result, ensure};

/// Loaded machine code.
pub(super) struct Module {
    pub handle: Pointer,
    /// Those asked for so far.
    functions: HashMap<&'static str, Pointer>,
}

/// A function of a module, ready to run.
pub struct Kernel {
    device: CudaDevice,
    function: Pointer,
    name: &'static str,
}

/// How many threads, and what a block shares.
#[derive(Debug, Clone, Copy, Default)]
pub struct Grid {
    /// Blocks on each axis; a launch with none does nothing.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Blocks of a cluster along the first axis; 0 for none.
    pub cluster: u32,
    /// Whether its blocks may come while the kernel before it ends: the kernel's first act is then `begin_early` of the prelude, which waits for what was
    /// asked for before, and it reads nothing through a restricted pointer, whose loads a compiler may move before that.
    pub early: bool,
}

impl Grid {
    /// Blocks on one axis.
    pub fn line(blocks: usize, threads: u32) -> Self {
        Grid { blocks: [blocks, 1, 1], threads, ..Grid::default() }
    }

    /// Enough blocks that every one of `items` has a thread.
    pub fn over(items: usize, threads: u32) -> Self {
        Grid::line(items.div_ceil(threads as usize), threads)
    }

    /// The same with shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Grid { shared: bytes as u32, ..self }
    }
}

/// What the copy engine needs to know of a matrix; passed by value.
#[derive(Clone, Copy)]
pub struct TensorMap(pub(super) api::TensorMap);

/// A struct that a kernel takes by value: words of 64 bits in the order of its fields.
pub struct Table<'a> {
    words: Vec<Address>,
    /// Words of the kernel's struct; those that nothing fills are zero.
    whole: usize,
    buffers: Vec<&'a CudaBuffer>,
}

impl<'a> Table<'a> {
    /// Of as many words as the kernel's struct has.
    pub fn new(whole: usize) -> Self {
        Table { words: Vec::with_capacity(whole), whole, buffers: Vec::new() }
    }

    fn push(&mut self, word: u64) {
        assert!(self.words.len() < self.whole, "a table of {} words", self.whole);
        self.words.push(word);
    }

    /// A pointer to the first element.
    pub fn buffer(&mut self, buffer: &'a CudaBuffer) {
        self.push(buffer.address());
        self.buffers.push(buffer);
    }

    /// A null pointer.
    pub fn null(&mut self) {
        self.push(0);
    }

    /// `long long`.
    pub fn long(&mut self, long: u64) {
        self.push(long);
    }

    /// `double`.
    pub fn f64(&mut self, number: f64) {
        self.push(number.to_bits());
    }

    /// All words of the struct.
    fn filled(&self) -> Vec<Address> {
        let mut words = self.words.clone();
        words.resize(self.whole, 0);
        words
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// A buffer, as a pointer to its first element.
    Buffer(&'a CudaBuffer),
    /// A buffer, as a pointer to the element of that number.
    At(&'a CudaBuffer, usize),
    /// A null pointer, for an output or input that is left out.
    Null,
    /// `int`.
    Int(i32),
    /// An extent as `int`; a launch refuses one of 2^31 or more.
    Extent(usize),
    /// `long long`.
    Long(i64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
    /// `__grid_constant__ const TensorMap`.
    Map(&'a TensorMap),
    /// A `__grid_constant__` struct.
    Table(&'a Table<'a>),
}

impl Arg<'_> {
    /// An extent as `int`.
    pub fn int(n: usize) -> Self {
        Arg::Extent(n)
    }
}

/// The value that a parameter points to.
#[repr(C, align(64))]
union Value {
    address: Address,
    int: i32,
    long: i64,
    f32: f32,
    f64: f64,
    map: api::TensorMap,
}

impl CudaDevice {
    /// The machine architecture that kernels are compiled for.
    pub fn architecture(&self) -> String {
        match self.properties().capability {
            (9, 0) => "sm_90a".into(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// The kernel of that name; its module is compiled and loaded at the first use.
    ///
    /// # Errors
    /// When NVRTC is not there, the source does not compile, or the driver refuses the module.
    pub fn kernel(&self, unit: &Unit, name: &'static str) -> Result<Kernel> {
        let inner = &*self.0;
        inner.enter(name)?;
        let key = unit.key();
        let mut modules = lock(&inner.modules);
        let module = match modules.entry(key) {
            Entry::Occupied(module) => module.into_mut(),
            Entry::Vacant(place) => {
                let folder = inner.options.kernels.as_deref();
                let cubin = self.compiler()?.cached(unit, &self.architecture(), folder)?;
                place.insert(Module { handle: self.load(name, &cubin)?, functions: HashMap::new() })
            }
        };
        let function = match module.functions.get(name) {
            Some(&function) => function,
            None => {
                let function = self.function(module.handle, name)?;
                module.functions.insert(name, function);
                function
            }
        };
        Ok(Kernel { device: self.clone(), function, name })
    }

    /// A function of loaded code, which may ask for as much shared memory as the card has.
    fn function(&self, module: Pointer, name: &'static str) -> Result<Pointer> {
        let inner = &*self.0;
        let (mut function, c_name) = (std::ptr::null_mut(), CString::new(name).expect("no zero in a name"));
        // SAFETY: the module is loaded and the name ends with a zero.
        let status = unsafe { (inner.driver.module_function)(&mut function, module, c_name.as_ptr()) };
        inner.check(name, "cuModuleGetFunction", status)?;
        let mut own = 0;
        // SAFETY: the function exists; the driver writes one integer.
        let status = unsafe { (inner.driver.function_get)(&mut own, api::STATIC_SHARED, function) };
        inner.check(name, "cuFuncGetAttribute", status)?;
        let most = self.properties().shared_per_block as c_int - own;
        // SAFETY: the function exists; with its own share the value is the limit that the card names.
        let status = unsafe { (inner.driver.function_set)(function, api::MAX_DYNAMIC_SHARED, most) };
        inner.check(name, "cuFuncSetAttribute", status)?;
        Ok(function)
    }

    fn load(&self, op: &'static str, cubin: &[u8]) -> Result<Pointer> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver checks the image, whose own header says how long it is.
        let status = unsafe { (self.0.driver.module_load)(&mut handle, cubin.as_ptr().cast()) };
        self.0.check(op, "cuModuleLoadData", status)?;
        Ok(handle)
    }

    /// Describes a batch of matrices of bf16 to the copy engine, which then copies boxes of `box_rows` by 64 elements in the
    /// 128-byte swizzle; what lies outside reads as zero. `first` is the first element, `[width, rows, batch]` the extents, and
    /// rows lie `stride` elements apart, matrices `rows * stride`.
    ///
    /// # Errors
    /// When the extents do not fit the buffer, or the driver refuses them.
    pub fn tensor_map(
        &self,
        (buffer, first, stride): (&CudaBuffer, usize, usize),
        [width, rows, batch]: [usize; 3],
        box_rows: u32,
    ) -> Result<TensorMap> {
        let op = "tensor_map";
        let last = first + (batch * rows).saturating_sub(1) * stride + width;
        ensure!(
            width <= stride && last <= buffer.len(),
            op,
            "[{batch}, {rows}, {width}], {stride} apart, in {buffer:?}"
        );
        let mut map = api::TensorMap([0; 16]);
        let (sizes, strides) =
            ([width, rows, batch].map(|n| n as u64), [stride * 2, rows * stride * 2].map(|n| n as u64));
        let (boxes, steps) = ([64u32, box_rows, 1], [1u32; 3]);
        const BF16: c_int = 9;
        const SWIZZLE_128: c_int = 3;
        const PROMOTE_256: c_int = 3;
        let address = buffer.address() + (first * buffer.kind().size()) as Address;
        let pointers = (sizes.as_ptr(), strides.as_ptr(), boxes.as_ptr(), steps.as_ptr());
        let encode = self.0.driver.tensor_map;
        // SAFETY: the arrays have three entries (strides two), as the rank says; the map is written by the driver.
        let status = unsafe {
            let (sizes, strides, boxes, steps) = pointers;
            encode(&mut map, BF16, 3, address, sizes, strides, boxes, steps, 0, SWIZZLE_128, PROMOTE_256, 0)
        };
        self.0.check(op, "cuTensorMapEncodeTiled", status)?;
        Ok(TensorMap(map))
    }
}

/// An extent as kernels count it.
fn extent(kernel: &'static str, n: usize) -> Result<i32> {
    let wide = |_| Error::invalid(kernel, format!("an extent of {n}: kernels count to 2^31 - 1"));
    i32::try_from(n).map_err(wide)
}

impl Kernel {
    /// Asks for a run, which begins when everything asked for before has ended; of an early one see [`Grid::early`].
    ///
    /// # Errors
    /// When a buffer lives on another device, an extent is 2^31 or more, or the driver refuses the launch.
    ///
    /// # Safety
    /// The arguments must be the kernel's parameters in number, order and type, and the kernel must stay inside the buffers
    /// for these extents.
    pub unsafe fn launch(&self, grid: Grid, args: &[Arg]) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let inner = &*self.device.0;
        inner.enter(self.name)?;
        let mut values = Vec::with_capacity(args.len());
        for arg in args {
            values.push(self.value(arg)?);
        }
        let tables: Vec<Vec<Address>> = args
            .iter()
            .filter_map(|arg| if let Arg::Table(table) = arg { Some(table.filled()) } else { None })
            .collect();
        let mut tables = tables.iter();
        let pointer = |(value, arg): (&Value, &Arg)| match arg {
            Arg::Table(_) => tables.next().map_or(std::ptr::null_mut(), |words| words.as_ptr().cast_mut().cast()),
            _ => std::ptr::from_ref(value).cast_mut().cast::<c_void>(),
        };
        let mut pointers: Vec<Pointer> = values.iter().zip(args).map(pointer).collect();
        let blocks = grid.blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let attribute = |id, of: [u32; 3]| {
            let mut attribute = LaunchAttribute { id, pad: 0, value: [0; 16] };
            attribute.value[..3].copy_from_slice(&of);
            attribute
        };
        let clustered = grid.cluster > 0;
        let early = grid.early && self.device.properties().capability.0 >= 9;
        let attributes = [
            clustered.then(|| attribute(api::CLUSTER_DIMENSION, [grid.cluster, 1, 1])),
            early.then(|| attribute(api::PROGRAMMATIC_SERIALIZATION, [1, 0, 0])),
        ];
        let attributes: Vec<LaunchAttribute> = attributes.into_iter().flatten().collect();
        let config = LaunchConfig {
            blocks,
            threads: [grid.threads, 1, 1],
            shared_bytes: grid.shared,
            stream: inner.stream,
            attributes: attributes.as_ptr(),
            attribute_count: attributes.len() as u32,
        };
        // SAFETY: the configuration and the values outlive the call, which copies them; the rest is the caller's contract.
        let status =
            unsafe { (inner.driver.launch)(&config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        if status == 0 {
            return Ok(());
        }
        let call = format!("the launch of {grid:?}");
        inner.check(self.name, &call, status)
    }

    fn value(&self, arg: &Arg) -> Result<Value> {
        let address = |buffer: &CudaBuffer, element: usize| {
            let same = std::sync::Arc::ptr_eq(&buffer.device().0, &self.device.0);
            let on = || format!("{buffer:?} lives on {:?}, the kernel on {:?}", buffer.device(), self.device);
            if same {
                Ok(buffer.address() + (element * buffer.kind().size()) as Address)
            } else {
                Err(Error::invalid(self.name, on()))
            }
        };
        Ok(match *arg {
            Arg::Buffer(buffer) => Value { address: address(buffer, 0)? },
            Arg::At(buffer, element) => Value { address: address(buffer, element)? },
            Arg::Null => Value { address: 0 },
            Arg::Int(int) => Value { int },
            Arg::Extent(n) => Value { int: extent(self.name, n)? },
            Arg::Long(long) => Value { long },
            Arg::F32(f32) => Value { f32 },
            Arg::F64(f64) => Value { f64 },
            Arg::Map(map) => Value { map: map.0 },
            // its words are passed themselves
            Arg::Table(table) => {
                table.buffers.iter().try_for_each(|buffer| address(buffer, 0).map(|_| ()))?;
                Value { address: 0 }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_that_a_kernel_cannot_count_is_refused() {
        assert_eq!(extent("softmax", i32::MAX as usize).unwrap(), i32::MAX);
        let told = extent("softmax", 1 << 31).unwrap_err().to_string();
        assert_eq!(told, "softmax: an extent of 2147483648: kernels count to 2^31 - 1");
    }
}
