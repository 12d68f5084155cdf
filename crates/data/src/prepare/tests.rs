//! Whole preparations.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use super::*;

pub(super) fn settings(dir: &Path) -> Settings {
    let path = dir.join("corpus.txt");
    let text: String = (0..2000).map(|i| format!("{i} sheep jump over the {}. fence\n", i * i % 97)).collect();
    fs::write(&path, text).unwrap();
    Settings {
        source: Source::Text,
        path,
        extensions: crate::EXTENSIONS.map(String::from).into(),
        field: crate::FIELD.into(),
        vocab_size: 300,
        vocab_bytes: 1 << 20,
        tokenizer: None,
        padded: false,
        end_of_text: None,
        treatment: Treatment::default(),
        validation: Validation::default(),
        validation_share: 0.05,
        validation_tokens: 10_000_000,
        max_tokens: 0,
        cache: dir.join("cache"),
    }
}

fn age(path: &Path) {
    let old = SystemTime::now() - Duration::from_secs(100);
    File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
}

/// Every token of some shards, in order.
pub(super) fn tokens(shards: &[Arc<Shard>]) -> Vec<u32> {
    let (mut all, mut ids) = (Vec::new(), Vec::new());
    for shard in shards {
        shard.read(0, shard.len(), &mut ids);
        all.extend_from_slice(&ids);
    }
    all
}

fn bytes(shards: &[Arc<Shard>]) -> u64 {
    shards.iter().map(|s| s.text_bytes(0, s.len()).unwrap()).sum()
}

#[test]
fn a_second_call_reads_the_cache_and_a_changed_file_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let first = prepare(&s, |_| {}).unwrap();
    let second = prepare(&s, |_| {}).unwrap();
    assert!(first.fresh && !second.fresh && first.folder == second.folder);
    fs::write(&s.path, fs::read_to_string(&s.path).unwrap() + "one more\n").unwrap();
    let changed = prepare(&s, |_| {}).unwrap();
    assert!(changed.fresh);
    // other settings are another corpus
    for other in [Settings { validation_share: 0.1, ..s.clone() }, Settings { vocab_bytes: 9999, ..s.clone() }] {
        assert!(prepare(&other, |_| {}).unwrap().fresh);
    }
    // the same bytes read in another way are another text
    let lines = dir.path().join("corpus.md");
    fs::copy(&s.path, &lines).unwrap();
    assert_ne!(prepare(&Settings { path: lines, ..s }, |_| {}).unwrap().folder, changed.folder);
}

#[test]
fn an_unchanged_corpus_is_not_read_again_and_a_touched_one_is_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let reads = |s: &Settings| {
        let mut reads = false;
        let p = prepare(s, |p| reads |= matches!(p, Progress::Reading(..))).unwrap();
        (reads, p.fresh)
    };
    assert_eq!(reads(&s), (true, true));
    assert_eq!(reads(&s), (true, false), "a file changed just now may change again within one tick");
    age(&s.path);
    // on Unix `age` itself is a change of the file's record
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(reads(&s), (true, false));
    assert_eq!(reads(&s), (false, false));
    // as many bytes, another text, a time that was set back
    let text = fs::read_to_string(&s.path).unwrap();
    fs::write(&s.path, text.replacen("sheep", "goats", 1)).unwrap();
    age(&s.path);
    assert_eq!(reads(&s), (true, true));
}

#[test]
fn shards_decode_to_the_text_and_count_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let p = prepare(&s, |_| {}).unwrap();
    let text = fs::read_to_string(&s.path).unwrap();
    let (train, validation) = (tokens(&p.train), tokens(&p.validation));
    let decode = |ids: &[u32]| p.tokenizer.as_ref().unwrap().decode(ids).unwrap();
    assert_eq!(decode(&train) + &decode(&validation), text);
    assert!(decode(&train).ends_with('\n'));
    assert_eq!(bytes(&p.validation), p.report.validation_bytes);
    assert_eq!(decode(&validation).len() as u64, p.report.validation_bytes);
    assert_eq!((p.report.train_tokens, p.report.validation_tokens), (train.len() as u64, validation.len() as u64));
    let share = p.report.validation_bytes as f64 / p.report.bytes as f64;
    assert!((share - 0.05).abs() < 0.002, "{share}");
}

#[test]
fn validation_has_at_most_the_tokens_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let s = Settings { validation_tokens: 300, ..settings(dir.path()) };
    let p = prepare(&s, |_| {}).unwrap();
    assert!((250..=300).contains(&p.report.validation_tokens), "{}", p.report.validation_tokens);
    let all = tokens(&p.train).len() + tokens(&p.validation).len();
    let whole = prepare(&Settings { validation_tokens: 1 << 40, ..s }, |_| {}).unwrap();
    assert!(all.abs_diff(tokens(&whole.train).len() + tokens(&whole.validation).len()) < 5, "nothing is lost");
}

#[test]
fn too_little_text_is_told_with_what_was_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("corpus");
    fs::create_dir(&path).unwrap();
    let told = |text: &str, set: &dyn Fn(Settings) -> Settings| {
        fs::write(path.join("a.jsonl"), format!("{{\"text\": null}}\n{{\"text\": \"{text}\"}}\n")).unwrap();
        fs::write(path.join("b.bin"), "b").unwrap();
        let all = set(Settings { path: path.clone(), ..settings(dir.path()) });
        let error = prepare(&all, |_| {}).err().expect("there is too little text");
        assert!(error.is_request());
        error.to_string()
    };
    let left = "; left out: 1 (extension .bin), 1 (null)";
    let few = told("a few words", &|s| s);
    assert!(few.contains("11 bytes of text are too few") && few.ends_with(left), "{few}");
    let alike = told(&"ab ".repeat(3000), &|s| s);
    assert!(alike.contains("gives only") && alike.ends_with(left), "{alike}");
    let one_side = told("a few words", &|s| Settings { vocab_size: 257, ..s });
    assert!(one_side.ends_with(left), "{one_side}");
    fs::write(path.join("a.jsonl"), "{\"text\": null}\n").unwrap();
    let none = prepare(&Settings { path: path.clone(), ..settings(dir.path()) }, |_| {}).err().unwrap().to_string();
    assert!(none.contains("no text found") && none.contains(left), "{none}");
    assert!(
        none.ends_with(
            ". With .bin: where it holds token ids of llm.c, nanoGPT or Megatron, set data.source = \"tokens\""
        ),
        "{none}"
    );
    fs::write(path.join("c.py.gz"), "c").unwrap();
    fs::write(path.join("d.h"), "d").unwrap();
    fs::write(path.join("e.bin.gz"), "e").unwrap();
    let none = prepare(&Settings { path: path.clone(), ..settings(dir.path()) }, |_| {}).err().unwrap().to_string();
    assert!(none.contains("(null). To read them: data.extensions = [\"h\", \"py\"]. With .bin"), "{none}");
    assert_eq!(none.matches("With .bin").count(), 1, "{none}");
}

#[test]
fn a_book_and_a_note_are_both_parted() {
    let dir = tempfile::tempdir().unwrap();
    for edition in 0..30 {
        let folder = dir.path().join(format!("split{edition}"));
        fs::create_dir_all(&folder).unwrap();
        let book: String = (0..1500).map(|i| format!("the book has {} words\n", i * edition)).collect();
        fs::write(folder.join("book.txt"), format!("{book}edition {edition}\n")).unwrap();
        fs::write(folder.join("notes.txt"), "a note on it\n".repeat(300)).unwrap();
        let s = Settings { path: folder, vocab_size: 262, ..settings(dir.path()) };
        let r = prepare(&s, |_| {}).unwrap().report;
        let share = r.validation_bytes as f64 / r.bytes as f64;
        assert!((0.045..0.055).contains(&share), "edition {edition}: {share}");
    }
}

#[test]
fn small_documents_are_whole_on_one_side_and_equal_ones_on_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lines.jsonl");
    let line = |i: usize| format!("{{\"text\": \"document {} of many, about {}\"}}\n", i % 1500, (i % 1500) * 7);
    fs::write(&path, (0..3000).map(line).collect::<String>()).unwrap();
    let p = prepare(&Settings { path, ..settings(dir.path()) }, |_| {}).unwrap();
    let documents = |shards: &[Arc<Shard>]| {
        let ids = tokens(shards);
        let end = p.tokenizer.as_ref().unwrap().end_of_text();
        ids.split(|&id| id == end)
            .map(|d| p.tokenizer.as_ref().unwrap().decode(d).unwrap())
            .filter(|d| !d.is_empty())
            .collect::<Vec<_>>()
    };
    let (train, validation) = (documents(&p.train), documents(&p.validation));
    assert_eq!(train.len() + validation.len(), 3000);
    assert_eq!(p.report.end_side(), crate::Side::After);
    assert!(train.iter().chain(&validation).all(|d| d.starts_with("document ") && d.contains("about")));
    let seen: std::collections::HashSet<&String> = train.iter().collect();
    assert!(validation.len() > 100 && validation.iter().all(|d| !seen.contains(d)));
}

#[test]
fn documents_begin_with_the_bos_of_a_given_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let learned = prepare(&s, |_| {}).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(learned.tokenizer.as_ref().unwrap().json()).unwrap();
    json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"!": {"id": "!", "ids": [1], "tokens": ["!"]}}});
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    let given = Settings { tokenizer: Some(path), ..s };
    let p = prepare(&given, |_| {}).unwrap();
    assert_eq!((tokens(&p.train)[0], tokens(&p.validation)[0]), (1, 1));
    assert_eq!(p.end_side(), Side::Before, "where documents do not see each other, each begins as a prompt does");
    let none = Treatment { bos: crate::Bos::None, ..Treatment::default() };
    let without = prepare(&Settings { treatment: none, ..given }, |_| {}).unwrap();
    assert_eq!(tokens(&without.train).len() + 1, tokens(&p.train).len());
    assert_eq!(without.end_side(), Side::After);
}

#[test]
fn a_vocabulary_of_another_size_or_language_is_told_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = settings(dir.path());
    let p = prepare(&s, |_| {}).unwrap();
    s.tokenizer = Some(p.folder.join("tokenizer.json"));
    s.vocab_size = 999;
    let err = prepare(&s, |_| {}).err().unwrap().to_string();
    assert!(err.contains("has 300 entries, data.vocab_size is 999; set it to 300"), "{err}");
    // a model that was padded has more rows than its tokenizer has entries, and never fewer
    let padded = prepare(&Settings { padded: true, ..s.clone() }, |_| {}).unwrap();
    assert_eq!((padded.tokenizer.unwrap().vocab_size(), padded.train[0].vocab()), (300, 300));
    fs::remove_dir_all(padded.folder).unwrap();
    let err = prepare(&Settings { padded: true, vocab_size: 299, ..s.clone() }, |_| {}).err().unwrap().to_string();
    assert!(err.contains("has 300 entries, the model that the run starts from has 299 rows"), "{err}");
    let words = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
        "model":{"type":"WordLevel","vocab":{"[UNK]":0,"sheep":1,"</s>":2},"unk_token":"[UNK]"}}"#;
    let path = dir.path().join("words.json");
    fs::write(&path, words).unwrap();
    let s = Settings { tokenizer: Some(path), vocab_size: 3, ..s };
    let err = prepare(&s, |_| {}).err().unwrap().to_string();
    assert!(err.contains("words.json: its vocabulary cannot express") && err.contains("such as"), "{err}");
    let left: Vec<_> = fs::read_dir(&s.cache).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [p.folder.file_name().unwrap()]);
}

#[test]
fn names_of_special_tokens_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let text = fs::read_to_string(&s.path).unwrap().replacen("sheep", "<|endoftext|>", 7);
    fs::write(&s.path, text).unwrap();
    let p = prepare(&s, |_| {}).unwrap();
    assert_eq!(p.report.special_names, 7);
    assert!(p.report.notes[0].contains("7 names of special tokens in the text are encoded as text"));
    let end = p.tokenizer.as_ref().unwrap().end_of_text();
    assert_eq!(tokens(&p.train).iter().filter(|&&id| id == end).count(), 1);
}

#[test]
fn a_missing_shard_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let p = prepare(&s, |_| {}).unwrap();
    let report = p.folder.join("report.json");
    let more = Report { train_shards: 2, ..p.report };
    fs::write(&report, serde_json::to_vec(&more).unwrap()).unwrap();
    let err = Prepared::open(&p.folder, s.treatment).err().unwrap().to_string();
    assert!(err.contains("train-00001.shard: cannot be opened"), "{err}");
}

#[test]
fn two_preparations_of_one_corpus_make_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let all: Vec<Prepared> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| prepare(&s, |_| {}).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(all.iter().filter(|p| p.fresh).count(), 1);
    assert!(all.iter().all(|p| tokens(&p.train) == tokens(&all[0].train)));
}

#[test]
fn training_ends_with_the_tokens_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(dir.path());
    let whole = prepare(&s, |_| {}).unwrap();
    let part = prepare(&Settings { max_tokens: 5000, ..s.clone() }, |_| {}).unwrap();
    let (all, first) = (tokens(&whole.train), tokens(&part.train));
    let text = first.len() - 1;
    assert!((4990..=5000).contains(&first.len()) && first[..text] == all[..text], "{}", first.len());
    assert_eq!(tokens(&part.validation), tokens(&whole.validation), "validation is that of the whole corpus");
    assert_eq!(part.report.train_tokens, first.len() as u64);
    // more than there is changes nothing but the name
    let more = prepare(&Settings { max_tokens: 1 << 40, ..s }, |_| {}).unwrap();
    assert_eq!(tokens(&more.train), all);
}

#[test]
fn text_behind_the_tokens_asked_for_is_left_out_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lines.jsonl");
    let line = |i: usize| format!("{{\"body\": \"{}\"}}\n", format!("word {i} of many ").repeat(4000));
    fs::write(&path, (0..100).map(line).collect::<String>()).unwrap();
    let s = Settings { path, field: "body".into(), max_tokens: 50_000, ..settings(dir.path()) };
    let p = prepare(&s, |_| {}).unwrap();
    assert!((49_990..=50_000).contains(&p.report.train_tokens), "{}", p.report.train_tokens);
    assert!(p.notes.iter().any(|n| n.starts_with("data.max_tokens = 50000 leaves out the last ")), "{:?}", p.notes);
    assert_eq!(p.report.read_as, [("JSON lines".to_string(), 1)].into());
    let err = prepare(&Settings { field: "text".into(), ..s }, |_| {}).err().unwrap().to_string();
    assert!(
        err.contains("line 1: expected a JSON object with a field \"text\": missing field `text`; it has "),
        "{err}"
    );
    assert!(err.ends_with("; data.field names the one that holds the text"), "{err}");
}

/// A folder with documents in three kinds of files; those of the last by name are of their own words.
fn three_kinds(dir: &Path) -> PathBuf {
    let path = dir.join("text");
    fs::create_dir(&path).unwrap();
    let line = |word: &str, i: usize| format!("{{\"text\": \"{word} {i} of the lines\"}}\n");
    fs::write(path.join("a.txt"), "first file, many words ".repeat(300)).unwrap();
    fs::write(path.join("b.jsonl"), (0..200).map(|i| line("second", i)).collect::<String>()).unwrap();
    fs::write(path.join("c.jsonl"), (0..300).map(|i| line("third", i)).collect::<String>()).unwrap();
    path
}

#[test]
fn the_last_file_validates_and_nothing_of_it_trains() {
    let dir = tempfile::tempdir().unwrap();
    let shared = Settings { path: three_kinds(dir.path()), ..settings(dir.path()) };
    let s = Settings { validation: Validation::LastFile, ..shared.clone() };
    let p = prepare(&s, |_| {}).unwrap();
    let decode = |p: &Prepared, shards: &[Arc<Shard>]| p.tokenizer.as_ref().unwrap().decode(&tokens(shards)).unwrap();
    let (train, validation) = (decode(&p, &p.train), decode(&p, &p.validation));
    assert!(train.starts_with("first file") && train.contains("second 199 of") && !train.contains("third"));
    assert!(
        (0..300).all(|i| validation.contains(&format!("third {i} of the lines"))) && !validation.contains("second")
    );
    assert_eq!(p.report.validation_file.as_deref(), Some("c.jsonl"));
    assert_eq!(p.report.validation_bytes, p.report.sources["c.jsonl"]);
    // it is remembered, and another corpus than with a share
    assert!(!prepare(&s, |_| {}).unwrap().fresh && prepare(&shared, |_| {}).unwrap().key() != p.key());
    // what validation has no room for does not train either
    let short = prepare(&Settings { validation_tokens: 100, ..s }, |_| {}).unwrap();
    assert_eq!(tokens(&short.train), tokens(&p.train));
    assert!((90..=100).contains(&short.report.validation_tokens));
    let rest = p.report.validation_bytes - short.report.validation_bytes;
    let note = format!("data.validation_tokens = 100 leaves out the last {rest} bytes of c.jsonl");
    assert!(short.notes.contains(&note), "{:?}", short.notes);
}

#[test]
fn a_last_file_that_cannot_validate_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let s = Settings { validation: Validation::LastFile, ..settings(dir.path()) };
    let told = |s: &Settings| prepare(s, |_| {}).err().unwrap().to_string();
    let one = told(&s);
    assert!(one.contains("corpus.txt: holds one file that is read") && one.contains("needs two at least"), "{one}");
    let path = three_kinds(dir.path());
    fs::write(path.join("d.txt"), "\n").unwrap();
    let empty = told(&Settings { path: path.clone(), ..s.clone() });
    assert!(empty.contains("its last file, d.txt, which validates") && empty.contains("1 (empty)"), "{empty}");
    for name in ["a.txt", "b.jsonl", "c.jsonl"] {
        fs::write(path.join(name), "\n").unwrap();
    }
    fs::write(path.join("d.txt"), "words ".repeat(9000)).unwrap();
    let nothing = told(&Settings { path, ..s });
    assert!(nothing.contains("the files before d.txt, the last one") && nothing.contains("1 (empty)"), "{nothing}");
}
