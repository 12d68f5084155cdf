//! The ops on buffers of a CUDA device: each op's `cuda.rs` launches the kernels of its `kernel.cu`. Here are the list of what
//! there is to compile, what the launches share, and the harness of their tests.

pub(crate) use super::adamw::cuda as adamw;
pub(crate) use super::cross_entropy::cuda as cross_entropy;
pub(crate) use super::documents::cuda as documents;
pub(crate) use super::elementwise::cuda as elementwise;
pub(crate) use super::embedding::cuda as embedding;
pub(crate) use super::entmax::cuda as entmax;
pub(crate) use super::gated_sum::cuda as gated_sum;
pub(crate) use super::grad_norm::cuda as grad_norm;
pub(crate) use super::heads::cuda as heads;
pub(crate) use super::layout::cuda as layout;
pub(crate) use super::muon::cuda as muon;
pub(crate) use super::reduce::cuda as reduce;
pub(crate) use super::rmsnorm::cuda as rmsnorm;
pub(crate) use super::rope::cuda as rope;
pub(crate) use super::softmax::cuda as softmax;
pub(crate) use super::spike_guard::cuda as spike_guard;
pub(crate) use super::swiglu::cuda as swiglu;

use crate::device::cuda::{Arg, CudaBuffer, Kind, Source, Unit};
use crate::error::{Result, ensure};

/// Attention on buffers, for benchmarks: extents, kinds and lists are checked.
pub mod attention {
    pub use crate::ops::attention::cached::cuda as cached;
    pub use crate::ops::attention::cuda::{BlockMask, Gradients, Operands, backward, forward};
}

/// Every source under every set of definitions that a launch may ask for.
pub fn units() -> Vec<Unit> {
    let ops = [
        adamw::units(),
        super::attention::cuda::units(),
        super::attention::cached::cuda::units(),
        crate::device::cuda::contest::units(),
        cross_entropy::units(),
        documents::units(),
        elementwise::units(),
        embedding::units(),
        entmax::units(),
        gated_sum::units(),
        grad_norm::units(),
        heads::units(),
        layout::units(),
        muon::units(),
        reduce::units(),
        rmsnorm::units(),
        rope::units(),
        softmax::units(),
        spike_guard::units(),
        swiglu::units(),
    ];
    ops.into_iter().flatten().collect()
}

/// A source for numbers of kind X that are computed in R, `at_once` in one access of a thread.
pub(crate) fn unit_at_once(source: &'static Source, x: Kind, at_once: usize) -> Unit {
    let [x, r] = [("X", x), ("R", wide(x))].map(|(name, kind)| (name, kind.source_name().to_string()));
    Unit::new(source, [x, r, ("AT_ONCE", at_once.to_string())])
}

/// What sums of numbers of a kind are computed in.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::F64 { Kind::F64 } else { Kind::F32 }
}

/// A number as an argument of type `float` or `double`.
pub(crate) fn real<'a>(kind: Kind, x: f64) -> Arg<'a> {
    if kind == Kind::F64 { Arg::F64(x) } else { Arg::F32(x as f32) }
}

/// Infinity in a source.
pub(crate) fn infinity(kind: Kind) -> &'static str {
    match kind {
        Kind::F64 => "__longlong_as_double(0x7ff0000000000000ll)",
        Kind::F32 | Kind::Bf16 | Kind::U32 | Kind::U64 => "__int_as_float(0x7f800000)",
    }
}

/// Refuses buffers of different kinds or lengths.
pub(crate) fn alike(op: &'static str, buffers: &[&CudaBuffer]) -> Result<()> {
    same(op, buffers)?;
    same_len(op, buffers)
}

/// Refuses buffers of different lengths.
pub(crate) fn same_len(op: &'static str, buffers: &[&CudaBuffer]) -> Result<()> {
    let len = buffers[0].len();
    ensure!(buffers.iter().all(|b| b.len() == len), op, "buffers of different lengths: {buffers:?}");
    Ok(())
}

/// Refuses buffers of different kinds.
pub(crate) fn same(op: &'static str, buffers: &[&CudaBuffer]) -> Result<()> {
    let kind = buffers[0].kind();
    ensure!(buffers.iter().all(|b| b.kind() == kind), op, "buffers of different kinds: {buffers:?}");
    Ok(())
}

/// Number of rows `width` wide.
pub(crate) fn rows(op: &'static str, x: &CudaBuffer, width: usize) -> Result<usize> {
    ensure!(width > 0 && x.len().is_multiple_of(width), op, "{x:?} in rows of {width}");
    Ok(x.len() / width)
}

#[cfg(test)]
pub(crate) mod testing {
    //! Launches are compared with the CPU's op in f64 on the same numbers. Where there is no card a test says so and passes.

    use std::path::PathBuf;
    use std::sync::OnceLock;

    use crate::Tensor;
    use crate::device::cuda::{CudaBuffer, CudaDevice, CudaOptions, Kind};
    use crate::error::Result;
    use crate::tape::{Tape, Var};
    use crate::testing::{bf16, normal};

    /// Where the harness looks for libraries: the folders in `DASH_CUDA`, then the usual place.
    pub fn folders() -> Vec<PathBuf> {
        let named = std::env::var_os("DASH_CUDA").unwrap_or_default();
        std::env::split_paths(&named).filter(|p| p.is_absolute()).chain(["/usr/local/cuda/lib64".into()]).collect()
    }

    /// Where the harness keeps compiled kernels: the folder in `DASH_CUDA_KERNELS`, nowhere without it.
    pub fn kernels() -> Option<PathBuf> {
        std::env::var_os("DASH_CUDA_KERNELS").map(PathBuf::from).filter(|p| p.is_absolute())
    }

    /// The card, on a device that poisons new memory.
    pub struct Gpu(CudaDevice);

    /// The first card, or `None`, said aloud, where there is none.
    pub fn cuda() -> Option<&'static Gpu> {
        static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
        let open = || {
            let options =
                CudaOptions { folders: folders(), kernels: kernels(), poison: true, ..CudaOptions::default() };
            CudaDevice::new(options).map(Gpu).map_err(|e| eprintln!("not run: no GPU here. {e}")).ok()
        };
        let gpu = GPU.get_or_init(open).as_ref();
        if gpu.is_none() {
            eprintln!("not run: {} needs a GPU", std::thread::current().name().unwrap_or("this test"));
        }
        gpu
    }

    impl Gpu {
        pub fn cuda(&self) -> &CudaDevice {
            &self.0
        }

        pub fn device(&self) -> crate::Device {
            crate::Device::Cuda(self.0.clone())
        }

        /// The numbers of a tensor on the card.
        pub fn tensor(&self, x: &Tensor, kind: Kind) -> CudaBuffer {
            let x = x.to_f64().unwrap();
            match kind {
                Kind::F64 => self.0.upload("test", &x),
                Kind::F32 => self.0.upload("test", &x.iter().map(|&x| x as f32).collect::<Vec<_>>()),
                Kind::Bf16 => {
                    let bits = |x: &f64| ((bf16(*x) as f32).to_bits() >> 16) as u16;
                    self.0.upload("test", &x.iter().map(bits).collect::<Vec<_>>())
                }
                Kind::U32 | Kind::U64 => panic!("a tensor holds numbers"),
            }
            .unwrap()
        }

        /// The numbers of a buffer.
        pub fn numbers(&self, x: &CudaBuffer) -> Vec<f64> {
            numbers(x)
        }

        /// Runs 20 times, with other launches of other sizes between, and asserts the same bits.
        pub fn same_bits(&self, run: impl Fn() -> Result<Vec<CudaBuffer>>) {
            let bits = |buffers: Vec<CudaBuffer>| -> Vec<Vec<u64>> {
                buffers.iter().map(|b| numbers(b).iter().map(|x| x.to_bits()).collect()).collect()
            };
            let first = bits(run().unwrap());
            for i in 0..20 {
                let load = self.0.zeros("load", Kind::F32, 1 << (10 + i % 12)).unwrap();
                crate::ops::reduce::cuda::sum_axis(&load, (1, load.len(), 1)).unwrap();
                assert!(first == bits(run().unwrap()), "run {i} has other bits");
            }
        }
    }

    fn numbers(x: &CudaBuffer) -> Vec<f64> {
        match x.kind() {
            Kind::F64 => x.download::<f64>().unwrap(),
            Kind::F32 => x.download::<f32>().unwrap().into_iter().map(f64::from).collect(),
            Kind::Bf16 => {
                let widen = |b: u16| f64::from(f32::from_bits(u32::from(b) << 16));
                x.download::<u16>().unwrap().into_iter().map(widen).collect()
            }
            Kind::U32 => x.download::<u32>().unwrap().into_iter().map(f64::from).collect(),
            Kind::U64 => x.download::<u64>().unwrap().into_iter().map(|x| x as f64).collect(),
        }
    }

    /// Normals in f64 on the CPU, each rounded to the kind that the card will hold.
    pub fn tensors(shapes: &[(&[usize], Kind)]) -> Vec<Tensor> {
        let device = crate::testing::device();
        let make = |(i, &(shape, kind)): (usize, &(&[usize], Kind))| {
            let x = normal(&device, shape, i as u64 + 1);
            let round = |x: f64| match kind {
                Kind::Bf16 => bf16(x),
                Kind::F32 => f64::from(x as f32),
                _ => x,
            };
            Tensor::from_vec(&device, shape, x.to_f64().unwrap().into_iter().map(round).collect()).unwrap()
        };
        shapes.iter().enumerate().map(make).collect()
    }

    /// What the CPU computes of the first `N` inputs: the op's value and their gradients, for the gradient of the value that the
    /// input after them is, or of the value itself where there is none.
    pub fn reference<const N: usize>(
        inputs: &[Tensor],
        op: impl FnOnce(&Tape, &[Var; N]) -> Result<Var>,
    ) -> (Tensor, [Tensor; N]) {
        let tape = Tape::new();
        let vars = std::array::from_fn(|i| tape.leaf(inputs[i].clone()));
        let out = op(&tape, &vars).unwrap();
        let grads = match inputs.get(N) {
            Some(dy) => tape.backward_from(&out, dy.clone()),
            None => tape.backward(&out),
        };
        let grads = grads.unwrap();
        (out.value, vars.map(|var| grads.get(&var).unwrap().clone()))
    }

    /// (what is computed in, what comes out): the three that ops are compiled for.
    pub fn kinds() -> [(Kind, Kind); 3] {
        [(Kind::F32, Kind::Bf16), (Kind::F32, Kind::F32), (Kind::F64, Kind::F64)]
    }

    /// The largest error, over the largest number, that the arithmetic leaves room for.
    #[derive(Debug, Clone, Copy)]
    pub struct Bound(f64);

    impl Bound {
        /// Sums of `terms` products in `number` (a rounding each, and a few around them), the result rounded to `out`: twice the
        /// half unit in the last place of a bf16.
        pub fn of(number: Kind, out: Kind, terms: usize) -> Self {
            let unit = if number == Kind::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) } / 2.0;
            Bound(unit * (8.0 + terms as f64) + if out == Kind::Bf16 { 2.0 / 512.0 } else { 0.0 })
        }
        /// Where more than the result is rounded.
        pub fn relative(error: f64) -> Self {
            Bound(error)
        }
        /// Numbers that only move.
        pub fn exact() -> Self {
            Bound(0.0)
        }
    }

    /// Asserts that the numbers agree, and that every one was written.
    pub fn compare(name: &str, got: &CudaBuffer, want: &Tensor, bound: Bound) {
        let (got, want) = (numbers(got), want.to_f64().unwrap());
        assert_eq!(got.len(), want.len(), "{name}");
        assert!(want.iter().all(|x| x.is_finite()), "{name}: the reference is finite");
        let scale = want.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let error = (g - w).abs() / scale;
            assert!(
                error <= bound.0,
                "{name}: element {i} is {g}, the CPU in f64 has {w}: off by {error:e} > {bound:?}"
            );
        }
    }
}

#[cfg(test)]
mod parity;

#[cfg(test)]
mod restricted;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Compiler;

    /// Every source under every set of definitions compiles for Hopper without a spill or a stack, and no kernel exchanges anything
    /// through a restricted pointer. No GPU is needed.
    #[test]
    fn every_kernel_compiles() {
        let compiler = match Compiler::open(&testing::folders()) {
            Ok(compiler) => compiler,
            Err(e) => return eprintln!("not run: no NVRTC. {e}"),
        };
        eprintln!("{compiler:?}");
        let (mut keys, mut used, mut faults) = (std::collections::HashSet::new(), Default::default(), Vec::new());
        for unit in units() {
            assert!(keys.insert(unit.key()), "{} is listed twice", unit.key());
            let compiled = compiler.compile(&unit, "sm_90a").unwrap_or_else(|e| panic!("{e}"));
            assert!(compiled.cubin.starts_with(b"\x7fELF"), "{} is no cubin", unit.key());
            assert!(!compiled.resources.is_empty(), "{} has no kernel", unit.key());
            if let Some(folder) = testing::kernels() {
                compiler.keep(&unit, "sm_90a", &folder, &compiled.cubin).unwrap();
            }
            faults.extend(restricted::faults(&unit, &compiled.ptx, &mut used));
            for r in &compiled.resources {
                eprintln!("{:60} {:24} {:4} registers", unit.key(), r.kernel, r.registers);
                assert!(r.spills == 0 && r.stack == 0, "{} spills: {r:?}", unit.key());
                assert!(!r.serialized, "{}: products wait for each other: {r:?}", unit.key());
            }
        }
        assert!(faults.is_empty(), "{}", faults.join("\n"));
        assert!(used.iter().all(|used| *used), "an exception of restricted.rs is not needed: {used:?}");
    }
}
