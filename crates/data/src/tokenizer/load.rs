//! Reading a `tokenizer.json` of anybody, with a look at everything in it that would change the training text.

use std::collections::HashSet;
use std::path::Path;

use aho_corasick::AhoCorasick;
use serde::Deserialize;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{ModelWrapper, Tokenizer as Inner};

use super::{Bos, END_OF_TEXT, SpecialTokens, Tokenizer, Treatment};
use crate::error::{DataError, Result};
use crate::guard::guarded;

/// Names of tokens that end a text, the most telling first.
const ENDS: [&str; 8] = [
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "[SEP]",
    "<eos>",
    "<EOS>",
    "[EOS]",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// What the `tokenizers` crate keeps to itself.
#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    added_tokens: Vec<RawToken>,
    model: RawModel,
    #[serde(default)]
    normalizer: serde_json::Value,
    #[serde(default)]
    pre_tokenizer: serde_json::Value,
    #[serde(default)]
    post_processor: serde_json::Value,
    #[serde(default)]
    decoder: serde_json::Value,
}

#[derive(Deserialize)]
struct RawToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct RawModel {
    unk_id: Option<u32>,
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
}

pub(super) fn parse(json: String, origin: &Path, treatment: Treatment) -> Result<Tokenizer> {
    let no = |what: String| DataError::content(origin, what);
    let json = json.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(json);
    // first, because the crate panics where the text is no JSON
    let raw: Raw = serde_json::from_str(&json).map_err(|e| no(format!("is no tokenizer.json: {e}")))?;
    let mut inner = parse_inner(&json).map_err(|e| no(format!("is no tokenizer.json: {e}")))?;
    check_ids(&inner, &raw).map_err(no)?;
    check_template(&raw.post_processor).and_then(|()| check_decoder(&raw.decoder)).map_err(no)?;
    let mut notes = switch_off(&mut inner);
    let mut changed = !notes.is_empty();
    let vocab = inner.get_vocab(true);
    let names = vocab.len();
    let ids: HashSet<u32> = vocab.into_values().collect();
    if names > ids.len() {
        notes.push(format!("{} of its {names} tokens have an id that another token has, too", names - ids.len()));
    }
    let rows = ids.iter().max().map_or(0, |&id| id as usize + 1);
    if rows > ids.len() {
        notes.push(format!(
            "{} of its {rows} ids have no token; the model has rows for them all the same",
            rows - ids.len()
        ));
    }
    let (before, behind) = frame(&inner).map_err(no)?;
    if let Some(id) = before.iter().chain(&behind).find(|id| !ids.contains(id)) {
        return Err(no(format!("its post-processor puts the id {id} to a text, which no token has")));
    }
    let end = behind.last().copied().or_else(|| ENDS.iter().find_map(|t| inner.token_to_id(t)));
    let end = end.ok_or_else(|| no(format!("has no end-of-text token such as {END_OF_TEXT}")))?;
    let bos = if treatment.bos == Bos::None { Vec::new() } else { before.clone() };
    if bos != before {
        // what is exported must begin a text as training did
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        notes.push("its post-processor, which begins a text with a token, is left out: data.bos is \"none\"".into());
        changed = true;
    }
    let json = if changed { inner.to_string(true).map_err(|e| no(e.to_string()))? } else { json };
    inner.set_encode_special_tokens(treatment.special_tokens == SpecialTokens::Text);
    let names: Vec<&str> = raw.added_tokens.iter().filter(|t| t.special).map(|t| t.content.as_str()).collect();
    let names = names.into_iter().filter(|n| !n.is_empty()).collect::<Vec<_>>();
    let names = if names.is_empty() { None } else { AhoCorasick::new(names).ok() };
    let unknown = raw.model.unk_token.as_deref().and_then(|t| inner.token_to_id(t)).or(raw.model.unk_id);
    let closed = is_closed(&inner, &raw);
    let silent = !closed && unknown.is_none() && matches!(inner.get_model(), ModelWrapper::BPE(_));
    let witness = if silent { witness(&json, rows, treatment) } else { None };
    Ok(Tokenizer {
        closed,
        witness,
        tokens: ids.len(),
        origin: origin.display().to_string(),
        end_of_text: end,
        inner,
        json,
        rows,
        bos,
        unknown,
        names,
        notes,
    })
}

/// The crate's own reader, which panics on some files that are JSON and no tokenizer (a decoder that is a number).
fn parse_inner(json: &str) -> std::result::Result<Inner, String> {
    // `from_str` is compiled in tokenizers already; the generic `from_bytes` would bring its deserialisers here once more
    let parse = || json.parse::<Inner>().map_err(|e| e.to_string());
    guarded(parse).unwrap_or_else(|e| Err(format!("its parts are not what they should be; {e}")))
}

/// The ids that the file gives to added tokens have to be those that they get.
fn check_ids(inner: &Inner, raw: &Raw) -> std::result::Result<(), String> {
    let wrong = raw.added_tokens.iter().find(|t| !t.content.is_empty() && inner.token_to_id(&t.content) != Some(t.id));
    match wrong {
        Some(t) => Err(format!(
            "gives the added token {:?} the id {}, but it gets {}: the ids of added tokens have to follow the vocabulary without a hole",
            t.content,
            t.id,
            inner.token_to_id(&t.content).map_or("none".into(), |id| id.to_string())
        )),
        None => Ok(()),
    }
}

/// A template asks for tokens that it has and for one text: the crate panics at the first text otherwise, which [`frame`] finds, but not
/// what is wrong.
fn check_template(processor: &serde_json::Value) -> std::result::Result<(), String> {
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    list(&processor["processors"]).iter().try_for_each(check_template)?;
    for piece in list(&processor["single"]).iter().chain(&list(&processor["pair"])) {
        if let Some(name) = piece["SpecialToken"]["id"].as_str()
            && processor["special_tokens"].get(name).is_none()
        {
            return Err(format!("its post-processor names {name:?}, which is not among its special_tokens"));
        }
    }
    match list(&processor["single"]).iter().any(|piece| piece["Sequence"]["id"] == "B") {
        true => Err("its post-processor asks for a second text where there is one".into()),
        false => Ok(()),
    }
}

/// A decoder that strips the end of tokens panics in the crate at the first token that is shorter than what it strips.
fn check_decoder(decoder: &serde_json::Value) -> std::result::Result<(), String> {
    decoder["decoders"].as_array().into_iter().flatten().try_for_each(check_decoder)?;
    match decoder.get("stop") {
        Some(stop) if stop != 0 => Err(format!(
            "its decoder strips up to {stop} characters off the end of each token (\"stop\"), which is not supported; set that to 0"
        )),
        _ => Ok(()),
    }
}

/// Switches off what varies, cuts or fills a text, and says so.
fn switch_off(inner: &mut Inner) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(t) = inner.get_truncation() {
        notes.push(format!("its truncation to {} tokens is switched off", t.max_length));
        // `None` has no stride that could be wrong
        let _ = inner.with_truncation(None);
    }
    if inner.get_padding().is_some() {
        notes.push("its padding is switched off".into());
        inner.with_padding(None);
    }
    if let ModelWrapper::BPE(bpe) = inner.get_model()
        && let Some(dropout) = bpe.dropout
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        inner.with_model(bpe);
        notes.push(format!("its dropout of {dropout} is switched off"));
    }
    notes
}

/// What the post-processor puts before and behind a text.
fn frame(inner: &Inner) -> std::result::Result<(Vec<u32>, Vec<u32>), String> {
    let plain = || PROBES.iter().filter(|text| inner.encode_fast(**text, false).is_ok()).count();
    guarded(plain).map_err(|e| format!("cannot encode a text: {e}"))?;
    guarded(|| probe(inner)).map_err(|e| format!("its post-processor fails at a text: {e}"))
}

/// Texts of which most vocabularies know one.
const PROBES: [&str; 3] = ["a", "the", "0"];

fn probe(inner: &Inner) -> (Vec<u32>, Vec<u32>) {
    let ids = |text: &str, all| inner.encode_fast(text, all).map(|e| e.get_ids().to_vec()).ok();
    for text in PROBES {
        let (Some(plain), Some(full)) = (ids(text, false), ids(text, true)) else { continue };
        if plain.is_empty() || full.len() < plain.len() {
            continue;
        }
        if let Some(at) = full.windows(plain.len()).position(|w| w == plain) {
            return (full[..at].to_vec(), full[at + plain.len()..].to_vec());
        }
    }
    // no probe has a token of its own: what frames the empty text, by name
    let mut before = ids("", true).unwrap_or_default();
    let ends = |id: &u32| inner.id_to_token(*id).is_some_and(|t| ENDS.contains(&t.as_str()));
    let behind = before.iter().position(ends).map_or(Vec::new(), |at| before.split_off(at));
    (before, behind)
}

/// A BPE without an unknown token drops what it does not know, and all offsets behind it are off. The same with a token for that knows
/// which characters they are.
fn witness(json: &str, rows: usize, treatment: Treatment) -> Option<(Inner, u32)> {
    let id = u32::try_from(rows).ok()?;
    let mut json: serde_json::Value = serde_json::from_str(json).ok()?;
    let model = json.get_mut("model")?;
    let name = "\u{0}unknown";
    model.get_mut("vocab")?.as_object_mut()?.insert(name.into(), id.into());
    model["unk_token"] = name.into();
    model["fuse_unk"] = false.into();
    let mut inner = parse_inner(&json.to_string()).ok()?;
    inner.set_encode_special_tokens(treatment.special_tokens == SpecialTokens::Text);
    Some((inner, id))
}

/// Whether the vocabulary expresses every text: it falls back to bytes or works on bytes, and has them all.
fn is_closed(inner: &Inner, raw: &Raw) -> bool {
    let has = |token: &str| inner.token_to_id(token).is_some();
    let bytes = || (0..=255u8).all(|b| has(&format!("<0x{b:02X}>")));
    let letters = || ByteLevel::alphabet().iter().all(|c| has(&c.to_string()));
    let byte_level =
        || [&raw.normalizer, &raw.pre_tokenizer].iter().any(|part| part.to_string().contains("\"ByteLevel\""));
    let (bpe, unigram) = match inner.get_model() {
        ModelWrapper::BPE(_) => (true, false),
        ModelWrapper::Unigram(_) => (false, true),
        _ => (false, false),
    };
    (bpe || unigram) && raw.model.byte_fallback && bytes() || bpe && byte_level() && letters()
}
