use dash_core::ops::attention::{Center, RouterGradient};
use dash_core::{DType, Result, Tape, Tensor, Var};
use dash_model::attention::{Inputs, attend};
use dash_model::{Attention, Dash};

use crate::files::{Golden, all, difference, error};
use crate::plain;

/// Variants of the oracle that the model crate does not have yet.
const NOT_YET: [&str; 3] = ["nsa", "infllmv2", "token-entmax"];

fn variant(g: &Golden) -> Attention {
    match g.text("variant") {
        "dense" => Attention::Dense,
        "topk" => Attention::TopK { chunk_size: g.size("chunk_size"), top: g.size("top"), gamma: g.number("gamma") },
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
        other => panic!("{}: unknown variant {other}", g.name),
    }
}

/// `[b, heads, t, d]` of the oracle to `[b, t, heads, d]` of the engine, or back.
fn swap(x: &Tensor) -> Tensor {
    let t = Tape::inference();
    dash_core::ops::transpose(&t, &t.leaf(x.clone()), &[0, 2, 1, 3]).unwrap().value
}

fn is_4d(name: &str) -> bool {
    ["q", "k", "v"].contains(&name)
}

/// Output and gradients, in the oracle's layout.
fn run(g: &Golden, dtype: DType, f: impl Fn(&Tape, &[(&str, Var)]) -> Result<Var>) -> Vec<(String, Tensor)> {
    let t = Tape::new();
    let names = ["q", "k", "v", "summary_query", "diagonal"].into_iter().filter(|n| g.has(n));
    let leaves: Vec<(&str, Var)> = names
        .map(|n| {
            let x = g.tensor(n, dtype);
            let x = if is_4d(n) {
                swap(&x)
            } else if n == "summary_query" {
                x.reshape(&[x.numel()]).unwrap()
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

fn ours(t: &Tape, a: &Attention, x: &[(&str, Var)]) -> Result<Var> {
    let must = |n| find(x, n).expect("every case has it");
    let inputs = Inputs {
        q: must("q"),
        k: must("k"),
        v: must("v"),
        indexer: find(x, "summary_query"),
        diagonal: find(x, "diagonal"),
    };
    Ok(attend(t, a, inputs)?.0)
}

fn composed(t: &Tape, a: &Attention, x: &[(&str, Var)]) -> Result<Var> {
    let must = |n| find(x, n).expect("every case has it");
    let (q, k, v) = (must("q"), must("k"), must("v"));
    match a {
        Attention::Dense => plain::dense(t, q, k, v),
        Attention::Dash(c) => plain::dash(t, q, k, v, must("summary_query"), find(x, "diagonal"), c),
        Attention::TopK { .. } => {
            let inputs = Inputs { q, k, v, indexer: find(x, "summary_query"), diagonal: None };
            let (_, trace) = attend(&Tape::inference(), a, inputs)?;
            plain::listed(t, q, k, v, trace.expect("topk routes").list())
        }
    }
}

fn cases() -> impl Iterator<Item = Golden> {
    all("attention").into_iter().filter(|g| {
        let known = !NOT_YET.contains(&g.text("variant"));
        if !known {
            println!("not implemented yet: {}", g.name);
        }
        known
    })
}

#[test]
fn golden_attention_f64() {
    for g in cases() {
        let a = variant(&g);
        for (name, got) in run(&g, DType::F64, |t, x| ours(t, &a, x)) {
            let e = error(&got, g.numbers(&name));
            assert!(e <= 1e-9, "{}: {name} is off by {e:e}", g.name);
        }
    }
}

#[test]
fn golden_attention_composed_from_primitives() {
    for g in cases() {
        let a = variant(&g);
        for (name, got) in run(&g, DType::F64, |t, x| composed(t, &a, x)) {
            let e = error(&got, g.numbers(&name));
            assert!(e <= 1e-9, "{}: {name} is off by {e:e}", g.name);
        }
    }
}

/// The fused f32 rooms err at most twice as much as the plain formula in f32. Inputs and upstream gradients are standard
/// normals, so what is summed has size one at least: a result that the plain formula meets by luck may be off by the
/// rounding of its own sum: with `terms` elements of the output for one of its own, the partial sums reach sqrt(terms),
/// each addition is off by half an ulp of that, and four of these cover the sums that make the terms.
#[test]
fn golden_attention_f32() {
    for g in cases() {
        let a = variant(&g);
        let fused = run(&g, DType::F32, |t, x| ours(t, &a, x));
        let plain = run(&g, DType::F32, |t, x| composed(t, &a, x));
        for ((name, fused), (_, plain)) in fused.iter().zip(&plain) {
            let want = g.numbers(name);
            let ((e, scale), (p, _)) = (difference(fused, want), difference(plain, want));
            let terms = g.numbers("out").len() as f64 / want.len() as f64;
            let allowed = 2.0 * p + 4.0 * terms.sqrt() * f32::EPSILON as f64 * scale.max(1.0);
            assert!(e <= allowed, "{}: {name} off by {e:e}, plain formula {p:e}, largest element {scale}", g.name);
        }
    }
}
