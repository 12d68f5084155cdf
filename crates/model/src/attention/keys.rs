//! The keys of `[model.attention]`: every variant declares its own with `settings!`, and reading, writing, range checks,
//! messages and the reference of keys follow from that declaration.

use std::fmt;

use dash_core::ops::attention::{Center, RouterGradient};
use serde::Serialize;

use super::{GradientTo, Variant};
use crate::error::ConfigError;

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A count.
    Size(usize),
    /// A real number.
    Number(f64),
    /// A switch.
    Flag(bool),
    /// One of the names of [`Type::Choice`].
    Name(&'static str),
}

impl fmt::Display for Value {
    /// As TOML.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Value::Size(n) => write!(f, "{n}"),
            Value::Number(x) => write!(f, "{x:?}"),
            Value::Flag(on) => write!(f, "{on}"),
            Value::Name(name) => write!(f, "{name:?}"),
        }
    }
}

/// What a key takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A non-negative integer.
    Size,
    /// A real number.
    Number,
    /// `true` or `false`.
    Flag,
    /// One of these names.
    Choice(&'static [&'static str]),
}

impl Type {
    /// A size or a real number.
    pub fn is_number(&self) -> bool {
        matches!(self, Type::Size | Type::Number)
    }
}

/// Which values of its type a key takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    least: f64,
    /// `least` itself is outside
    open: bool,
    most: f64,
    /// why not less; may be empty
    why: &'static str,
}

/// Larger sizes than any sequence: 2^31 tokens. It keeps sums and products of sizes away from the edge of 64 bits.
const LARGEST_SIZE: f64 = (1u64 << 31) as f64;

impl Range {
    /// Every value of the type.
    pub const ANY: Range = Range { least: f64::NEG_INFINITY, open: false, most: f64::INFINITY, why: "" };

    /// Sizes from `least` on.
    pub const fn at_least(least: usize, why: &'static str) -> Self {
        Range { least: least as f64, open: false, most: LARGEST_SIZE, why }
    }

    /// Numbers above zero.
    pub const fn positive(why: &'static str) -> Self {
        Range { least: 0.0, open: true, most: f64::MAX, why }
    }

    /// Numbers from `least` to `most`.
    pub const fn within(least: f64, most: f64, why: &'static str) -> Self {
        Range { least, open: false, most, why }
    }

    /// Numbers above `least` and at most `most`.
    pub const fn above(least: f64, most: f64, why: &'static str) -> Self {
        Range { least, open: true, most, why }
    }

    /// Whether a number is inside.
    pub fn holds(&self, x: f64) -> bool {
        (if self.open { x > self.least } else { x >= self.least }) && x <= self.most
    }

    /// What is wrong with a value, if it is outside.
    fn complaint(&self, value: Value) -> Option<String> {
        let x = match value {
            Value::Size(n) => n as f64,
            Value::Number(x) => x,
            Value::Flag(_) | Value::Name(_) => return None,
        };
        if self.holds(x) {
            return None;
        }
        if x > self.most && self.most == LARGEST_SIZE {
            return Some(format!("{value} is above {LARGEST_SIZE}, the largest that is taken"));
        }
        let why = if x <= self.most && !self.why.is_empty() { format!("; {}", self.why) } else { String::new() };
        Some(format!("{value} is not {self}{why}"))
    }
}

impl fmt::Display for Range {
    /// `at least 1`, `above 1 and at most 2`; nothing for every value.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.least.is_finite() {
            write!(f, "{} {}", if self.open { "above" } else { "at least" }, self.least)?;
        }
        if self.most != LARGEST_SIZE && self.most < f64::MAX {
            // 1e38 in full has 39 digits
            let most = if self.most < 1e9 { format!("{}", self.most) } else { format!("{:e}", self.most) };
            write!(f, " and at most {most}")?;
        }
        Ok(())
    }
}

/// One key of a variant, for readers and for programs.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// As written in the configuration.
    pub name: &'static str,
    /// What it takes.
    pub takes: Type,
    /// Which of these.
    pub range: Range,
    /// The expression of the default, in terms of the variant's other keys where it follows from them.
    pub default: &'static str,
    /// One sentence.
    pub meaning: &'static str,
}

/// A type that a key can have.
pub trait Setting: Copy {
    /// What the key takes.
    const TYPE: Type;
    /// Back from [`Setting::value`]; `None` for a value of another type.
    fn of(value: Value) -> Option<Self>;
    /// As a value.
    fn value(self) -> Value;
}

macro_rules! plain_setting {
    ($type:ty, $variant:ident) => {
        impl Setting for $type {
            const TYPE: Type = Type::$variant;
            fn of(value: Value) -> Option<Self> {
                match value {
                    Value::$variant(x) => Some(x),
                    _ => None,
                }
            }
            fn value(self) -> Value {
                Value::$variant(self)
            }
        }
    };
}
plain_setting!(usize, Size);
plain_setting!(f64, Number);
plain_setting!(bool, Flag);

macro_rules! choice_setting {
    ($type:ty, $($name:literal = $variant:ident),+) => {
        impl Setting for $type {
            const TYPE: Type = Type::Choice(&[$($name),+]);
            fn of(value: Value) -> Option<Self> {
                match value {
                    $(Value::Name($name) => Some(<$type>::$variant),)+
                    _ => None,
                }
            }
            fn value(self) -> Value {
                match self {
                    $(<$type>::$variant => Value::Name($name),)+
                }
            }
        }
    };
}
choice_setting!(Center, "none" = None, "mean" = Mean, "mean-detached" = MeanDetached);
choice_setting!(
    RouterGradient,
    "full" = Full,
    "stopped" = Stopped,
    "straight-through" = StraightThrough,
    "flipped" = Flipped,
    "placebo" = Placebo
);
choice_setting!(
    GradientTo,
    "all" = All,
    "q" = Queries,
    "summaries" = Summaries,
    "indexer" = Indexer,
    "all-but-indexer" = AllButIndexer
);

/// Keys with their values.
#[derive(Debug, Clone, Default)]
pub struct Given(Vec<(&'static str, Value)>);

impl Given {
    /// These.
    pub fn of(keys: &[(&'static str, Value)]) -> Self {
        Given(keys.to_vec())
    }

    /// A later value of a key replaces an earlier one.
    pub fn set(&mut self, key: &'static str, value: Value) {
        self.0.retain(|(k, _)| *k != key);
        self.0.push((key, value));
    }

    /// The value of a key, where it is given.
    pub fn get<T: Setting>(&self, key: &str) -> Option<T> {
        self.0.iter().find(|(k, _)| *k == key).and_then(|(_, v)| T::of(*v))
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(k, _)| *k)
    }

    /// `self` with `over` on top.
    pub fn with(mut self, over: Given) -> Self {
        over.0.into_iter().for_each(|(k, v)| self.set(k, v));
        self
    }
}

/// What `settings!` makes of a declaration.
pub trait Settings: fmt::Debug {
    /// All keys, in the order of the declaration.
    fn keys(&self) -> &'static [Key];
    /// The value of a key; `None` for a key of another variant.
    fn value(&self, key: &str) -> Option<Value>;
}

/// Declares the keys of a variant: `/// meaning`, then `name: type = default, range;`. A default may use the keys above it.
/// The result is a struct with these fields, `Default`, [`Settings`], and `from_given`.
macro_rules! settings {
    ($(#[doc = $about:literal])* pub struct $name:ident {
        $($(#[doc = $meaning:literal])* $key:ident: $type:ty = $default:expr, $range:expr;)*
    }) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub struct $name { $($(#[doc = $meaning])* pub $key: $type,)* }

        impl $name {
            /// The keys of this variant.
            pub const KEYS: &'static [$crate::attention::keys::Key] = &[$($crate::attention::keys::Key {
                name: stringify!($key),
                takes: <$type as $crate::attention::keys::Setting>::TYPE,
                range: $range,
                default: stringify!($default),
                meaning: concat!($($meaning),*),
            }),*];

            /// Given values, and defaults for the others.
            pub fn from_given(given: &$crate::attention::keys::Given) -> Self {
                let _ = given;
                $(let $key: $type = given.get(stringify!($key)).unwrap_or_else(|| $default);)*
                $name { $($key),* }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::from_given(&Default::default())
            }
        }

        impl $crate::attention::keys::Settings for $name {
            fn keys(&self) -> &'static [$crate::attention::keys::Key] {
                Self::KEYS
            }
            fn value(&self, key: &str) -> Option<$crate::attention::keys::Value> {
                match key {
                    $(stringify!($key) => Some($crate::attention::keys::Setting::value(self.$key)),)*
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use settings;

/// Refuses the first value outside its range.
pub(super) fn check_ranges(settings: &dyn Variant) -> Result<(), ConfigError> {
    for key in settings.keys() {
        let what = settings.value(key.name).and_then(|value| key.range.complaint(value));
        if let Some(what) = what {
            return Err(ConfigError::new(format!("model.attention.{}", key.name), what));
        }
    }
    Ok(())
}
