//! The table `[model.attention]` of a configuration, read and written by the keys that the variants declare.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::keys::{Given, Type, Value};
use super::{Attention, VARIANTS};
use crate::error::ConfigError;

impl Serialize for Attention {
    /// The table `[model.attention]`: the kind, then every key.
    ///
    /// # Errors
    /// For [`Attention::custom`]: no reader would know the kind, or know another variant by its name.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Attention::Custom(custom) = self {
            let kind = custom.spec().kind;
            return Err(serde::ser::Error::custom(format!(
                "{kind:?} is a variant of another crate, which no file can name"
            )));
        }
        let keys = self.keys();
        let mut map = serializer.serialize_map(Some(1 + keys.len()))?;
        map.serialize_entry("kind", self.kind())?;
        for key in keys {
            map.serialize_entry(key.name, &self.value(key.name))?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Attention {
    /// A kind or a preset, and the keys that override its defaults. Without a kind it is `dash`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Table)
    }
}

/// Reads the table.
struct Table;

impl<'de> Visitor<'de> for Table {
    type Value = Attention;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a table with the kind of the attention and its keys")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Attention, A::Error> {
        let (mut kind, mut given) = (None, Given::default());
        while let Some(KnownKey(name, takes)) = map.next_key()? {
            match takes {
                None => kind = Some(map.next_value::<String>()?),
                Some(takes) => given.set(name, map.next_value_seed(Typed(name, takes))?),
            }
        }
        Attention::from_keys(kind.as_deref().unwrap_or("dash"), given).map_err(A::Error::custom)
    }
}

/// A key that some variant has, with what it takes; `None` for `kind`.
struct KnownKey(&'static str, Option<Type>);

impl<'de> Deserialize<'de> for KnownKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let given = String::deserialize(deserializer)?;
        let all = || VARIANTS.iter().flat_map(|v| v.keys);
        if given == "kind" {
            return Ok(KnownKey("kind", None));
        }
        match all().find(|k| k.name == given) {
            Some(key) => Ok(KnownKey(key.name, Some(key.takes))),
            None => {
                let mut names = vec!["kind"];
                all().for_each(|k| {
                    if !names.contains(&k.name) {
                        names.push(k.name);
                    }
                });
                Err(D::Error::custom(format!("unknown field `{given}`, expected one of `{}`", names.join("`, `"))))
            }
        }
    }
}

/// Reads a value of a type.
struct Typed(&'static str, Type);

impl<'de> DeserializeSeed<'de> for Typed {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Ok(match self.1 {
            Type::Size => Value::Size(usize::deserialize(deserializer)?),
            Type::Number => Value::Number(f64::deserialize(deserializer)?),
            Type::Flag => Value::Flag(bool::deserialize(deserializer)?),
            Type::Choice(names) => {
                let given = String::deserialize(deserializer)?;
                let quoted = || names.iter().map(|n| format!("{n:?}")).collect::<Vec<_>>().join(", ");
                let wrong = || {
                    let key = format!("model.attention.{}", self.0);
                    D::Error::custom(ConfigError::new(key, format!("{given:?} is none of {}", quoted())))
                };
                Value::Name(names.iter().find(|n| **n == given).ok_or_else(wrong)?)
            }
        })
    }
}
