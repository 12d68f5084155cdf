//! Files that Python's gzip and `zstandard` compressed (`oracle/make_corpora.py`), and their damaged twins.

use std::fs;
use std::path::PathBuf;

use super::super::{Corpus, Document, FIELD, Found, Text};
use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The text that the script wrote.
fn document(i: usize) -> String {
    format!("document {i}: {} sheep, \u{e4} \u{6f22} \u{1f980}\nand a second line\n", i * i)
}

/// The texts of a file, and what it was read as.
fn read(path: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let corpus = Corpus::text(path, &["jsonl".into(), "txt".into()], FIELD)?;
    let (mut texts, mut read_as) = (Vec::new(), Vec::new());
    for found in corpus.documents() {
        match found? {
            Found::Document(Document { text: Text::Whole(text), .. }) => texts.push(text.into_owned()),
            Found::Read(what) => read_as.push(what),
            other => panic!("{other:?}"),
        }
    }
    Ok((texts, read_as))
}

/// The error of a file with this content.
fn error(name: &str, content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    let told = read(&path).expect_err("it is damaged");
    assert!(told.is_request() && told.to_string().starts_with(&path.display().to_string()), "{told}");
    told.to_string()
}

#[test]
fn what_other_tools_compressed_is_read_as_it_was() {
    let all: Vec<String> = (0..60).map(document).collect();
    let (texts, read_as) = read(&fixture("dolma.json.gz")).unwrap();
    assert_eq!((texts, read_as), (all.clone(), vec!["JSON lines, gzip of several members".to_string()]));
    let (texts, read_as) = read(&fixture("lines.jsonl.zst")).unwrap();
    assert_eq!((texts, read_as), (all, vec!["JSON lines, zstd of several frames".to_string()]));
    let (texts, read_as) = read(&fixture("page.txt.gz")).unwrap();
    assert_eq!((texts.concat(), read_as), ((0..9).map(document).collect(), vec!["text, gzip".to_string()]));
}

#[test]
fn what_a_file_is_called_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("lines.jsonl.zst"), dir.path().join("a.jsonl")).unwrap();
    fs::write(dir.path().join("b.jsonl.gz"), "{\"text\": \"plain\"}\n").unwrap();
    fs::copy(fixture("dolma.json.gz"), dir.path().join("c.json.gz")).unwrap();
    fs::write(dir.path().join("d.json"), "{\"name\": \"settings of something\"}").unwrap();
    let (texts, read_as) = read(dir.path()).unwrap();
    assert_eq!((texts.len(), &*texts[60]), (121, "plain"));
    let told = ["JSON lines, zstd of several frames", "JSON lines", "JSON lines, gzip of several members"];
    assert_eq!(read_as, told);
}

#[test]
fn a_text_larger_than_what_is_held_is_measured_first() {
    use std::io::Write;
    let text: String = (0..400_000).map(|i| format!("line {i} of a large text, \u{e4}\n")).collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.txt.gz");
    fs::write(&path, gzip.finish().unwrap()).unwrap();
    let corpus = Corpus::text(&path, &[], FIELD).unwrap();
    let mut found = corpus.documents();
    let Some(Ok(Found::Document(document))) = found.next() else { panic!("no document") };
    assert!(matches!(document.text, Text::File(_, len) if len == text.len() as u64));
    let mut again = String::new();
    let each = |piece: super::super::Piece| {
        again += &piece.text;
        Ok(())
    };
    document.for_each_piece(each).unwrap();
    assert!(again == text);
}

#[test]
fn damage_is_told_with_its_member_or_frame() {
    let gzip = fs::read(fixture("dolma.json.gz")).unwrap();
    let starts: Vec<usize> = (0..gzip.len() - 4).filter(|&i| gzip[i..i + 3] == [0x1f, 0x8b, 8]).collect();
    assert_eq!(starts.len(), 3);
    let cut = error("a.json.gz", &gzip[..starts[2] - 9]);
    assert!(cut.contains(&format!("ends within gzip member 2, which begins at byte {}", starts[1])), "{cut}");
    let mut flipped = gzip.clone();
    flipped[starts[2] - 6] ^= 1;
    let told = error("a.json.gz", &flipped);
    assert!(told.contains("gzip member 2, which begins at byte") && told.contains("cannot be decompressed"), "{told}");
    let told = error("a.json.gz", &[&gzip[..], b"more"].concat());
    assert!(told.contains(&format!("byte {}, behind gzip member 3, begins no other member", gzip.len())), "{told}");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.json.gz"), [&gzip[..], &[0; 700]].concat()).unwrap();
    assert_eq!(read(&dir.path().join("a.json.gz")).unwrap().0.len(), 60, "zeros are padding");

    let zstd = fs::read(fixture("lines.jsonl.zst")).unwrap();
    let starts: Vec<usize> = (0..zstd.len() - 4).filter(|&i| zstd[i..i + 4] == [0x28, 0xb5, 0x2f, 0xfd]).collect();
    assert_eq!(starts.len(), 3);
    let cut = error("a.jsonl.zst", &zstd[..starts[2] - 2]);
    assert!(cut.contains(&format!("ends within zstd frame 2, which begins at byte {}", starts[1])), "{cut}");
    let mut flipped = zstd.clone();
    flipped[starts[2] - 1] ^= 1;
    assert!(error("a.jsonl.zst", &flipped).contains("the content does not match its checksum"));
    for appended in [&b"x"[..], b"more than a magic number", &[0; 64]] {
        let told = error("a.jsonl.zst", &[&zstd[..], appended].concat());
        assert!(told.contains(&format!("byte {}, behind zstd frame 3, begins no other frame", zstd.len())), "{told}");
    }
    let cut = error("a.jsonl.zst", &[&zstd[..], &zstd[..2]].concat());
    assert!(cut.contains("ends within zstd frame 4"), "{cut}");
    // a frame that asks for a window of 256 MB
    let told = error("a.jsonl.zst", &[0x28, 0xb5, 0x2f, 0xfd, 0, 18 << 3, 1, 0, 0]);
    assert!(told.contains("a window of 256 MB, above the 128 MB") && told.ends_with("without --long"), "{told}");
}

#[test]
fn a_cut_or_flipped_file_never_reads_as_another_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json.gz");
    let good = fs::read(fixture("dolma.json.gz")).unwrap();
    let all: Vec<String> = (0..60).map(document).collect();
    let mut refused = 0;
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        for content in [&good[..at], &bad[..]] {
            fs::write(&path, content).unwrap();
            match read(&path) {
                Err(e) => {
                    assert!(e.is_request(), "{e}");
                    refused += 1;
                }
                // time and system of a header say nothing of the content; what is cut behind a member and a line is whole
                Ok((texts, _)) => assert!(all.starts_with(&texts), "byte {at}"),
            }
        }
    }
    assert!(refused > 2 * good.len() - 120, "{refused} of {}", 2 * good.len());
}

#[test]
fn a_frame_is_held_to_the_size_that_its_header_announces() {
    // a raw block of five bytes, the last; a single segment, so the size stands in a byte
    let frame = |size: u8| [&[0x28, 0xb5, 0x2f, 0xfd, 0x20, size, 5 << 3 | 1, 0, 0][..], b"a = 1"].concat();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt.zst"), frame(5)).unwrap();
    assert_eq!(read(&dir.path().join("a.txt.zst")).unwrap().0, ["a = 1"]);
    for size in [4, 6] {
        let told = error("a.txt.zst", &frame(size));
        assert!(told.contains(&format!("it holds 5 bytes, its header announces {size}")), "{told}");
    }
    let python = fs::read(fixture("lines.jsonl.zst")).unwrap();
    assert!(content_size(&python).is_some(), "Python's zstandard writes it");
}

#[test]
fn what_is_no_text_is_told_by_its_first_bytes() {
    use std::io::Write;
    let mut tar = [0u8; 512];
    tar[..8].copy_from_slice(b"book.txt");
    tar[257..262].copy_from_slice(b"ustar");
    let packed = |content: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(content).unwrap();
        gzip.finish().unwrap()
    };
    let text = b"{\"text\": \"a\"}\n";
    // the letters that mark a tar archive, at their place in a text
    let custard = format!("{:256}custard", "a");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), &custard).unwrap();
    assert_eq!(read(&dir.path().join("a.txt")).unwrap().0, [custard]);
    for (name, content, what) in [
        ("a.jsonl.gz", packed(&packed(text)), "is compressed (gzip), no text; decompress it once"),
        ("a.txt.gz", packed(b"\xfd7zXZ\0\0\x04"), "is compressed by xz, no text; decompress it first (unxz)"),
        ("a.tgz", packed(&tar), "is a tar archive, no text; unpack it first"),
        ("a.txt", b"BZh91AY&SY123".to_vec(), "is compressed by bzip2"),
        ("a.txt", b"PAR1\x15\x04".to_vec(), "is parquet, no text; name it so that it ends in .parquet"),
        ("a.md", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n".to_vec(), "git lfs pull"),
    ] {
        let told = error(name, &content);
        assert!(told.contains(what), "{told}");
    }
}
