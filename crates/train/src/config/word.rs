//! Choices by their names.

use serde::Serialize;

/// How a configuration writes a choice: `phone-book`.
pub fn word(choice: &impl Serialize) -> String {
    serde_json::json!(choice).as_str().unwrap_or_default().to_string()
}
