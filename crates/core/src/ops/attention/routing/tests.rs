use super::*;
use crate::device::Device;
use crate::number::DType;
use crate::ops::{self, attention::chunk_summary, entmax::entmax_row};
use crate::tape::Tape;
use crate::testing::{check_grad, device, normal};

fn settings() -> Entmax {
    Entmax { chunk_size: 4, alpha: 1.5, gamma: 1.0, sigma: 1.0, center: Center::None, gradient: RouterGradient::Full }
}

#[test]
fn grad_of_the_bias_to_queries_summaries_and_diagonal() {
    let d = device();
    let inputs = [normal(&d, &[2, 22, 4, 3], 1), normal(&d, &[2, 5, 2, 3], 2), normal(&d, &[2], 3)];
    let cases = [
        settings(),
        Entmax { sigma: 2.0, center: Center::Mean, ..settings() },
        Entmax { alpha: 1.25, gamma: 3.0, ..settings() },
        Entmax { alpha: 2.0, gamma: 0.3, ..settings() },
    ];
    for case in cases {
        check_grad(&inputs, |t, v| Ok(entmax_routing(t, &v[0], &v[1], Some(&v[2]), case)?.bias));
    }
}

#[test]
fn the_list_is_the_union_of_the_heads_supports_and_ends_with_the_own_chunk() {
    let (dev, t) = (device(), Tape::new());
    let (q, kbar) = (t.leaf(normal(&dev, &[1, 40, 4, 6], 1)), t.leaf(normal(&dev, &[1, 10, 2, 6], 2)));
    let routing = entmax_routing(&t, &q, &kbar, None, Entmax { gamma: 3.0, ..settings() }).unwrap();
    let (qs, ks) = (q.value.to_f64().unwrap(), kbar.value.to_f64().unwrap());
    let weights = routing.weights.to_f64().unwrap();
    let (list, mut dropped) = (routing.routes.to_host().unwrap(), 0);
    for kv in 0..2 {
        for query in 0..40 {
            let own = query / 4;
            let mut w = vec![0.0; own];
            for head in 0..2 {
                let q = &qs[(query * 4 + kv * 2 + head) * 6..][..6];
                let dot = |c: usize| q.iter().zip(&ks[(c * 2 + kv) * 6..]).map(|(a, b)| a * b).sum::<f64>();
                let mut p: Vec<f64> = (0..own).map(|c| 3.0 * dot(c) / 6f64.sqrt()).collect();
                entmax_row(&mut p, 1.5);
                w.iter_mut().zip(&p).for_each(|(w, p)| *w += 0.5 * p);
            }
            let mut want: Vec<u32> = (0..own as u32).filter(|&c| w[c as usize] > 0.0).collect();
            dropped += own - want.len();
            want.push(own as u32);
            assert_eq!(list.chunks_of(0, kv, query), want);
            for (e, &c) in list.entries_of(0, kv, query).zip(&want) {
                let w = w.get(c as usize).copied().unwrap_or(0.0);
                assert!((weights[e] - w).abs() < 1e-12);
            }
        }
    }
    assert!(dropped > 50, "the case is sparse enough to test something: {dropped}");
}

#[test]
fn the_bias_is_the_centred_log_of_the_weights_over_sigma() {
    let (dev, t) = (device(), Tape::new());
    let (q, kbar) = (t.leaf(normal(&dev, &[2, 40, 4, 6], 1)), t.leaf(normal(&dev, &[2, 10, 2, 6], 2)));
    for center in [Center::None, Center::Mean, Center::MeanDetached] {
        let routing =
            entmax_routing(&t, &q, &kbar, None, Entmax { gamma: 3.0, sigma: 2.0, center, ..settings() }).unwrap();
        let (weights, bias) = (routing.weights.to_f64().unwrap(), routing.bias.value.to_f64().unwrap());
        let list = routing.routes.to_host().unwrap();
        for (batch, kv, query) in (0..2 * 2 * 40).map(|i| (i / 80, i / 40 % 2, i % 40)) {
            let entries = list.entries_of(batch, kv, query);
            let (own, routed) = (entries.end - 1, entries.start..entries.end - 1);
            let logs: Vec<f64> = weights[routed.clone()].iter().map(|w| w.ln()).collect();
            let mean = match center {
                Center::None => 0.0,
                _ => logs.iter().sum::<f64>() / logs.len().max(1) as f64,
            };
            for (b, log) in bias[routed].iter().zip(&logs) {
                assert!((b - (log - mean) / 2.0).abs() < 1e-12, "{center:?}, query {query}");
            }
            assert_eq!(bias[own], 0.0);
        }
    }
}

#[test]
fn stopped_has_the_forward_bits_of_full_and_no_gradient() {
    let dev = device();
    let run = |gradient| {
        let t = Tape::new();
        let (q, k) = (t.leaf(normal(&dev, &[1, 33, 2, 4], 1)), t.leaf(normal(&dev, &[1, 33, 1, 4], 2)));
        let qbar = t.leaf(normal(&dev, &[4], 3));
        let kbar = chunk_summary(&t, &k, &qbar, 4).unwrap();
        let bias = entmax_routing(&t, &q, &kbar, None, Entmax { gradient, ..settings() }).unwrap().bias;
        let seed = normal(&dev, bias.value.shape(), 4);
        let g = t.backward_from(&bias, seed).unwrap();
        (bias.value.to_f64().unwrap(), g.get(&qbar).map(|g| g.to_f64().unwrap()))
    };
    let (full, stopped) = (run(RouterGradient::Full), run(RouterGradient::Stopped));
    let straight = run(RouterGradient::StraightThrough);
    assert!(full.0 == stopped.0 && full.0 == straight.0);
    assert!(full.1.unwrap().iter().any(|&g| g != 0.0) && stopped.1.is_none() && straight.1.is_some());
}

#[test]
fn topk_takes_the_best_and_ties_go_to_the_lower_chunk() {
    let dev = device();
    let q = Tensor::from_vec(&dev, &[1, 10, 1, 1], vec![1.0f64; 10]).unwrap();
    let kbar = Tensor::from_vec(&dev, &[1, 5, 1, 1], vec![1.0f64, 3.0, 2.0, 3.0, 0.0]).unwrap();
    let list = |top| topk_routing(&q, &kbar, 2, top, 1.0).unwrap().to_host().unwrap();
    assert_eq!(list(2).chunks_of(0, 0, 9), [1, 4]);
    assert_eq!(list(3).chunks_of(0, 0, 9), [1, 3, 4]);
    assert_eq!(list(9).chunks_of(0, 0, 9), [0, 1, 2, 3, 4]);
    assert_eq!(list(1).chunks_of(0, 0, 3), [1]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let run = |threads| {
        let dev = Device::cpu(threads).unwrap();
        let t = Tape::new();
        let cast = |x: Tensor| t.leaf(x.to_dtype(DType::F32).unwrap());
        let (q, kbar) = (cast(normal(&dev, &[2, 200, 4, 8], 1)), cast(normal(&dev, &[2, 50, 2, 8], 2)));
        let bias = entmax_routing(&t, &q, &kbar, None, settings()).unwrap().bias;
        let (value, seed) = (bias.value.to_vec::<f32>().unwrap(), bias.value.clone());
        let g = t.backward_from(&bias, seed).unwrap();
        [value, g.get(&q).unwrap().to_vec().unwrap(), g.get(&kbar).unwrap().to_vec().unwrap()]
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn bad_settings_are_told() {
    let (dev, t) = (device(), Tape::new());
    let (q, kbar) = (t.leaf(normal(&dev, &[1, 8, 1, 2], 1)), t.leaf(normal(&dev, &[1, 2, 1, 2], 2)));
    let err = |s| entmax_routing(&t, &q, &kbar, None, s).err().unwrap().to_string();
    assert!(err(Entmax { sigma: 0.0, ..settings() }).contains("sigma is 0"));
    assert!(err(Entmax { alpha: 1.0, ..settings() }).contains("alpha is 1"));
    assert!(err(Entmax { chunk_size: 2, ..settings() }).contains("summaries of chunks of 2 are [1, 2, 1, 2]"));
    assert!(ops::attention::topk_routing(&q.value, &kbar.value, 4, 0, 1.0).is_err());
    let windows =
        WindowChoice { chunk_size: 4, top: 2, length: 4, stride: 4, init: 0, local: 1, pooling: Pooling::Max };
    let told = |choice| window_routing(&q.value, &kbar.value, choice).map(|_| ()).map_err(|e| e.to_string());
    assert_eq!(told(windows), Ok(()));
    assert_eq!(told(WindowChoice { top: usize::MAX, local: usize::MAX, ..windows }), Ok(()));
    assert!(
        told(WindowChoice { init: usize::MAX, ..windows }).unwrap_err().contains("top is 2, but 18446744073709551615")
    );
    assert!(told(WindowChoice { length: 3, ..windows }).unwrap_err().contains("at most the length"));
}

#[test]
fn without_a_complete_chunk_every_query_attends_its_own() {
    let dev = device();
    for gradient in [RouterGradient::Full, RouterGradient::StraightThrough] {
        let t = Tape::new();
        let (q, kbar) = (t.leaf(normal(&dev, &[2, 3, 4, 6], 1)), t.leaf(normal(&dev, &[2, 0, 2, 6], 2)));
        let routing = entmax_routing(&t, &q, &kbar, None, Entmax { gradient, ..settings() }).unwrap();
        assert_eq!(routing.weights.to_f64().unwrap(), vec![0.0; 2 * 2 * 3]);
        let seed = routing.bias.value.clone();
        let grads = t.backward_from(&routing.bias, seed).unwrap();
        assert!(grads.get(&q).unwrap().to_f64().unwrap().iter().all(|&dq| dq == 0.0));
    }
}

fn literal(device: &Device, shape: [usize; 4], numbers: &[f64]) -> Tensor {
    Tensor::from_vec(device, &shape, numbers.to_vec()).unwrap()
}

/// Sparsemax by hand: of the scores 1, 0.5 and -1 the first two stay, above (1 + 0.5 - 1) / 2 = 0.25: 0.75 and 0.25.
#[test]
fn entmax_routing_of_literal_scores() {
    let (dev, t) = (device(), Tape::new());
    let q = t.leaf(literal(&dev, [1, 8, 1, 1], &[1.0; 8]));
    let kbar = t.leaf(literal(&dev, [1, 4, 1, 1], &[1.0, 0.5, -1.0, 9.0]));
    let diagonal = t.leaf(Tensor::from_vec(&dev, &[1], vec![0.5]).unwrap());
    let of = |center, gamma| {
        let s = Entmax { chunk_size: 2, alpha: 2.0, gamma, sigma: 2.0, center, gradient: RouterGradient::Full };
        let r = entmax_routing(&t, &q, &kbar, Some(&diagonal), s).unwrap();
        let list = r.routes.to_host().unwrap();
        let at = list.entries_of(0, 0, 7);
        let of = |x: &Tensor| list.per_entry(x).unwrap()[at.clone()].to_vec();
        (list.chunks_of(0, 0, 7).to_vec(), of(&r.weights), of(&r.bias.value))
    };
    let near = |got: &[f64], want: &[f64]| {
        assert!(
            got.len() == want.len() && got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-14),
            "{got:?} {want:?}"
        );
    };
    let (chunks, weights, bias) = of(Center::None, 1.0);
    // the own chunk 3 is not scored, although its summary would win
    assert_eq!(chunks, [0, 1, 3]);
    near(&weights, &[0.75, 0.25, 0.0]);
    near(&bias, &[0.75f64.ln() / 2.0, 0.25f64.ln() / 2.0, 0.5]);
    let mean = (0.75f64.ln() + 0.25f64.ln()) / 2.0;
    near(&of(Center::Mean, 1.0).2, &[(0.75f64.ln() - mean) / 2.0, (0.25f64.ln() - mean) / 2.0, 0.5]);
    // four times as sharp: 4 is 2 above the next, so alone
    let (chunks, weights, bias) = of(Center::None, 4.0);
    assert_eq!(chunks, [0, 3]);
    near(&weights, &[1.0, 0.0]);
    near(&bias, &[0.0, 0.5]);
}

/// Two heads that want opposite things: probabilities 8 1 2 of 11 and 1/8 1 1/2 of 13/8, so 0.80 0.71 0.49 together. The first
/// head alone would take chunk 2 before chunk 1.
#[test]
fn topk_routing_chooses_by_the_mean_over_the_group() {
    let dev = device();
    let q = literal(&dev, [1, 8, 2, 1], &[1.0, -1.0].repeat(8));
    let kbar = literal(&dev, [1, 4, 1, 1], &[8f64.ln(), 0.0, 2f64.ln(), 9.0]);
    let chunks = |top| topk_routing(&q, &kbar, 2, top, 1.0).unwrap().to_host().unwrap().chunks_of(0, 0, 7).to_vec();
    assert_eq!((chunks(2), chunks(3), chunks(4)), (vec![0, 3], vec![0, 1, 3], vec![0, 1, 2, 3]));
}

/// Twelve tokens, chunks of four, windows of four every two: window w covers tokens 2w to 2w + 3. Window 1 shares one stride with
/// chunks 0 and 1, window 3 with 1 and 2; 0, 2 and 4 lie in one chunk with both.
fn window_choice(pooling: Pooling, top: usize, (init, local): (usize, usize)) -> WindowChoice {
    WindowChoice { chunk_size: 4, top, length: 4, stride: 2, init, local, pooling }
}

/// The chunks of a query where the window's probabilities are in proportion to `weights`.
fn by_windows(weights: [f64; 5], query: usize, choice: WindowChoice) -> Vec<u32> {
    let dev = device();
    let q = literal(&dev, [1, 12, 1, 1], &[1.0; 12]);
    let keys = literal(&dev, [1, 5, 1, 1], &weights.map(f64::ln));
    window_routing(&q, &keys, choice).unwrap().to_host().unwrap().chunks_of(0, 0, query).to_vec()
}

#[test]
fn window_routing_pools_the_largest_or_the_overlap() {
    let weights = [3.0, 1.0, 2.0, 2.5, 1.0];
    // largest: chunk 0 has 3 of window 0, chunk 1 has 2.5 of window 3. Strides: 2 x 3 + 1 = 7 and 1 + 2 x 2 + 2.5 = 7.5
    assert_eq!(by_windows(weights, 11, window_choice(Pooling::Max, 2, (0, 1))), [0, 2]);
    assert_eq!(by_windows(weights, 11, window_choice(Pooling::Overlap, 2, (0, 1))), [1, 2]);
    // the weight of a window that lies in one chunk decides: 2 x 3 + 1 = 7 against 1 + 2 x 0.5 + 2.8; without it 4 against 4.3
    assert_eq!(by_windows([3.0, 1.0, 0.5, 2.8, 1.0], 11, window_choice(Pooling::Overlap, 2, (0, 1))), [0, 2]);
    // all windows alike: of equals the lower chunk; strides 3 and 4
    assert_eq!(by_windows([1.0; 5], 11, window_choice(Pooling::Max, 2, (0, 1))), [0, 2]);
    assert_eq!(by_windows([1.0; 5], 11, window_choice(Pooling::Overlap, 2, (0, 1))), [1, 2]);
}

#[test]
fn window_routing_takes_forced_chunks_first_and_top_in_all() {
    let weights = [1.0, 1.0, 9.0, 1.0, 1.0];
    let chunks = |top, forced| by_windows(weights, 11, window_choice(Pooling::Max, top, forced));
    assert_eq!(chunks(1, (0, 1)), [2]);
    assert_eq!(chunks(2, (0, 1)), [1, 2]);
    assert_eq!(chunks(2, (1, 1)), [0, 2]);
    assert_eq!(chunks(2, (0, 2)), [1, 2]);
    assert_eq!(chunks(3, (1, 1)), [0, 1, 2]);
    // forced chunks that are not there yet force nothing: query 5 has chunks 0 and 1, query 2 its own
    assert_eq!(by_windows(weights, 5, window_choice(Pooling::Max, 3, (2, 1))), [0, 1]);
    assert_eq!(by_windows(weights, 2, window_choice(Pooling::Max, 3, (1, 2))), [0]);
    // and a chunk that is first and last at once counts once
    assert_eq!(by_windows([1.0; 5], 4, window_choice(Pooling::Max, 3, (1, 2))), [0, 1]);
}

#[test]
fn window_routing_sees_a_window_from_its_last_token_on() {
    // window 3 ends at token 9
    let weights = [3.0, 1.0, 2.0, 9.0, 1.0];
    let chunks = |query| by_windows(weights, query, window_choice(Pooling::Max, 2, (0, 1)));
    assert_eq!((chunks(8), chunks(9)), (vec![0, 2], vec![1, 2]));
    // before token 3 there is no window, and no earlier chunk either
    assert_eq!(chunks(2), [0]);
}

#[test]
fn window_routing_adds_the_heads_of_a_group_and_keeps_groups_apart() {
    // chunks are windows: two heads that want 4 1 2 1 of 8 and 1/4 1 1/2 1 of 2.75, together 0.59 0.49 0.43
    let choice = WindowChoice { chunk_size: 2, top: 3, length: 2, stride: 2, init: 0, local: 1, pooling: Pooling::Max };
    let dev = device();
    let keys = literal(&dev, [1, 4, 1, 1], &[4f64.ln(), 0.0, 2f64.ln(), 0.0]);
    let chunks = |heads: &[f64]| {
        let q = literal(&dev, [1, 8, heads.len(), 1], &heads.repeat(8));
        window_routing(&q, &keys, choice).unwrap().to_host().unwrap().chunks_of(0, 0, 7).to_vec()
    };
    assert_eq!((chunks(&[1.0]), chunks(&[1.0, -1.0])), (vec![0, 2, 3], vec![0, 1, 3]));
    // two kv heads of one query head each, with the same keys: each has its own list
    let two = literal(&dev, [1, 4, 2, 1], &[4f64.ln(), 4f64.ln(), 0.0, 0.0, 2f64.ln(), 2f64.ln(), 0.0, 0.0]);
    let q = literal(&dev, [1, 8, 2, 1], &[1.0, -1.0].repeat(8));
    let list = window_routing(&q, &two, choice).unwrap().to_host().unwrap();
    assert_eq!((list.chunks_of(0, 0, 7), list.chunks_of(0, 1, 7)), (&[0, 2, 3][..], &[1, 2, 3][..]));
}

#[test]
fn window_routing_refuses_what_it_cannot_choose() {
    let dev = device();
    let (q, keys) = (literal(&dev, [1, 12, 1, 1], &[1.0; 12]), literal(&dev, [1, 5, 1, 1], &[1.0; 5]));
    let err = |choice| window_routing(&q, &keys, choice).unwrap_err().to_string();
    assert!(err(window_choice(Pooling::Max, 2, (0, 0))).contains("local is 0"));
    assert!(err(window_choice(Pooling::Max, 2, (1, 2))).contains("top is 2, but 1 first and 2 last"));
    assert!(err(WindowChoice { stride: 3, ..window_choice(Pooling::Max, 2, (0, 1)) }).contains("windows of 4 every 3"));
    assert!(err(WindowChoice { stride: 0, ..window_choice(Pooling::Max, 2, (0, 1)) }).contains("at least 1"));
}
