//! The same weights with another kind of attention.

use dash_model::{Attention, kinds};

use crate::config::{Config, nearest};
use crate::failure::{Failure, Result};

/// What `--as` asks for.
pub struct Other<'a> {
    /// Kind.
    pub kind: &'a str,
    /// Attended chunks; none: as many as hold the tokens that the model attends.
    pub top: Option<usize>,
    /// Tokens of a chunk; none: the model's.
    pub chunk_size: Option<usize>,
}

/// The kind, with the sizes of the model's own attention and, where it chooses a number of chunks, that number.
///
/// # Errors
/// When the sequences are too short for what is asked.
pub fn other_attention(config: &Config, asked: &Other, attended: f64) -> Result<Attention> {
    let kind = asked.kind;
    let own = &config.model.attention;
    let Some(other) = Attention::preset(kind) else {
        let meant = nearest(kind, kinds().into_iter()).map_or(String::new(), |m| format!("; did you mean {m}?"));
        return Err(Failure::request(format!("--as: {kind:?} is none of {}{meant}", kinds().join(", "))));
    };
    let t = config.data.seq_len;
    let size = asked.chunk_size.or(own.chunk_size()).or(other.chunk_size()).unwrap_or(1);
    if size == 0 {
        return Err(Failure::request("--chunk-size: is 0; a chunk has at least one token"));
    }
    let chunks = t.div_ceil(size);
    let nearest = (1..=chunks).find(|&n| Attention::listed_at(size, n, t) >= attended).unwrap_or(chunks);
    let top = asked.top.unwrap_or(nearest);
    if other.chunk_size().is_some() && chunks < 2 {
        let what = format!("--chunk-size: {size} leaves nothing to route in sequences of {t}; give one below {t}");
        return Err(Failure::request(what));
    }
    if other.top().is_some() && !(1..=chunks).contains(&top) {
        return Err(Failure::request(format!("--top: {top} is not between 1 and the {chunks} chunks of a sequence")));
    }
    let other = Attention::converted(kind, &config.model, size, top);
    other.map_err(|e| Failure::request(format!("--as {kind}: {e}")))
}
