//! Files that numpy wrote as llm.c and nanoGPT do, and those of Megatron's own builder (`oracle/make_corpora.py`), and their damaged twins.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::tests::tokens;
use super::super::{Prepared, Source, prepare};
use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The ids of a document that the script wrote.
fn document(i: u32) -> Vec<u32> {
    (0..5 + i % 9).map(|j| (31 * i + 7 * j) % 50000).collect()
}

fn settings(path: PathBuf, cache: &Path) -> Settings {
    Settings {
        source: Source::Tokens,
        path,
        extensions: Vec::new(),
        field: crate::FIELD.into(),
        vocab_size: 50257,
        vocab_bytes: 1 << 20,
        tokenizer: None,
        padded: false,
        end_of_text: None,
        treatment: crate::Treatment::default(),
        validation: Validation::default(),
        validation_share: 0.2,
        validation_tokens: 1 << 30,
        max_tokens: 0,
        cache: cache.join("cache"),
    }
}

fn both(p: &Prepared) -> (Vec<u32>, Vec<u32>) {
    (tokens(&p.train), tokens(&p.validation))
}

fn with_end(documents: std::ops::Range<u32>, end: u32, side: Side) -> Vec<u32> {
    let framed = |i| match side {
        Side::Before => [vec![end], document(i)].concat(),
        Side::After => [document(i), vec![end]].concat(),
    };
    documents.flat_map(framed).collect()
}

#[test]
fn the_tokens_of_llm_c_and_nanogpt_stay_as_they_are_with_their_split() {
    let dir = tempfile::tempdir().unwrap();
    let gpt2 = settings(fixture("llmc"), dir.path());
    let llama3 = Settings { vocab_size: 128_256, ..settings(fixture("llama3"), dir.path()) };
    let nano = settings(fixture("nanogpt"), dir.path());
    let cases = [
        (gpt2, 50256, Side::Before, "token ids, llm.c, version 1"),
        (llama3, 128_000, Side::Before, "token ids, llm.c, version 7"),
        (nano, 50256, Side::After, "token ids, nanoGPT, 16 bits without a header"),
    ];
    for (s, id, side, read_as) in cases {
        let p = prepare(&s, |_| {}).unwrap();
        assert!(p.fresh && p.tokenizer.is_none());
        assert_eq!(both(&p), (with_end(6..30, id, side), with_end(0..6, id, side)));
        assert_eq!(p.report.end_of_text, Some(EndOfText { id, side }));
        assert_eq!(p.report.end_side(), side);
        assert_eq!((p.report.documents, &p.report.read_as), (30, &[(read_as.to_string(), 2)].into()));
        let starts: usize = p.train.iter().map(|shard| shard.document_starts().len()).sum();
        assert_eq!(starts, 24, "documents begin where the files say");
        assert!(!prepare(&s, |_| {}).unwrap().fresh);
    }
}

#[test]
fn megatrons_index_says_where_documents_begin_and_the_end_validates_where_no_name_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let s = settings(fixture("megatron"), dir.path());
    let p = prepare(&s, |_| {}).unwrap();
    let all = with_end(0..30, 50256, Side::After);
    let (train, validation) = both(&p);
    assert_eq!([train, validation.clone()].concat(), all);
    assert_eq!((p.report.documents, p.report.end_of_text), (30, None));
    assert_eq!(p.report.end_side(), Side::Before);
    let share = validation.len() as f64 / all.len() as f64;
    assert!((0.1..=0.2).contains(&share), "{share}");
    assert_eq!(validation[..5], all[all.len() - validation.len()..][..5]);
    assert_eq!(p.validation[0].document_starts()[0], 0, "validation begins with a document");
    assert!(p.report.left_out.is_empty(), "{:?}", p.report.left_out);
}

/// One file, as of single characters, whose ids hold no end of text: there is no document to wait for.
#[test]
fn ids_that_nothing_parts_are_cut_where_half_of_the_validation_is_left() {
    let dir = tempfile::tempdir().unwrap();
    // within a part that is read at once, and behind some of them
    for count in [1000u32, 600_001] {
        let path = dir.path().join(format!("input-{count}.bin"));
        let ids: Vec<u32> = (0..count).map(|i| i * 7 % 65).collect();
        fs::write(&path, ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
        let p = prepare(&Settings { vocab_size: 65, ..settings(path, dir.path()) }, |_| {}).unwrap();
        let (train, validation) = both(&p);
        assert_eq!(validation.len(), count as usize / 10);
        assert_eq!([train, validation].concat(), ids);
        assert_eq!((p.report.documents, p.validation[0].document_starts()), (1, vec![0]));
    }
}

/// As llm.c with Llama 3's tokenizer: a text begins with a token that is not the one that ends it.
#[test]
fn documents_of_llm_c_begin_with_what_its_tokenizer_begins_a_text_with() {
    let dir = tempfile::tempdir().unwrap();
    let learned = crate::Tokenizer::learn(["a b a b"].into_iter(), 258, crate::Treatment::default()).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(learned.json()).unwrap();
    json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"!": {"id": "!", "ids": [1], "tokens": ["!"]}}});
    let (tokenizer, path) = (dir.path().join("tokenizer.json"), dir.path().join("ids.bin"));
    fs::write(&tokenizer, json.to_string()).unwrap();
    let ids: Vec<u32> = (0..20u32).flat_map(|i| [vec![1], vec![40 + i; 9]].concat()).collect();
    let mut header = vec![0i32; 256];
    header[..3].copy_from_slice(&[20240801, 7, ids.len() as i32]);
    let bytes = header.iter().flat_map(|n| n.to_le_bytes()).chain(ids.iter().flat_map(|id| id.to_le_bytes()));
    fs::write(&path, bytes.collect::<Vec<u8>>()).unwrap();
    let s = Settings { tokenizer: Some(tokenizer), vocab_size: 258, ..settings(path, dir.path()) };
    let p = prepare(&s, |_| {}).unwrap();
    assert_eq!((p.report.documents, p.report.end_of_text), (20, Some(EndOfText { id: 1, side: Side::Before })));
    assert_eq!(both(&p).1.len(), 40, "the last fifth begins with a document");
    let told = prepare(&Settings { end_of_text: Some(40), ..s }, |_| {}).unwrap();
    assert_eq!(told.report.documents, 1 + 9, "what the configuration says counts");
}

#[test]
fn ids_for_a_padded_model_are_read_with_its_smaller_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let learned = crate::Tokenizer::learn(["a b a b"].into_iter(), 258, crate::Treatment::default()).unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, learned.json()).unwrap();
    let s = Settings { tokenizer: Some(path), end_of_text: Some(50256), ..settings(fixture("llmc"), dir.path()) };
    let told = prepare(&s, |_| {}).err().unwrap().to_string();
    assert!(told.contains("has 258 entries, data.vocab_size is 50257; set it to 258"), "{told}");
    let p = prepare(&Settings { padded: true, ..s }, |_| {}).unwrap();
    assert_eq!(tokens(&p.train), with_end(6..30, 50256, Side::Before));
    assert_eq!((p.tokenizer.unwrap().vocab_size(), p.train[0].vocab()), (258, 50257));
}

/// Types of numbers by their codes in `indexed_dataset.py`, each as numpy writes it.
#[test]
fn every_type_of_numbers_that_megatron_writes_ids_in_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<i64> = (0..40).map(|i| 3 * i).collect();
    let write = |code: u8, width: usize, ids: &[i64]| {
        let bytes = ids.iter().flat_map(|id| id.to_le_bytes()[..width].to_vec());
        fs::write(dir.path().join("a.bin"), bytes.collect::<Vec<u8>>()).unwrap();
        // two documents, of one sequence and of two
        let (sizes, count) = ([20i32, 10, 10], 3u64);
        let firsts = [0, 20, 30].map(|at| at * width as i64);
        let index = [
            b"MMIDIDX\0\0".to_vec(),
            1u64.to_le_bytes().to_vec(),
            vec![code],
            count.to_le_bytes().to_vec(),
            3u64.to_le_bytes().to_vec(),
            sizes.iter().flat_map(|n| n.to_le_bytes()).collect(),
            firsts.iter().flat_map(|n| n.to_le_bytes()).collect(),
            [0i64, 1, 3].iter().flat_map(|n| n.to_le_bytes()).collect(),
        ];
        fs::write(dir.path().join("a.idx"), index.concat()).unwrap();
    };
    let s = Settings { vocab_size: 1 << 16, ..settings(dir.path().join("a.bin"), dir.path()) };
    for (code, width) in [(1, 1), (3, 2), (4, 4), (5, 8), (8, 2)] {
        write(code, width, &ids);
        let p = prepare(&s, |_| {}).unwrap();
        let (train, validation) = both(&p);
        let read: Vec<i64> = train.into_iter().chain(validation).map(i64::from).collect();
        assert_eq!((read, p.report.documents), (ids.clone(), 2), "type {code}");
        if [3, 4, 5].contains(&code) {
            write(code, width, &[&ids[..39], &[-1]].concat());
            let told = prepare(&s, |_| {}).err().unwrap().to_string();
            assert!(told.contains("token 39 is -1, not below data.vocab_size"), "type {code}: {told}");
        }
    }
}

#[test]
fn the_last_file_of_tokens_validates_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ids");
    fs::create_dir(&path).unwrap();
    for (from, to) in [("fineweb_train_000001.bin", "shard_0.bin"), ("fineweb_val_000000.bin", "shard_1.bin")] {
        fs::copy(fixture("llmc").join(from), path.join(to)).unwrap();
    }
    let s = Settings { validation: Validation::LastFile, ..settings(path.clone(), dir.path()) };
    let p = prepare(&s, |_| {}).unwrap();
    let want = (with_end(6..30, 50256, Side::Before), with_end(0..6, 50256, Side::Before));
    assert_eq!(both(&p), want);
    assert_eq!(p.report.validation_file.as_deref(), Some("shard_1.bin"));
    let share = Settings { validation: Validation::Share, validation_share: 0.5, ..s.clone() };
    let share = prepare(&share, |_| {}).unwrap();
    assert!(both(&share) != want && share.key() != p.key());
    fs::rename(path.join("shard_0.bin"), path.join("a_val.bin")).unwrap();
    let named = prepare(&s, |_| {}).err().unwrap().to_string();
    assert!(named.contains("a_val.bin: is called a validation file"), "{named}");
    fs::remove_file(path.join("a_val.bin")).unwrap();
    let one = prepare(&s, |_| {}).err().unwrap().to_string();
    assert!(one.contains("holds one file that is read"), "{one}");
}

#[test]
fn tokens_to_train_on_end_where_asked() {
    let dir = tempfile::tempdir().unwrap();
    let s = Settings { max_tokens: 100, ..settings(fixture("llmc"), dir.path()) };
    let p = prepare(&s, |_| {}).unwrap();
    assert_eq!(tokens(&p.train), with_end(6..30, 50256, Side::Before)[..100]);
    assert!(p.notes[0].starts_with("data.max_tokens = 100 leaves out the last "), "{:?}", p.notes);
}

#[test]
fn files_that_nothing_parts_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let note = |s: &Settings| {
        let p = prepare(s, |_| {}).unwrap();
        assert_eq!((p.report.documents, p.report.end_of_text, p.report.end_side()), (2, None, Side::Before));
        p.notes.join("\n")
    };
    let other = Settings { end_of_text: Some(50_255), ..settings(fixture("llmc"), dir.path()) };
    let told = note(&other);
    assert!(told.starts_with("no token 50255, which would part documents, stands in the files: each file"), "{told}");
    let path = dir.path().join("ids");
    fs::create_dir(&path).unwrap();
    for name in ["train.bin", "val.bin"] {
        fs::write(path.join(name), (0..99u16).flat_map(u16::to_le_bytes).collect::<Vec<_>>()).unwrap();
    }
    let small = Settings { vocab_size: 99, ..settings(path, dir.path()) };
    let told = note(&small);
    assert!(told.starts_with("no token is known that parts the documents of the files: each file is one"), "{told}");
    for name in ["llmc", "nanogpt", "megatron"] {
        let p = prepare(&settings(fixture(name), dir.path()), |_| {}).unwrap();
        assert!(p.notes.is_empty(), "{name}: {:?}", p.notes);
    }
}

#[test]
fn damaged_files_are_told_by_name_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let val = fs::read(fixture("llmc/fineweb_val_000000.bin")).unwrap();
    let path = dir.path().join("a_val.bin");
    let told = |content: &[u8], vocab_size: usize| {
        fs::write(&path, content).unwrap();
        let e = prepare(&Settings { vocab_size, ..settings(path.clone(), dir.path()) }, |_| {}).err().unwrap();
        assert!(e.is_request() && e.to_string().contains("a_val.bin"), "{e}");
        e.to_string()
    };
    let cut = told(&val[..val.len() - 2], 50257);
    let (have, announced) = (val.len() - 2, val.len());
    assert!(cut.contains(&format!("has {have} bytes")) && cut.contains(&format!("are {announced}")), "{cut}");
    assert!(told(&val, 50000).contains("token 0 is 50256, not below data.vocab_size = 50000"));
    let word = |n: i32, at: usize| [&val[..at], &n.to_le_bytes(), &val[at + 4..]].concat();
    assert!(told(&word(20240522, 0), 50257).contains("questions of an evaluation"));
    assert!(told(&word(3, 4), 50257).contains("is of llm.c's version 3"));
    assert!(told(&word(-1, 8), 50257).contains("-1 tokens"));
    assert!(told(b"abc", 50257).contains("has 3 bytes and no header"));
    assert!(told(b"PK\x03\x04more", 50257).contains("as PyTorch saves models"));
    // compressed ids of a vocabulary that holds every number of 16 bits
    for (head, word) in [
        (&b"\x1f\x8b\x08\0"[..], "gunzip"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\x93NUMPY\x01\0", "tofile"),
    ] {
        assert!(told(&[head, &[7; 64]].concat(), 1 << 16).contains(word), "{word}");
    }
    assert!(told(b"", 50257).contains("is empty"));
    assert!(told(&word(7, 4), 50257).contains("version 7 behind the number 20240520"));
    assert!(told(&[0; 64], 100_000).contains("data.vocab_size = 100000 needs more"));
    assert!(told(&val, 50257).contains("gave 0 training and "));
    let left: Vec<_> = fs::read_dir(dir.path().join("cache")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_damaged_index_is_told_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let name = "pile_text_document";
    fs::copy(fixture("megatron").join(format!("{name}.bin")), dir.path().join("a.bin")).unwrap();
    let index = fs::read(fixture("megatron").join(format!("{name}.idx"))).unwrap();
    let told = |content: &[u8]| {
        fs::write(dir.path().join("a.idx"), content).unwrap();
        let e = prepare(&settings(dir.path().join("a.bin"), dir.path()), |_| {}).err().unwrap();
        assert!(e.is_request() && e.to_string().contains("a.idx"), "{e}");
        e.to_string()
    };
    assert!(told(&index[..index.len() - 1]).contains("60 sequences and is cut off"));
    assert!(told(&index[..20]).contains("is no Megatron index"));
    assert!(told(b"TNTIDX\0\0 and so on").contains("old layout"));
    let byte = |at: usize, b: u8| [&index[..at], &[b], &index[at + 1..]].concat();
    assert!(told(&byte(17, 6)).contains("numbers of type 6"));
    assert!(told(&byte(9, 2)).contains("is of version 2"));
    // a size, a pointer, a document
    assert!(told(&byte(37, 1)).contains("sequence 0 ends behind the 582 bytes"));
    assert!(told(&byte(37, 255)).contains("sequence 0 has -"));
    assert!(told(&byte(34 + 4 * 60 + 7, 1)).contains("sequence 0 ends behind"));
    assert!(told(&byte(34 + 12 * 60 + 1, 1)).contains("document 0 begins at sequence 256 of 60"));
    // every byte that is changed: an error, or tokens of the file
    let mut refused = 0;
    for at in (0..index.len()).step_by(5) {
        fs::write(dir.path().join("a.idx"), byte(at, index[at] ^ 0x55)).unwrap();
        match prepare(&settings(dir.path().join("a.bin"), dir.path()), |_| {}) {
            Ok(p) => assert!(tokens(&p.train).iter().all(|&id| id < 50257)),
            Err(e) => {
                assert!(e.is_request(), "{e}");
                refused += 1;
            }
        }
    }
    assert!(refused > index.len() / 10, "{refused} of {}", index.len() / 5);
}

#[test]
fn an_index_of_other_places_or_of_another_type_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let sequences: [&[u32]; 4] = [&[1, 2, 3], &[], &[4, 5], &[6, 7, 8, 9, 10, 11, 12, 13]];
    let bin: Vec<u8> = sequences.concat().iter().flat_map(|id| (*id as u16).to_le_bytes()).collect();
    let path = dir.path().join("a.bin");
    let write = |code: u8, places: [i64; 4], documents: &[i64], bin: &[u8]| {
        let mut index = [&b"MMIDIDX\0\0"[..], &1u64.to_le_bytes(), &[code], &4u64.to_le_bytes()].concat();
        index.extend((documents.len() as u64).to_le_bytes());
        index.extend(sequences.iter().flat_map(|s| (s.len() as i32).to_le_bytes()));
        index.extend(places.iter().chain(documents).flat_map(|x| x.to_le_bytes()));
        fs::write(dir.path().join("a.idx"), index).unwrap();
        fs::write(&path, bin).unwrap();
        prepare(&settings(path.clone(), dir.path()), |_| {}).map(|p| {
            let starts = |shards: &[std::sync::Arc<crate::Shard>]| {
                shards.iter().map(|s| s.document_starts().len()).sum::<usize>()
            };
            (both(&p), starts(&p.train) + starts(&p.validation), p.report.documents)
        })
    };
    let places = [0, 6, 6, 10];
    // the document of an empty sequence begins with the next one
    let (ids, starts, documents) = write(8, places, &[0, 1, 3, 4], &bin).unwrap();
    // and the last one is cut, so that its end validates
    assert_eq!(([ids.0, ids.1].concat(), starts, documents), (sequences.concat(), 4, 3));
    let told = |code, places, documents: &[i64], bin: &[u8]| {
        let e = write(code, places, documents, bin).err().unwrap();
        assert!(e.is_request() && e.to_string().contains("a.idx"), "{e}");
        e.to_string()
    };
    let wide: Vec<u8> = sequences.concat().iter().flat_map(|id| id.to_le_bytes()).collect();
    let other = told(8, [0, 12, 12, 20], &[0, 4], &wide);
    assert!(other.contains("sequence 1 begins at byte 12, expected 6"), "{other}");
    assert!(told(1, places, &[0, 4], &bin).contains("sequence 1 begins at byte 6, expected 3"));
    assert!(told(8, [0, 0, 0, 0], &[0, 4], &bin).contains("sequence 1 begins at byte 0, expected 6"));
    assert!(told(8, places, &[0, 4], &[&bin[..], b"more"].concat()).contains("end at byte 26 of the 30"));
    assert!(told(8, places, &[1, 4], &bin).contains("no document begins at the first sequence"));
    assert!(told(8, places, &[0, 3, 2], &bin).contains("document 2 begins at sequence 2, the one before at 3"));
    let index = dir.path().join("a.idx");
    let e = prepare(&settings(index, dir.path()), |_| {}).err().unwrap().to_string();
    assert!(e.contains("is a Megatron index and holds no ids; name the .bin file"), "{e}");
}

#[test]
fn a_file_without_a_header_that_is_no_ids_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    let wide: Vec<u8> = (0..200u32).flat_map(|i| (i * 7 % 50000).to_le_bytes()).collect();
    let text = "The river runs, and the bridge stands.\n".repeat(9);
    for (content, what) in [
        (wide, "its ids have 32 bits or more; write them again as uint16"),
        (text.into_bytes(), "holds text and no token ids; set data.source = \"text\""),
        (b"GGUF\x03\0\0\0".to_vec(), "is a model (GGUF)"),
        ([&10u64.to_le_bytes()[..], b"{\"a\":{}}  "].concat(), "is a safetensors file"),
        (b"%PDF-1.7 and so on".to_vec(), "is PDF, no file of token ids"),
    ] {
        fs::write(&path, content).unwrap();
        let e = prepare(&settings(path.clone(), dir.path()), |_| {}).err().unwrap();
        assert!(e.is_request() && e.to_string().contains(what), "{e}");
    }
    // as a fifth id, what stands behind the length in a safetensors file
    let ids: Vec<u16> = (0..200).map(|i| if i == 4 { u16::from_le_bytes(*b"{\"") } else { i + 1 }).collect();
    fs::write(&path, ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    let (train, validation) = both(&prepare(&settings(path, dir.path()), |_| {}).unwrap());
    assert_eq!([train, validation].concat(), ids.iter().map(|&id| u32::from(id)).collect::<Vec<_>>());
}
