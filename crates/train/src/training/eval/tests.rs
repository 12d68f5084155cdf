//! The figures of a validation on models whose weights are set, against values counted by hand.

use std::f64::consts::LN_2;

use dash_data::ShardWriter;
use dash_model::{Dash, Dense, Nsa, TokenEntmax, TopK};

use super::super::handmade::{Pull, bigram, config};
use super::*;
use crate::config::Far;

/// p(next | token) by powers of two: a row's surprises are 1, 2, 3, 3 bits, 2, 2, 2, 2, ...
const TABLE: [[f64; 4]; 4] =
    [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.5, 0.125, 0.125, 0.25], [0.125, 0.5, 0.25, 0.125]];

/// Three windows of three: `0 1 2 3 | 3 0 2 1 | 1 3 3 1`, each with the successor of its last token.
const TEXT: [u32; 10] = [0, 1, 2, 3, 0, 2, 1, 3, 3, 1];
/// Bits of the nine targets: 2 2 2, 3 3 3, 2 3 1.
const BITS: [f64; 9] = [2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 2.0, 3.0, 1.0];
/// Bytes of the ten tokens. The first is no target, so that its 5 bytes do not count.
const BYTES: [u32; 10] = [5, 1, 0, 4, 2, 2, 3, 1, 1, 2];

const FLAT: Pull = Pull { q: &[], k: &[] };

fn shard(folder: &Path, name: &str, tokens: &[u32], bytes: Option<&[u32]>) -> Arc<Shard> {
    let path = folder.join(name);
    let mut w = ShardWriter::create(&path, 4, 0, bytes.is_some()).unwrap();
    w.begin();
    w.append(tokens, bytes.unwrap_or_default()).unwrap();
    w.finish().unwrap();
    Arc::new(Shard::open(&path).unwrap())
}

fn validate(shards: &[Arc<Shard>], set: &[&str], model: &Model) -> (ValidationSet, Validation) {
    let set = ValidationSet::new(&config(set), shards, Side::After).unwrap();
    let v = set.run(model, RouterChoice::Own).unwrap();
    (set, v)
}

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-12 * want.abs(), "{got}, counted by hand {want}");
}

const SETS: [&str; 3] = ["data.seq_len=3", "data.batch_size=2", "model.attention.kind=dense"];

#[test]
fn loss_perplexity_bits_per_byte_and_loss_by_position() {
    let dir = tempfile::tempdir().unwrap();
    let text = [shard(dir.path(), "a", &TEXT, Some(&BYTES))];
    let model = bigram(Dense {}.into(), 1, 3, &TABLE, &FLAT);
    let (set, v) = validate(&text, &SETS, &model);
    // two batches, of two windows and of one: the mean is over tokens, not over batches
    assert_eq!((v.tokens, v.by_position.len()), (9, 3));
    assert_eq!(BITS.iter().sum::<f64>(), 21.0);
    close(v.loss, 21.0 / 9.0 * LN_2);
    // the windows have 6, 9 and 6 bits where 7 is the mean: sqrt(3 / 2 (1 + 4 + 1)) / 9
    close(v.loss_error.unwrap(), LN_2 / 3.0);
    // 1 + 0 + 4 + 2 + 2 + 3 + 1 + 1 + 2 = 16 bytes
    close(v.bits_per_byte.unwrap(), 21.0 / 16.0);
    // position by position (2 + 3 + 2), (2 + 3 + 3), (2 + 3 + 1) bits of three windows
    [7.0 / 3.0, 8.0 / 3.0, 2.0].iter().zip(&v.by_position).for_each(|(bits, got)| close(*got, bits * LN_2));
    // 2 ^ (7 / 3) = 5.0397
    assert_eq!(v.summary(), "perplexity 5.04, 1.3125 bits per byte");
    assert_eq!((v.density, v.layers.len(), v.task.len()), (1.0, 0, 0));
    // of three tokens the first sees 1, the second 2, the third 3
    assert_eq!(v.attended, 2.0);
    assert_eq!((&set.first().0[..], set.first().1), (&[0, 1, 2, 3, 0, 2][..], 2));
}

#[test]
fn fewer_batches_look_at_evenly_spaced_windows() {
    let dir = tempfile::tempdir().unwrap();
    let text = [shard(dir.path(), "a", &TEXT, Some(&BYTES))];
    let model = bigram(Dense {}.into(), 1, 3, &TABLE, &FLAT);
    // two of three windows: numbers 0 and 3 / 2 = 1; 6 + 9 bits, 12 bytes
    let (_, v) = validate(&text, &[&SETS[..], &["eval.batches=1"]].concat(), &model);
    close(v.loss, 15.0 / 6.0 * LN_2);
    close(v.bits_per_byte.unwrap(), 15.0 / 12.0);
}

#[test]
fn bits_per_byte_is_given_only_where_all_bytes_are_known() {
    let dir = tempfile::tempdir().unwrap();
    let model = bigram(Dense {}.into(), 1, 3, &TABLE, &FLAT);
    let of = |name: &str, bytes: Option<&[u32]>| shard(dir.path(), name, &TEXT, bytes);
    let all = [&SETS[..], &["eval.batches=3"]].concat();
    let bits = |shards: &[Arc<Shard>]| validate(shards, &all, &model).1.bits_per_byte;
    let (known, unknown, none) = (of("a", Some(&BYTES)), of("b", None), of("c", Some(&[0; 10])));
    // twice the text: 42 bits of 32 bytes
    close(bits(&[known.clone(), of("d", Some(&BYTES))]).unwrap(), 42.0 / 32.0);
    assert_eq!((bits(&[known, unknown]), bits(&[none])), (None, None));
}

#[test]
fn the_unigram_loss_is_the_entropy_under_the_training_counts() {
    let dir = tempfile::tempdir().unwrap();
    let text = [shard(dir.path(), "a", &TEXT, Some(&BYTES))];
    let set = ValidationSet::new(&config(&SETS), &text, Side::After).unwrap();
    // one of each, and 3, 2, 1, 0 seen: 4, 3, 2, 1 of 10. The targets are 1 2 3 0 2 1 3 3 1: one 0, three 1, two 2, three 3
    let train = [shard(dir.path(), "t", &[0, 0, 1], None), shard(dir.path(), "u", &[0, 1, 2], None)];
    let want = -(0.4f64.ln() + 3.0 * 0.3f64.ln() + 2.0 * 0.2f64.ln() + 3.0 * 0.1f64.ln()) / 9.0;
    close(unigram_loss(&train, &set, 4), want);
}

/// Windows of seven, one: chunks of two, the own chunk and one earlier. Queries 0 and 1 have nothing to choose. Of the others
/// query 2 and 3 attend 2 of 2 chunks, 4 and 5 attend 2 of 3, 6 attends 2 of 4.
#[test]
fn density_counts_chunks_and_attended_counts_tokens_of_a_hard_choice() {
    let dir = tempfile::tempdir().unwrap();
    let text = [shard(dir.path(), "a", &[0, 1, 2, 3, 0, 1, 2, 3], Some(&[1; 8]))];
    let set = ["data.seq_len=7", "data.batch_size=2", "model.attention.kind=dense"];
    let topk = TopK { chunk_size: 2, top: 2, ..TopK::default() };
    let v = validate(&text, &set, &bigram(topk.into(), 2, 7, &TABLE, &FLAT)).1;
    let want = (1.0 + 1.0 + 2.0 / 3.0 + 2.0 / 3.0 + 0.5) / 5.0;
    assert_eq!(v.layers.len(), 2);
    v.layers.iter().for_each(|layer| close(*layer, want));
    close(v.density, want);
    // 1 and 2 tokens in the first chunk; then two of an earlier chunk and 1 or 2 of the own: 3 4 3 4 3
    close(v.attended, (1 + 2 + 3 + 4 + 3 + 4 + 3) as f64 / 7.0);
    // with windows of two every two tokens, and the last three tokens as a sliding window: 0 1 1 2 2 3 3 and 1 2 3 3 3 3 3 more
    let nsa = Nsa { chunk_size: 2, top: 2, length: 2, stride: 2, init: 0, local: 1, window: 3 };
    let v = validate(&text, &set, &bigram(nsa.into(), 1, 7, &TABLE, &FLAT)).1;
    close(v.density, want);
    close(v.attended, (20 + 12 + 18) as f64 / 7.0);
    // token-level entmax has no chunks: 1 to 7 visible tokens
    let v = validate(&text, &set, &bigram(TokenEntmax::default().into(), 1, 7, &TABLE, &FLAT)).1;
    assert_eq!((v.density, v.attended, v.layers.len()), (1.0, 4.0, 0));
}

/// A token 1 asks for the chunk with a token 2; every other token scores all chunks alike, and entmax keeps them all. Three
/// windows of six, chunks of two:
///
/// | window | query 2, 3, 4, 5: attended of visible | tokens |
/// |---|---|---|
/// | `2 0 0 0 1 0` | 2/2, 2/2, 2/3, 3/3 | 1 2 3 4 3 6 |
/// | `2 0 1 1 1 1` | 2/2, 2/2, 2/3, 2/3 | 1 2 3 4 3 4 |
/// | `1 1 1 1 1 1` | 2/2, 2/2, 3/3, 3/3 | 1 2 3 4 5 6 |
#[test]
fn density_and_attended_tokens_weigh_every_sequence_alike() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = [2, 0, 0, 0, 1, 0, 2, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0];
    let text = [shard(dir.path(), "a", &tokens, Some(&[1; 19]))];
    let pull = Pull { q: &[0.0, 100.0, 0.0, 0.0], k: &[0.0, 0.0, 1.0, 0.0] };
    let dash = Dash { chunk_size: 2, ..Dash::default() };
    // the second layer scores all alike
    let model = bigram(dash.into(), 2, 6, &TABLE, &pull);
    // batches of two windows and of one
    let set = ["data.seq_len=6", "data.batch_size=2", "model.attention.kind=dense"];
    let v = validate(&text, &set, &model).1;
    let thirds = |n: f64| n / 3.0;
    let first = (1.0 + 1.0 + thirds(2.0) + 1.0) + (1.0 + 1.0 + thirds(2.0) + thirds(2.0)) + 4.0;
    close(v.layers[0], first / 12.0);
    assert_eq!((v.layers.len(), v.layers[1]), (2, 1.0));
    close(v.density, (first / 12.0 + 1.0) / 2.0);
    let (first, second) = ((19 + 17 + 21) as f64 / 18.0, 21.0 / 6.0);
    close(v.attended, (first + second) / 2.0);
    // a router in the place of its own: as many chunks
    let set = ValidationSet::new(&config(&set), &text, Side::After).unwrap();
    let random = set.run(&model, RouterChoice::Random).unwrap();
    close(random.density, v.density);
    close(random.attended, v.attended);
}

#[test]
fn a_task_alone_gives_the_figures_of_the_training_length() {
    let set = ["data.vocab_size=40", "data.seq_len=24", "task.kind=sort", "task.pairs=3", "task.eval_sequences=5"];
    let lengths = ["task.eval_lengths=[16, 32]", "model.attention.kind=dense"];
    let config = config(&[&set[..], &lengths[..]].concat());
    let set = ValidationSet::new(&config, &[], Side::After).unwrap();
    let mut model = config.model.clone();
    model.attention = Dash { chunk_size: 8, ..Dash::default() }.into();
    let device = dash_core::Device::cpu(1).unwrap();
    let model = Model::new(model, 40, 32, 3, &device, dash_core::DType::F64).unwrap();
    let v = set.run(&model, RouterChoice::Own).unwrap();
    assert_eq!(v.task.iter().map(|r| r.length).collect::<Vec<_>>(), [16, 24, 32]);
    let own = &v.task[1];
    // three answers of each of five sequences
    assert_eq!((v.tokens, v.loss, v.density, &v.layers), (15, own.loss, own.density, &own.layers));
    assert_eq!((v.attended, v.bits_per_byte, v.by_position.len()), (own.listed, None, 0));
    let share = |i: usize| v.task[i].score.right as f64 / 15.0;
    let want = format!(
        "accuracy {:.3} at length 16, accuracy {:.3} at length 24, accuracy {:.3} at length 32",
        share(0),
        share(1),
        share(2)
    );
    assert_eq!(v.summary(), want);
}

/// Two windows of seven: `0 1 2 3 0 1 3 | 3` and `1 3 0 0 1 3 2 | 0`. Far is more than 2 tokens back. Of the targets behind place 2:
///
/// | target | pair | before | in training | class | bits |
/// |---|---|---|---|---|---|
/// | 3 | 3 0 | - | 0 | 0 | 3 |
/// | 4 | 0 1 | 4 back | 1 | 1 | 2 |
/// | 5 | 1 3 | - | 0 | 0 | 2 |
/// | 6 | 3 3 | - | 2 | 1 | 3 |
/// | 3 | 0 1 | - | 1 | 1 | 2 |
/// | 4 | 1 3 | 4 back | 0 | 0 | 2 |
/// | 5 | 3 2 | - | 0 | 0 | 2 |
/// | 6 | 2 0 | - | 0 | 0 | 1 |
#[test]
fn far_and_rare_targets_and_their_control_are_counted_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let text =
        [[0, 1, 2, 3, 0, 1, 3, 3], [1, 3, 0, 0, 1, 3, 2, 0]].map(|t| shard(dir.path(), &format!("{}", t[0]), &t, None));
    // 0 1, 1 0, 0 2, 2 3, 3 3, 3 3
    let train = [shard(dir.path(), "t", &[0, 1, 0, 2, 3, 3, 3], None)];
    let model = bigram(Dense {}.into(), 1, 7, &TABLE, &FLAT);
    let far = |tokens: usize, rare: u64, batch: usize| {
        let set =
            ["data.seq_len=7".to_string(), format!("data.batch_size={batch}"), "model.attention.kind=dense".into()];
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let set = ValidationSet::new(&config(&set), &text, Side::After).unwrap();
        set.looking_far(Far { tokens, rare }, &train).run(&model, RouterChoice::Own).unwrap().far
    };
    for batch in [1, 2] {
        let all = far(2, 2, batch).unwrap();
        assert_eq!((all.tokens, all.control_tokens), (2, 6));
        close(all.loss, 2.0 * LN_2);
        // half of the weight each: (3 + 2 + 2 + 1) / 4 bits of pairs that training has not, (3 + 2) / 2 of the others
        close(all.control, 0.5 * (2.0 + 2.5) * LN_2);
        // a target a window, and both cost the same
        assert_eq!(all.error, Some(0.0));
    }
    // never in training: one of each window's two controls is left out
    let never = far(2, 0, 2).unwrap();
    assert_eq!((never.tokens, never.control_tokens), (1, 4));
    close(never.control, 2.0 * LN_2);
    // 4 back is not more than 4 back
    assert_eq!(far(4, 2, 2), None);
}

#[test]
fn sequences_of_text_and_task_by_their_length() {
    let dir = tempfile::tempdir().unwrap();
    let text = [shard(dir.path(), "a", &[1; 100], None)];
    let sizes = |set: &[&str], text: &[Arc<Shard>]| {
        let set = ValidationSet::new(&config(set), text, Side::After).unwrap();
        let of = |(t, batches): (usize, Vec<&Batch>)| (t, batches.iter().map(|b| b.batch).collect::<Vec<_>>());
        set.by_length().into_iter().map(of).collect::<Vec<_>>()
    };
    let set = ["data.seq_len=24", "data.batch_size=3", "model.attention.kind=dense"];
    // 99 / 24 windows
    assert_eq!(sizes(&set, &text), [(24, vec![3, 1])]);
    let task = ["data.vocab_size=40", "task.kind=sort", "task.pairs=3", "task.eval_sequences=2"];
    let both = |lengths: &'static str| [&set[..], &task[..], &[lengths]].concat();
    assert_eq!(sizes(&both("task.eval_lengths=[32, 16]"), &[]), [(16, vec![2]), (24, vec![2]), (32, vec![2])]);
    assert_eq!(sizes(&both("task.eval_lengths=[32, 16]"), &text), [(16, vec![2]), (24, vec![2, 3, 1]), (32, vec![2])]);
}
