//! Micro-batches add up in a fixed binary tree, so that several processes that share them give the bits of one.
//!
//! With `a` micro-batches an update and `p` the largest power of two that divides it, a leaf is the left fold of `a / p`
//! consecutive micro-batches and a perfect binary tree adds the leaves. A process that takes a contiguous `1 / w` of them, `w` a
//! divisor of `p`, holds a whole subtree: the `w` partial sums add up in the same tree.

use dash_core::{Result, Tensor};

/// What adds up.
pub trait Sum {
    /// Adds what comes later in the order of micro-batches.
    ///
    /// # Errors
    /// When the two do not fit.
    fn add(&mut self, later: Self) -> Result<()>;
}

impl Sum for f64 {
    fn add(&mut self, later: f64) -> Result<()> {
        *self += later;
        Ok(())
    }
}

/// Gradients in the order of the parameters; one that a micro-batch does not reach adds nothing.
impl Sum for Vec<Option<Tensor>> {
    fn add(&mut self, later: Self) -> Result<()> {
        assert_eq!(self.len(), later.len(), "gradients of the same parameters");
        for (sum, later) in self.iter_mut().zip(later) {
            match (sum.as_mut(), later) {
                (Some(sum), Some(later)) => sum.accumulate(&later)?,
                (None, Some(later)) => *sum = Some(later),
                (_, None) => {}
            }
        }
        Ok(())
    }
}

/// The largest number of processes that give the bits of one, where an update has `all` micro-batches; so does every divisor of it.
pub fn most_processes(all: usize) -> usize {
    1 << all.trailing_zeros()
}

/// Micro-batches of a leaf, where an update has `all` of them.
pub fn leaf(all: usize) -> usize {
    all >> all.trailing_zeros()
}

/// Partial sums held at most beside the micro-batch that is being added, where an update has `all` of them.
pub fn held(all: usize) -> usize {
    all.trailing_zeros() as usize + (leaf(all) > 1) as usize
}

/// A sum that grows. At most log2(all) + 1 partial sums are held.
pub struct Tree<T> {
    leaf: usize,
    /// Finished subtrees, the largest first: (leaves, sum).
    done: Vec<(usize, T)>,
    /// The leaf that grows: (micro-batches, sum).
    growing: Option<(usize, T)>,
}

impl<T: Sum> Tree<T> {
    /// An empty sum with leaves of so many micro-batches.
    pub fn new(leaf: usize) -> Self {
        Tree { leaf, done: Vec::new(), growing: None }
    }

    /// Adds the next micro-batch.
    ///
    /// # Errors
    /// When it does not fit those before.
    pub fn push(&mut self, next: T) -> Result<()> {
        let (n, sum) = match self.growing.take() {
            None => (1, next),
            Some((n, mut sum)) => {
                sum.add(next)?;
                (n + 1, sum)
            }
        };
        if n < self.leaf {
            self.growing = Some((n, sum));
            return Ok(());
        }
        let (mut leaves, mut sum) = (1, sum);
        while let Some((_, mut earlier)) = self.done.pop_if(|(n, _)| *n == leaves) {
            earlier.add(sum)?;
            (leaves, sum) = (2 * leaves, earlier);
        }
        self.done.push((leaves, sum));
        Ok(())
    }

    /// The sum; `None` of nothing. A number of leaves that is no power of two adds up from the end.
    ///
    /// # Errors
    /// When the parts do not fit.
    pub fn finish(mut self) -> Result<Option<T>> {
        let mut sum = self.growing.map(|(_, sum)| sum);
        while let Some((_, mut earlier)) = self.done.pop() {
            if let Some(later) = sum {
                earlier.add(later)?;
            }
            sum = Some(earlier);
        }
        Ok(sum)
    }
}

/// The sum of one figure a micro-batch.
pub fn total(values: &[f64]) -> f64 {
    let mut tree = Tree::new(leaf(values.len().max(1)));
    values.iter().for_each(|&x| tree.push(x).expect("numbers fit"));
    tree.finish().expect("numbers fit").unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_core::rng::Rng;

    /// f64 values of so different sizes that any other order of addition gives other bits.
    fn values(n: usize) -> Vec<f64> {
        let mut rng = Rng::new(n as u64);
        (0..n).map(|_| rng.normal() * (8.0 * rng.normal()).exp()).collect()
    }

    /// The definition, by recursion.
    fn plain(x: &[f64], leaf: usize) -> f64 {
        if x.len() == leaf {
            return x[1..].iter().fold(x[0], |s, v| s + v);
        }
        let (a, b) = x.split_at(x.len() / 2);
        plain(a, leaf) + plain(b, leaf)
    }

    #[test]
    fn the_sum_is_that_of_the_definition() {
        for n in 1..=64 {
            let x = values(n);
            assert_eq!(total(&x).to_bits(), plain(&x, leaf(n)).to_bits(), "{n}");
            if n % 2 == 1 || n == 2 {
                let fold = x[1..].iter().fold(x[0], |s, v| s + v);
                assert_eq!(total(&x).to_bits(), fold.to_bits(), "{n}: a left fold");
            }
        }
        assert_eq!(total(&[]), 0.0);
    }

    #[test]
    fn a_world_of_any_size_gives_the_bits_of_one() {
        for n in [4usize, 6, 8, 12, 16, 40, 64] {
            let x = values(n);
            for world in (0..=n.trailing_zeros()).map(|i| 1usize << i) {
                let part = |rank: usize| {
                    let mut tree = Tree::new(leaf(n));
                    x[rank * n / world..(rank + 1) * n / world].iter().for_each(|&v| tree.push(v).unwrap());
                    tree.finish().unwrap().unwrap()
                };
                let mut ranks = Tree::new(1);
                (0..world).for_each(|rank| ranks.push(part(rank)).unwrap());
                assert_eq!(ranks.finish().unwrap().unwrap().to_bits(), total(&x).to_bits(), "{n} over {world}");
            }
        }
    }

    #[test]
    fn gradients_of_ranks_add_up_to_the_bits_of_one() {
        let device = dash_core::Device::cpu(1).unwrap();
        let mut rng = Rng::new(3);
        // the second parameter is reached by every other micro-batch only
        let gradients: Vec<Vec<Option<Tensor>>> = (0..12)
            .map(|i| {
                let mut tensor = || Tensor::normal(&device, &[37], dash_core::DType::F32, 1.0, &mut rng).unwrap();
                vec![Some(tensor()), (i % 2 == 1).then(tensor), None]
            })
            .collect();
        let sum = |parts: &[Vec<Option<Tensor>>], leaf: usize| {
            let mut tree = Tree::new(leaf);
            parts.iter().for_each(|g| tree.push(g.clone()).unwrap());
            tree.finish().unwrap().unwrap()
        };
        let bits = |g: &[Option<Tensor>]| -> Vec<Option<Vec<u32>>> {
            let of = |t: &Tensor| t.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
            g.iter().map(|t| t.as_ref().map(of)).collect()
        };
        let one = bits(&sum(&gradients, leaf(12)));
        assert!(one[0].is_some() && one[1].is_some() && one[2].is_none());
        for world in [2, 4] {
            let ranks: Vec<_> = gradients.chunks(12 / world).map(|part| sum(part, leaf(12))).collect();
            assert_eq!(bits(&sum(&ranks, 1)), one, "{world} ranks");
        }
        // a left fold has other bits: the test above could fail
        assert_ne!(bits(&sum(&gradients, 12)), one);
    }

    #[test]
    fn few_partial_sums_are_held() {
        for n in 1..=64usize {
            let mut tree = Tree::new(leaf(n));
            let mut most = 0;
            for v in values(n) {
                most = most.max(tree.done.len() + tree.growing.is_some() as usize);
                tree.push(v).unwrap();
            }
            assert_eq!((most, tree.done.len()), (held(n), 1), "{n}");
            assert!(most <= n.ilog2() as usize + 1);
        }
    }
}
