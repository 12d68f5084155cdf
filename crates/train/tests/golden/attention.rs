use std::collections::HashMap;

use dash_core::rng::Rng;
use dash_core::{DType, Result, Tape, Tensor, Var};
use dash_model::Attention;
use dash_model::attention::{Inputs, attend};
use serde_json::Value;

use crate::files::{Golden, all, difference, error};
use crate::plain;

/// The case's variant: its settings are the keys of a configuration, and a parameter that the case has is asked for.
fn variant(g: &Golden) -> Attention {
    variant_with(g, g.config.clone())
}

/// The same with other settings.
fn variant_with(g: &Golden, mut keys: Value) -> Attention {
    let table = keys.as_object_mut().expect("a table");
    let kind = table.remove("variant").unwrap_or_else(|| panic!("{}: no variant", g.name));
    for (input, kind_of, key) in [("summary_query", "topk", "indexer"), ("diagonal", "dash", "diagonal")] {
        if kind == kind_of && g.has(input) {
            table.insert(key.into(), true.into());
        }
    }
    table.insert("kind".into(), kind);
    serde_json::from_value(keys).unwrap_or_else(|e| panic!("{}: {e}", g.name))
}

/// `[b, heads, t, d]` of the oracle to `[b, t, heads, d]` of the engine, or back.
fn swap(x: &Tensor) -> Tensor {
    let t = Tape::inference();
    dash_core::ops::transpose(&t, &t.leaf(x.clone()), &[0, 2, 1, 3]).unwrap().value
}

/// Activations have four axes, parameters fewer.
fn is_activation(g: &Golden, name: &str) -> bool {
    g.shape(name).len() == 4
}

/// The weight of losses that a layer has of its own: that of the oracle.
const SHARE: f64 = 1.0;

/// Output and gradients, in the oracle's layout.
fn run(g: &Golden, dtype: DType, f: impl Fn(&Tape, &Inputs) -> Result<Var>) -> Vec<(String, Tensor)> {
    run_on(g, &|name| g.tensor(name, dtype), f)
}

/// The same with other inputs and another upstream gradient: `input(name)`.
fn run_on(
    g: &Golden,
    input: &dyn Fn(&str) -> Tensor,
    f: impl Fn(&Tape, &Inputs) -> Result<Var>,
) -> Vec<(String, Tensor)> {
    let t = Tape::new();
    let named = g.names().filter(|n| !n.starts_with("grad")).count();
    let names: Vec<_> = variant(g).spec().golden.iter().filter(|n| g.has(n)).collect();
    assert_eq!(names.len() + 1, named, "{}: every tensor but the output is an input", g.name);
    let leaf = |name: &&&str| {
        let x = input(name);
        t.leaf(match x.shape().len() {
            4 => swap(&x),
            // the learned query of the summaries
            2 => x.reshape(&[x.numel()]).unwrap(),
            _ => x,
        })
    };
    let leaves: Vec<Var> = names.iter().map(leaf).collect();
    let [q, k, v, own @ ..] = &leaves[..] else { panic!("{}: q, k and v come first", g.name) };
    let out =
        f(&t, &Inputs { q, k, v, own, layer: 0, budget: None, reroute: None, loss_share: Some(SHARE), cache: None })
            .unwrap();
    let mut results = vec![("out".to_string(), swap(&out.value))];
    let grads = t.backward_from(&out, swap(&input("grad_out"))).unwrap();
    for (name, leaf) in names.iter().zip(&leaves) {
        let zeros = || Tensor::zeros(leaf.value.device(), leaf.value.shape(), leaf.value.dtype()).unwrap();
        let d = grads.get(leaf).cloned().unwrap_or_else(zeros);
        results.push((format!("grad.{name}"), if is_activation(g, name) { swap(&d) } else { d }));
    }
    results
}

fn ours(t: &Tape, a: &Attention, x: &Inputs) -> Result<Var> {
    Ok(attend(t, a, x)?.0)
}

#[test]
fn golden_attention_f64() {
    for g in all("attention") {
        let a = variant(&g);
        for (name, got) in run(&g, DType::F64, |t, x| ours(t, &a, x)) {
            let e = error(&got, g.numbers(&name));
            assert!(e <= 1e-9, "{}: {name} is off by {e:e}", g.name);
        }
    }
}

#[test]
fn golden_attention_composed_from_primitives() {
    for g in all("attention") {
        let a = variant(&g);
        for (name, got) in run(&g, DType::F64, |t, x| plain::attend(t, &a, x)) {
            let e = error(&got, g.numbers(&name));
            assert!(e <= 1e-9, "{}: {name} is off by {e:e}", g.name);
        }
    }
}

/// How far the plain formula in f32 comes off, by result: the worst of sixteen inputs that differ from the case's in their
/// last bits. One evaluation would not do, it may be lucky: close to the edge of a support u = x - tau is small, log w = 2 log
/// u carries the rounding of x and tau divided by u, and centring hands the error of one such chunk to the biases of all.
/// Which bits are lost depends on the order of the sums, so the error of a case is a distribution, and this is its upper end.
fn rounding(g: &Golden, a: &Attention) -> HashMap<String, f64> {
    let mut worst = HashMap::new();
    for draw in 0..16 {
        let mut rng = Rng::new(draw);
        let names = a.spec().golden.iter().copied().filter(|n| g.has(n)).chain(["grad_out"]);
        let mut moved = HashMap::new();
        for name in names {
            let mut neighbour = |x: &f64| (x * (1.0 + 2.0 * f32::EPSILON as f64 * rng.normal())) as f32 as f64;
            moved.insert(name, g.numbers(name).iter().map(&mut neighbour).collect::<Vec<f64>>());
        }
        let input =
            |n: &str, to| Tensor::from_vec(g.device(), g.shape(n), moved[n].clone()).unwrap().to_dtype(to).unwrap();
        let plain = |dtype| run_on(g, &|n| input(n, dtype), |t, x| plain::attend(t, a, x));
        for ((name, got), (_, want)) in plain(DType::F32).into_iter().zip(plain(DType::F64)) {
            let (e, _) = difference(&got, &want.to_f64().unwrap());
            let worst: &mut f64 = worst.entry(name).or_default();
            *worst = worst.max(e);
        }
    }
    worst
}

/// The fused f32 ops err at most twice as much as the plain formula in f32 can (see [`rounding`]), or as much as the
/// rounding of their own sums, which the plain formula may be spared: a row with one key has ds = 0 in it, term by term.
/// Inputs and upstream gradients are standard normals, so what is summed has size one at least: with `terms` elements of the
/// output for one of its own, the partial sums reach sqrt(terms), each addition is off by half an ulp of that, and four of
/// these cover the sums that make the terms. All gradients but v's go through ds = p (dp - delta), whose sums dp = <dout, v>
/// and delta = <dout, out> reach |dout| |v|, cancel, and are rounded apart from each other: their ulps are larger by that
/// factor. The summaries' query is reached through the bias alone, which divides by sigma; an indexer through its own loss alone, a mean over
/// rows of (p - P) times a query or key, where p carries the rounding of scores as large as the product of the two.
fn allowed(g: &Golden, a: &Attention) -> HashMap<String, f64> {
    let longest = |name: &str| {
        let d = *g.shape(name).last().expect("has axes");
        g.numbers(name).chunks(d).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).fold(0.0, f64::max)
    };
    let values = ["v", "v_cmp", "v_slc", "v_win"].into_iter().filter(|name| g.has(name)).map(longest);
    let cancelling = longest("grad_out") * values.fold(0.0, f64::max);
    let bound = |(name, plain): (String, f64)| {
        let terms = g.numbers("out").len() as f64 / g.numbers(&name).len() as f64;
        let through_scores = name != "out" && !name.starts_with("grad.v");
        let mut size = largest(g, &name).max(1.0) * if through_scores { cancelling.max(1.0) } else { 1.0 };
        if name.starts_with("grad.index") {
            let rows: usize = g.shape("index_q")[..3].iter().product();
            size = longest("index_q") * longest("index_k") / rows as f64;
        }
        if g.text("variant") == "dash" && name == "grad.summary_query" {
            size /= g.number("sigma");
        }
        (name, 2.0 * plain + 4.0 * terms.sqrt() * f32::EPSILON as f64 * size)
    };
    rounding(g, a).into_iter().map(bound).collect()
}

fn largest(g: &Golden, name: &str) -> f64 {
    g.numbers(name).iter().fold(0.0, |m, x| m.max(x.abs()))
}

#[test]
fn golden_attention_f32() {
    for g in all("attention") {
        let a = variant(&g);
        let allowed = allowed(&g, &a);
        for (name, got) in run(&g, DType::F32, |t, x| ours(t, &a, x)) {
            let ((e, scale), allowed) = (difference(&got, g.numbers(&name)), allowed[&name]);
            assert!(e <= allowed, "{}: {name} off by {e:e}, allowed {allowed:e}, largest element {scale}", g.name);
        }
    }
}

/// What [`golden_attention_f32`] allows is far below one per cent of every result, and of what a router's settings do.
#[test]
fn golden_attention_f32_finds_a_fault_of_one_per_cent() {
    for g in all("attention") {
        let a = variant(&g);
        let allowed = allowed(&g, &a);
        let right = run(&g, DType::F32, |t, x| ours(t, &a, x));
        let mut tried = 0;
        for (name, got) in &right {
            // zero in exact arithmetic: one per cent of it is nothing
            if largest(&g, name) < 1e-9 {
                continue;
            }
            let wrong = got.to_f64().unwrap().iter().map(|x| 1.01 * x).collect();
            let wrong = Tensor::from_vec(g.device(), got.shape(), wrong).unwrap();
            let ((e, scale), allowed) = (difference(&wrong, g.numbers(name)), allowed[name]);
            assert!(e > allowed, "{}: {name} times 1.01 passes, allowed {allowed:e} of {scale:e}", g.name);
            tried += 1;
        }
        assert!(tried >= 3, "{}: {tried} results are not zero", g.name);
        // without an earlier chunk nothing is routed
        if g.text("variant") != "dash" || g.shape("q")[2] <= g.size("chunk_size") {
            continue;
        }
        let (gamma, alpha, sigma) = (g.number("gamma"), g.number("alpha"), g.number("sigma"));
        let mut wrong = vec![("gamma", 1.01 * gamma), ("alpha", 1.0 + 0.99 * (alpha - 1.0))];
        // a bias of 1e-6 is nobody's
        if sigma < 1e3 {
            wrong.push(("sigma", 1.01 * sigma));
        }
        for (setting, value) in wrong {
            let mut keys = g.config.clone();
            keys[setting] = value.into();
            let wrong = variant_with(&g, keys);
            let found = run(&g, DType::F32, |t, x| ours(t, &wrong, x)).iter().any(|(name, got)| {
                let (e, _) = difference(got, g.numbers(name));
                e > allowed[name]
            });
            assert!(found, "{}: {setting} off by 1 % passes", g.name);
        }
    }
}
