use dash_core::{DType, Result, Tape, Tensor, Var};
use dash_model::Attention;
use dash_model::attention::{Inputs, attend};

use crate::files::{Golden, all, difference, error};
use crate::plain;

/// The case's variant: its settings are the keys of a configuration, and a parameter that the case has is asked for.
fn variant(g: &Golden) -> Attention {
    let mut keys = g.config.clone();
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

/// Output and gradients, in the oracle's layout.
fn run(g: &Golden, dtype: DType, f: impl Fn(&Tape, &Inputs) -> Result<Var>) -> Vec<(String, Tensor)> {
    let t = Tape::new();
    let named = g.names().filter(|n| !n.starts_with("grad")).count();
    let names: Vec<_> = variant(g).spec().golden.iter().filter(|n| g.has(n)).collect();
    assert_eq!(names.len() + 1, named, "{}: every tensor but the output is an input", g.name);
    let leaf = |name: &&&str| {
        let x = g.tensor(name, dtype);
        t.leaf(match x.shape().len() {
            4 => swap(&x),
            // the learned query of the summaries
            2 => x.reshape(&[x.numel()]).unwrap(),
            _ => x,
        })
    };
    let leaves: Vec<Var> = names.iter().map(leaf).collect();
    let [q, k, v, own @ ..] = &leaves[..] else { panic!("{}: q, k and v come first", g.name) };
    let out = f(&t, &Inputs { q, k, v, own, reroute: None }).unwrap();
    let mut results = vec![("out".to_string(), swap(&out.value))];
    let grads = t.backward_from(&out, swap(&g.tensor("grad_out", dtype))).unwrap();
    for (name, leaf) in names.iter().zip(&leaves) {
        let zeros = || Tensor::zeros(leaf.value.device(), leaf.value.shape(), dtype).unwrap();
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

/// The fused f32 rooms err at most twice as much as the plain formula in f32, or as much as the rounding of their own sums,
/// which the plain formula may be spared by luck. Inputs and upstream gradients are standard normals, so what is summed has
/// size one at least: with `terms` elements of the output for one of its own, the partial sums reach sqrt(terms), each
/// addition is off by half an ulp of that, and four of these cover the sums that make the terms. All gradients but v's go
/// through ds = p (dp - delta), whose sums dp = <dout, v> and delta = <dout, out> reach |dout| |v|, cancel, and are rounded
/// apart from each other: their ulps are larger by that factor, and the router multiplies them as it does the gradient.
#[test]
fn golden_attention_f32() {
    for g in all("attention") {
        let a = variant(&g);
        let fused = run(&g, DType::F32, |t, x| ours(t, &a, x));
        let plain = run(&g, DType::F32, |t, x| plain::attend(t, &a, x));
        let longest = |name: &str| {
            let d = *g.shape(name).last().expect("has axes");
            g.numbers(name).chunks(d).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).fold(0.0, f64::max)
        };
        let values = ["v", "v_cmp", "v_slc", "v_win"].into_iter().filter(|name| g.has(name)).map(longest);
        let cancelling = longest("grad_out") * values.fold(0.0, f64::max);
        for ((name, fused), (_, plain)) in fused.iter().zip(&plain) {
            let want = g.numbers(name);
            let ((e, scale), (p, _)) = (difference(fused, want), difference(plain, want));
            let terms = g.numbers("out").len() as f64 / want.len() as f64;
            let through_scores = name != "out" && !name.starts_with("grad.v");
            let size = scale.max(1.0) * if through_scores { cancelling.max(1.0) } else { 1.0 };
            let allowed = 2.0 * p + 4.0 * terms.sqrt() * f32::EPSILON as f64 * size;
            assert!(e <= allowed, "{}: {name} off by {e:e}, plain formula {p:e}, largest element {scale}", g.name);
        }
    }
}
