use super::*;
use crate::ops::attention::{Top, block_attention, dense_attention, span_attention, topk_routing, topk_routing_after};
use crate::ops::index_select;
use crate::testing::{device, normal, relative_error};
use crate::{DType, Device, Ids, Tape};

const T: usize = 37;

/// q, k and v of T tokens, 4 heads of 2 groups.
fn tensors(dev: &Device) -> [Tensor; 3] {
    [normal(dev, &[1, T, 4, 6], 1), normal(dev, &[1, T, 2, 6], 2), normal(dev, &[1, T, 2, 6], 3)]
}

/// Rows of axis 1.
fn rows(x: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let tape = Tape::inference();
    let places = Ids::places(x.device(), &range.collect::<Vec<_>>()).unwrap();
    index_select(&tape, &tape.leaf(x.clone()), 1, &places).unwrap().value
}

/// x with room behind it that no kernel may read.
fn with_room(x: &Tensor) -> Tensor {
    let [_, t, g, d] = x.dims("test").unwrap();
    let mut roomy = Tensor::full(x.device(), &[1, t + 9, g, d], DType::F64, f64::NAN).unwrap();
    keep_rows(&mut roomy, 0, x).unwrap();
    roomy
}

/// Every split into kept and new tokens gives the rows of the whole sequence, to the rounding of sums in another order.
fn agrees(whole: &Tensor, seen: impl Fn(usize, usize) -> Tensor) {
    for (past, new) in [(0, 1), (0, T), (1, 1), (7, 1), (8, 1), (8, 9), (23, 2), (36, 1)] {
        let got = seen(past, new);
        let want = rows(whole, past..past + new).to_f64().unwrap();
        assert_eq!(got.shape()[1], new);
        assert!(relative_error(&got, &want) < 1e-13, "{new} after {past}");
    }
}

#[test]
fn spans_agree_with_the_whole_sequence() {
    let dev = device();
    let tape = Tape::inference();
    let [q, k, v] = tensors(&dev).map(|x| tape.leaf(x));
    let (roomy_k, roomy_v) = (with_room(&k.value), with_room(&v.value));
    let cached = |span: Span, alpha: f64, past: usize, new: usize| {
        let q = rows(&q.value, past..past + new);
        cached_attention(&q, &roomy_k, &roomy_v, past, Seen::Span(span, alpha)).unwrap()
    };
    let dense = dense_attention(&tape, &q, &k, &v).unwrap().value;
    agrees(&dense, |past, new| cached(Span::Causal, 1.0, past, new));
    for (span, alpha) in [(Span::Causal, 1.5), (Span::Causal, 1.25), (Span::Sliding(5), 1.0)] {
        let whole = span_attention(&tape, &q, &k, &v, span, alpha).unwrap().value;
        agrees(&whole, |past, new| cached(span, alpha, past, new));
    }
    let windows = Span::Windows { length: 4, stride: 2 };
    let few = |x: &crate::Var| tape.leaf(rows(&x.value, 0..windows.keys(T)));
    let whole = span_attention(&tape, &q, &few(&k), &few(&v), windows, 1.0).unwrap().value;
    agrees(&whole, |past, new| cached(windows, 1.0, past, new));
}

#[test]
fn routes_agree_with_the_whole_sequence_and_choose_the_same_chunks() {
    let dev = device();
    let tape = Tape::inference();
    let [q, k, v] = tensors(&dev).map(|x| tape.leaf(x));
    let (roomy_k, roomy_v) = (with_room(&k.value), with_room(&v.value));
    let kbar = normal(&dev, &[1, T / 4, 2, 6], 4);
    let routes = topk_routing(&q.value, &kbar, 4, 3, 1.0).unwrap();
    let list = routes.to_host().unwrap();
    // a bias that names its chunk
    let bias: Vec<f64> = (0..list.len()).map(|i| (i as f64 * 0.7).sin()).collect();
    let bias = tape.leaf(routes.entries_from_host(&bias, DType::F64).unwrap());
    let whole = block_attention(&tape, &q, &k, &v, &routes, Some(&bias)).unwrap().value;
    let plain = block_attention(&tape, &q, &k, &v, &routes, None).unwrap().value;
    for with_bias in [true, false] {
        agrees(if with_bias { &whole } else { &plain }, |past, new| {
            let q = rows(&q.value, past..past + new);
            let own = topk_routing_after(past, &q, &rows(&kbar, 0..(past + new) / 4), 4, Top::All(3), 1.0).unwrap();
            let host = own.to_host().unwrap();
            let mut numbers = Vec::new();
            for (kv, query) in (0..2).flat_map(|kv| (0..new).map(move |query| (kv, query))) {
                assert_eq!(host.chunks_of(0, kv, query), list.chunks_of(0, kv, past + query));
                let entries = list.entries_of(0, kv, past + query);
                numbers.extend(list.per_entry(&bias.value).unwrap()[entries].iter().copied());
            }
            let own_bias = own.entries_from_host(&numbers, DType::F64).unwrap();
            let seen = Seen::Routes(&own, with_bias.then_some(&own_bias));
            cached_attention(&q, &roomy_k, &roomy_v, past, seen).unwrap()
        });
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = device();
    let [q, k, v] = tensors(&dev);
    let causal = Seen::Span(Span::Causal, 1.0);
    let error = |q: &Tensor, k: &Tensor, past, seen| cached_attention(q, k, &v, past, seen).unwrap_err().to_string();
    assert!(error(&q, &k, 1, causal).contains("38 keys are seen, 37 are there"));
    assert!(error(&q, &k, 0, Seen::Span(Span::Causal, 3.0)).contains("alpha is 3"));
    assert!(error(&q, &rows(&k, 0..5), 0, causal).contains("k is [1, 5, 2, 6], v is [1, 37, 2, 6]"));
    let kbar = normal(&dev, &[1, T / 4, 2, 6], 4);
    let routes = topk_routing(&q, &kbar, 4, 3, 1.0).unwrap();
    let one = rows(&q, 3..4);
    assert!(error(&one, &k, 3, Seen::Routes(&routes, None)).contains("not (3, (1, 2, 1))"));
    let later = topk_routing_after(3, &one, &rows(&kbar, 0..1), 4, Top::All(3), 1.0).unwrap();
    let tape = Tape::inference();
    let [one, k1, v1] = [one, rows(&k, 3..4), rows(&v, 3..4)].map(|x| tape.leaf(x));
    let refused = block_attention(&tape, &one, &k1, &v1, &later, None).unwrap_err().to_string();
    assert!(refused.contains("after 3 kept tokens"), "{refused}");
    let mut kept = with_room(&k);
    assert!(keep_rows(&mut kept, 10, &k).unwrap_err().to_string().contains("37 rows from 10 on do not fit into 46"));
    assert!(keep_rows(&mut kept, 0, &q).unwrap_err().to_string().contains("do not fit into [1, 46, 2, 6]"));
}
