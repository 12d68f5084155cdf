use super::*;
use crate::device::cuda::CudaBuffer;
use crate::device::cuda::Kind::{Bf16, F32};
use crate::ops::attention::{HostRoutes, Routes, block_attention};
use crate::ops::cuda::testing::{Gpu, cuda, tensors};
use crate::tape::Tape;
use crate::testing::{attention_of_operands, bf16};
use crate::{Device, Tensor, testing};

/// Shapes with odd lengths, every group size, every head width (two of them padded) and every chunk size.
const SHAPES: [([usize; 5], usize); 22] = [
    ([1, 1, 1, 1, 32], 16),
    ([2, 5, 2, 1, 64], 16),
    ([1, 37, 3, 1, 64], 16),
    ([1, 63, 4, 2, 128], 32),
    ([1, 97, 12, 2, 64], 32),
    ([2, 129, 4, 4, 32], 64),
    ([1, 257, 8, 1, 64], 64),
    ([1, 257, 12, 1, 128], 16),
    ([1, 200, 16, 1, 128], 64),
    ([1, 300, 5, 1, 64], 128),
    ([1, 150, 4, 2, 16], 4),
    ([1, 131, 6, 2, 24], 8),
    ([1, 140, 3, 1, 128], 4),
    ([2, 97, 2, 2, 8], 8),
    ([1, 210, 12, 1, 96], 64),
    ([2, 450, 6, 2, 64], 64),
    ([1, 420, 4, 2, 64], 64),
    ([1, 330, 2, 2, 64], 64),
    ([2, 210, 10, 2, 40], 64),
    ([1, 330, 16, 1, 64], 64),
    ([1, 330, 8, 2, 64], 64),
    ([2, 210, 6, 2, 48], 64),
];

fn dims([b, t, h, g, d]: [usize; 5]) -> Dims {
    Dims { b, t, h, g, d }
}

/// About half of the earlier chunks, another half for every query.
fn routes(device: &Device, dims: Dims, chunk: usize) -> Routes {
    let mut rng = crate::rng::Rng::new(7);
    let choose = |_, _, query: usize, chosen: &mut Vec<u32>| {
        chosen.extend((0..(query / chunk) as u32).filter(|_| rng.uniform() < 0.5));
    };
    Routes::from_choice(device, (dims.b, dims.g, dims.t), chunk, choose).unwrap()
}

/// q, k, v and the gradient of the output, rounded to bf16.
fn inputs(dims: Dims) -> Vec<Tensor> {
    let (wide, narrow) = ([dims.b, dims.t, dims.h, dims.d], [dims.b, dims.t, dims.g, dims.d]);
    tensors(&[(&wide, Bf16), (&narrow, Bf16), (&narrow, Bf16), (&wide, Bf16)])
}

/// The largest error over the largest number; infinite where one is no number.
pub(super) fn error(got: &[f64], want: &[f64]) -> f64 {
    error_to(f64::MIN_POSITIVE, got, want)
}

/// The largest error over the largest number, or over `least` where that is more.
fn error_to(least: f64, got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(least, |m, x| m.max(x.abs()));
    let far = |(g, w): (&f64, &f64)| if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
    got.iter().zip(want).map(far).fold(0.0, f64::max)
}

/// Gradients by the kernels that these extents choose, and by the one that longer sequences choose, where it takes them.
fn gradients(
    dims: Dims,
    operands: Operands,
    (mask, bias): (Option<&BlockMask>, Option<&CudaBuffer>),
    (o, lse): (&CudaBuffer, &CudaBuffer),
    dout: &CudaBuffer,
) -> Vec<Gradients> {
    let chosen = backward(dims, operands, mask, bias, (o, lse), dout).unwrap();
    let pass = Pass::listed("attention", dims, operands, mask, bias).unwrap();
    assert!(!pass.sides_are_joint(), "{dims:?}: one way is not tested");
    let joint = pass.rows_may_be_gathered().then(|| {
        let delta = pass.delta(o, dout).unwrap();
        pass.joint([dout, lse, &delta], joint::Order { together: 1, chains: 2 }).unwrap()
    });
    [chosen].into_iter().chain(joint).collect()
}

/// Asserts that numbers are those of another order of sums: off by `terms` times what rounding to 24 bits changes of the largest, at most.
pub(super) fn differ_by_rounding(name: &str, of_one: &[f64], got: &[f64], terms: f64) {
    let (far, bound) = (error(got, of_one), terms / f64::from(1 << 24));
    assert!(far <= bound, "{name}: {far:e} of the largest, at most {bound:e}");
}

/// Hands on a pass over lists of chunks of 64 with a bias, of which chunk 0 is every query's and others are few queries', and what its backward
/// starts from: the gradient of the output, lse and delta.
pub(super) fn over_uneven_lists(gpu: &Gpu, dims: Dims, test: impl Fn(&Pass, [&CudaBuffer; 3])) {
    let host = inputs(dims);
    let card = on(gpu, &host);
    let mut rng = crate::rng::Rng::new(3);
    let choose = |_, _, query: usize, chosen: &mut Vec<u32>| {
        chosen.extend((0..(query / 64) as u32).filter(|&c| c == 0 || rng.uniform() < 0.2));
    };
    let list = Routes::from_choice(host[0].device(), (dims.b, dims.g, dims.t), 64, choose).unwrap().to_host().unwrap();
    let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
    let bias = gpu.tensor(&testing::normal(host[0].device(), &[list.len()], 5), F32);
    let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
    let (o, lse) = forward(dims, operands, Some(&mask), Some(&bias)).unwrap();
    let pass = Pass::listed("attention", dims, operands, Some(&mask), Some(&bias)).unwrap();
    let delta = pass.delta(&o, &card[3]).unwrap();
    test(&pass, [&card[3], &lse, &delta]);
}

fn on(gpu: &Gpu, tensors: &[Tensor]) -> Vec<CudaBuffer> {
    tensors.iter().map(|x| gpu.tensor(x, Bf16)).collect()
}

/// The formula with operands rounded to bf16 against itself in f64, for every output; 2^-9 for the rounding of the result itself.
fn errors_of_bf16(dims: Dims, host: &[Tensor], sees: impl Fn([usize; 4]) -> bool + Copy) -> (Vec<Vec<f64>>, Vec<f64>) {
    let numbers: Vec<Vec<f64>> = host.iter().map(|x| x.to_f64().unwrap()).collect();
    let extents = [dims.b, dims.t, dims.h, dims.d];
    let exact = attention_of_operands(&numbers, extents, dims.g, sees, |x| x);
    let rounded = attention_of_operands(&numbers, extents, dims.g, sees, bf16);
    let errors = rounded.iter().zip(&exact).map(|(r, e)| error(r, e).max(1.0 / 512.0)).collect();
    (exact, errors)
}

#[test]
fn output_and_gradients_are_as_near_as_the_formula_in_bf16() {
    let Some(gpu) = cuda() else { return };
    for (extents, chunk) in SHAPES {
        let dims = dims(extents);
        let host = inputs(dims);
        let card = on(gpu, &host);
        let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
        let list = routes(host[0].device(), dims, chunk).to_host().unwrap();
        let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
        for listed in [false, true] {
            let sees = |[b, g, i, j]: [usize; 4]| !listed || list.chunks_of(b, g, i).contains(&((j / chunk) as u32));
            let (exact, bounds) = errors_of_bf16(dims, &host, sees);
            let (o, lse) = forward(dims, operands, listed.then_some(&mask), None).unwrap();
            let far = error(&gpu.numbers(&o), &exact[0]);
            assert!(
                far <= 2.0 * bounds[0],
                "{extents:?} chunk {chunk} listed {listed}: {far:e}, formula {:e}",
                bounds[0]
            );
            assert!(gpu.numbers(&lse).iter().all(|x| x.is_finite()), "{extents:?}: every lse is written");
            let ways = gradients(dims, operands, (listed.then_some(&mask), None), (&o, &lse), &card[3]);
            let all = ways.iter().flat_map(|d| [("dq", &d.dq, 1), ("dk", &d.dk, 2), ("dv", &d.dv, 3)]);
            for (name, got, i) in all {
                let (far, bound) = (error(&gpu.numbers(got), &exact[i]), bounds[i]);
                let case = format!("{name} of {extents:?} chunk {chunk} listed {listed}");
                assert!(far <= 2.0 * bound, "{case}: {far:e}, formula {bound:e}");
            }
        }
    }
}

#[test]
fn bias_of_entries_is_added() {
    let Some(gpu) = cuda() else { return };
    for (extents, chunk) in SHAPES {
        let dims = dims(extents);
        let host = inputs(dims);
        let card = on(gpu, &host);
        let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
        let routes = routes(host[0].device(), dims, chunk);
        let list = routes.to_host().unwrap();
        let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
        let bias = testing::normal(host[0].device(), &[list.len()], 5);
        let tape = Tape::new();
        let vars: Vec<_> = host[..3].iter().map(|x| tape.leaf(x.clone())).collect();
        let leaf = tape.leaf(bias.clone());
        let want = block_attention(&tape, &vars[0], &vars[1], &vars[2], &routes, Some(&leaf)).unwrap();
        let grads = tape.backward_from(&want, host[3].clone()).unwrap();
        let by_cell = gpu.tensor(
            &Tensor::from_vec(bias.device(), &[list.len()], to_cells(&list, &bias.to_f64().unwrap())).unwrap(),
            F32,
        );
        let (o, lse) = forward(dims, operands, Some(&mask), Some(&by_cell)).unwrap();
        let sees = |[b, g, i, j]: [usize; 4]| list.chunks_of(b, g, i).contains(&((j / chunk) as u32));
        let (_, bounds) = errors_of_bf16(dims, &host, sees);
        let far = error(&gpu.numbers(&o), &want.value.to_f64().unwrap());
        assert!(far <= 2.0 * bounds[0], "{extents:?} chunk {chunk}: {far:e}, formula without bias {:e}", bounds[0]);
        let ways = gradients(dims, operands, (Some(&mask), Some(&by_cell)), (&o, &lse), &card[3]);
        for (name, got, i) in ways.iter().flat_map(|d| [("dq", &d.dq, 1), ("dk", &d.dk, 2), ("dv", &d.dv, 3)]) {
            let far = error(&gpu.numbers(got), &grads.get(&vars[i - 1]).unwrap().to_f64().unwrap());
            assert!(far <= 2.0 * bounds[i], "{name} of {extents:?} chunk {chunk}: {far:e}, formula {:e}", bounds[i]);
        }
        // An entry's sum over keys and heads of p (dp - delta) carries the error of delta = o . do, whose o is kept in bf16 and so is
        // off by 2^-9 of each product; beside it the errors of the products, which are of order one, as dq's are.
        let want_bias = to_cells(&list, &grads.get(&leaf).unwrap().to_f64().unwrap());
        let (o, dout) = (want.value.to_f64().unwrap(), host[3].to_f64().unwrap());
        let rows = o.chunks(dims.group() * dims.d).zip(dout.chunks(dims.group() * dims.d));
        let delta =
            rows.map(|(o, d)| o.iter().zip(d).map(|(o, d)| (o * d).abs()).sum::<f64>()).fold(0.0, f64::max) / 512.0;
        let bound = 2.0 * bounds[1] + delta / want_bias.iter().fold(1.0f64, |m, x| m.max(x.abs()));
        for d in ways {
            let far = error_to(1.0, &gpu.numbers(d.dbias.as_ref().unwrap()), &want_bias);
            assert!(far <= bound, "dbias of {extents:?} chunk {chunk}: {far:e} > {bound:e}");
        }
    }
}

/// Numbers of entries in the order of queries, reordered by cell.
fn to_cells(list: &HostRoutes, numbers: &[f64]) -> Vec<f64> {
    let (batch, kv_heads, queries) = list.extents();
    let mut order = Vec::new();
    for (row, query) in (0..batch * kv_heads * queries).map(|n| (n / queries, n % queries)) {
        let (b, g) = (row / kv_heads, row % kv_heads);
        for (entry, &chunk) in list.entries_of(b, g, query).zip(list.chunks_of(b, g, query)) {
            order.push(((row, query / 64, chunk, query), entry));
        }
    }
    order.sort_unstable();
    order.into_iter().map(|(_, entry)| numbers[entry]).collect()
}

/// Attended chunks with nothing between them, more of it than blocks of keys are on their way at a time.
#[test]
fn chunks_may_lie_far_apart() {
    for (heads, width) in [(16, 128), (3, 64), (4, 64)] {
        let few = |query: usize| if query.is_multiple_of(5) { vec![0, 1, 9] } else { vec![0, 9] };
        attend_these(dims([1, 1100, heads, 1, width]), few);
    }
}

/// Between two chunks that a warpgroup attends more that only its neighbours do than are on their way at a time.
#[test]
fn warpgroups_may_skip_what_their_neighbours_attend() {
    for (heads, tokens) in [(3, 64), (4, 32)] {
        let even = |query: usize| (query / tokens).is_multiple_of(2);
        attend_these(dims([1, 1100, heads, 1, 64]), |query| if even(query) { vec![0, 7] } else { (1..7).collect() });
    }
}

/// One sequence of one kv head, of whose queries each attends its own chunk and what is before it of those named.
fn attend_these(dims: Dims, chunks: impl Fn(usize) -> Vec<u32>) {
    let Some(gpu) = cuda() else { return };
    let host = inputs(dims);
    let choose = |_, _, query: usize, chosen: &mut Vec<u32>| {
        chosen.extend(chunks(query).into_iter().filter(|&c| (c as usize) < query / 64));
    };
    let list = Routes::from_choice(host[0].device(), (1, 1, dims.t), 64, choose).unwrap().to_host().unwrap();
    let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
    let card = on(gpu, &host);
    let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
    let (exact, bounds) =
        errors_of_bf16(dims, &host, |[b, g, i, j]| list.chunks_of(b, g, i).contains(&((j / 64) as u32)));
    let (o, lse) = forward(dims, operands, Some(&mask), None).unwrap();
    let ways = gradients(dims, operands, (Some(&mask), None), (&o, &lse), &card[3]);
    let all = ways.iter().flat_map(|d| [("dq", &d.dq, 1), ("dk", &d.dk, 2), ("dv", &d.dv, 3)]);
    for (name, got, i) in all.chain([("o", &o, 0)]) {
        let far = error(&gpu.numbers(got), &exact[i]);
        assert!(far <= 2.0 * bounds[i], "{name}: {far:e}, formula {:e}", bounds[i]);
    }
}

#[test]
fn entries_are_numbered_by_cell() {
    let Some(gpu) = cuda() else { return };
    for (extents, chunk) in SHAPES.into_iter().chain([([2, 3000, 2, 2, 32], 16)]) {
        let dims = dims(extents);
        let list = routes(&testing::device(), dims, chunk).to_host().unwrap();
        let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
        let cells: Vec<u64> = mask.cells().download().unwrap();
        let mut before = vec![0u32];
        cells.iter().for_each(|c| before.push(before.last().unwrap() + c.count_ones()));
        assert_eq!(mask.first().download::<u32>().unwrap(), before, "{extents:?}");
        assert_eq!(*before.last().unwrap() as usize, list.len());
    }
}

#[test]
fn same_bits_every_run() {
    let Some(gpu) = cuda() else { return };
    for (extents, chunk) in
        [([2, 700, 8, 2, 64], 32), ([1, 700, 16, 1, 128], 64), ([2, 1500, 6, 2, 64], 64), ([1, 700, 8, 2, 64], 64)]
    {
        let dims = dims(extents);
        let card = on(gpu, &inputs(dims));
        let list = routes(&testing::device(), dims, chunk).to_host().unwrap();
        let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
        let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
        for mask in [None, Some(&mask)] {
            gpu.same_bits(|| {
                let (o, lse) = forward(dims, operands, mask, None)?;
                let d = backward(dims, operands, mask, None, (&o, &lse), &card[3])?;
                Ok([o, lse, d.dq, d.dk, d.dv].into_iter().chain(d.dbias).collect())
            });
        }
    }
}
