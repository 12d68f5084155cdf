//! What must hold between the arms of an experiment, whatever the weights.

use std::sync::Arc;

use dash_core::ops::attention::RouterGradient;
use dash_core::{DType, Tape, testing};
use dash_model::attention::GradientTo;
use dash_model::{
    Attention, Budget, Dash, KlIndexer, Model, ModelConfig, Profile, RandomChunks, TopK, TopKBias, kinds,
};

const VOCAB: usize = 50;
const T: usize = 37;

fn dash() -> Dash {
    Dash { chunk_size: 8, gamma: 8.0, ..Dash::default() }
}

fn model(attention: impl Into<Attention>, layers: usize, dtype: DType) -> Model {
    model_of(&ModelConfig { attention: attention.into(), ..ModelConfig::new(layers, 24, (4, 2), 32) }, dtype)
}

fn model_of(config: &ModelConfig, dtype: DType) -> Model {
    // far from zero, so that attention is neither uniform nor the router flat
    let config = ModelConfig { init_std: 0.5, ..config.clone() };
    let mut m = Model::new(config, VOCAB, T, 3, &testing::device(), dtype).unwrap();
    for p in m.params_mut().iter_mut().filter(|p| p.name.ends_with("indexer_q")) {
        p.value = testing::normal(p.value.device(), p.value.shape(), 7).to_dtype(dtype).unwrap();
    }
    m
}

fn ids(seed: u64) -> Vec<u32> {
    let mut rng = dash_core::rng::Rng::new(seed);
    (0..2 * T).map(|_| rng.below(VOCAB) as u32).collect()
}

fn logits(m: &Model) -> Vec<f64> {
    m.logits(&m.ids(&ids(1), 2).unwrap()).unwrap().to_f64().unwrap()
}

/// Gradients of all parameters, zeros where nothing reaches, and whether the indexer has one.
fn gradients(m: &Model) -> (Vec<f64>, bool) {
    let (x, y) = (m.ids(&ids(1), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
    let t = Tape::new();
    let leaves = m.leaves(&t);
    let (loss, _) = m.loss(&t, &leaves, (&x, &y), 2.0 * T as f64).unwrap();
    let g = t.backward(&loss).unwrap();
    let of = |l: &dash_core::Var| g.get(l).map_or(vec![0.0; l.value.numel()], |g| g.to_f64().unwrap());
    let indexer = m.indexer(0).is_some_and(|i| g.get(&leaves[i]).is_some());
    (leaves.iter().flat_map(of).collect(), indexer)
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    let scale = b.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / scale
}

fn minus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

#[test]
fn without_the_forward_bias_the_forward_bits_are_those_of_an_infinite_sigma() {
    for dtype in [DType::F32, DType::F64] {
        let with = |dash: Dash| logits(&model(dash, 2, dtype));
        let gradient_only = with(Dash { forward_bias: false, ..dash() });
        assert!(gradient_only == with(Dash { sigma: f64::INFINITY, ..dash() }));
        assert!(
            gradient_only == with(Dash { forward_bias: false, router_gradient: RouterGradient::Stopped, ..dash() })
        );
        assert!(far(&gradient_only, &with(dash())) > 1e-3);
    }
    // and the gradient of the choice is there
    let full = gradients(&model(Dash { forward_bias: false, ..dash() }, 1, DType::F64));
    let none = gradients(&model(
        Dash { sigma: f64::INFINITY, router_gradient: RouterGradient::Stopped, ..dash() },
        1,
        DType::F64,
    ));
    assert!(full.1 && !none.1 && far(&full.0, &none.0) > 1e-3);
}

/// In one layer the gradients of what each receiver gets add up: all = q + summaries, and so on, with what comes through the tokens
/// alone (stopped) subtracted from each.
#[test]
fn the_gradients_of_the_receivers_add_up() {
    for forward_bias in [true, false] {
        let base = Dash { forward_bias, ..dash() };
        let stopped = model(Dash { router_gradient: RouterGradient::Stopped, ..base }, 1, DType::F64);
        let bits = logits(&stopped);
        let (through_tokens, _) = gradients(&stopped);
        let of = |gradient_to| {
            let m = model(Dash { gradient_to, ..base }, 1, DType::F64);
            assert!(logits(&m) == bits, "{gradient_to:?} changes the forward pass");
            let (g, indexer) = gradients(&m);
            (minus(&g, &through_tokens), indexer)
        };
        let [all, q, summaries, indexer, rest] = [
            GradientTo::All,
            GradientTo::Queries,
            GradientTo::Summaries,
            GradientTo::Indexer,
            GradientTo::AllButIndexer,
        ]
        .map(of);
        assert_eq!([all.1, q.1, summaries.1, indexer.1, rest.1], [true, false, true, true, false]);
        for part in [&q.0, &summaries.0, &indexer.0, &rest.0] {
            assert!(part.iter().any(|x| x.abs() > 1e-6), "every receiver gets something");
        }
        assert!(far(&minus(&all.0, &q.0), &summaries.0) < 1e-9);
        assert!(far(&minus(&all.0, &indexer.0), &rest.0) < 1e-9);
        // with the other sign
        let flipped = gradients(&model(Dash { router_gradient: RouterGradient::Flipped, ..base }, 1, DType::F64)).0;
        let flipped: Vec<f64> = minus(&flipped, &through_tokens).iter().map(|x| -x).collect();
        assert!(far(&flipped, &all.0) < 1e-9);
    }
}

#[test]
fn a_placebo_changes_no_forward_bit_and_no_thread_changes_it() {
    let placebo = Dash { router_gradient: RouterGradient::Placebo, ..dash() };
    assert!(logits(&model(placebo, 2, DType::F32)) == logits(&model(dash(), 2, DType::F32)));
    let once = gradients(&model(placebo, 2, DType::F32)).0;
    assert!(once == gradients(&model(placebo, 2, DType::F32)).0);
    assert!(far(&once, &gradients(&model(dash(), 2, DType::F32)).0) > 1e-3);
    // blocks that are run again draw the same
    let config = ModelConfig { recompute: true, ..model(placebo, 2, DType::F32).config().clone() };
    assert!(once == gradients(&model_of(&config, DType::F32)).0);
}

#[test]
fn a_stopped_bias_of_the_best_chunks_has_the_forward_bits_of_a_trained_one() {
    let full = TopKBias { chunk_size: 8, top: 3, gamma: 4.0, ..TopKBias::default() };
    let stopped = TopKBias { router_gradient: RouterGradient::Stopped, ..full };
    assert!(logits(&model(full, 2, DType::F32)) == logits(&model(stopped, 2, DType::F32)));
    assert_eq!((gradients(&model(full, 1, DType::F64)).1, gradients(&model(stopped, 1, DType::F64)).1), (true, false));
    // the choice is that of topk
    let choice = |a: Attention| {
        let m = model(a, 1, DType::F64);
        let (x, y) = (m.ids(&ids(1), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
        m.nll((&x, &y), None).unwrap().1[0].as_ref().unwrap().routes().unwrap().to_host().unwrap()
    };
    let topk = TopK { chunk_size: 8, top: 3, gamma: 4.0, indexer: true, per_head: false };
    assert_eq!(choice(full.into()), choice(topk.into()));
}

fn budget(layers: usize, mean: impl Fn(usize) -> f64) -> Arc<Budget> {
    let layer: Vec<f64> = (0..T).map(|i| mean(i).min((i / 8 + 1) as f64)).collect();
    Arc::new(Budget { chunk_size: 8, lengths: vec![Profile { length: T, sequences: 1, layers: vec![layer; layers] }] })
}

#[test]
fn a_budget_takes_the_place_of_the_number_of_chunks() {
    let topk = |top| Attention::from(TopK { chunk_size: 8, top, gamma: 4.0, ..TopK::default() });
    let random = |top| Attention::from(RandomChunks { chunk_size: 8, top, seed: 3 });
    for of in [&topk as &dyn Fn(usize) -> Attention, &random] {
        let mut m = model(of(2), 2, DType::F32);
        m.set_budget(budget(2, |_| 3.0)).unwrap();
        assert!(logits(&m) == logits(&model(of(3), 2, DType::F32)));
        let before = gradients(&m).0;
        assert!(before == gradients(&model(of(3), 2, DType::F32)).0);
        m.set_budget(budget(2, |i| 1.0 + i as f64 / 20.0)).unwrap();
        let mixed = logits(&m);
        assert!(mixed != logits(&model(of(2), 2, DType::F32)) && mixed != logits(&model(of(3), 2, DType::F32)));
        let (x, y) = (m.ids(&ids(1), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
        let host = m.nll((&x, &y), None).unwrap().1[1].as_ref().unwrap().routes().unwrap().to_host().unwrap();
        for query in 0..T {
            let count = |kv| host.chunks_of(1, kv, query).len() as f64;
            let want = (1.0 + query as f64 / 20.0).min((query / 8 + 1) as f64);
            assert!(((count(0) + count(1)) / 2.0 - want).abs() <= 0.5, "query {query}");
        }
        // another attention ends it
        m.set_attention(of(2)).unwrap();
        assert!(m.budget().is_none() && logits(&m) == logits(&model(of(2), 2, DType::F32)));
        let misfit = m.set_budget(budget(3, |_| 1.0)).unwrap_err().to_string();
        assert!(misfit.contains("it has 3 layers, here 2"), "{misfit}");
    }
    let told = model(dash(), 2, DType::F32).set_budget(budget(2, |_| 1.0)).unwrap_err().to_string();
    assert!(told.contains("the attention is dash, which has no number of chunks"), "{told}");
}

#[test]
fn random_chunks_do_not_depend_on_what_is_read_and_differ_between_layers() {
    let m = model(RandomChunks { chunk_size: 4, top: 3, seed: 3 }, 2, DType::F32);
    let lists = |seed| {
        let (x, y) = (m.ids(&ids(seed), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
        let traces = m.nll((&x, &y), None).unwrap().1;
        traces.into_iter().map(|t| t.unwrap().routes().unwrap().to_host().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(lists(1), lists(5));
    assert_ne!(lists(1)[0], lists(1)[1]);
}

#[test]
fn arms_that_mean_nothing_are_refused() {
    let told = |a: Attention| a.check_all().unwrap_err().to_string();
    let stopped = Dash { router_gradient: RouterGradient::Stopped, gradient_to: GradientTo::Queries, ..dash() };
    assert!(
        told(stopped.into()).starts_with("model.attention.gradient_to: means nothing to router_gradient = \"stopped\"")
    );
    let own = Dash { forward_bias: false, diagonal: true, ..dash() };
    assert!(told(own.into()).starts_with("model.attention.forward_bias: false leaves no bias"));
    let placebo = TopKBias { router_gradient: RouterGradient::Placebo, ..TopKBias::default() };
    assert!(told(placebo.into()).contains("is \"full\" or \"stopped\""));
    for name in [
        "dash-gradient-only",
        "dash-placebo",
        "dash-flipped",
        "dash-q-only",
        "dash-summaries-only",
        "dash-indexer-only",
        "dash-frozen",
        "topk-bias",
        "topk-bias-stopped",
        "random",
    ] {
        assert!(kinds().contains(&name), "{name}");
    }
}

/// The indexer's loss reaches its own two projections, nothing else reaches them, and everything else has the bits of a model whose indexer
/// does not learn.
#[test]
fn an_indexer_gets_its_own_loss_and_nobody_else_does() {
    let with = |weight| {
        let m = model(KlIndexer { chunk_size: 8, top: 3, weight, all_chunks: false }, 2, DType::F64);
        let (x, y) = (m.ids(&ids(1), 2).unwrap(), m.ids(&ids(2), 2).unwrap());
        let t = Tape::new();
        let leaves = m.leaves(&t);
        let (loss, traces) = m.loss(&t, &leaves, (&x, &y), 2.0 * T as f64).unwrap();
        let kl: Vec<f64> = traces.iter().map(|r| r.as_ref().unwrap().stats().unwrap().indexer_loss.unwrap()).collect();
        let g = t.backward(&loss).unwrap();
        let named = m
            .params()
            .iter()
            .zip(&leaves)
            .map(|(p, l)| (p.name.contains("index_"), g.get(l).unwrap().to_f64().unwrap()));
        (loss.value.item().unwrap(), kl, named.collect::<Vec<_>>())
    };
    let (once, twice) = (with(0.25), with(0.5));
    assert_eq!((once.0, &once.1), (twice.0, &twice.1));
    assert!(once.1.iter().all(|&kl| kl > 1e-3), "{:?}", once.1);
    assert_eq!(once.2.iter().filter(|(own, _)| *own).count(), 4);
    for ((own, a), (_, b)) in once.2.iter().zip(&twice.2) {
        match own {
            false => assert_eq!(a, b),
            true => {
                assert!(a.iter().any(|x| *x != 0.0) && far(&a.iter().map(|x| 2.0 * x).collect::<Vec<_>>(), b) < 1e-15)
            }
        }
    }
    // a pass without a loss has none, and the gradients do not depend on how an update is cut
    let m = model(KlIndexer { chunk_size: 8, top: 3, ..KlIndexer::default() }, 2, DType::F64);
    let x = m.ids(&ids(1), 2).unwrap();
    let none = m.nll((&x, &x), None).unwrap().1[0].as_ref().unwrap().stats().unwrap();
    assert_eq!(none.indexer_loss, None);
    let gradients = |part: &[u32], batch: usize| -> Vec<f64> {
        let x = m.ids(part, batch).unwrap();
        let t = Tape::new();
        let leaves = m.leaves(&t);
        let (loss, _) = m.loss(&t, &leaves, (&x, &x), 2.0 * T as f64).unwrap();
        let g = t.backward(&loss).unwrap();
        leaves.iter().flat_map(|l| g.get(l).unwrap().to_f64().unwrap()).collect()
    };
    let (all, whole) = (ids(1), gradients(&ids(1), 2));
    let (one, two) = (gradients(&all[..T], 1), gradients(&all[T..], 1));
    let sum: Vec<f64> = one.iter().zip(&two).map(|(a, b)| a + b).collect();
    assert!(far(&sum, &whole) < 1e-12);
}
