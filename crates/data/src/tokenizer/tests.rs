//! Our own tokenizer, and the kinds that people bring.

use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::*;
use crate::intake::pieces;

fn learn(texts: &[&str], vocab_size: usize) -> Result<Tokenizer> {
    Tokenizer::learn(texts.iter().copied(), vocab_size, Treatment::default())
}

fn sample() -> Vec<String> {
    (0..300).map(|i| format!("fn number_{i}() -> u32 {{ {i} }} // näh, the {i}th of them\n")).collect()
}

fn load(json: &Value, treatment: Treatment) -> Result<Tokenizer> {
    Tokenizer::parse(&json.to_string(), Path::new("given.json"), treatment)
}

fn given(json: &Value) -> Tokenizer {
    load(json, Treatment::default()).unwrap()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": !special, "special": special})
}

/// A tokenizer file around a model.
fn file(model: Value, added_tokens: Vec<Value>) -> Value {
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model})
}

/// Byte-level BPE without merges, ids in the order of the letters.
fn bytes_only(end: u32) -> Value {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let mut vocab: serde_json::Map<String, Value> =
        letters.iter().enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    vocab.insert(END_OF_TEXT.into(), json!(end));
    let mut t = file(
        json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}),
        vec![added(end, END_OF_TEXT, true)],
    );
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    t["pre_tokenizer"] = level.clone();
    t["decoder"] = level;
    t
}

/// As SentencePiece exports it: a mark for a blank, one before every text, `<s>` before it, bytes for what is missing.
fn sentence_piece(kind: &str, fallback: bool) -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    if fallback {
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    }
    tokens.extend("\u{2581}abcdefghijklmnopqrstuvwxyz".chars().map(String::from));
    tokens.extend(["\u{2581}t", "he", "\u{2581}the"].map(String::from));
    let model = if kind == "Unigram" {
        let scored: Vec<Value> = tokens.iter().enumerate().map(|(i, t)| json!([t, -(i as f64)])).collect();
        json!({"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": fallback})
    } else {
        let vocab: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
        let merges = [["\u{2581}", "t"], ["h", "e"], ["\u{2581}t", "he"]];
        json!({"type": "BPE", "dropout": null, "unk_token": if fallback { json!("<unk>") } else { json!(null) },
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": fallback,
            "vocab": vocab, "merges": merges})
    };
    let mut t = file(model, vec![added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)]);
    t["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    t["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    t["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    t
}

fn word_piece() -> Value {
    let words = ["[UNK]", "[CLS]", "[SEP]", "the", "river", "##s", "r", "##i", ".", ","];
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(i, t)| (t.to_string(), json!(i))).collect();
    let model = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab});
    let mut t = file(model, vec![added(0, "[UNK]", true), added(1, "[CLS]", true), added(2, "[SEP]", true)]);
    t["pre_tokenizer"] = json!({"type": "BertPreTokenizer"});
    t["post_processor"] = json!({"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]});
    t["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": false});
    t
}

fn word_level(unk: bool) -> Value {
    let mut vocab = json!({"[SEP]": 0, "the": 1, "river": 2});
    if unk {
        vocab["[UNK]"] = json!(3);
    }
    let mut t = file(json!({"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}), vec![added(0, "[SEP]", true)]);
    t["pre_tokenizer"] = json!({"type": "Whitespace"});
    t
}

#[test]
fn learning_is_deterministic_and_encoding_loses_nothing() {
    let text = sample();
    let texts: Vec<&str> = text.iter().map(String::as_str).collect();
    let a = learn(&texts, 400).unwrap();
    assert_eq!(a.json(), learn(&texts, 400).unwrap().json());
    assert_eq!((a.vocab_size(), a.tokens(), a.notes().len(), a.bos().len()), (400, 400, 0, 0));
    for t in ["", "fn x() {}", "tabs\tand\r\n and ünïcode 漢字 🦀", texts[7]] {
        let ids = a.encode(t).unwrap();
        assert_eq!(a.decode(&ids).unwrap(), t);
        let e = a.encode_accounted(t, true).unwrap();
        assert_eq!((e.ids, e.text_bytes.iter().sum::<u32>() as usize), (ids, t.len()));
    }
    assert!(a.encode(texts[7]).unwrap().len() * 2 < texts[7].len());
}

#[test]
fn a_decoder_that_strips_the_ends_of_tokens_is_refused() {
    let mut t = word_level(true);
    let strip = |stop: u64| json!({"type": "Strip", "content": " ", "start": 1, "stop": stop});
    for stop in [1, u64::MAX] {
        for decoder in [strip(stop), json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, strip(stop)]})] {
            t["decoder"] = decoder;
            let told =
                Tokenizer::parse(&t.to_string(), Path::new("t.json"), Treatment::default()).err().unwrap().to_string();
            assert!(told.contains(&format!("strips up to {stop} characters")), "{told}");
        }
    }
    t["decoder"] = strip(0);
    assert!(Tokenizer::parse(&t.to_string(), Path::new("t.json"), Treatment::default()).is_ok());
}

#[test]
fn too_little_text_and_too_small_a_vocabulary_are_told() {
    assert!(learn(&["ab"], 300).err().unwrap().to_string().contains("gives only"));
    assert!(learn(&["ab"], 100).err().unwrap().to_string().contains("below 257"));
}

#[test]
fn pieces_of_a_text_have_the_tokens_of_the_whole() {
    let text = sample().concat() + "and\n\n\n  a longer paragraph, with signs...\n\nand blanks    in it. 1234 5678\n";
    let learned = learn(&[&text], 400).unwrap();
    for tokenizer in [learned, given(&bytes_only(256))] {
        let whole = tokenizer.encode(&text).unwrap();
        for size in [17, 40, 129, 1000] {
            let parts: Vec<u32> = pieces::cut_to(&text, size).flat_map(|(_, p)| tokenizer.encode(p).unwrap()).collect();
            assert_eq!(parts, whole, "{size}");
        }
    }
}

#[test]
fn a_word_of_any_length_is_learned_from_and_encoded() {
    // 300 KB without a blank, and as many blanks: the square of that would take minutes
    let letters: String =
        (0..300_000u32).map(|i| char::from(b"acgt"[(i.wrapping_mul(2_654_435_761) >> 30) as usize])).collect();
    let text = sample().concat() + &letters + &" ".repeat(300_000) + "end";
    let tokenizer = learn(&[&text], 400).unwrap();
    let tokens: usize = pieces::cut(&text).map(|(_, p)| tokenizer.encode(p).unwrap().len()).sum();
    assert!(tokens < 200_000, "{tokens}");
}

#[test]
fn truncation_padding_and_dropout_are_switched_off_and_told() {
    let text = "the river ".repeat(50);
    let plain = given(&bytes_only(256)).encode(&text).unwrap();
    let mut t = bytes_only(256);
    t["truncation"] = json!({"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0});
    t["padding"] = json!({"strategy": {"Fixed": 1024}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    t["model"]["dropout"] = json!(0.5);
    let tokenizer = given(&t);
    assert_eq!(tokenizer.encode(&text).unwrap(), plain);
    assert_eq!(tokenizer.encode_accounted(&text, true).unwrap().ids, plain);
    let notes = tokenizer.notes().join("\n");
    assert!(["truncation to 64", "padding", "dropout of 0.5"].iter().all(|n| notes.contains(n)), "{notes}");
    // what is written is what was used
    let again = Tokenizer::parse(tokenizer.json(), Path::new("again"), Treatment::default()).unwrap();
    assert!(again.notes().is_empty() && again.hash() == tokenizer.hash());
    let written: Value = serde_json::from_str(tokenizer.json()).unwrap();
    assert!(written["truncation"].is_null() && written["padding"].is_null() && written["model"]["dropout"].is_null());
}

#[test]
fn ids_with_holes_need_rows_up_to_the_largest() {
    let hole = given(&bytes_only(300));
    assert_eq!((hole.vocab_size(), hole.tokens(), hole.end_of_text()), (301, 257, 300));
    assert!(hole.notes()[0].contains("44 of its 301 ids have no token"));
    let wide = given(&bytes_only(65_536 + 65));
    assert_eq!(wide.vocab_size(), 65_602);
    let mut t = bytes_only(256);
    t["added_tokens"] = json!([added(256, END_OF_TEXT, true), added(400, "<pad>", true)]);
    assert!(
        load(&t, Treatment::default()).err().unwrap().to_string().contains("\"<pad>\" the id 400, but it gets 257")
    );
}

#[test]
fn every_byte_of_the_text_has_one_token_whatever_the_kind() {
    let text = "the näh 漢字  the\nriver, the rivers.  ";
    for (name, t) in [
        ("bytes", bytes_only(256)),
        ("sentencepiece", sentence_piece("BPE", true)),
        ("drops unknown", sentence_piece("BPE", false)),
        ("unigram", sentence_piece("Unigram", true)),
        ("unigram with unk", sentence_piece("Unigram", false)),
        ("wordpiece", word_piece()),
        ("wordlevel", word_level(true)),
    ] {
        let e = given(&t).encode_accounted(text, true).unwrap();
        assert_eq!(e.ids.len(), e.text_bytes.len(), "{name}");
        assert_eq!(e.text_bytes.iter().sum::<u32>() as usize, text.len(), "{name}");
    }
    // one window of it: the bytes of its characters, not the letters that a vocabulary writes them with
    let e = given(&sentence_piece("BPE", true)).encode_accounted("the\u{e4}", true).unwrap();
    assert_eq!((e.ids.len(), e.text_bytes), (3, vec![3, 2, 0]));
}

#[test]
fn what_a_vocabulary_cannot_express_is_counted() {
    let text = "the \u{e4} \u{e4} \u{6f22} the";
    let unknown = |t: &Value| given(t).encode_accounted(text, false).unwrap().unknown;
    for (name, t) in [
        ("dropped", sentence_piece("BPE", false)),
        ("unk", sentence_piece("Unigram", false)),
        ("words", word_level(true)),
    ] {
        let u = unknown(&t);
        assert_eq!((u.characters, u.of), (3, 13), "{name}");
        assert_eq!(u.examples.iter().collect::<String>(), "\u{e4}\u{6f22}", "{name}");
    }
    for t in [bytes_only(256), sentence_piece("BPE", true), sentence_piece("Unigram", true)] {
        assert_eq!(unknown(&t).characters, 0);
    }
    let refused = given(&word_level(false)).encode(text).err().unwrap().to_string();
    assert!(refused.starts_with("given.json: cannot encode the text"), "{refused}");
}

#[test]
fn a_blank_counts_where_the_vocabulary_lacks_it_and_not_where_words_leave_it_out() {
    let unknown = |t: &Value, text| given(t).encode_accounted(text, false).unwrap().unknown;
    // byte-level letters without what writes bytes as letters: blanks and line breaks are dropped without a trace
    let mut t = bytes_only(256);
    t["pre_tokenizer"] = Value::Null;
    let u = unknown(&t, "a b\nc  d");
    assert_eq!((u.characters, u.of, u.examples.iter().collect::<String>()), (4, 8, "\n ".into()));
    // a vocabulary with a mark for blanks has none for line breaks
    assert_eq!(unknown(&sentence_piece("Unigram", false), "the\nthe the").characters, 1);
    assert_eq!(unknown(&word_level(true), "the river\n\nthe").characters, 0);
}

#[test]
fn what_the_tokenizers_crate_panics_at_is_an_error() {
    let mut t = bytes_only(256);
    t["normalizer"] = json!({"type": "Prepend", "prepend": ""});
    let told = load(&t, Treatment::default()).err().unwrap().to_string();
    assert!(
        told.starts_with("given.json: cannot encode a text: the library that reads it fails there: index"),
        "{told}"
    );
    // one that fails at some texts only: at all with more than a letter
    let one = json!({"type": "Replace", "pattern": {"String": "the"}, "content": "x"});
    t["normalizer"] = json!({"type": "Sequence", "normalizers": [one, t["normalizer"]]});
    let t = given(&t);
    assert_eq!(t.encode("the").unwrap(), t.encode("x").unwrap());
    for told in [t.encode("ab").err(), t.encode_accounted("ab", true).err()] {
        let told = told.unwrap().to_string();
        assert!(
            told.starts_with("given.json: cannot encode the text: the library that reads it fails there: index"),
            "{told}"
        );
    }
}

#[test]
fn a_document_begins_and_ends_as_the_post_processor_has_it() {
    let t = given(&sentence_piece("BPE", true));
    assert_eq!((t.bos(), t.end_of_text()), (&[1][..], 2));
    assert_eq!(t.encode_prompt("the").unwrap(), [1, t.encode("the").unwrap()[0]]);
    let none = Treatment { bos: Bos::None, ..Treatment::default() };
    let without = load(&sentence_piece("BPE", true), none).unwrap();
    assert!(without.bos().is_empty() && without.notes()[0].contains("data.bos"));
    let written: Value = serde_json::from_str(without.json()).unwrap();
    assert!(written["post_processor"].is_null(), "what is exported begins a text as training did");
    let bert = given(&word_piece());
    assert_eq!((bert.bos(), bert.end_of_text(), bert.unknown()), (&[1][..], 2, Some(0)));
    assert_eq!(given(&bytes_only(256)).bos(), [0u32; 0]);
}

#[test]
fn special_tokens_have_the_names_that_trained() {
    let t = given(&sentence_piece("BPE", true));
    assert_eq!(t.special(t.end_of_text()), SpecialToken { id: 2, text: "</s>".into() });
    assert_eq!((t.special(t.bos()[0]).text, t.padding()), ("<s>".into(), 2));
}

#[test]
fn the_name_of_a_special_token_is_text_unless_it_is_to_be_parsed() {
    let text = "one <|endoftext|> two <|endoftext|>";
    let t = given(&bytes_only(256));
    let ids = t.encode(text).unwrap();
    assert_eq!((ids.len(), ids.contains(&256)), (text.len(), false));
    assert_eq!(t.special_names(text), 2);
    let parse = Treatment { special_tokens: SpecialTokens::Parse, ..Treatment::default() };
    let e = load(&bytes_only(256), parse).unwrap().encode_accounted(text, true).unwrap();
    assert_eq!(e.ids.iter().filter(|&&id| id == 256).count(), 2);
    assert_eq!(e.text_bytes.iter().sum::<u32>() as usize, text.len());
}

#[test]
fn a_continuation_keeps_its_first_blank() {
    let t = given(&sentence_piece("BPE", true));
    let (prompt, next) = (t.encode_prompt("the").unwrap(), t.encode("the").unwrap());
    assert_eq!(t.decode(&next).unwrap(), "the");
    assert_eq!(t.decode_after(&prompt, &next).unwrap(), " the");
}

#[test]
fn text_comes_in_whole_characters_and_adds_up() {
    let all = sample();
    let texts: Vec<&str> = all.iter().map(String::as_str).collect();
    let kinds = [learn(&texts, 300).unwrap(), given(&sentence_piece("BPE", true)), given(&word_piece())];
    let mut parts = 0;
    for t in &kinds {
        for text in ["fn x() {}", "the end of a river", "ünïcode 漢字 🦀🦀 done", "🦀"] {
            let ids = t.encode(text).unwrap();
            for cut in 0..=ids.len() {
                let (context, new) = ids.split_at(cut);
                let mut stream = TextStream::after(t, context);
                let mut pieces: Vec<String> = new.iter().map(|&id| stream.push(id).unwrap()).collect();
                assert!(pieces.iter().all(|p| !p.contains('\u{fffd}') || cut > 0), "{pieces:?}");
                pieces.push(stream.finish().unwrap());
                assert_eq!(pieces.concat(), t.decode_after(context, new).unwrap(), "{text:?} after {cut}");
                parts += pieces.iter().filter(|p| !p.is_empty()).count();
            }
        }
    }
    assert!(parts > 100, "{parts}");
    // a character that never comes to its end
    let crab = kinds[0].encode("🦀").unwrap();
    assert!(crab.len() > 1, "a vocabulary this small has no crab");
    let mut stream = TextStream::after(&kinds[0], &[]);
    assert_eq!(stream.push(crab[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

#[test]
fn a_post_processor_that_asks_for_what_is_not_there_is_told() {
    let with = |single: Value, special: Value| {
        let mut json = bytes_only(256);
        json["post_processor"] = json!({"type": "Sequence", "processors": [
            {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}]});
        load(&json, Treatment::default()).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let token = |id: u32| json!({"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let named = json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, text]);
    assert_eq!(with(named.clone(), token(256)), "");
    assert!(with(named.clone(), json!({})).contains("names \"<s>\", which is not among its special_tokens"));
    assert!(with(named, token(9999)).contains("puts the id 9999 to a text, which no token has"));
    assert!(with(json!([{"Sequence": {"id": "B", "type_id": 0}}]), json!({})).contains("asks for a second text"));
    // the crate knows a template without its type, and carries out no template behind another
    let mut json = bytes_only(256);
    json["post_processor"] = json!({"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {}});
    let told = load(&json, Treatment::default()).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(told.contains("names \"<s>\", which is not among its special_tokens"), "{told}");
    let special = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let one = json!({"type": "TemplateProcessing", "single": [special, {"Sequence": {"id": "A", "type_id": 0}}, special],
        "pair": [], "special_tokens": token(256)});
    json["post_processor"] = json!({"type": "Sequence", "processors": [one, one]});
    let told = load(&json, Treatment::default()).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(told.contains("its post-processor fails at a text"), "{told}");
}

#[test]
fn a_byte_order_mark_is_skipped_and_a_shared_id_is_told() {
    let json = bytes_only(256);
    let plain = given(&json);
    let marked = Tokenizer::parse(&format!("\u{feff}{json}"), Path::new("given.json"), Treatment::default()).unwrap();
    assert_eq!(marked.hash(), plain.hash());
    let mut json = json;
    json["model"]["vocab"]["zz"] = json!(5);
    assert!(given(&json).notes().iter().any(|n| n.contains("1 of its 258 tokens have an id that another token has")));
}

#[test]
fn a_vocabulary_without_an_end_is_told() {
    let mut t = word_level(true);
    t["added_tokens"] = json!([]);
    t["model"]["vocab"] = json!({"[UNK]": 0, "the": 1});
    assert!(load(&t, Treatment::default()).err().unwrap().to_string().contains("no end-of-text token"));
}
