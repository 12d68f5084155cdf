//! Generation with what is kept of earlier tokens, against generation that computes them again.

use dash_core::rng::Rng;
use dash_core::{DType, Tensor, testing};
use dash_model::{Attention, Dash, Generation, Model, ModelConfig, Sampling, TopK, generate, kinds};

const VOCAB: usize = 50;
/// Positions: several chunks of 4 tokens and a ragged one.
const T: usize = 43;

/// Every kind and preset at sizes that route here, and the parameters that only a switch brings.
fn variants() -> Vec<Attention> {
    let mut all: Vec<Attention> = kinds().into_iter().map(|kind| Attention::small(kind).unwrap()).collect();
    let Some(Attention::Dash(dash)) = Attention::small("dash") else { panic!("dash is a kind") };
    let Some(Attention::TopK(topk)) = Attention::small("topk") else { panic!("topk is a kind") };
    all.push(Dash { diagonal: true, alpha: 1.3, ..dash }.into());
    all.push(TopK { indexer: true, ..topk }.into());
    assert!(all.len() >= 10);
    all
}

fn model(attention: Attention, dtype: DType) -> Model {
    model_with(attention, dtype, false)
}

/// With biases and norms of queries and keys, where they are asked for.
fn model_with(attention: Attention, dtype: DType, besides: bool) -> Model {
    // far from zero, so that attention is neither uniform nor the router flat
    let (qkv_bias, qk_norm) = (besides, besides);
    let config = ModelConfig { init_std: 0.5, qkv_bias, qk_norm, attention, ..ModelConfig::new(2, 24, (4, 2), 32) };
    let mut model = Model::new(config, VOCAB, T, 3, &testing::device(), dtype).unwrap();
    // what starts at zero would hide a term that is left out
    for p in model.params_mut().iter_mut().filter(|p| p.value.to_f64().unwrap().iter().all(|&x| x == 0.0)) {
        let drawn = testing::normal(p.value.device(), p.value.shape(), 7);
        p.value = drawn.to_dtype(dtype).unwrap();
    }
    model
}

fn text() -> Vec<u32> {
    let mut rng = Rng::new(1);
    (0..T).map(|_| rng.below(VOCAB) as u32).collect()
}

/// Logits after each prefix of the text that ends a pass, where passes have the lengths of `passes` in turn.
fn in_passes(model: &Model, text: &[u32], passes: &[usize]) -> Vec<(usize, Vec<f64>)> {
    let (mut cache, mut found, mut at) = (model.cache(), Vec::new(), 0);
    for &pass in passes.iter().cycle() {
        let end = (at + pass).min(text.len());
        let logits = model.logits_after(&mut cache, &model.ids(&text[at..end], 1).unwrap()).unwrap();
        assert_eq!(cache.len(), end);
        found.push((end, logits.to_f64().unwrap()));
        at = end;
        if at == text.len() {
            return found;
        }
    }
    unreachable!("the passes are repeated")
}

/// Largest distance of logits after prefixes from rows of `want [T, VOCAB]`, over the largest of those.
fn distance(found: &[(usize, Vec<f64>)], want: &[f64]) -> f64 {
    let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let rows = found.iter().flat_map(|(end, row)| row.iter().zip(&want[(end - 1) * VOCAB..]));
    rows.map(|(a, b)| if a.is_nan() { f64::INFINITY } else { (a - b).abs() }).fold(0.0, f64::max) / scale
}

/// Passes of one token, of prompts that end before, at and behind the border of a chunk, and of several tokens after others.
const PASSES: [&[usize]; 5] = [&[1], &[3, 1], &[4, 1, 1], &[5, 2, 1], &[17, 9]];

/// The same sums in another order. f64: a rounding is 1e-16 of a term, and no sum here has more than 43 terms; 1e-12 leaves room
/// for what two layers make of it, and a key that is missing, or rotated by a wrong position, changes a logit by 1e-3 and more.
#[test]
fn kept_tokens_give_the_logits_of_the_whole_text() {
    let text = text();
    let plain = variants().into_iter().map(|a| (a, false));
    let besides = variants().into_iter().filter(|a| a.kind() != "nsa").map(|a| (a, true));
    for (attention, besides) in plain.chain(besides) {
        let model = model_with(attention, DType::F64, besides);
        let whole = model.logits(&model.ids(&text, 1).unwrap()).unwrap().to_f64().unwrap();
        for passes in PASSES {
            let error = distance(&in_passes(&model, &text, passes), &whole);
            assert!(error < 1e-12, "{attention:?}, {besides}, in passes of {passes:?}: {error:e}");
        }
        assert!(distance(&in_passes(&model, &text[1..], &[1]), &whole) > 1e-3, "the distance sees a difference");
    }
}

/// f32: against f64, no further than twice the whole text's own distance, which has as many roundings.
#[test]
fn kept_tokens_lose_no_digits_in_f32() {
    let text = text();
    for attention in variants() {
        let (mut rounded, model) = (model(attention, DType::F64), model(attention, DType::F32));
        let device = rounded.device().clone();
        for (wide, narrow) in rounded.params_mut().iter_mut().zip(model.params().iter()) {
            wide.value = Tensor::from_vec(&device, narrow.value.shape(), narrow.value.to_f64().unwrap()).unwrap();
        }
        let ids = rounded.ids(&text, 1).unwrap();
        let want = rounded.logits(&ids).unwrap().to_f64().unwrap();
        let whole = model.logits(&model.ids(&text, 1).unwrap()).unwrap().to_f64().unwrap();
        let rows: Vec<_> = (1..=T).map(|end| (end, whole[(end - 1) * VOCAB..end * VOCAB].to_vec())).collect();
        let own = distance(&rows, &want);
        let kept = distance(&in_passes(&model, &text, &[1]), &want);
        assert!(kept < 2.0 * own, "{attention:?}: {kept:e} against {own:e}");
    }
}

/// Also where the text becomes longer than the positions and slides.
#[test]
fn the_same_tokens_with_and_without() {
    let text = text();
    let mut changed = 0;
    for attention in variants() {
        let model = model(attention, DType::F32);
        for (length, temperature) in [(1, 0.0), (3, 1.0), (4, 0.0), (8, 1.0), (21, 0.0), (T, 1.0)] {
            let continued = |cache: bool| {
                let sampling = Sampling { temperature, top_p: 0.9 };
                let mut tokens = Vec::new();
                let how = Generation { max_tokens: 50, sampling, cache };
                generate(&model, &text[..length], how, &mut Rng::new(5), |id| {
                    tokens.push(id);
                    true
                })
                .unwrap();
                tokens
            };
            let tokens = continued(true);
            assert_eq!(tokens, continued(false), "{attention:?} from {length} tokens at temperature {temperature}");
            assert_eq!(tokens.len(), 50);
            changed += tokens.windows(2).filter(|w| w[0] != w[1]).count();
        }
    }
    assert!(changed > 1000, "a model that repeats one token shows nothing: {changed}");
}

#[test]
fn a_text_beyond_the_positions_is_refused_and_sampling_stops_when_told() {
    let model = model(Attention::small("dash").unwrap(), DType::F32);
    let (mut cache, ids) = (model.cache(), model.ids(&text(), 1).unwrap());
    assert!(cache.is_empty());
    model.logits_after(&mut cache, &ids).unwrap();
    let one = model.ids(&[1], 1).unwrap();
    let error = model.logits_after(&mut cache, &one).unwrap_err().to_string();
    assert!(error.contains("positions up to 44 asked, the table has 43"), "{error}");
    let mut count = 0;
    let how = Generation { max_tokens: 9, sampling: Sampling { temperature: 0.0, top_p: 1.0 }, cache: true };
    generate(&model, &[1], how, &mut Rng::new(1), |_| {
        count += 1;
        count < 3
    })
    .unwrap();
    assert_eq!(count, 3);
}
