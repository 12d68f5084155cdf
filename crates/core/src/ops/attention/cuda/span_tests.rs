use super::*;
use crate::device::cuda::Kind::Bf16;
use crate::ops::attention::span_attention as on_cpu;
use crate::ops::cuda::testing::{cuda, tensors};
use crate::ops::entmax::{entmax_row, jacobian_factor};
use crate::ops::softmax::softmax_row;
use crate::tape::Tape;
use crate::testing::bf16;

/// Odd lengths, every width in shared memory, one padded, spans that begin and end inside blocks of keys, and rows without a key.
const SHAPES: [([usize; 5], Span); 11] = [
    ([1, 1, 1, 1, 32], Span::Causal),
    ([2, 37, 3, 1, 64], Span::Causal),
    ([1, 257, 8, 2, 16], Span::Causal),
    ([1, 200, 5, 1, 128], Span::Causal),
    ([1, 300, 4, 2, 32], Span::Sliding(17)),
    ([2, 129, 16, 1, 64], Span::Sliding(1)),
    ([1, 270, 12, 2, 128], Span::Sliding(100)),
    ([1, 130, 4, 4, 24], Span::Sliding(1000)),
    ([1, 3, 2, 1, 16], Span::Windows { length: 8, stride: 4 }),
    ([2, 300, 6, 2, 64], Span::Windows { length: 32, stride: 16 }),
    ([1, 1100, 3, 1, 128], Span::Windows { length: 7, stride: 3 }),
];
const ALPHAS: [f64; 4] = [1.0, 1.5, 1.25, 2.0];

/// Output and gradients of q, k and v with loops in f64; `round` is applied to every operand of every product.
fn formula(dims: Dims, inputs: &[Vec<f64>], span: Span, alpha: f64, round: fn(f64) -> f64) -> Vec<Vec<f64>> {
    let Dims { b, t, h, g, d } = dims;
    let [q, k, v, dout] = inputs else { panic!("q, k, v and the gradient of the output") };
    let (m, scale) = (span.keys(t), 1.0 / (d as f64).sqrt());
    let mut out = vec![vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]];
    for (batch, head, i) in (0..b * h * t).map(|n| (n / (h * t), n / t % h, n % t)) {
        let query = ((batch * t + i) * h + head) * d;
        let key = |j: usize| ((batch * m + j) * g + head / (h / g)) * d;
        let dot = |x: &[f64], y: &[f64], to: usize| -> f64 { (0..d).map(|c| x[query + c] * y[to + c]).sum() };
        let mut p: Vec<f64> = span.of(i).map(|j| scale * dot(q, k, key(j))).collect();
        if p.is_empty() {
            continue;
        }
        if alpha == 1.0 {
            softmax_row(&mut p)
        } else {
            entmax_row(&mut p, alpha)
        }
        let (mut sum, mut inner) = (0.0, 0.0);
        for (j, &p) in span.of(i).zip(&p) {
            let r = jacobian_factor(p, alpha);
            sum += r;
            inner += r * dot(dout, v, key(j));
            (0..d).for_each(|c| out[0][query + c] += round(p) * v[key(j) + c]);
        }
        // o is kept rounded; softmax has delta = o . dout
        out[0][query..query + d].iter_mut().for_each(|o| *o = round(*o));
        let of_output = (0..d).map(|c| out[0][query + c] * dout[query + c]).sum();
        let mean = if alpha == 1.0 { of_output } else { inner / sum };
        for (j, &p) in span.of(i).zip(&p) {
            let ds = round(jacobian_factor(p, alpha) * (dot(dout, v, key(j)) - mean));
            for c in 0..d {
                out[1][query + c] += scale * ds * k[key(j) + c];
                out[2][key(j) + c] += scale * ds * q[query + c];
                out[3][key(j) + c] += round(p) * dout[query + c];
            }
        }
    }
    out
}

/// The largest error over the largest number, or over one, which the products are of the order of: a row of softmax over one key has no
/// gradient at all.
fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    let far = |(g, w): (&f64, &f64)| if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() / scale };
    got.iter().zip(want).map(far).fold(0.0, f64::max)
}

fn inputs(dims: Dims, span: Span) -> Vec<crate::Tensor> {
    let Dims { b, t, h, g, d } = dims;
    let (wide, narrow) = ([b, t, h, d], [b, span.keys(t), g, d]);
    tensors(&[(&wide, Bf16), (&narrow, Bf16), (&narrow, Bf16), (&wide, Bf16)])
}

#[test]
fn output_and_gradients_are_as_near_as_the_formula_in_bf16() {
    let Some(gpu) = cuda() else { return };
    for ([b, t, h, g, d], span) in SHAPES {
        let dims = Dims { b, t, h, g, d };
        let host = inputs(dims, span);
        let numbers: Vec<Vec<f64>> = host.iter().map(|x| x.to_f64().unwrap()).collect();
        let card: Vec<CudaBuffer> = host.iter().map(|x| gpu.tensor(x, Bf16)).collect();
        let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
        for alpha in ALPHAS {
            let name = format!("{dims:?} {span:?} alpha {alpha}");
            let exact = formula(dims, &numbers, span, alpha, |x| x);
            let tape = Tape::new();
            let vars: Vec<_> = host[..3].iter().map(|x| tape.leaf(x.clone())).collect();
            let want = on_cpu(&tape, &vars[0], &vars[1], &vars[2], span, alpha).unwrap();
            let grads = tape.backward_from(&want, host[3].clone()).unwrap();
            let of_cpu = [&want.value].into_iter().chain(vars.iter().map(|v| grads.get(v).unwrap()));
            for (x, exact) in of_cpu.zip(&exact) {
                assert!(error(&x.to_f64().unwrap(), exact) < 1e-9, "{name}: the formula is that of the CPU");
            }
            let rounded = formula(dims, &numbers, span, alpha, bf16);
            let bounds: Vec<f64> = rounded.iter().zip(&exact).map(|(r, e)| error(r, e).max(1.0 / 512.0)).collect();
            let of = span_attention(dims, operands, span, alpha).unwrap();
            let d = span_attention_backward(dims, operands, (span, alpha), (&of.o, &of.rows), &card[3]).unwrap();
            for (i, (what, got)) in [("o", &of.o), ("dq", &d.dq), ("dk", &d.dk), ("dv", &d.dv)].into_iter().enumerate()
            {
                let (far, bound) = (error(&gpu.numbers(got), &exact[i]), bounds[i]);
                assert!(far <= 2.0 * bound, "{what} of {name}: {far:e}, formula {bound:e}");
            }
        }
    }
}

#[test]
fn same_bits_every_run() {
    let Some(gpu) = cuda() else { return };
    let dims = Dims { b: 2, t: 700, h: 8, g: 2, d: 64 };
    for (span, alpha) in
        [(Span::Causal, 1.5), (Span::Sliding(100), 1.0), (Span::Windows { length: 8, stride: 4 }, 1.25)]
    {
        let card: Vec<CudaBuffer> = inputs(dims, span).iter().map(|x| gpu.tensor(x, Bf16)).collect();
        let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
        gpu.same_bits(|| {
            let of = span_attention(dims, operands, span, alpha)?;
            let d = span_attention_backward(dims, operands, (span, alpha), (&of.o, &of.rows), &card[3])?;
            Ok(vec![of.o, of.rows, d.dq, d.dk, d.dv])
        });
    }
}
