//! What must hold between variants, whatever the weights.

use dash_core::ops::attention::{RouterGradient, Routes};
use dash_core::{DType, Tape, Tensor, testing};
use dash_model::{Attention, Dash, Dense, Model, ModelConfig, RouterTrace, TopK, VARIANTS};

const VOCAB: usize = 50;
const T: usize = 37;

fn dash() -> Dash {
    Dash { chunk_size: 8, gamma: 8.0, ..Dash::default() }
}

fn topk(chunk_size: usize, top: usize) -> Attention {
    TopK { chunk_size, top, ..TopK::default() }.into()
}

/// Every variant at sizes that route here.
fn variants() -> impl Iterator<Item = Attention> {
    VARIANTS.iter().map(|v| v.with(v.small))
}

fn model(attention: impl Into<Attention>, dtype: DType) -> Model {
    // far from zero, so that attention is neither uniform nor the router flat
    let init_std = 0.5;
    let config = ModelConfig { init_std, attention: attention.into(), ..ModelConfig::new(2, 24, (4, 2), 32) };
    Model::new(config, VOCAB, T, 3, &testing::device(), dtype).unwrap()
}

fn ids(seed: u64) -> Vec<u32> {
    let mut rng = dash_core::rng::Rng::new(seed);
    (0..2 * T).map(|_| rng.below(VOCAB) as u32).collect()
}

fn logits(m: &Model, ids: &[u32]) -> Tensor {
    m.logits(&m.ids(ids, ids.len() / T).unwrap()).unwrap()
}

/// Parameter names and gradients, `None` where nothing reaches.
type Named = Vec<(String, Option<Vec<f64>>)>;

fn gradients(attention: impl Into<Attention>) -> (Vec<f64>, Named) {
    let m = model(attention, DType::F64);
    let (x, y) = (m.ids(&ids(1), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
    let t = Tape::new();
    let leaves = m.leaves(&t);
    let (loss, _) = m.loss(&t, &leaves, (&x, &y), 2.0 * T as f64).unwrap();
    let value = loss.value.to_f64().unwrap();
    let g = t.backward(&loss).unwrap();
    let named = m.params().iter().zip(&leaves).map(|(p, l)| (p.name.clone(), g.get(l).map(|x| x.to_f64().unwrap())));
    (value, named.collect())
}

#[test]
fn topk_with_every_chunk_is_dense() {
    let dense = logits(&model(Dense {}, DType::F64), &ids(1)).to_f64().unwrap();
    let all = logits(&model(topk(8, 5), DType::F64), &ids(1));
    assert!(testing::relative_error(&all, &dense) < 1e-12);
    let some = logits(&model(topk(8, 2), DType::F64), &ids(1));
    assert!(testing::relative_error(&some, &dense) > 1e-3);
}

#[test]
fn one_chunk_is_dense() {
    let dense = logits(&model(Dense {}, DType::F64), &ids(1)).to_f64().unwrap();
    let long = Dash { chunk_size: T, ..dash() };
    for a in [long.into(), topk(T + 3, 1)] {
        assert!(testing::relative_error(&logits(&model(a, DType::F64), &ids(1)), &dense) < 1e-12);
    }
}

#[test]
fn the_router_gradient_changes_gradients_and_no_forward_bit() {
    let with = |router_gradient| gradients(Dash { router_gradient, ..dash() });
    let (full, stopped) = (with(RouterGradient::Full), with(RouterGradient::Stopped));
    let ste = with(RouterGradient::StraightThrough);
    assert!(full.0[0].to_bits() == stopped.0[0].to_bits() && full.0[0].to_bits() == ste.0[0].to_bits());
    let indexers = |g: &Named| -> Vec<Option<Vec<f64>>> {
        g.iter().filter(|(n, _)| n.ends_with("indexer_q")).map(|(_, g)| g.clone()).collect()
    };
    assert!(indexers(&full.1).iter().all(|g| g.as_ref().is_some_and(|g| g.iter().any(|&x| x != 0.0))));
    assert!(indexers(&stopped.1).iter().all(|g| g.as_ref().is_none_or(|g| g.iter().all(|&x| x == 0.0))));
    let q = |g: &Named| g.iter().find(|(n, _)| n.ends_with("0.self_attn.q_proj.weight")).unwrap().1.clone();
    assert!(q(&full.1) != q(&stopped.1) && q(&full.1) != q(&ste.1));
}

#[test]
fn a_later_token_changes_no_earlier_logit() {
    for a in variants() {
        let m = model(a, DType::F32);
        let (before, mut changed) = (ids(1), ids(1));
        changed[20] = (changed[20] + 1) % VOCAB as u32;
        let (x, y) = (logits(&m, &before).to_f64().unwrap(), logits(&m, &changed).to_f64().unwrap());
        assert_eq!(x[..20 * VOCAB], y[..20 * VOCAB], "{}", a.kind());
        assert_ne!(x[20 * VOCAB..T * VOCAB], y[20 * VOCAB..T * VOCAB]);
    }
}

#[test]
fn permuting_the_batch_permutes_the_logits() {
    for a in variants() {
        let m = model(a, DType::F32);
        let x = ids(1);
        let swapped: Vec<u32> = x[T..].iter().chain(&x[..T]).copied().collect();
        let (a, b) = (logits(&m, &x).to_f64().unwrap(), logits(&m, &swapped).to_f64().unwrap());
        assert_eq!(a[..T * VOCAB], b[T * VOCAB..]);
        assert_eq!(a[T * VOCAB..], b[..T * VOCAB]);
    }
}

#[test]
fn the_router_of_these_tests_is_neither_dense_nor_empty() {
    let m = model(dash(), DType::F64);
    let (_, traces) = m.nll((&m.ids(&ids(1), 2).unwrap(), &m.ids(&ids(2), 2).unwrap()), None).unwrap();
    for stats in traces.into_iter().map(|t| t.unwrap().stats().unwrap()) {
        assert!(stats.density > 0.3 && stats.density < 0.98, "{stats:?}");
        assert_eq!(stats.histogram.iter().sum::<u64>(), stats.rows);
        assert!(stats.bias_max >= stats.bias_mean && stats.bias_mean > 0.0);
    }
}

#[test]
fn variants_start_from_equal_weights_wherever_shapes_agree() {
    let dense = model(Dense {}, DType::F32);
    for a in variants() {
        let m = model(a, DType::F32);
        for p in dense.params().iter() {
            assert_eq!(
                p.value.to_f64().unwrap(),
                m.params().get(&p.name).unwrap().to_f64().unwrap(),
                "{}: {}",
                a.kind(),
                p.name
            );
        }
        let own = a.params(m.config());
        assert_eq!(m.params().len(), dense.params().len() + 2 * own.len(), "{}", a.kind());
        let numel = own.iter().map(|p| 2 * p.shape.iter().product::<usize>()).sum::<usize>();
        assert_eq!(m.params().numel(), dense.params().numel() + numel);
        assert_eq!(dash_model::parameters(m.config(), VOCAB), Ok(m.params().numel()));
        for layer in 0..2 {
            let at = m.indexer(layer).map(|i| m.params().iter().nth(i).unwrap().name.clone());
            let has = own.iter().any(|p| p.name.ends_with("indexer_q"));
            assert_eq!(at, has.then(|| format!("model.layers.{layer}.self_attn.indexer_q")));
        }
    }
}

#[test]
fn extents_that_no_machine_holds_are_refused_with_the_largest() {
    let config = |change: &dyn Fn(&mut ModelConfig)| {
        let mut c = model(Dense {}, DType::F32).config().clone();
        change(&mut c);
        c.check().unwrap_err().to_string()
    };
    let width = config(&|c| c.width = 1_000_000_000_000);
    assert_eq!(width, "model.width: 1000000000000 is above 1048576, the largest that is taken");
    assert!(config(&|c| c.ffn = usize::MAX).contains("model.ffn: 18446744073709551615 is above 4194304"));
    assert_eq!(config(&|c| c.layers = 0), "model.layers: is 0; it must be at least 1");
    let all = config(&|c| {
        (c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn) =
            (1 << 14, 1 << 20, 1 << 16, 1 << 16, 1 << 16, 1 << 22);
    });
    assert!(all.contains("makes more than 2^64 parameters; at most 2^40"), "{all}");
    let some = config(&|c| (c.layers, c.width, c.ffn) = (1 << 14, 1 << 20, 1 << 20));
    assert!(some.contains("makes 5.4e16 parameters"), "{some}");
    // sizes of a variant enter its parameters
    let nsa = config(&|c| {
        (c.kv_heads, c.heads, c.head_dim) = (1 << 16, 1 << 16, 1 << 16);
        c.attention = dash_model::Nsa { length: 1 << 31, ..Default::default() }.into();
    });
    assert!(nsa.contains("makes more than 2^64 parameters"), "{nsa}");
}

#[test]
fn recomputing_blocks_changes_no_bit_and_halves_the_memory_of_activations() {
    let besides = variants().filter(|a| a.kind() == "dash").map(|a| (a, true));
    for (attention, besides) in variants().map(|a| (a, false)).chain(besides) {
        let device = testing::device();
        let dash_core::Device::Cpu(cpu) = &device else { panic!("the tests run on a CPU") };
        let run = |recompute: bool| {
            let config = ModelConfig { layers: 6, ..model(attention, DType::F32).config().clone() };
            let config = ModelConfig { recompute, qkv_bias: besides, qk_norm: besides, ..config };
            let m = Model::new(config, VOCAB, T, 3, &device, DType::F32).unwrap();
            let (x, y) = (m.ids(&ids(1), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
            cpu.reset_peak();
            let before = cpu.peak_bytes();
            let t = Tape::new();
            let leaves = m.leaves(&t);
            let (loss, traces) = m.loss(&t, &leaves, (&x, &y), 2.0 * T as f64).unwrap();
            let kept = cpu.peak_bytes() - before;
            let mut bits: Vec<f64> = loss.value.to_f64().unwrap();
            let g = t.backward(&loss).unwrap();
            leaves.iter().for_each(|l| bits.extend(g.get(l).unwrap().to_f64().unwrap()));
            bits.extend(traces.iter().flatten().map(|t| t.stats().unwrap().score_gradient));
            (bits, kept)
        };
        let (plain, recomputed) = (run(false), run(true));
        assert!(plain.0 == recomputed.0, "{}", attention.kind());
        assert!(recomputed.1 * 2 <= plain.1, "{}: {} against {} bytes", attention.kind(), recomputed.1, plain.1);
    }
}

#[test]
fn a_choice_of_nothing_is_empty_in_every_row() {
    let none = Routes::from_choice(&testing::device(), (1, 1, 5), 2, |_, _, _, _| {}).unwrap();
    let s = RouterTrace::hard(none).stats().unwrap();
    // queries 2 and 3 attend 1 of 2 chunks, query 4 attends 1 of 3
    assert_eq!((s.empty, s.active_chunks, s.rows, s.histogram), (1.0, 1.0, 3, vec![0, 3]));
    assert!((s.density - (0.5 + 0.5 + 1.0 / 3.0) / 3.0).abs() < 1e-15, "{}", s.density);
}
