//! What identifies a task: a run goes on with the one that it began with, whichever build began it.

use serde::Serialize;

use super::{Task, TaskKind};

/// The keys in their order. One that came after the first eight is left out at its default: a build that did not know it made the
/// same sequences.
#[derive(Serialize)]
struct Keys<'a> {
    kind: TaskKind,
    pairs: usize,
    queries: usize,
    #[serde(skip_serializing_if = "is_zero")]
    distractors: usize,
    value_tokens: usize,
    power: f64,
    share: f64,
    eval_lengths: &'a [usize],
    eval_sequences: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Task {
    /// A text that differs exactly where two tasks do, and is the same in every build.
    pub fn identity(&self) -> String {
        // every field by its name: a key that is added does not compile before it stands above, too
        let Task { kind, pairs, queries, distractors, value_tokens, power, share, eval_lengths, eval_sequences } = self;
        let keys = Keys {
            kind: *kind,
            pairs: *pairs,
            queries: *queries,
            distractors: *distractors,
            value_tokens: *value_tokens,
            power: *power,
            share: *share,
            eval_lengths,
            eval_sequences: *eval_sequences,
        };
        serde_json::to_string(&keys).expect("a task is JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// What the first build wrote and hashed.
    const FIRST: &str = r#"{"kind":"needle","pairs":8,"queries":0,"value_tokens":2,"power":0.01,"share":1.0,"eval_lengths":[128],"eval_sequences":64}"#;

    #[test]
    fn a_task_of_the_first_version_has_the_identity_that_it_had() {
        let task: Task = serde_json::from_str(FIRST).unwrap();
        assert_eq!(task.identity(), FIRST);
    }

    #[test]
    fn every_key_enters_the_identity() {
        let task: Task = serde_json::from_str(FIRST).unwrap();
        let Value::Object(keys) = serde_json::to_value(&task).unwrap() else { panic!("a task is a table") };
        assert!(keys.contains_key("distractors"), "{keys:?}");
        for (key, value) in &keys {
            let other = match value {
                Value::String(_) => json!("mqar"),
                Value::Array(_) => json!([256]),
                Value::Number(n) if n.is_f64() => json!(0.5),
                _ => json!(5),
            };
            let changed = Value::Object(keys.clone().into_iter().chain([(key.clone(), other)]).collect());
            let changed: Task = serde_json::from_value(changed).unwrap();
            assert_ne!(changed.identity(), task.identity(), "{key}");
        }
    }
}
