//! What a caller can get wrong: a configuration, or weights that do not belong to it.

/// A configuration that no model can be built from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{key}: {what}")]
pub struct ConfigError {
    /// The key at fault, in full, as a configuration file has it: `model.attention.top`.
    pub key: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl ConfigError {
    /// A refusal of `key`.
    pub fn new(key: impl Into<String>, what: impl Into<String>) -> Self {
        ConfigError { key: key.into(), what: what.into() }
    }
}

/// A parameter that the configuration asks for and the weights do not have in that shape.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("parameter {name} {what}")]
pub struct ParamError {
    /// Hugging Face name.
    pub name: String,
    /// What is wrong with it.
    pub what: String,
}
