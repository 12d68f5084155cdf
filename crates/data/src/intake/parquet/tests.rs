use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::super::{Corpus, Found, Text};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet").join(name)
}

/// As oracle/make_corpora.py makes it.
fn document(i: usize) -> String {
    format!("document {i}: {} sheep, \u{e4} \u{6f22} \u{1f980}\nand a second line\n", i * i)
}

type Read = (Vec<String>, BTreeMap<String, usize>, Vec<String>);

fn read(path: &Path, field: &str) -> crate::error::Result<Read> {
    let corpus = Corpus::text(path, &["parquet".to_string()], field)?;
    let mut read: Read = Default::default();
    for found in corpus.documents() {
        match found? {
            Found::Document(d) => {
                assert!(d.source.ends_with(".parquet"), "{}", d.source);
                let Text::Whole(text) = d.text else { panic!("a row is a text") };
                read.0.push(text.into_owned());
            }
            Found::LeftOut(why) => *read.1.entry(why).or_default() += 1,
            Found::Read(what) => read.2.push(what),
        }
    }
    Ok(read)
}

#[test]
fn rows_come_in_their_order_and_nulls_are_counted() {
    let kept: Vec<String> = (0..60).filter(|i| ![7, 9].contains(&(i % 20))).map(document).collect();
    let left_out = BTreeMap::from([("null".to_string(), 3), ("empty".to_string(), 3)]);
    let (texts, out, what) = read(&fixture("fineweb.parquet"), "text").unwrap();
    assert_eq!((texts, out, what), (kept.clone(), left_out.clone(), vec!["parquet".to_string()]));
    // a field of a struct
    let (texts, out, _) = read(&fixture("fineweb.parquet"), "meta.note").unwrap();
    assert_eq!((texts, out), (kept, left_out));
    let (texts, out, _) = read(&fixture("shard.parquet"), "text").unwrap();
    assert_eq!((texts, out), ((0..60).map(document).collect(), BTreeMap::new()));
    // all files of a folder
    let (texts, _, what) = read(fixture("shard.parquet").parent().unwrap(), "text").unwrap();
    assert_eq!((texts.len(), what.len()), (114, 2));
}

#[test]
fn the_last_shard_validates_as_nanochat_has_it() {
    let folder = fixture("shard.parquet").parent().unwrap().to_path_buf();
    let corpus = Corpus::text(&folder, &["parquet".to_string()], "text").unwrap();
    let corpus = corpus.with_last_file_validating(&folder).unwrap();
    assert_eq!(corpus.validation_file(), Some("shard.parquet"));
    let mut seen = [0, 0];
    for found in corpus.documents() {
        let Found::Document(d) = found.unwrap() else { continue };
        let of = (d.source.to_string(), d.validation);
        match (of.0.as_str(), of.1) {
            ("fineweb.parquet", Some(false)) => seen[0] += 1,
            ("shard.parquet", Some(true)) => seen[1] += 1,
            _ => panic!("{of:?}"),
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn a_column_that_is_none_of_texts_is_refused_by_name() {
    let told = |field: &str| read(&fixture("fineweb.parquet"), field).unwrap_err().to_string();
    let none = told("content");
    assert!(
        none.contains("has no column \"content\" (data.field)") && none.contains("text, id, token_count"),
        "{none}"
    );
    assert!(told("token_count").contains("holds no texts"));
    let list = read(&fixture("fineweb.parquet"), "tags.list.element").unwrap_err().to_string();
    assert!(list.contains("holds no texts"), "{list}");
}

#[test]
fn a_compression_that_is_not_read_is_told_as_such() {
    let told = read(&fixture("../gzip.parquet"), "text").unwrap_err().to_string();
    assert!(told.contains("row group 1: column \"text\" is compressed by GZIP") && !told.contains("damaged"), "{told}");
}

/// A damaged file gives an error that names it, or other texts; never a panic, and never without end.
#[test]
fn damage_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.parquet");
    for name in ["fineweb.parquet", "shard.parquet"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        let mut refused = 0;
        let mut tried = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            if let Err(e) = read(&path, "text") {
                assert!(e.to_string().contains("damaged.parquet"), "{e}");
                refused += 1;
            }
        };
        for at in (0..whole.len()).step_by(3) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x41;
            tried(&bytes);
        }
        (0..whole.len()).step_by(37).for_each(|n| tried(&whole[..n]));
        assert!(refused > whole.len() / 37, "{name}: {refused}");
    }
    std::fs::write(&path, b"").unwrap();
    let empty = read(&path, "text").unwrap_err().to_string();
    assert!(empty.contains("damaged.parquet: is damaged"), "{empty}");
}
