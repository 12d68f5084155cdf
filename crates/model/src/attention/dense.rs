//! Causal softmax attention over all earlier tokens.

use dash_core::{Result, Tape};

use super::keys::settings;
use super::{Attended, Export, Inputs, Loader, Spec, Variant};
use crate::config::ModelConfig;

settings! {
    /// Dense attention has no settings.
    pub struct Dense {}
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "dense",
    about: "Causal softmax over all earlier tokens.",
    presets: &[],
    keys: Dense::KEYS,
    build: |given| Dense::from_given(given).into(),
    small: &[],
    golden: &["q", "k", "v"],
};

impl Variant for Dense {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn export(&self, config: &ModelConfig, _positions: usize) -> Export {
        if config.qkv_bias {
            // transformers 5 gives every model of type "qwen2" the tokenizer of Qwen's own, whatever tokenizer.json says
            let note = "This is a dense Llama with biases of queries, keys and values. `modeling_dashlab.py` computes the logits in \
                `parity.safetensors`.";
            return Export { loader: Loader::Own, keys: Vec::new(), note: note.into() };
        }
        let family = if config.qk_norm { "Qwen3" } else { "Llama" };
        let note = format!(
            "This is a dense {family}: `transformers.{family}ForCausalLM.from_pretrained(folder)` computes the logits in \
             `parity.safetensors`."
        );
        Export { loader: Loader::Stock, keys: Vec::new(), note }
    }

    fn decodes_on_a_card(&self) -> bool {
        true
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        Ok((x.attend_all(tape)?, None))
    }
}
