//! The gradients of scores against what queries and summaries get, the straight-through one against differences, and a choice by mass.

use super::arm_tests::{GROUP, Seen, seen, seen_of, settings};
use super::*;
use crate::number::DType;
use crate::tape::{Tape, Var};
use crate::testing::{device, normal};

/// Asks for the gradients that these of the scores give, and counts the pairs of a query and a chunk that have one: `ds` is called with (batch, kv head, query, scores `[group, visible]`).
fn assert_gradients(
    seen: &Seen,
    gamma: f64,
    ds: impl Fn((usize, usize, usize), &[Vec<f64>]) -> Vec<Vec<f64>>,
) -> usize {
    let dev = device();
    let (qs, ks) =
        (normal(&dev, &[2, 70, 4, 6], 1).to_f64().unwrap(), normal(&dev, &[2, 17, 2, 6], 2).to_f64().unwrap());
    let factor = gamma / 6f64.sqrt();
    let (mut dq, mut dkbar) = (vec![0.0; qs.len()], vec![0.0; ks.len()]);
    let (mut squares, mut pairs) = (0.0, 0);
    for (batch, kv, query) in (0..2 * 2 * 70).map(|i| (i / 140, i / 70 % 2, i % 70)) {
        let place = |head: usize| ((batch * 70 + query) * 4 + kv * GROUP + head) * 6;
        let key = |c: usize| ((batch * 17 + c) * 2 + kv) * 6;
        let dot = |head: usize, c: usize| (0..6).map(|i| qs[place(head) + i] * ks[key(c) + i]).sum::<f64>() * factor;
        let scores: Vec<Vec<f64>> = (0..GROUP).map(|head| (0..query / 4).map(|c| dot(head, c)).collect()).collect();
        let ds = ds((batch, kv, query), &scores);
        for (head, row) in ds.iter().enumerate() {
            squares += row.iter().map(|x| x * x).sum::<f64>();
            for ((c, ds), i) in row.iter().enumerate().flat_map(|e| (0..6).map(move |i| (e, i))) {
                dq[place(head) + i] += ds * factor * ks[key(c) + i];
                dkbar[key(c) + i] += ds * factor * qs[place(head) + i];
            }
        }
        pairs += (0..query / 4).filter(|&c| ds.iter().any(|row| row[c] != 0.0)).count();
    }
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-7);
    assert!(near(&seen.dq, &dq) && near(&seen.dkbar, &dkbar));
    assert!((seen.norm - squares.sqrt()).abs() < 1e-7);
    pairs
}

#[test]
fn what_is_told_of_the_scores_is_what_queries_and_summaries_get() {
    let dev = device();
    let entmax = |gradient| seen(&dev, DType::F64, settings(gradient), 5);
    let softmax = |t: &Tape, q: &Var, kbar: &Var| {
        let routes = topk_routing(&q.value, &kbar.value, 4, 5, 1.0).unwrap();
        softmax_bias(t, q, kbar, routes, 1.0).unwrap()
    };
    for seen in [
        entmax(RouterGradient::Full),
        entmax(RouterGradient::Flipped),
        entmax(RouterGradient::Placebo),
        seen_of(&dev, DType::F64, 5, softmax),
    ] {
        let list = seen.routing.routes.to_host().unwrap();
        let pairs = assert_gradients(&seen, 1.0, |(batch, kv, query), scores| {
            let mut ds: Vec<Vec<f64>> = scores.iter().map(|row| vec![0.0; row.len()]).collect();
            let entries = list.entries_of(batch, kv, query).zip(list.chunks_of(batch, kv, query).iter().copied());
            for (e, c) in entries.filter(|(_, c)| (*c as usize) < query / 4) {
                (0..GROUP).for_each(|head| ds[head][c as usize] = seen.scores[e * GROUP + head]);
            }
            ds
        });
        assert!(seen.pairs == pairs as f64 && pairs > 500, "{pairs} pairs, told are {}", seen.pairs);
    }
}

/// Against central differences of sum over listed c of dbias_c / sigma * log of the sum over heads of softmax_c over all that is visible.
#[test]
fn the_straight_through_gradient_is_that_of_the_log_of_the_mean_softmax() {
    let (dev, sigma) = (device(), 2.0);
    // all that is visible is listed, and less
    for gamma in [0.05, 3.0] {
        let seen = seen(&dev, DType::F64, Entmax { gamma, sigma, ..settings(RouterGradient::StraightThrough) }, 5);
        let list = seen.routing.routes.to_host().unwrap();
        let dbias = normal(&dev, &[list.len()], 5).to_f64().unwrap();
        assert_gradients(&seen, gamma, |(batch, kv, query), scores| {
            let listed: Vec<(usize, usize)> = list
                .entries_of(batch, kv, query)
                .zip(list.chunks_of(batch, kv, query).iter().copied())
                .map(|(e, c)| (e, c as usize))
                .filter(|(_, c)| *c < query / 4)
                .collect();
            let value = |scores: &[Vec<f64>]| {
                let softmax = |row: &Vec<f64>, c: usize| row[c].exp() / row.iter().map(|x| x.exp()).sum::<f64>();
                let log = |c: usize| scores.iter().map(|row| softmax(row, c)).sum::<f64>().ln();
                listed.iter().map(|&(e, c)| dbias[e] / sigma * log(c)).sum::<f64>()
            };
            let moved = |head: usize, c: usize, by: f64| {
                let mut scores = scores.to_vec();
                scores[head][c] += by;
                value(&scores)
            };
            let slope = |head, c| (moved(head, c, 1e-5) - moved(head, c, -1e-5)) / 2e-5;
            let ds: Vec<Vec<f64>> = (0..GROUP).map(|head| (0..query / 4).map(|c| slope(head, c)).collect()).collect();
            for &(e, c) in &listed {
                assert!((0..GROUP).all(|head| (seen.scores[e * GROUP + head] - ds[head][c]).abs() < 1e-7));
            }
            ds
        });
        // one visible chunk has the probability 1 whatever its score is
        let pairs: usize = (0..70).map(|query| query / 4).filter(|&visible| visible > 1).sum();
        assert_eq!(seen.pairs, (2 * 2 * pairs) as f64);
    }
}

/// The list against a plain one, over several heads, kv heads, tiles of queries and numbers of chunks.
#[test]
fn mass_routing_adds_the_heads_and_the_tokens_of_a_chunk() {
    let dev = device();
    let (q, k) = (normal(&dev, &[2, 70, 4, 6], 1), normal(&dev, &[2, 70, 2, 6], 2));
    let tops: Vec<u32> = (0..2 * 70).map(|i| 1 + i % 7 % 4).collect();
    let list = mass_routing(0, &q, &k, 4, Top::Each(&tops)).unwrap().to_host().unwrap();
    let (qs, ks) = (q.to_f64().unwrap(), k.to_f64().unwrap());
    let mut chosen = 0;
    for (batch, kv, query) in (0..2 * 2 * 70).map(|i| (i / 140, i / 70 % 2, i % 70)) {
        let own = query / 4;
        let mut mass = vec![0.0; own];
        for head in 0..GROUP {
            let q = &qs[((batch * 70 + query) * 4 + kv * GROUP + head) * 6..][..6];
            let dot = |token: usize| q.iter().zip(&ks[((batch * 70 + token) * 2 + kv) * 6..]).map(|(a, b)| a * b);
            let p: Vec<f64> = (0..4 * own).map(|token| (dot(token).sum::<f64>() / 6f64.sqrt()).exp()).collect();
            let sum: f64 = p.iter().sum();
            p.iter().enumerate().for_each(|(token, p)| mass[token / 4] += p / sum);
        }
        let mut want: Vec<u32> = (0..own as u32).collect();
        want.sort_by(|&a, &b| mass[b as usize].total_cmp(&mass[a as usize]));
        want.truncate(tops[kv * 70 + query] as usize - 1);
        chosen += want.len();
        want.sort_unstable();
        want.push(own as u32);
        assert_eq!(list.chunks_of(batch, kv, query), want, "{batch} {kv} {query}");
    }
    assert!(chosen > 300, "{chosen}");
}
