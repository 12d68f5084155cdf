use dash_core::ops::attention::{Center, RouterGradient};
use dash_core::{DType, Result, Tape, Tensor, Var};
use dash_model::attention::{Branches, Inputs, attend};
use dash_model::{Attention, Dash, Nsa, Windows};

use crate::files::{Golden, all, difference, error};
use crate::plain;

fn variant(g: &Golden) -> Attention {
    match g.text("variant") {
        "dense" => Attention::Dense,
        "topk" => Attention::TopK {
            chunk_size: g.size("chunk_size"),
            top: g.size("top"),
            gamma: g.number("gamma"),
            indexer: true,
        },
        "dash" => Attention::Dash(Dash {
            chunk_size: g.size("chunk_size"),
            alpha: g.number("alpha"),
            gamma: g.number("gamma"),
            sigma: g.number("sigma"),
            center: match g.text("center") {
                "none" => Center::None,
                "mean" => Center::Mean,
                "mean-detached" => Center::MeanDetached,
                other => panic!("{}: center {other}", g.name),
            },
            router_gradient: match g.text("router_gradient") {
                "full" => RouterGradient::Full,
                "stopped" => RouterGradient::Stopped,
                "straight-through" => RouterGradient::StraightThrough,
                other => panic!("{}: router_gradient {other}", g.name),
            },
            diagonal: g.has("diagonal"),
        }),
        "token-entmax" => Attention::TokenEntmax { alpha: g.number("alpha") },
        "infllmv2" => Attention::InfLlmV2(windows(g)),
        "nsa" => Attention::Nsa(Nsa { windows: windows(g), window: g.size("window") }),
        other => panic!("{}: unknown variant {other}", g.name),
    }
}

fn windows(g: &Golden) -> Windows {
    Windows {
        chunk_size: g.size("chunk_size"),
        top: g.size("top"),
        length: g.size("length"),
        stride: g.size("stride"),
        init: g.size("init"),
        local: g.size("local"),
    }
}

/// Every input that a case can have, by the oracle's name.
const INPUTS: [&str; 15] = [
    "q",
    "k",
    "v",
    "summary_query",
    "diagonal",
    "k_cmp",
    "v_cmp",
    "k_slc",
    "v_slc",
    "k_win",
    "v_win",
    "w_k",
    "w_v",
    "pe",
    "gates",
];

/// `[b, heads, t, d]` of the oracle to `[b, t, heads, d]` of the engine, or back.
fn swap(x: &Tensor) -> Tensor {
    let t = Tape::inference();
    dash_core::ops::transpose(&t, &t.leaf(x.clone()), &[0, 2, 1, 3]).unwrap().value
}

fn is_4d(name: &str) -> bool {
    ["q", "k", "v", "gates"].contains(&name) || ["_cmp", "_slc", "_win"].iter().any(|end| name.ends_with(end))
}

/// Output and gradients, in the oracle's layout.
fn run(g: &Golden, dtype: DType, f: impl Fn(&Tape, &[(&str, Var)]) -> Result<Var>) -> Vec<(String, Tensor)> {
    let t = Tape::new();
    let named = g.names().filter(|n| !n.starts_with("grad")).count();
    let names = INPUTS.into_iter().filter(|n| g.has(n));
    assert_eq!(names.clone().count() + 1, named, "{}: every tensor but the output is an input", g.name);
    let leaves: Vec<(&str, Var)> = names
        .map(|n| {
            let x = g.tensor(n, dtype);
            let x = if is_4d(n) {
                swap(&x)
            } else if ["summary_query", "pe"].contains(&n) {
                x.reshape(&[x.numel()]).unwrap()
            } else if ["w_k", "w_v"].contains(&n) {
                let [g, window, d] = x.dims("golden").unwrap();
                x.reshape(&[g * window, d]).unwrap()
            } else {
                x
            };
            (n, t.leaf(x))
        })
        .collect();
    let out = f(&t, &leaves).unwrap();
    let mut results = vec![("out".to_string(), swap(&out.value))];
    let grads = t.backward_from(&out, swap(&g.tensor("grad_out", dtype))).unwrap();
    for (name, leaf) in &leaves {
        let zeros = || Tensor::zeros(leaf.value.device(), leaf.value.shape(), dtype);
        let d = grads.get(leaf).cloned().unwrap_or_else(zeros);
        results.push((format!("grad.{name}"), if is_4d(name) { swap(&d) } else { d }));
    }
    results
}

fn find<'a>(leaves: &'a [(&str, Var)], name: &str) -> Option<&'a Var> {
    leaves.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
}

fn inputs<'a>(a: &Attention, x: &'a [(&str, Var)]) -> Inputs<'a> {
    let must = |n| find(x, n).unwrap_or_else(|| panic!("the case has no {n}"));
    let nsa = matches!(a, Attention::Nsa(_));
    Inputs {
        q: must("q"),
        k: must(if nsa { "k_slc" } else { "k" }),
        v: must(if nsa { "v_slc" } else { "v" }),
        indexer: find(x, "summary_query"),
        diagonal: find(x, "diagonal"),
        reroute: None,
        nsa: nsa.then(|| Branches {
            k_compressed: must("k_cmp"),
            v_compressed: must("v_cmp"),
            k_window: must("k_win"),
            v_window: must("v_win"),
            compress_k: must("w_k"),
            compress_v: must("w_v"),
            position: must("pe"),
            gates: must("gates"),
        }),
    }
}

fn ours(t: &Tape, a: &Attention, x: &[(&str, Var)]) -> Result<Var> {
    Ok(attend(t, a, inputs(a, x))?.0)
}

fn composed(t: &Tape, a: &Attention, x: &[(&str, Var)]) -> Result<Var> {
    let i = inputs(a, x);
    // a hard choice is data: the plain formula attends what the engine chose
    let chosen = || attend(&Tape::inference(), a, inputs(a, x)).map(|o| o.1.expect("it routes"));
    match a {
        Attention::Dense => plain::dense(t, i.q, i.k, i.v),
        Attention::TokenEntmax { alpha } => plain::token_entmax(t, i.q, i.k, i.v, *alpha),
        Attention::Dash(c) => plain::dash(t, i.q, i.k, i.v, i.indexer.expect("dash has it"), i.diagonal, c),
        Attention::TopK { .. } | Attention::InfLlmV2(_) => plain::listed(t, i.q, i.k, i.v, chosen()?.list()),
        Attention::Nsa(c) => plain::nsa(t, &i, chosen()?.list(), c),
    }
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
        for (name, got) in run(&g, DType::F64, |t, x| composed(t, &a, x)) {
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
        let plain = run(&g, DType::F32, |t, x| composed(t, &a, x));
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
