//! Where a router spends its budget on a task: tokens in the attended chunks by half of the sequence and where something is asked, and
//! how often the chunk with the answer is among them.

use dash_core::ops::attention::HostRoutes;
use dash_data::Question;
use serde_json::{Value, json};

/// What one layer attends, means over key/value heads and sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spent {
    /// Number of the layer.
    pub layer: usize,
    /// Tokens in the attended chunks of a query in the first half of the positions.
    pub first_half: f64,
    /// In the second half.
    pub second_half: f64,
    /// Of a query that asks.
    pub asked: f64,
    /// Share of lists of asking queries that hold the chunk of the answer, where that is an earlier chunk than the own one.
    pub recall: f64,
    /// What lists of the same lengths would hold if their earlier chunks were drawn at random.
    pub chance: f64,
}

impl Spent {
    /// For metrics.jsonl and `eval --json`.
    pub fn json(&self) -> Value {
        json!({
            "layer": self.layer, "tokens_first_half": self.first_half, "tokens_second_half": self.second_half,
            "tokens_asked": self.asked, "answer_recall": self.recall, "answer_chance": self.chance,
        })
    }
}

/// Sums and counts.
#[derive(Debug, Clone, Copy, Default)]
struct Mean(f64, f64);

impl Mean {
    fn add(&mut self, x: f64) {
        *self = Mean(self.0 + x, self.1 + 1.0);
    }

    fn get(self) -> f64 {
        self.0 / self.1.max(1.0)
    }
}

/// [`Spent`] in the making.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    halves: [Mean; 2],
    asked: Mean,
    recall: Mean,
    chance: Mean,
}

/// Tokens of a query's list: earlier chunks whole, the own one up to the query.
fn tokens(list: &HostRoutes, (batch, kv, query): (usize, usize, usize)) -> f64 {
    let (size, chunks) = (list.chunk_size(), list.chunks_of(batch, kv, query).len());
    ((chunks - 1) * size + query % size + 1) as f64
}

impl Tally {
    /// Adds a batch: its lists and its questions.
    pub fn add(&mut self, list: &HostRoutes, questions: &[Question]) {
        let (batch, kv_heads, queries) = list.extents();
        for b in 0..batch {
            for kv in 0..kv_heads {
                (0..queries).for_each(|q| self.halves[2 * q / queries].add(tokens(list, (b, kv, q))));
            }
        }
        for q in questions {
            let (own, answer) = (q.at / list.chunk_size(), q.evidence / list.chunk_size());
            for kv in 0..kv_heads {
                self.asked.add(tokens(list, (q.sequence, kv, q.at)));
                if answer < own {
                    let chunks = list.chunks_of(q.sequence, kv, q.at);
                    self.recall.add(chunks.contains(&(answer as u32)) as u8 as f64);
                    self.chance.add((chunks.len() - 1) as f64 / own as f64);
                }
            }
        }
    }

    /// The means.
    pub fn spent(&self, layer: usize) -> Spent {
        Spent {
            layer,
            first_half: self.halves[0].get(),
            second_half: self.halves[1].get(),
            asked: self.asked.get(),
            recall: self.recall.get(),
            chance: self.chance.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_core::Device;
    use dash_core::ops::attention::Routes;

    /// Chunks of two tokens, one sequence of eight, two kv heads. Head 0 attends nothing earlier; head 1 from query 6 on chunks 0 and 1.
    #[test]
    fn tokens_by_half_and_where_it_asks_and_the_answer_beside_chance() {
        let device = Device::cpu(1).unwrap();
        let list = Routes::from_choice(&device, (1, 2, 8), 2, |_, kv, query, chunks| {
            if kv == 1 && query >= 6 {
                chunks.extend([0, 1]);
            }
        });
        let ask = |at: usize, evidence: usize| Question { sequence: 0, at, evidence };
        let mut tally = Tally::default();
        // evidence in chunk 1, in chunk 2, which nobody attends, and in the own chunk, which everybody does
        tally.add(&list.unwrap().to_host().unwrap(), &[ask(7, 3), ask(7, 4), ask(7, 6)]);
        let spent = tally.spent(3);
        // 1 2 1 2 in the first half; in the second 1 2 1 2 of head 0 and 1 2 5 6 of head 1
        assert_eq!((spent.layer, spent.first_half, spent.second_half), (3, 1.5, 2.5));
        // 2 of head 0, 6 of head 1
        assert_eq!(spent.asked, 4.0);
        // of four lists of the first two questions one holds it; head 1 attends 2 of 3 earlier chunks
        assert_eq!(spent.recall, 0.25);
        assert!((spent.chance - 1.0 / 3.0).abs() < 1e-15, "{}", spent.chance);
    }
}
