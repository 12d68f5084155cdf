//! Another router in the place of a model's own, to separate what was learned from how it is routed. For evaluation: the
//! choice has no gradient. Reads the model's own choice on the host.

use dash_core::ops::attention::Routes;
use dash_core::rng::Rng;
use dash_core::{Result, Tape, Var};

/// Who chooses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reroute {
    /// As many earlier chunks as the model's own router chose, drawn at random, without a bias. With the seed.
    Random(u64),
    /// At each (sequence, query, token): the token's chunk and the query's own, without a bias. Other queries keep the
    /// choice and the bias of the model's own router.
    Oracle(Vec<(usize, usize, usize)>),
}

impl Reroute {
    /// The new routes, and a bias per entry where there was one.
    pub(super) fn apply(&self, tape: &Tape, routes: &Routes, bias: Option<&Var>) -> Result<(Routes, Option<Var>)> {
        let list = routes.to_host()?;
        let extents = list.extents();
        let s = list.chunk_size();
        let old = bias.map(|b| list.per_entry(&b.value)).transpose()?;
        let mut values = Vec::new();
        let mut rng = match self {
            Reroute::Random(seed) => Rng::new(*seed),
            Reroute::Oracle(_) => Rng::new(0),
        };
        let new = Routes::from_choice(routes.device(), extents, s, |batch, kv, query, chunks| {
            let own = list.chunks_of(batch, kv, query);
            let (_, earlier) = own.split_last().expect("the own chunk");
            let entries = list.entries_of(batch, kv, query);
            match self {
                Reroute::Random(_) => {
                    let mut all: Vec<u32> = (0..(query / s) as u32).collect();
                    for i in 0..earlier.len() {
                        let j = i + rng.below(all.len() - i);
                        all.swap(i, j);
                    }
                    all.truncate(earlier.len());
                    all.sort_unstable();
                    chunks.extend_from_slice(&all);
                    values.extend(std::iter::repeat_n(0.0, earlier.len() + 1));
                }
                Reroute::Oracle(wanted) => {
                    let here = wanted.iter().filter(|(b, q, _)| (*b, *q) == (batch, query));
                    let mut found: Vec<u32> = here.map(|(_, _, token)| (token / s) as u32).collect();
                    if found.is_empty() {
                        chunks.extend_from_slice(earlier);
                        values.extend(entries.map(|e| old.as_ref().map_or(0.0, |b| b[e])));
                    } else {
                        found.sort_unstable();
                        found.dedup();
                        found.retain(|&c| (c as usize) < query / s);
                        values.extend(std::iter::repeat_n(0.0, found.len() + 1));
                        chunks.extend(found);
                    }
                }
            }
        })?;
        let bias = match bias {
            None => None,
            Some(b) => Some(tape.leaf(new.entries_from_host(&values, b.value.dtype())?)),
        };
        Ok((new, bias))
    }
}
