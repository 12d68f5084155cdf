//! What every task's sequences have to hold.

use super::*;

pub(super) fn task(kind: TaskKind) -> Task {
    let records = matches!(kind, TaskKind::Recall | TaskKind::Needle | TaskKind::PhoneBook);
    Task {
        kind,
        pairs: if matches!(kind, TaskKind::Needle | TaskKind::PhoneBook) { eight() } else { 6 },
        queries: if matches!(kind, TaskKind::Recall | TaskKind::PhoneBook) { 3 } else { 0 },
        distractors: 0,
        value_tokens: if records { 3 } else { one() },
        power: power(),
        share: 1.0,
        eval_lengths: vec![],
        eval_sequences: 1,
    }
}

const KINDS: [TaskKind; 6] =
    [TaskKind::Mqar, TaskKind::Recall, TaskKind::Needle, TaskKind::PhoneBook, TaskKind::SelectiveCopy, TaskKind::Sort];

#[test]
fn the_evidence_is_the_answer_and_lies_before_the_question() {
    for kind in KINDS {
        let task = task(kind);
        task.check(100, 64).unwrap();
        for number in 0..50 {
            let e = task.example(100, 64, 7, number);
            assert_eq!(e, task.example(100, 64, 7, number));
            let asked = e.targets.iter().filter(|&&t| t != IGNORE).count();
            assert_eq!(asked, e.questions.len(), "{kind:?}");
            assert!(asked > 0);
            for q in &e.questions {
                assert!(q.evidence < q.at, "{kind:?}");
                assert_eq!(e.targets[q.at], e.inputs[q.evidence], "{kind:?}");
            }
            assert!(e.inputs.iter().all(|&id| id < 64));
            let next = e.questions.windows(2).filter(|w| w[1].at == w[0].at + 1);
            // an answer is the next input where the next token is asked too
            for pair in next.filter(|_| kind != TaskKind::Mqar) {
                assert_eq!(e.inputs[pair[1].at], e.targets[pair[0].at], "{kind:?}");
            }
        }
        assert_ne!(task.example(100, 64, 7, 0), task.example(100, 64, 8, 0));
    }
}

#[test]
fn the_name_determines_the_answer() {
    for kind in [TaskKind::Recall, TaskKind::PhoneBook, TaskKind::Mqar] {
        let task = Task { value_tokens: one(), ..task(kind) };
        let names = task.records(90).name;
        for number in 0..50 {
            let e = task.example(90, 40, 3, number);
            for q in &e.questions {
                let name = &e.inputs[q.at + 1 - names..=q.at];
                let found: Vec<usize> = (names..q.evidence.max(names) + 40)
                    .filter(|&i| i < 90 && i <= q.at && e.inputs[i - names..i] == *name)
                    .collect();
                assert_eq!(found[0], q.evidence, "{kind:?}: the first place after the name");
            }
        }
    }
}

/// Of `count` records as (first, second, value): the needle's name stands once, and every other record shares one token of it.
#[test]
fn distractors_share_one_token_of_the_needles_name() {
    for distractors in [1, 2, 3, 8] {
        let task = Task { distractors, value_tokens: 1, ..task(TaskKind::Needle) };
        task.check(48, 31).unwrap();
        let is_key = |id: u32| (1..=10).contains(&id);
        let mut places = std::collections::BTreeSet::new();
        for number in 0..100 {
            let e = task.example(48, 31, 5, number);
            let [q] = e.questions[..] else { panic!("one question") };
            assert_eq!((q.at, e.targets[q.at], e.inputs[47]), (46, e.inputs[47], e.inputs[q.evidence]));
            let names: Vec<(u32, u32)> = (0..45)
                .filter(|&i| is_key(e.inputs[i]) && is_key(e.inputs[i + 1]))
                .map(|i| (e.inputs[i], e.inputs[i + 1]))
                .collect();
            let needle = (e.inputs[45], e.inputs[46]);
            let count = |f: &dyn Fn(&(u32, u32)) -> bool| names.iter().filter(|n| f(n)).count();
            assert_eq!((names.len(), count(&|&n| n == needle)), (distractors + 1, 1));
            assert_eq!(count(&|n| n.0 == needle.0 && n.1 != needle.1), distractors.div_ceil(2));
            assert_eq!(count(&|n| n.0 != needle.0 && n.1 == needle.1), distractors / 2);
            places.insert(names.iter().position(|&n| n == needle).unwrap());
        }
        assert_eq!(places.len(), distractors + 1, "the needle is anywhere among them");
    }
    let refused = |t: Task, len, vocab| t.check(len, vocab).unwrap_err();
    let needle = |distractors| Task { distractors, value_tokens: 1, ..task(TaskKind::Needle) };
    assert_eq!(
        refused(needle(9), 30, 64),
        ("distractors", "a sequence needs 33 tokens, but a length of 30 is asked for".into())
    );
    assert!(refused(needle(8), 90, 13).1.contains("5 different names from 4 keys"));
    assert!(refused(needle(usize::MAX), 90, 64).1.contains("a length of 90"));
    let sort = Task { distractors: 1, ..task(TaskKind::Sort) };
    assert_eq!(refused(sort, 90, 64), ("distractors", "means nothing to kind \"sort\"; remove it".into()));
}

#[test]
fn sorted_answers_ascend_and_copied_ones_keep_their_order() {
    for number in 0..20 {
        let e = task(TaskKind::Sort).example(60, 64, 1, number);
        assert!(e.questions.windows(2).all(|w| e.targets[w[0].at] < e.targets[w[1].at]));
        let e = task(TaskKind::SelectiveCopy).example(60, 64, 1, number);
        assert!(e.questions.windows(2).all(|w| w[0].evidence < w[1].evidence));
    }
}

#[test]
fn what_does_not_fit_is_told() {
    let err = |t: Task, len, vocab| t.check(len, vocab).unwrap_err().1;
    let long = |n| Task { value_tokens: n, ..task(TaskKind::Needle) };
    // 2 * (1 + (2^63 - 1)) and 2 * (1 + 2^60) wrap to small numbers
    for n in [usize::MAX, usize::MAX / 2, 1 << 60, (1 << 63) - 1] {
        assert!(err(long(n), 100, 64).contains("a length of 100"), "{n}");
        assert!(err(Task { value_tokens: n, ..task(TaskKind::Recall) }, 100, 64).contains("tokens"), "{n}");
        assert!(err(Task { value_tokens: n, ..task(TaskKind::PhoneBook) }, 100, 64).contains("tokens"), "{n}");
        for kind in [TaskKind::Mqar, TaskKind::Recall, TaskKind::Sort, TaskKind::SelectiveCopy] {
            assert!(err(Task { pairs: n, ..task(kind) }, 100, 64).contains("tokens"), "{kind:?} {n}");
        }
        let many = Task { eval_sequences: n, ..task(TaskKind::Sort) };
        assert!(err(many, 100, 64).contains("use 2684354 at most"), "{n}");
        assert!(err(task(TaskKind::Sort), n, 64).contains("above the"), "{n}");
    }
    assert!(err(task(TaskKind::Recall), 30, 64).contains("needs 36 tokens"));
    assert!(err(Task { queries: 7, ..task(TaskKind::Recall) }, 100, 64).contains("7 questions about 6 records"));
    assert!(err(task(TaskKind::Recall), 100, 16).contains("6 different names from 5 keys"));
    assert!(err(Task { share: 0.0, ..task(TaskKind::Sort) }, 100, 64).contains("above 0"));
    let needle = Task { power: 0.5, ..task(TaskKind::Needle) };
    assert_eq!(
        needle.check(100, 64).unwrap_err(),
        ("power", "means nothing to kind \"needle\"; remove it".to_string())
    );
    for kind in KINDS {
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
    }
}

#[test]
fn the_ends_of_ranges_are_taken_and_what_lies_beyond_is_not() {
    let fits = |t: &Task, len, vocab| t.check(len, vocab).is_ok();
    // four pairs of four tokens; a third of 13 tokens less one is 4 names
    let four = Task { pairs: 4, ..task(TaskKind::Mqar) };
    assert!(fits(&four, 16, 13) && !fits(&four, 15, 13) && !fits(&four, 16, 12));
    let power = |power| Task { power, ..task(TaskKind::Mqar) };
    for (x, taken) in [(0.0, false), (1e-9, true), (16.0, true), (16.1, false), (f64::NAN, false), (-1.0, false)] {
        assert_eq!(fits(&power(x), 64, 64), taken, "{x}");
    }
    let sequences = |n| Task { eval_sequences: n, ..task(TaskKind::Mqar) };
    assert!(fits(&sequences(MOST_TOKENS / 64), 64, 64) && !fits(&sequences(MOST_TOKENS / 64 + 1), 64, 64));
    let long = sequences(1).check(MOST_TOKENS + 1, 64).unwrap_err().1;
    assert!(long.starts_with(&format!("sequences of {} tokens are above", MOST_TOKENS + 1)), "{long}");
    let least: Task = serde_json::from_str("{\"kind\": \"sort\"}").unwrap();
    assert_eq!((least.eval_sequences, least.pairs, least.value_tokens, least.share), (64, 8, 1, 1.0));
}

#[test]
fn the_sequences_are_pinned() {
    // a change here is another task for every published result
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for kind in KINDS {
        let task: Task = serde_json::from_str(&format!("{{\"kind\":\"{}\"}}", kind.name())).unwrap();
        for number in 0..5 {
            let e = task.example(64, 64, 7, number);
            e.inputs.iter().chain(&e.targets).for_each(|t| hash.update(&t.to_le_bytes()));
        }
    }
    assert_eq!(hash.digest(), 0x4d8a_d5e2_cbf4_d996);
}
