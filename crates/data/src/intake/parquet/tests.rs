use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::super::{Corpus, Found, Text};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet").join(name)
}

fn odd(name: &str) -> PathBuf {
    fixture("../parquet-odd").join(name)
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

/// Files of Python's pyarrow in which one thing is as it should not be; see `oracle/make_corpora.py`.
#[test]
fn columns_of_one_name_other_codecs_and_other_files_are_told() {
    let told = |name: &str| read(&odd(name), "text").unwrap_err().to_string();
    assert!(told("two.parquet").contains("has several columns \"text\" (data.field)"));
    let brotli = told("brotli.parquet");
    assert!(
        brotli.contains("row group 1: its column is compressed by Brotli, expected zstd, snappy, gzip"),
        "{brotli}"
    );
    let (texts, ..) = read(&odd("gzip.parquet"), "text").unwrap();
    assert_eq!(texts, (0..60).map(document).collect::<Vec<_>>());
    let dir = tempfile::tempdir().unwrap();
    for (content, what) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n"[..], "git lfs pull"),
        (b"<html>Not found</html>", "is no parquet file, which begins with PAR1"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "is compressed (gzip), no parquet file"),
        (b"PARE\0\0\0\0", "is encrypted"),
    ] {
        let path = dir.path().join("a.parquet");
        std::fs::write(&path, content).unwrap();
        let e = read(&path, "text").unwrap_err().to_string();
        assert!(e.contains("a.parquet") && e.contains(what), "{e}");
    }
}

/// Pages have checksums in this file, and nothing is compressed: each changed byte of a text would read as another text.
#[test]
fn a_page_is_held_to_its_checksum_and_a_row_group_to_its_rows() {
    let whole = std::fs::read(odd("checksum.parquet")).unwrap();
    assert_eq!(read(&odd("checksum.parquet"), "text").unwrap().0.len(), 60);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.parquet");
    let changed = |at: usize, by: u8| {
        let mut bytes = whole.clone();
        bytes[at] ^= by;
        std::fs::write(&path, bytes).unwrap();
        read(&path, "text")
    };
    let at = whole.windows(12).position(|w| w == b"document 33:").unwrap();
    let told = changed(at + 3, 1).unwrap_err().to_string();
    assert!(told.contains("row group") && told.contains("checksum"), "{told}");
    // whatever is changed: an error, or as many rows as there were
    let mut refused = 0;
    for (at, by) in (0..whole.len()).flat_map(|at| [(at, 6), (at, 16)]) {
        match changed(at, by) {
            Ok((texts, out, _)) => assert_eq!(texts.len() + out.values().sum::<usize>(), 60, "byte {at}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > whole.len(), "{refused} of {}", 2 * whole.len());
}
