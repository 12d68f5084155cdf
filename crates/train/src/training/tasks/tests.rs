//! Accuracy and whose fault, on literal choices and on a model that answers with the token that it attends.

use dash_core::Device;
use dash_core::ops::attention::Routes;
use dash_model::{Dash, Dense, InfLlmV2, Nsa, TopK};

use super::super::handmade::{Pull, config, reader};
use super::*;

fn ask(sequence: usize, at: usize, evidence: usize) -> Question {
    Question { sequence, at, evidence }
}

#[test]
fn a_score_sorts_answers_into_right_missed_and_misread() {
    let mut score = Score::default();
    for (right, seen, times) in [(true, true, 3), (true, false, 2), (false, false, 4), (false, true, 1)] {
        (0..times).for_each(|_| score.add(right, seen));
    }
    assert_eq!(score, Score { asked: 10, right: 5, missed: 4, misread: 1, unseen: 6 });
    let json = score.json();
    assert_eq!(json, json!({"asked": 10, "accuracy": 0.5, "router_missed": 0.4, "reader_missed": 0.1, "unseen": 0.6}));
    // without a question every share is 0, not NaN
    assert_eq!(Score::default().json()["accuracy"], 0.0);
}

/// Chunks of four tokens, two sequences of twelve, two kv heads: only query 9 of sequence 1 chose an earlier chunk, 0, in kv head 1.
#[test]
fn seen_is_what_some_layer_attends_when_it_asks() {
    let device = Device::cpu(1).unwrap();
    let list = |chosen: bool| {
        let routes = Routes::from_choice(&device, (2, 2, 12), 4, |batch, kv, query, chunks| {
            if chosen && (batch, kv, query) == (1, 1, 9) {
                chunks.push(0);
            }
        });
        Some(routes.unwrap().to_host().unwrap())
    };
    let topk: Attention = TopK::default().into();
    let seen_by = |lists: &[Option<HostRoutes>], q: Question| seen(&topk, lists, &q);
    let layer = [list(true)];
    assert!(seen_by(&layer, ask(1, 9, 0)) && seen_by(&layer, ask(1, 9, 3)), "both ends of chunk 0");
    assert!(!seen_by(&layer, ask(1, 9, 4)) && !seen_by(&layer, ask(1, 9, 7)), "chunk 1 was not chosen");
    assert!(seen_by(&layer, ask(1, 9, 8)), "the own chunk is always attended");
    assert!(!seen_by(&layer, ask(0, 9, 0)), "another sequence");
    assert!(!seen_by(&layer, ask(1, 8, 0)) && !seen_by(&layer, ask(1, 10, 0)), "another query");
    // the other kv head alone did not choose it
    let other = Routes::from_choice(&device, (2, 1, 12), 4, |_, _, _, _| {}).unwrap();
    assert!(!seen_by(&[Some(other.to_host().unwrap())], ask(1, 9, 0)));
    // some layer is enough, and one without chunks attends everything
    assert!(seen_by(&[list(false), list(true)], ask(1, 9, 0)) && !seen_by(&[list(false)], ask(1, 9, 0)));
    assert!(seen_by(&[list(false), None], ask(0, 9, 0)));
    // a sliding window of three holds the query and two tokens before it; the others have none
    let window: Attention = Nsa { window: 3, ..Nsa::default() }.into();
    assert!(seen(&window, &[list(false)], &ask(0, 9, 7)) && !seen(&window, &[list(false)], &ask(0, 9, 6)));
    assert!(
        [topk, Dash::default().into(), Dense {}.into(), InfLlmV2::default().into()].iter().all(|a| a.window() == 0)
    );
}

/// Token 1 asks; 2 to 7 are data, of which 6 pulls twice as hard as the others; 0 is noise.
const PULL: Pull =
    Pull { q: &[0.0, 1000.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], k: &[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0] };

/// Sequences of eight in chunks of two; the last token asks.
///
/// | sequence | evidence | a router takes | it reads | so |
/// |---|---|---|---|---|
/// | `0 0 5 0 0 0 0 1` | 2 | chunk 1 | 5 | right |
/// | `0 0 5 6 0 0 0 1` | 2 | chunk 1 | 6 | misread |
/// | `5 0 6 0 0 0 0 1` | 0 | chunk 1 | 6 | missed |
/// | `6 0 6 6 0 0 0 1` | 0 | chunk 1 | 6 | right, unseen |
/// | `0 0 0 0 0 0 5 1` | 6 | all: none has data | 5, of the own chunk | right |
fn sequences() -> Vec<Length> {
    let of = |rows: &[([u32; 8], usize)]| {
        let inputs: Vec<u32> = rows.iter().flat_map(|r| r.0).collect();
        let mut targets = vec![dash_data::IGNORE; inputs.len()];
        let questions = rows.iter().enumerate().map(|(i, r)| {
            targets[i * 8 + 7] = r.0[r.1];
            ask(i, 7, r.1)
        });
        let questions = questions.collect();
        Batch {
            inputs: inputs.into(),
            targets,
            batch: rows.len(),
            state: Default::default(),
            questions,
            documents: Vec::new(),
        }
    };
    let first = of(&[([0, 0, 5, 0, 0, 0, 0, 1], 2), ([0, 0, 5, 6, 0, 0, 0, 1], 2)]);
    let second = of(&[([5, 0, 6, 0, 0, 0, 0, 1], 0), ([6, 0, 6, 6, 0, 0, 0, 1], 0), ([0, 0, 0, 0, 0, 0, 5, 1], 6)]);
    let shortcut = Shortcut { accuracy: 0.25, by_question: vec![0.25] };
    vec![Length { length: 8, batches: vec![first, second], shortcut }]
}

fn evaluate(attention: impl Into<Attention>, router: RouterChoice) -> LengthResult {
    TaskSet(sequences()).run(&reader(attention.into(), 1, 8, &PULL), router).unwrap().remove(0)
}

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-12, "{got}, counted by hand {want}");
}

/// Cross-entropy of the token that is read, and of any other but the asking one: logits are 3 and 1 times the root of 8 / 10, and 0.
fn losses() -> (f64, f64) {
    let root = 0.8f64.sqrt();
    let all = ((3.0 * root).exp() + root.exp() + 6.0).ln();
    (all - 3.0 * root, all)
}

#[test]
fn a_router_that_takes_the_strongest_chunk_is_judged_answer_by_answer() {
    let r = evaluate(Dash { chunk_size: 2, ..Dash::default() }, RouterChoice::Own);
    assert_eq!((r.length, r.score), (8, Score { asked: 5, right: 3, missed: 1, misread: 1, unseen: 2 }));
    // distances 5, 5, 7, 7 and 1
    let near = Score { asked: 1, right: 1, ..Score::default() };
    let far = Score { asked: 4, right: 2, missed: 1, misread: 1, unseen: 2 };
    assert_eq!(r.by_distance.into_iter().collect::<Vec<_>>(), [(2, near), (8, far)]);
    assert_eq!(r.by_question, [r.score], "each sequence asks once");
    let (right, wrong) = losses();
    close(r.loss, (3.0 * right + 2.0 * wrong) / 5.0);
    // sqrt(5 / 4 (3 (2 / 5)^2 + 2 (3 / 5)^2)) / 5
    close(r.loss_error.unwrap(), 1.5f64.sqrt() / 5.0 * (wrong - right));
    // noise keeps every chunk; the asking query takes 2 of 4, and all 4 where no chunk has data: 5 rows of 1 and one of these
    close(r.density, (4.0 * (5.0 + 0.5) / 6.0 + 1.0) / 5.0);
    assert_eq!(r.layers, [r.density]);
    // 1 + 2 + ... + 7 tokens and 4 or 8 of the last query
    close(r.listed, (4.0 * (28.0 + 4.0) / 8.0 + (28.0 + 8.0) / 8.0) / 5.0);
}

#[test]
fn dense_attention_misses_nothing_and_an_oracle_shows_every_evidence() {
    // it attends the strongest token anywhere: 6 where there is one
    let r = evaluate(Dense {}, RouterChoice::Own);
    assert_eq!(r.score, Score { asked: 5, right: 3, missed: 0, misread: 2, unseen: 0 });
    assert_eq!((r.density, r.listed, r.layers.len()), (1.0, 0.0, 0));
    // shown the chunk of its evidence, the third reads 5; the second still reads 6 beside it
    let oracle = evaluate(Dash { chunk_size: 2, ..Dash::default() }, RouterChoice::Oracle);
    assert_eq!(oracle.score, Score { asked: 5, right: 4, missed: 0, misread: 1, unseen: 0 });
    // others than the asking query keep their choice; that one has 2 of 4 chunks, or its own alone where that holds the evidence
    close(oracle.density, (4.0 * 5.5 + 5.25) / 30.0);
    // the same hard choice
    let topk = evaluate(TopK { chunk_size: 2, top: 2, ..TopK::default() }, RouterChoice::Own);
    assert_eq!(topk.score, Score { asked: 5, right: 3, missed: 1, misread: 1, unseen: 2 });
    // 2 of 2, 2 of 2, 2 of 3, 2 of 3, 2 of 4, 2 of 4
    close(topk.density, (1.0 + 1.0 + 2.0 / 3.0 + 2.0 / 3.0 + 0.5 + 0.5) / 6.0);
    // 1 2 3 4 3 4 3 4
    close(topk.listed, 3.0);
}

#[test]
fn the_sets_of_a_task_have_every_length_once_and_as_many_sequences_as_asked() {
    let set = ["data.seq_len=64", "data.batch_size=4", "model.attention.kind=dense", "task.kind=sort", "task.pairs=3"];
    let more = ["task.eval_lengths=[128, 64, 32]", "task.eval_sequences=5"];
    let config = config(&[&set[..], &more[..]].concat());
    let tasks = TaskSet::new(config.task.as_ref().unwrap(), &config);
    let sizes = |length: usize| tasks.batches(length).iter().map(|b| (b.batch, b.inputs.len())).collect::<Vec<_>>();
    assert_eq!(tasks.0.iter().map(|l| l.length).collect::<Vec<_>>(), [32, 64, 128]);
    // about 4 x 64 tokens at once
    assert_eq!(sizes(32), [(5, 160)]);
    assert_eq!(sizes(64), [(4, 256), (1, 64)]);
    assert_eq!(sizes(128), [(2, 256), (2, 256), (1, 128)]);
    assert!(sizes(16).is_empty());
}

#[test]
fn a_result_is_written_with_the_shares_of_its_distances() {
    let line = evaluate(Dash { chunk_size: 2, ..Dash::default() }, RouterChoice::Own).json();
    assert_eq!((&line["length"], &line["asked"], &line["accuracy"]), (&json!(8), &json!(5), &json!(0.6)));
    assert_eq!((&line["router_missed"], &line["reader_missed"]), (&json!(0.2), &json!(0.2)));
    let far = &line["by_distance"][1];
    assert_eq!((&far["distance_below"], &far["accuracy"], &far["unseen"]), (&json!(8), &json!(0.5), &json!(0.5)));
    assert_eq!(line["by_distance"].as_array().unwrap().len(), 2);
    assert_eq!(line["shortcut"], 0.25);
    assert_eq!(line["by_question"], json!([{"question": 1, "asked": 5, "accuracy": 0.6, "shortcut": 0.25}]));
    // queries 0 to 3 attend 1 2 3 4 tokens; the others 5 6 7 and 4 or 8. 4 or 8 where it asks. Evidence in an earlier chunk: seen in 2 of
    // 4 lists, which hold 1 of 3 earlier chunks
    let layer = &line["layers"][0];
    let close = |key: &str, want: f64| super::tests::close(layer[key].as_f64().unwrap(), want);
    assert_eq!((&layer["layer"], line["layers"].as_array().unwrap().len()), (&json!(0), 1));
    close("tokens_first_half", 2.5);
    close("tokens_second_half", (5.0 + 6.0 + 7.0 + (4.0 * 4.0 + 8.0) / 5.0) / 4.0);
    close("tokens_asked", 4.8);
    close("answer_recall", 0.5);
    close("answer_chance", 1.0 / 3.0);
    assert!(line["density"].as_f64().unwrap() < 1.0 && line["loss"].as_f64().unwrap() > 0.0);
}

#[test]
fn density_and_tokens_of_a_task_are_means_over_the_layers() {
    // the second layer scores all chunks alike, so it attends them all: 1 + 2 + ... + 8 tokens
    let dash = Dash { chunk_size: 2, ..Dash::default() };
    let r = TaskSet(sequences()).run(&reader(dash.into(), 2, 8, &PULL), RouterChoice::Own).unwrap().remove(0);
    close(r.layers[0], (4.0 * 5.5 / 6.0 + 1.0) / 5.0);
    assert_eq!((r.layers.len(), r.layers[1]), (2, 1.0));
    close(r.density, (r.layers[0] + 1.0) / 2.0);
    close(r.listed, ((4.0 * 4.0 + 4.5) / 5.0 + 4.5) / 2.0);
    // and so every evidence is seen
    assert_eq!(r.score, Score { asked: 5, right: 3, missed: 0, misread: 2, unseen: 0 });
}

#[test]
fn an_accuracy_is_right_answers_over_questions() {
    let task = vec![evaluate(Dash { chunk_size: 2, ..Dash::default() }, RouterChoice::Own)];
    let v = super::super::eval::Validation {
        far: None,
        loss_error: None,
        loss: 1.0,
        bits_per_byte: None,
        task,
        attended: 1.0,
        tokens: 5,
        density: 1.0,
        by_position: Vec::new(),
        layers: Vec::new(),
    };
    assert_eq!(v.summary(), "accuracy 0.600 at length 8");
}
