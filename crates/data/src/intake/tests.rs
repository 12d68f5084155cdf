//! What is read, and what is left out for which reason.

use std::fs;
use std::path::Path;

use super::*;

/// Texts in their order and reasons with numbers.
fn read(path: &Path) -> Result<(Vec<String>, BTreeMap<String, usize>)> {
    read_those(path, &EXTENSIONS)
}

/// Those of files with these extensions.
fn read_those(path: &Path, extensions: &[&str]) -> Result<(Vec<String>, BTreeMap<String, usize>)> {
    let corpus = Corpus::text(path, &extensions.iter().map(|e| e.to_string()).collect::<Vec<_>>(), FIELD)?;
    let (mut texts, mut left_out) = (Vec::new(), corpus.left_out().clone());
    for found in corpus.documents() {
        match found? {
            Found::Document(d) => {
                let mut text = String::new();
                d.for_each_piece(|p| {
                    assert_eq!(p.at, text.len() as u64);
                    assert!(p.text.len() <= pieces::PIECE);
                    text += &p.text;
                    Ok(())
                })?;
                texts.push(text);
            }
            Found::LeftOut(reason) => *left_out.entry(reason).or_default() += 1,
            Found::Read(_) => {}
        }
    }
    Ok((texts, left_out))
}

fn error(path: &Path) -> String {
    read(path).expect_err("it is refused").to_string()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }
    fn put(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}

#[test]
fn what_this_program_wrote_is_no_text() {
    let f = Folder::new();
    f.put("a.txt", "a");
    f.put("runs/x/run.lock", "");
    f.put("runs/x/metrics.jsonl", "{\"step\": 1}");
    f.put("runs/x/logs/b.txt", "b");
    f.put("hf/parity.safetensors", "");
    f.put("hf/README.md", "c");
    f.put("runs/mine.md", "d");
    let (texts, left_out) = read(f.path()).unwrap();
    assert_eq!(texts, ["a", "d"]);
    assert_eq!(left_out, [("folder that this program wrote".to_string(), 2)].into());
    // whoever names such a folder means it
    assert_eq!(read(&f.path().join("hf")).unwrap().0, ["c"]);
}

#[test]
fn extensions_count_in_any_case_and_what_is_left_out_is_named() {
    let f = Folder::new();
    f.put("A.TXT", "a");
    f.put("b.Md", "b");
    f.put("c.JSONL", "{\"text\": \"c\"}\n\n{\"text\": null}\n{\"text\": \" \"}\n");
    f.put("d.jsonl.xz", "x");
    f.put("e.txt", b"\x00\x01\xff\xfe\x00\xff");
    f.put("f.txt", " \n");
    f.put("LICENSE", "x");
    f.put(".ipynb_checkpoints/a.txt", "old");
    f.put("._a.txt", b"\x00\x05\x16\x07");
    let (texts, left_out) = read(f.path()).unwrap();
    assert_eq!(texts, ["a", "b", "c"]);
    let told: Vec<(&str, usize)> = left_out.iter().map(|(k, n)| (k.as_str(), *n)).collect();
    assert_eq!(
        told,
        [("binary", 1), ("empty", 2), ("extension .xz", 1), ("hidden", 2), ("no extension", 1), ("null", 1)]
    );
}

#[test]
fn extensions_say_which_files_of_a_folder_are_read() {
    let f = Folder::new();
    f.put("a.py", "print(1)");
    f.put("b.H", "int x;");
    f.put("c.txt", "c");
    f.put("d.jsonl", "{\"text\": \"d\"}\n");
    let told = |extensions: &[&str]| read_those(f.path(), extensions).unwrap();
    assert_eq!(told(&["py", "h"]).0, ["print(1)", "int x;"]);
    assert_eq!(told(&["py", "h"]).1, [("extension .jsonl".to_string(), 1), ("extension .txt".to_string(), 1)].into());
    // lines of JSON stay lines of JSON
    assert_eq!(told(&["jsonl", "py"]).0, ["print(1)", "d"]);
    // whoever names one file means its text
    assert_eq!(read_those(&f.path().join("a.py"), &["txt"]).unwrap().0, ["print(1)"]);
    assert!(
        no_text("parquet").is_some() != cfg!(feature = "parquet") && EXTENSIONS.iter().all(|e| no_text(e).is_none())
    );
    // a folder of nothing but parquet is read by that; beside text it is left out, as ever
    let parquet = Folder::new();
    parquet.put("a.parquet", "PAR1");
    assert_eq!(extensions_for(parquet.path()), ["parquet"]);
    parquet.put("b.jsonl", "");
    let empty: [&str; 0] = [];
    assert_eq!(extensions_for(parquet.path()), empty);
    assert_eq!(extensions_for(&parquet.path().join("nowhere")), empty);
}

#[cfg(unix)]
#[test]
fn links_are_followed_once() {
    use std::os::unix::fs::symlink;
    let (elsewhere, f) = (Folder::new(), Folder::new());
    let a = elsewhere.put("far/a.txt", "a");
    f.put("b.txt", "b");
    symlink(&a, f.path().join("one.txt")).unwrap();
    symlink(&a, f.path().join("two.txt")).unwrap();
    symlink(elsewhere.path().join("far"), f.path().join("folder")).unwrap();
    symlink(f.path(), f.path().join("loop")).unwrap();
    symlink("nowhere", f.path().join("broken.txt")).unwrap();
    symlink("round", f.path().join("and")).unwrap();
    symlink("and", f.path().join("round")).unwrap();
    symlink("b.txt/below", f.path().join("file.txt")).unwrap();
    let (texts, left_out) = read(f.path()).unwrap();
    assert_eq!(texts, ["b", "a"]);
    let told: Vec<(&str, usize)> = left_out.iter().map(|(k, n)| (k.as_str(), *n)).collect();
    assert_eq!(
        told,
        [("broken link", 4), ("link to a file that is read already", 2), ("link to a folder above it", 1)]
    );
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_without_waiting_for_it() {
    let f = Folder::new();
    let pipe = f.path().join("p.txt");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(error(&pipe).contains("is a pipe or a device"));
    f.put("a.txt", "a");
    let (texts, left_out) = read(f.path()).unwrap();
    assert_eq!((texts, left_out["no regular file"]), (vec!["a".to_string()], 1));
}

#[test]
fn bad_text_is_told_with_its_place_and_a_remedy() {
    let f = Folder::new();
    assert!(error(&f.put("a.txt", b"ab\xff")).contains("byte 2 is not valid UTF-8"));
    assert!(error(&f.put("u.txt", b"\xff\xfea\x00b\x00")).contains("iconv -f UTF-16"));
    assert!(error(&f.put("c.jsonl.xz", b"\xfd7zXZ")).contains("unxz"));
    assert!(
        error(&f.put("c.json", b"[{\"text\": 1}]"))
            .contains("line 1: expected a JSON object with a field \"text\", not an array")
    );
    assert!(error(&f.path().join("missing.txt")).contains("cannot be read"));
    let line = error(&f.put("l.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n"));
    assert!(line.contains("line 2: byte 13 of the line is not valid UTF-8") && line.contains("iconv -f"), "{line}");
}

#[test]
fn one_file_in_another_encoding_does_not_end_a_folder() {
    let f = Folder::new();
    f.put("a.txt", "a");
    f.put("latin.txt", b"caf\xe9");
    f.put("wide.md", b"\xff\xfea\x00b\x00");
    // valid UTF-8, with a NUL behind each letter
    let wide = |text: &str| text.bytes().flat_map(|b| [b, 0]).collect::<Vec<u8>>();
    let plain = f.put("wide.txt", wide("a text without its mark"));
    let lines = f.put("wide.jsonl", wide("{\"text\": \"a\"}\n"));
    f.put("lines.jsonl", b"{\"text\": \"b\"}\n{\"text\": \"caf\xe9\"}\n{\"text\": \"c\"}\n");
    // its bad byte lies far behind what is held at once
    let mut large = "a line of a large file\n".repeat(1 + text::WHOLE as usize / 20).into_bytes();
    assert!(large.len() as u64 > text::WHOLE);
    large.push(0xe9);
    f.put("z.txt", &large);
    let (texts, left_out) = read(f.path()).unwrap();
    assert_eq!(texts, ["a", "b", "c"]);
    let told: Vec<(&str, usize)> = left_out.iter().map(|(k, n)| (k.as_str(), *n)).collect();
    assert_eq!(told, [("UTF-16, not UTF-8", 3), ("line that is not UTF-8", 1), ("not UTF-8", 2)]);
    for path in [plain, lines, f.put("mark.jsonl", b"\xff\xfe{\x00}\x00")] {
        assert!(error(&path).contains("is UTF-16; convert it (iconv -f UTF-16 -t UTF-8"), "{}", error(&path));
    }
    let alone = error(&f.path().join("z.txt"));
    assert!(alone.contains(&format!("byte {} is not valid UTF-8", large.len() - 1)), "{alone}");
}

#[test]
fn a_large_file_is_read_in_pieces_and_its_bad_byte_is_found() {
    let f = Folder::new();
    let text: String = (0..500_000).map(|i| format!("line {i} of a large file, \u{e4}\u{6f22}\n")).collect();
    assert!(text.len() as u64 > 4 * text::WHOLE);
    let path = f.put("a.txt", "\u{feff}".to_string() + &text);
    let (texts, _) = read(&path).unwrap();
    assert!(texts[0] == text);
    let mut bad = text.into_bytes();
    let at = bad.len() - 10;
    bad[at] = 0xff;
    assert!(error(&f.put("b.txt", &bad)).contains(&format!("byte {at} is not valid UTF-8")));
    // a character that the end of the file cuts off
    bad.truncate(at);
    bad.push(0xc3);
    assert!(error(&f.put("b.txt", &bad)).contains(&format!("byte {at} is not valid UTF-8")));
}

#[test]
fn lines_are_objects_with_a_text() {
    let parse = |line: &str| jsonl::parse(line.as_bytes(), FIELD);
    let text = |line: &str| match parse(line) {
        Ok(Some(Found::Document(Document { text: Text::Whole(t), .. }))) => t.into_owned(),
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(text("\u{feff}{\"id\": 1, \"text\": \"a\\nb\"}\r\n"), "a\nb");
    assert!(parse(" \n").unwrap().is_none());
    for bad in
        ["{\"txt\": 1}", "[\"text\"]", "{\"text\": 5}", "{\"text\": \"a\"} {}", "{\"text\": \"\\ud83d\"}", "{", "x"]
    {
        let told = parse(bad).err().unwrap();
        assert!(told.contains("expected a JSON object with a field \"text\"") && !told.contains("at line"), "{told}");
    }
    for (bad, what) in [
        ("{\"text\": \"\\ud83d x\"}", "half of a surrogate pair is no character"),
        ("{\"text\": \"\\udd80\"}", "half of a surrogate pair is no character"),
        ("{\"score\": NaN, \"text\": \"a\"}", "write null in their place"),
        ("{\"score\":NaN,\"text\":\"a\"}", "write null in their place"),
        ("{\"text\": \"a\", \"score\": -Infinity}", "write null in their place"),
        ("{\"text\": Infinity}", "write null in their place"),
    ] {
        let told = parse(bad).err().unwrap();
        assert!(told.contains(what), "{told}");
    }
    // a text about them has another fault
    let told = parse("{\"text\": \"NaN and Infinity\", \"score\": }").err().unwrap();
    assert!(!told.contains("null"), "{told}");
    let f = Folder::new();
    assert!(error(&f.put("b.jsonl", "{\"text\":\"x\"}\n{\"txt\":1}")).contains("line 2: expected a JSON object"));
}
