use super::*;
use crate::device::Device;
use crate::ops::attention::dense_attention;
use crate::testing::{ODD_LENGTHS, check_grad, device, normal, relative_error};
use crate::{DType, Tensor};

const SPANS: [Span; 4] =
    [Span::Causal, Span::Sliding(5), Span::Windows { length: 4, stride: 2 }, Span::Windows { length: 3, stride: 3 }];

fn inputs(dev: &Device, span: Span, b: usize, t: usize, h: usize, g: usize, d: usize) -> [Tensor; 3] {
    let m = span.keys(t);
    [normal(dev, &[b, t, h, d], 1), normal(dev, &[b, m, g, d], 2), normal(dev, &[b, m, g, d], 3)]
}

#[test]
fn grad_to_queries_keys_and_values() {
    let d = device();
    for span in SPANS {
        for (alpha, t) in [(1.0, 11), (1.5, 13), (1.25, 9), (2.0, 10), (1.5, 70)] {
            let width = if t > 20 { 1 } else { 3 };
            check_grad(&inputs(&d, span, 1, t, 2, 1, width), |tape, v| {
                span_attention(tape, &v[0], &v[1], &v[2], span, alpha)
            });
        }
    }
}

#[test]
fn a_span_of_everything_is_dense_attention_and_a_window_of_one_copies_its_value() {
    let dev = device();
    for t in ODD_LENGTHS {
        let x = inputs(&dev, Span::Causal, 2, t, 4, 2, 6);
        let tape = Tape::new();
        let v: Vec<Var> = x.iter().map(|x| tape.leaf(x.clone())).collect();
        let dense = dense_attention(&tape, &v[0], &v[1], &v[2]).unwrap().value.to_f64().unwrap();
        for span in [Span::Causal, Span::Sliding(t), Span::Sliding(t + 9)] {
            let y = span_attention(&tape, &v[0], &v[1], &v[2], span, 1.0).unwrap();
            assert!(relative_error(&y.value, &dense) < 1e-12, "{span:?} at {t}");
        }
        let one = span_attention(&tape, &v[0], &v[1], &v[2], Span::Sliding(1), 1.5).unwrap().value.to_f64().unwrap();
        let values = x[2].to_f64().unwrap();
        for (i, o) in one.iter().enumerate() {
            let (row, column) = (i / 24, i % 24);
            assert_eq!(*o, values[row * 12 + column / 12 * 6 + column % 6]);
        }
    }
}

#[test]
fn windows_end_at_or_before_the_query() {
    let span = Span::Windows { length: 32, stride: 16 };
    assert_eq!([30, 31, 46, 47, 63].map(|q| span.of(q).end), [0, 1, 1, 2, 3]);
    assert_eq!([31, 32, 48].map(|t| span.keys(t)), [0, 1, 2]);
    assert_eq!(Span::Windows { length: usize::MAX, stride: usize::MAX }.keys(48), 0);
}

#[test]
fn bits_do_not_depend_on_threads() {
    for span in SPANS {
        let run = |threads| {
            let dev = Device::cpu(threads).unwrap();
            let tape = Tape::new();
            let v: Vec<Var> = inputs(&dev, span, 2, 200, 4, 2, 8)
                .iter()
                .map(|x| tape.leaf(x.to_dtype(DType::F32).unwrap()))
                .collect();
            let y = span_attention(&tape, &v[0], &v[1], &v[2], span, 1.5).unwrap();
            let grads = tape.backward_from(&y, y.value.clone()).unwrap();
            let bits: Vec<Vec<f32>> = v.iter().map(|v| grads.get(v).unwrap().to_vec().unwrap()).collect();
            (y.value.to_vec::<f32>().unwrap(), bits)
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn what_does_not_fit_is_told() {
    let (dev, t) = (device(), Tape::new());
    let x = t.leaf(normal(&dev, &[1, 8, 1, 2], 1));
    let err = |span, alpha| span_attention(&t, &x, &x, &x, span, alpha).unwrap_err().to_string();
    assert!(err(Span::Windows { length: 4, stride: 2 }, 1.0).contains("8 tokens have 3 keys"));
    assert!(err(Span::Sliding(0), 1.0).contains("always sees itself"));
    assert!(err(Span::Windows { length: 2, stride: 3 }, 1.0).contains("at most the length"));
    assert!(err(Span::Causal, 0.5).contains("alpha is 0.5"));
}
