//! The thread pool, and every op at every instruction set of this processor, with the same bits.

use super::level::{Level, available};
use super::*;
use crate::device::Device;
use crate::error::Result;
use crate::ids::{IGNORE, Ids};
use crate::number::DType;
use crate::ops::attention::{
    Center, Entmax, Pooling, RouterGradient, Routes, Span, WindowChoice, block_attention, chunk_summary,
    dense_attention, entmax_routing, span_attention, topk_routing, window_routing,
};
use crate::ops::{self, AdamW, RopeTable};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::testing::normal;

/// Tokens of attention: more than a tile of queries, and a ragged chunk. Miri, a thousand times slower, takes fewer.
const TOKENS: usize = if cfg!(miri) { 21 } else { 137 };

/// Outputs and gradients of every op that runs a loop of its own, on awkward lengths; what a list of blocks holds as numbers.
struct Run {
    device: Device,
    dtype: DType,
    results: Vec<(&'static str, Vec<u64>)>,
}

impl Run {
    fn input(&self, shape: &[usize], seed: u64) -> Tensor {
        normal(&self.device, shape, seed).to_dtype(self.dtype).unwrap()
    }

    fn keep(&mut self, name: &'static str, x: &Tensor) {
        self.results.push((name, x.to_f64().unwrap().into_iter().map(f64::to_bits).collect()));
    }

    fn keep_list(&mut self, name: &'static str, routes: &Routes) {
        let list = routes.to_host().unwrap();
        let (batch, heads, queries) = list.extents();
        let places = (0..batch * heads * queries).map(|i| (i / (heads * queries), i / queries % heads, i % queries));
        let lists = places.flat_map(|(b, g, t)| list.chunks_of(b, g, t).iter().map(|&c| c as u64).chain([u64::MAX]));
        let lists = lists.collect();
        self.results.push((name, lists));
    }

    /// The op's output and all its gradients.
    fn op(&mut self, name: &'static str, shapes: &[&[usize]], f: impl Fn(&Tape, &[Var]) -> Result<Var>) {
        let tape = Tape::new();
        let inputs = shapes.iter().zip(1..).map(|(shape, seed)| tape.leaf(self.input(shape, seed)));
        let inputs: Vec<Var> = inputs.collect();
        let y = f(&tape, &inputs).unwrap();
        self.keep(name, &y.value);
        let seed = self.input(y.value.shape(), 99);
        let grads = tape.backward_from(&y, seed).unwrap();
        for x in &inputs {
            if let Some(grad) = grads.get(x) {
                self.keep(name, grad);
            }
        }
    }

    fn products(&mut self) {
        for rows in if cfg!(miri) { vec![1, 9] } else { vec![1, 37, 300] } {
            self.op("linear", &[&[rows, 130], &[67, 130]], |t, v| ops::linear(t, &v[0], &v[1]));
        }
        // a long inner axis in parts, and rows that are copied where they conflict in a cache
        self.op("linear", &[&[520, 9], &[8, 9]], |t, v| ops::linear(t, &v[0], &v[1]));
        if !cfg!(miri) {
            self.op("linear", &[&[2100, 33], &[40, 33]], |t, v| ops::linear(t, &v[0], &v[1]));
            self.op("linear", &[&[150, 512], &[128, 512]], |t, v| ops::linear(t, &v[0], &v[1]));
        }
        self.op("linear_add", &[&[37, 50], &[67, 50], &[37, 67]], |t, v| ops::linear_add(t, &v[0], &v[1], &v[2]));
        self.op("matmul", &[&[2, 5, 33], &[2, 33, 17]], |t, v| ops::matmul(t, &v[0], &v[1]));
        let (rows, f) = if cfg!(miri) { (7, 40) } else { (300, 200) };
        let shapes: [&[usize]; 5] = [&[rows, 33], &[f, 33], &[f, 33], &[33, f], &[rows, 33]];
        self.op("swiglu", &shapes, |t, v| ops::swiglu(t, &v[0], [&v[1], &v[2], &v[3]], Some(&v[4])));
        self.op("cross entropy", &[&[37, 20], &[97, 20]], |t, v| {
            let targets: Vec<u32> = (0..37).map(|i| if i == 5 { IGNORE } else { i * 7 % 97 }).collect();
            let targets = Ids::new(v[0].value.device(), &[37], &targets)?;
            ops::linear_cross_entropy(t, &v[0], &v[1], &targets, 36.0)
        });
    }

    fn rows(&mut self) {
        self.op("rmsnorm", &[&[70, 37], &[37]], |t, v| ops::rmsnorm(t, &v[0], &v[1], 1e-5));
        self.op("softmax", &[&[9, 37]], |t, v| ops::softmax(t, &v[0]));
        for alpha in [1.25, 1.5, 2.0] {
            self.op("entmax", &[&[9, 37]], |t, v| ops::entmax(t, &v[0], alpha));
        }
        self.op("rope", &[&[2, 37, 3, 10]], |t, v| {
            let table = RopeTable::new(v[0].value.device(), v[0].value.dtype(), 37, 10, 1e4)?;
            ops::rope(t, &v[0], &table, 0)
        });
        self.op("elementwise", &[&[7, 37], &[7, 37]], |t, v| {
            let (sum, product) = (ops::add(t, &v[0], &v[1])?, ops::mul(t, &v[0], &v[1])?);
            ops::sub(t, &ops::sigmoid(t, &sum)?, &ops::exp(t, &ops::scale(t, &product, 0.1)?)?)
        });
        let settings = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.5, step: 3 };
        let scale = Tensor::full(&self.device, &[], DType::F64, 0.25).unwrap();
        let mut state = [1, 2, 3].map(|seed| self.input(&[1037], seed));
        let grad = self.input(&[1037], 4);
        let [p, m, v] = &mut state;
        let squares = ops::mul(&Tape::new(), &Tape::new().leaf(v.clone()), &Tape::new().leaf(v.clone()));
        *v = squares.unwrap().value;
        ops::adamw(settings, p, m, v, &grad, &scale).unwrap();
        state.iter().for_each(|x| self.keep("adamw", x));
        let (mut p, mut m) = (self.input(&[37, 70], 5), self.input(&[37, 70], 6));
        let settings = ops::Muon { momentum: 0.95, step: 0.1, decay: 0.01 };
        ops::muon(settings, &mut p, &mut m, &self.input(&[37, 70], 7), &scale).unwrap();
        [p, m].iter().for_each(|x| self.keep("muon", x));
        let norm = ops::grad_norm(&self.device, [&grad]).unwrap();
        self.keep("grad_norm", &norm);
    }

    fn attention(&mut self) {
        let (q, kv): (&[usize], &[usize]) = (&[2, TOKENS, 6, 9], &[2, TOKENS, 2, 9]);
        self.op("dense attention", &[q, kv, kv], |t, v| dense_attention(t, &v[0], &v[1], &v[2]));
        for (span, alpha) in [(Span::Sliding(20), 1.0), (Span::Causal, 1.5)] {
            self.op("span attention", &[q, kv, kv], |t, v| span_attention(t, &v[0], &v[1], &v[2], span, alpha));
        }
        self.op("chunk summary", &[kv, &[2, 9]], |t, v| chunk_summary(t, &v[0], &v[1], 8));
        let full = Entmax {
            chunk_size: 8,
            alpha: 1.5,
            gamma: 2.0,
            sigma: 1.5,
            center: Center::Mean,
            gradient: RouterGradient::Full,
        };
        for settings in [full, Entmax { gradient: RouterGradient::StraightThrough, ..full }] {
            let shapes: [&[usize]; 5] = [q, kv, kv, &[2, TOKENS / 8, 2, 9], &[2]];
            self.op("routed attention", &shapes, |t, v| {
                let routing = entmax_routing(t, &v[0], &v[3], Some(&v[4]), settings)?;
                block_attention(t, &v[0], &v[1], &v[2], &routing.routes, Some(&routing.bias))
            });
        }
        let (q, kbar) = (self.input(q, 1), self.input(&[2, TOKENS / 8, 2, 9], 2));
        let list = topk_routing(&q, &kbar, 8, 4, 1.0).unwrap();
        self.keep_list("top-k routing", &list);
        let windows = Span::Windows { length: 8, stride: 4 };
        let keys = self.input(&[2, windows.keys(TOKENS), 2, 9], 3);
        for pooling in [Pooling::Max, Pooling::Overlap] {
            let choice = WindowChoice { chunk_size: 8, top: 5, length: 8, stride: 4, init: 1, local: 2, pooling };
            self.keep_list("window routing", &window_routing(&q, &keys, choice).unwrap());
        }
    }
}

fn run(level: Level, dtype: DType) -> Vec<(&'static str, Vec<u64>)> {
    let device = CpuDevice::at_level(2, level);
    let mut run = Run { device: Device::Cpu(device.clone()), dtype, results: Vec::new() };
    // on a worker, so that what no task does runs at the level, too
    device.enter(move || {
        assert_eq!(level::level(), level);
        run.products();
        run.rows();
        run.attention();
        run.results
    })
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_baseline() {
    for dtype in [DType::F32, DType::F64] {
        let want = run(Level::Baseline, dtype);
        assert!(want.iter().all(|(_, bits)| !bits.is_empty()));
        for level in available().skip(1) {
            for ((name, want), (_, got)) in want.iter().zip(run(level, dtype)) {
                assert!(got == *want, "{name} in {dtype:?} at {level:?} differs from the baseline");
            }
        }
    }
}

#[test]
fn every_task_runs_once_and_its_result_stands_in_its_place() {
    for threads in [1, 2, 5] {
        let device = CpuDevice::new(threads, false).unwrap();
        for tasks in [0, 1, 2, 3, 64] {
            let mut counts = vec![0u32; 3 * tasks];
            // work inside work
            device.for_pieces(&mut counts, 3, |i, piece| {
                let inner: usize = device.map(4, |j| i * j).into_iter().sum();
                piece.iter_mut().for_each(|n| *n += (inner + 1) as u32);
            });
            let want: Vec<u32> = (0..3 * tasks).map(|n| (n / 3 * 6 + 1) as u32).collect();
            assert_eq!(counts, want, "{threads} threads, {tasks} tasks");
            assert_eq!(device.map(tasks, |i| 7 * i), (0..tasks).map(|i| 7 * i).collect::<Vec<_>>());
            let seen = Mutex::new(Vec::new());
            device.for_each((0..tasks).collect(), |i| seen.lock().unwrap().push(i));
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert_eq!(seen, (0..tasks).collect::<Vec<_>>());
        }
    }
}

#[test]
fn ordered_sum_does_not_depend_on_threads() {
    let x: Vec<f64> = (0..100_000).map(|i| ((i * 7919) % 1009) as f64 * 1e-3).collect();
    let sum = |threads| CpuDevice::new(threads, false).unwrap().ordered_sum(x.len(), 977, |r| x[r].iter().sum());
    assert_eq!(sum(1).to_bits(), sum(5).to_bits());
}
