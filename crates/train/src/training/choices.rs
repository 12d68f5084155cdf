//! Which of several continuations a model takes for the most probable: what tests of choices (BLiMP, HellaSwag) ask.

use dash_data::IGNORE;
use dash_model::Model;

use crate::failure::Result;

/// A text whose end is scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// All of its ids.
    pub ids: Vec<u32>,
    /// The first that is scored, above 0: those before are context.
    pub from: usize,
}

impl Asked {
    /// As far as a model that reads `length` tokens at once can see: the earliest tokens drop out. Whether some did.
    fn cut(&mut self, length: usize) -> bool {
        let over = self.ids.len().saturating_sub(length + 1);
        self.ids.drain(..over);
        self.from = self.from.saturating_sub(over).max(1);
        over > 0
    }
}

/// Nats of the scored tokens of each text together.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// One a text.
    pub nats: Vec<f64>,
    /// Scored tokens of each text: all but those that were cut off with the beginning.
    pub tokens: Vec<usize>,
    /// Texts that were longer than what the model reads at once.
    pub cut: usize,
}

/// Scores texts, `batch` of them in a pass. Shorter ones of a pass are filled up behind their end, which no token before sees.
///
/// # Errors
/// When an id is not below the model's vocabulary, or the device fails.
pub fn scores(model: &Model, mut asked: Vec<Asked>, (length, batch): (usize, usize)) -> Result<Scores> {
    let cut = asked.iter_mut().map(|a| a.cut(length)).filter(|cut| *cut).count();
    let tokens = asked.iter().map(|a| a.ids.len() - a.from).collect();
    let mut nats = Vec::with_capacity(asked.len());
    for group in asked.chunks(batch.max(1)) {
        let longest = group.iter().map(|a| a.ids.len() - 1).max().unwrap_or(0);
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for Asked { ids, from } in group {
            let fill = longest - (ids.len() - 1);
            inputs.extend_from_slice(&ids[..ids.len() - 1]);
            inputs.extend(std::iter::repeat_n(ids[0], fill));
            targets.extend(std::iter::repeat_n(IGNORE, from - 1));
            targets.extend_from_slice(&ids[*from..]);
            targets.extend(std::iter::repeat_n(IGNORE, fill));
        }
        let (inputs, targets) = (model.ids(&inputs, group.len())?, model.ids(&targets, group.len())?);
        let nll = model.nll((&inputs, &targets), None)?.0.to_f64()?;
        let of = |(a, nll): (&Asked, &[f64])| nll[a.from - 1..a.ids.len() - 1].iter().sum::<f64>();
        nats.extend(group.iter().zip(nll.chunks_exact(longest)).map(of));
    }
    Ok(Scores { nats, tokens, cut })
}

/// A share of right answers, with its standard error.
pub fn share(right: usize, of: usize) -> (f64, f64) {
    let (n, p) = (of as f64, right as f64 / of.max(1) as f64);
    (p, (p * (1.0 - p) / (n - 1.0).max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use dash_core::{DType, Device};
    use dash_model::{Dash, ModelConfig};

    use super::*;

    #[test]
    fn texts_of_a_pass_are_scored_as_alone_and_long_ones_by_what_the_model_sees() {
        let mut config = ModelConfig::new(2, 16, (2, 1), 24);
        config.attention = Dash { chunk_size: 4, ..Dash::default() }.into();
        let model = Model::new(config, 50, 16, 3, &Device::cpu(1).unwrap(), DType::F32).unwrap();
        let text = |n: u32, from: usize| Asked { ids: (0..n).map(|i| (i * 7 + n) % 50).collect(), from };
        // the last one is longer than what is seen with all that is scored
        let all = vec![text(9, 3), text(2, 1), text(14, 13), text(30, 28), text(40, 5)];
        let together = scores(&model, all.clone(), (16, 3)).unwrap();
        assert_eq!((together.nats.len(), together.cut), (5, 2));
        assert_eq!(together.tokens, [6, 1, 1, 2, 16]);
        for (asked, nats) in all.iter().zip(&together.nats) {
            let seen = &asked.ids[asked.ids.len().saturating_sub(17)..];
            let scored = (asked.ids.len() - asked.from).min(16);
            let (inputs, targets) = (&seen[..seen.len() - 1], &seen[1..]);
            let (inputs, targets) = (model.ids(inputs, 1).unwrap(), model.ids(targets, 1).unwrap());
            let nll = model.nll((&inputs, &targets), None).unwrap().0.to_f64().unwrap();
            let alone: f64 = nll[nll.len() - scored..].iter().sum();
            assert!((alone - nats).abs() < 1e-5 * alone, "{alone} {nats}");
        }
    }

    #[test]
    fn a_share_has_the_error_of_a_proportion() {
        assert_eq!(share(1, 1), (1.0, 0.0));
        let (p, error) = share(5, 11);
        assert_eq!(p, 5.0 / 11.0);
        assert!((error - (30.0f64 / 121.0 / 10.0).sqrt()).abs() < 1e-15);
        assert_eq!(share(0, 0), (0.0, 0.0));
    }
}
