use dash_core::ops::attention::{Center, RouterGradient};

use super::*;
use crate::params::INDEXER;

fn read(table: &[(&'static str, Value)], kind: &str) -> std::result::Result<Attention, ConfigError> {
    let a = Attention::from_keys(kind, Given::of(table))?;
    a.check_all().map(|()| a)
}

#[test]
fn presets_and_overrides() {
    let Attention::Dash(d) = read(&[], "dash-released").unwrap() else { panic!() };
    assert_eq!((d.sigma, d.center, d.router_gradient), (1e6, Center::Mean, RouterGradient::Full));
    let Attention::Dash(d) = read(&[("sigma", Value::Number(2.0))], "dash-released").unwrap() else { panic!() };
    assert_eq!((d.sigma, d.center), (2.0, Center::Mean));
    let Attention::Nsa(n) = read(&[("chunk_size", Value::Size(8))], "nsa").unwrap() else { panic!() };
    assert_eq!(n, Nsa { chunk_size: 8, top: 4, length: 4, stride: 2, init: 1, local: 2, window: 16 });
    assert_eq!(Attention::default(), Attention::preset("dash").unwrap());
}

#[test]
fn the_registry_agrees_with_itself() {
    let all = kinds();
    for (i, kind) in all.iter().enumerate() {
        assert!(!all[..i].contains(kind), "{kind} is there twice");
        Attention::preset(kind).unwrap().check_all().unwrap();
    }
    for spec in VARIANTS {
        let (default, small) = (spec.with(&[]), spec.with(spec.small));
        assert_eq!((default.kind(), spec.kind), (spec.kind, small.kind()));
        small.check_all().unwrap();
        let text = format!("{}{:?}{:?}", spec.about, spec.keys, spec.golden);
        assert!(text.len() > 20 && spec.golden.len() >= 3, "{}", spec.kind);
        // values of every key survive being taken apart and put together, so that a file can hold them
        let values: Vec<_> = spec.keys.iter().map(|k| (k.name, small.value(k.name).unwrap())).collect();
        assert_eq!(spec.with(&values), small);
        for key in spec.keys {
            assert!(!key.meaning.trim().is_empty(), "{}.{} has no meaning", spec.kind, key.name);
            // a key is read before the kind is known
            let same = VARIANTS.iter().flat_map(|v| v.keys).filter(|k| k.name == key.name);
            assert!(same.clone().all(|k| k.takes == key.takes), "{} has two types", key.name);
        }
        for (key, value) in spec.presets.iter().flat_map(|p| p.values).chain(spec.small) {
            assert_eq!(spec.with(&[(*key, *value)]).value(key), Some(*value), "{}.{key}", spec.kind);
        }
        assert!(reference().contains(&format!("kind = \"{}\"", spec.kind)));
    }
}

#[test]
fn a_key_of_another_kind_is_refused_with_the_kinds_that_have_it() {
    let err = read(&[("top", Value::Size(3))], "dash").unwrap_err().to_string();
    let having: Vec<&str> =
        VARIANTS.iter().filter(|v| v.keys.iter().any(|k| k.name == "top")).map(|v| v.kind).collect();
    assert!(having.contains(&"topk") && !having.contains(&"dash"));
    let what = format!("means nothing to kind \"dash\"; remove it (it is a key of {})", having.join(", "));
    assert_eq!(err, format!("model.attention.top: {what}"));
    let err = read(&[], "dahs").unwrap_err().to_string();
    assert_eq!(err, format!("model.attention.kind: \"dahs\" is none of {}", kinds().join(", ")));
}

#[test]
fn values_outside_a_range_are_refused_with_the_range() {
    let refused = |kind, key, value| read(&[(key, value)], kind).unwrap_err().to_string();
    for (kind, key, value, what) in [
        ("dash", "chunk_size", Value::Size(0), "0 is not at least 1; a chunk has"),
        ("dash", "alpha", Value::Number(1.0), "1.0 is not at least 1.001 and at most 2; 1 is softmax"),
        ("dash", "gamma", Value::Number(1e39), "is not above 0 and at most 1e38"),
        ("token-entmax", "alpha", Value::Number(1.000001), "is not at least 1.001"),
        ("token-entmax", "alpha", Value::Number(f64::NAN), "NaN is not at least 1.001 and at most 2"),
        ("dash", "sigma", Value::Number(f64::INFINITY), "inf is not above 0"),
        ("topk", "top", Value::Size(1 << 40), "1099511627776 is above 2147483648, the largest that is taken"),
        ("nsa", "stride", Value::Size(33), "33 is not between 1 and length = 32"),
        ("infllmv2", "init", Value::Size(4), "4 is below init + local = 5"),
    ] {
        let err = refused(kind, key, value);
        assert!(err.starts_with("model.attention.") && err.contains(what), "{err}");
    }
}

#[test]
fn a_model_is_converted_with_what_both_kinds_have() {
    let of = |attention: Attention| ModelConfig { attention, ..ModelConfig::new(1, 8, (2, 1), 8) };
    let dash = of(Dash { gamma: 8.0, diagonal: true, sigma: 3.0, ..Dash::default() }.into());
    let topk = Attention::converted("topk", &dash, 16, 5).unwrap();
    assert_eq!(topk, TopK { chunk_size: 16, top: 5, gamma: 8.0, indexer: true, per_head: false }.into());
    let released = Attention::converted("dash-released", &dash, 64, 5).unwrap();
    let want = Dash { gamma: 8.0, diagonal: true, sigma: 1e6, center: Center::Mean, ..Dash::default() };
    assert_eq!(released, want.into());
    let hard = Attention::converted("infllmv2", &dash, 16, 1).unwrap();
    assert_eq!(hard, InfLlmV2 { chunk_size: 16, top: 1, length: 8, stride: 4, init: 0, local: 1 }.into());
    let nsa = Nsa { chunk_size: 16, window: 7, ..Nsa::default() };
    assert_eq!(Attention::converted("nsa", &of(nsa.into()), 16, 4).unwrap(), nsa.into());
    assert!(nsa.params(&of(nsa.into())).iter().all(|p| p.name != INDEXER));
}

#[test]
fn tokens_of_a_full_list_are_counted_by_hand() {
    // ten tokens in chunks of four, the own chunk and one earlier: 1 2 3 4, 5 6 7 8, 4 + 1 and 4 + 2
    assert_eq!(Attention::listed_at(4, 2, 10), 4.7);
    // the own chunk alone: 1 2 3 4 1 2 3 4 1 2; every chunk: 1 to 10
    assert_eq!((Attention::listed_at(4, 1, 10), Attention::listed_at(4, 9, 10)), (2.3, 5.5));
    assert_eq!(Attention::listed_at(4, 2, 0), 0.0);
    let topk: Attention = TopK { chunk_size: 4, top: 2, ..TopK::default() }.into();
    let dash: Attention = Dash::default().into();
    assert_eq!((topk.listed(10), dash.listed(10), Attention::from(Dense {}).listed(10)), (Some(4.7), None, Some(0.0)));
    assert_eq!((topk.attended(10, 4.7), Attention::from(Dense {}).attended(10, 0.0)), (4.7, 5.5));
    // a window of three: 1 2 3 3 3 3 3 3 3 3; windows of four every two end at 3, 5, 7, 9: 0 0 0 1 1 2 2 3 3 4
    let nsa = Nsa { chunk_size: 4, top: 2, length: 4, stride: 2, init: 0, local: 1, window: 3 };
    assert_eq!(Attention::from(nsa).attended(10, 4.7), 4.7 + 2.7 + 1.6);
}
