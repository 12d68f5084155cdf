//! The choice against dense attention.

use dash_core::ops::attention::HostRoutes;

/// Queries whose dense attention is computed, at most.
const SAMPLED: usize = 64;

/// Over some queries: how many of the chosen earlier chunks are among the equally many with most dense attention (mean over
/// the group), and how much of dense attention lies in the attended chunks.
pub fn overlap(list: &HostRoutes, (q, k): (&[f64], &[f64]), h: usize, d: usize) -> (f64, f64) {
    let (b, g, t) = list.extents();
    let (group, s) = (h / g, list.chunk_size());
    let (mut recall, mut recalled, mut captured, mut rows) = (0.0, 0usize, 0.0, 0usize);
    for query in (s..t).step_by((t - s).div_ceil(SAMPLED).max(1)) {
        for (batch, kv) in (0..b * g).map(|i| (i / g, i % g)) {
            let mut mass = vec![0.0; query / s + 1];
            for head in kv * group..(kv + 1) * group {
                let q = &q[((batch * t + query) * h + head) * d..][..d];
                let z = (0..=query).map(|j| {
                    let k = &k[((batch * t + j) * g + kv) * d..][..d];
                    q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()
                });
                let z: Vec<f64> = z.collect();
                let top = z.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = z.iter().map(|x| (x - top).exp()).sum();
                z.iter().enumerate().for_each(|(j, x)| mass[j / s] += (x - top).exp() / sum / group as f64);
            }
            let chunks = list.chunks_of(batch, kv, query);
            captured += chunks.iter().map(|&c| mass[c as usize]).sum::<f64>();
            rows += 1;
            let (_, chosen) = chunks.split_last().expect("the own chunk");
            if !chosen.is_empty() {
                let mut order: Vec<u32> = (0..(query / s) as u32).collect();
                order.sort_by(|&a, &b| mass[b as usize].total_cmp(&mass[a as usize]).then(a.cmp(&b)));
                let best = &order[..chosen.len()];
                recall += chosen.iter().filter(|c| best.contains(c)).count() as f64 / chosen.len() as f64;
                recalled += 1;
            }
        }
    }
    (recall / recalled.max(1) as f64, captured / rows.max(1) as f64)
}
