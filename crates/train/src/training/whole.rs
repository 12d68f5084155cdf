//! The loss of all tokens of given sequences, of any length: what fixed validation files are measured by.

use std::ops::Range;

use dash_model::Model;

use super::standard_error::standard_error;
use crate::failure::Result;

/// Ids of which each but the first is predicted.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// The ids.
    pub ids: Vec<u32>,
    /// Bytes of text behind those that are predicted, where they are known.
    pub bytes: Option<u64>,
}

/// How sequences are cut into what a model reads at once.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// Tokens of a window, at most.
    pub length: usize,
    /// Tokens from the end of a window to that of the next one: those count that no window before had, with the rest as their context.
    pub stride: usize,
    /// Windows of a pass.
    pub batch: usize,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Whole {
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Its standard error over windows, see [`standard_error`].
    pub loss_error: Option<f64>,
    /// In bits per byte of the text, where that is known.
    pub bits_per_byte: Option<f64>,
    /// Predicted tokens: each counts once.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
}

/// Places of the inputs of each window, and how many targets at its end count. The last window ends with the sequence.
fn windows(predicted: usize, cut: &Cut) -> Vec<(Range<usize>, usize)> {
    let length = cut.length.min(predicted);
    let (mut out, mut done) = (Vec::new(), 0);
    while done < predicted {
        let step = if done == 0 { length } else { cut.stride.clamp(1, length) };
        let end = (done + step).min(predicted);
        out.push((end - length..end, end - done));
        done = end;
    }
    out
}

/// Evaluates a model on all of the sequences, of which each has two ids at least. Windows of one sequence are of one length.
///
/// # Errors
/// When an id is not below the model's vocabulary, or the device fails.
pub fn whole(model: &Model, sequences: &[Sequence], cut: &Cut) -> Result<Whole> {
    let mut found = Vec::new();
    for Sequence { ids, .. } in sequences {
        for windows in windows(ids.len().saturating_sub(1), cut).chunks(cut.batch.max(1)) {
            let at = |shift: usize| -> Vec<u32> {
                windows.iter().flat_map(|(w, _)| &ids[w.start + shift..w.end + shift]).copied().collect()
            };
            let (inputs, targets) = (model.ids(&at(0), windows.len())?, model.ids(&at(1), windows.len())?);
            let nll = model.nll((&inputs, &targets), None)?.0.to_f64()?;
            for ((w, counts), nll) in windows.iter().zip(nll.chunks_exact(windows[0].0.len())) {
                found.push((nll[w.len() - counts..].iter().sum::<f64>(), *counts as f64));
            }
        }
    }
    let (sum, tokens) = found.iter().fold((0.0, 0.0), |(s, n), x| (s + x.0, n + x.1));
    let bytes = sequences.iter().map(|s| s.bytes).sum::<Option<u64>>().filter(|&n| n > 0);
    Ok(Whole {
        loss: sum / tokens,
        loss_error: standard_error(&found),
        bits_per_byte: bytes.map(|n| sum / std::f64::consts::LN_2 / n as f64),
        tokens: tokens as usize,
        windows: found.len(),
    })
}

#[cfg(test)]
mod tests {
    use dash_core::{DType, Device};
    use dash_model::ModelConfig;

    use super::*;

    #[test]
    fn each_token_counts_once_and_windows_end_where_the_text_does() {
        for predicted in 1..40 {
            for (length, stride) in [(8, 8), (8, 3), (8, 1), (1, 1), (64, 64), (8, 100)] {
                let all = windows(predicted, &Cut { length, stride, batch: 2 });
                let counted: Vec<usize> = all.iter().flat_map(|(w, n)| w.end - n..w.end).collect();
                assert_eq!(counted, (0..predicted).collect::<Vec<_>>(), "{predicted} {length} {stride}");
                assert!(all.iter().all(|(w, n)| w.len() == length.min(predicted) && *n >= 1));
                assert_eq!(all.last().unwrap().0.end, predicted);
            }
        }
    }

    #[test]
    fn the_loss_is_that_of_passes_made_one_by_one() {
        let config = ModelConfig::new(1, 16, (2, 1), 24);
        let model = Model::new(config, 50, 8, 3, &Device::cpu(1).unwrap(), DType::F32).unwrap();
        let ids: Vec<u32> = (0..22).map(|i| i * 7 % 50).collect();
        // 21 targets: 8 and then 3 at a time, the last window with 1
        let mut by_hand = 0.0;
        for (end, counts) in [(8, 8), (11, 3), (14, 3), (17, 3), (20, 3), (21, 1)] {
            let of = |shift: usize| model.ids(&ids[end - 8 + shift..end + shift], 1).unwrap();
            let nll = model.nll((&of(0), &of(1)), None).unwrap().0.to_f64().unwrap();
            by_hand += nll[8 - counts..].iter().sum::<f64>();
        }
        let cut = Cut { length: 8, stride: 3, batch: 4 };
        let short = Sequence { ids: vec![1, 2, 3], bytes: Some(5) };
        let long = Sequence { ids, bytes: Some(40) };
        let one = whole(&model, std::slice::from_ref(&long), &cut).unwrap();
        assert_eq!((one.tokens, one.windows), (21, 6));
        assert!((one.loss - by_hand / 21.0).abs() < 1e-6, "{} {}", one.loss, by_hand / 21.0);
        let both = whole(&model, &[long, short.clone()], &cut).unwrap();
        let alone = whole(&model, &[short], &cut).unwrap();
        assert_eq!((both.tokens, both.windows, alone.tokens), (23, 7, 2));
        let sum = one.loss * 21.0 + alone.loss * 2.0;
        assert!((both.loss - sum / 23.0).abs() < 1e-9);
        assert!((both.bits_per_byte.unwrap() - sum / std::f64::consts::LN_2 / 45.0).abs() < 1e-9);
    }
}
