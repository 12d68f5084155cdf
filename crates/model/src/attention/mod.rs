//! The attention variants: one file each, and one line each in the registry.

mod custom;
mod documents;
mod gradient_to;
mod inputs;
pub mod keys;
mod reference;
mod reroute;
mod table;
mod variant;
mod windows;

pub use custom::Custom;
pub use dash::{ROUTER_K, ROUTER_Q};
pub(crate) use documents::{Parted, attend_documents};
pub use gradient_to::GradientTo;
pub use inputs::{Inputs, Layer};
pub use reference::{KeyDoc, describe, reference};
pub use reroute::Reroute;
pub use variant::{Attended, Chunks, Cost, Export, Knob, Loader, Preset, Spec, Variant};

use dash_core::{Result, Tape};

use crate::config::ModelConfig;
use crate::error::ConfigError;
use keys::{Given, Setting, Value};

/// Makes the modules, the closed enum and the list of all variants from one line a variant.
macro_rules! registry {
    ($($file:ident: $name:ident,)*) => {
        $(pub mod $file;)*
        $(pub use $file::$name;)*

        /// The attention of every layer: one of the variants. What it can do is in [`Variant`], which it dereferences to.
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub enum Attention {
            $(#[doc = concat!("See [`", stringify!($file), "`].")] $name($name),)*
            /// One that is not in the registry; see [`Attention::custom`].
            Custom(Custom),
        }

        /// All variants, in the order of the reference.
        pub static VARIANTS: &[&Spec] = &[$(&$file::SPEC),*];

        impl std::ops::Deref for Attention {
            type Target = dyn Variant;
            fn deref(&self) -> &Self::Target {
                match self { $(Attention::$name(variant) => variant,)* Attention::Custom(variant) => &**variant }
            }
        }

        impl Attention {
            /// To change it; `None` where it is not of the registry.
            fn registered_mut(&mut self) -> Option<&mut dyn Variant> {
                match self { $(Attention::$name(variant) => Some(variant),)* Attention::Custom(_) => None }
            }
        }

        $(impl From<$name> for Attention {
            fn from(variant: $name) -> Self {
                Attention::$name(variant)
            }
        })*
    };
}

registry! {
    dense: Dense,
    topk: TopK,
    dash: Dash,
    token_entmax: TokenEntmax,
    infllmv2: InfLlmV2,
    nsa: Nsa,
    topk_bias: TopKBias,
    random: RandomChunks,
    mass: Mass,
    landmark: Landmark,
    kl_indexer: KlIndexer,
}

impl Default for Attention {
    fn default() -> Self {
        Dash::default().into()
    }
}

/// Kinds and presets that `model.attention.kind` and `--arms` take: each kind, followed by its presets.
pub fn kinds() -> Vec<&'static str> {
    VARIANTS.iter().flat_map(|v| std::iter::once(v.kind).chain(v.presets.iter().map(|p| p.name))).collect()
}

/// The variant of a kind or preset, and the values that the preset puts in the place of defaults.
pub fn find(kind: &str) -> Option<(&'static Spec, &'static [(&'static str, Value)])> {
    VARIANTS.iter().find_map(|&v| {
        let preset = v.presets.iter().find(|p| p.name == kind).map(|p| p.values);
        preset.or((v.kind == kind).then_some(&[])).map(|values| (v, values))
    })
}

impl Attention {
    /// A kind with its defaults, or a preset.
    pub fn preset(kind: &str) -> Option<Self> {
        find(kind).map(|(spec, values)| spec.with(values))
    }

    /// A kind or preset at the sizes of [`Spec::small`].
    pub fn small(kind: &str) -> Option<Self> {
        find(kind).map(|(spec, values)| (spec.build)(&Given::of(values).with(Given::of(spec.small))))
    }

    /// A kind or preset with some values in the place of its own. Ranges are checked by [`Attention::check_all`].
    ///
    /// # Errors
    /// When there is no such kind, or it has no such key.
    pub fn from_keys(kind: &str, given: Given) -> std::result::Result<Self, ConfigError> {
        let Some((spec, preset)) = find(kind) else {
            return Err(ConfigError::new(
                "model.attention.kind",
                format!("{kind:?} is none of {}", kinds().join(", ")),
            ));
        };
        let has = |spec: &Spec, key: &str| spec.keys.iter().any(|k| k.name == key);
        if let Some(key) = given.keys().find(|key| !has(spec, key)) {
            let others: Vec<&str> = VARIANTS.iter().filter(|v| has(v, key)).map(|v| v.kind).collect();
            let what = format!("means nothing to kind {kind:?}; remove it (it is a key of {})", others.join(", "));
            return Err(ConfigError::new(format!("model.attention.{key}"), what));
        }
        Ok((spec.build)(&Given::of(preset).with(given)))
    }

    /// The keys that stay when a configuration is given this kind or preset; see [`Spec::kept_keys`].
    pub fn kept_keys(kind: &str) -> Vec<&'static str> {
        find(kind).map_or(Vec::new(), |(spec, _)| spec.kept_keys().collect())
    }

    /// Another kind for a model that was trained as `config` says: its numbers where both kinds have the key, chunks of
    /// `size` tokens, and `top` of them where the choice is hard.
    ///
    /// # Errors
    /// As [`Attention::from_keys`] and [`Attention::check_all`].
    pub fn converted(
        kind: &str,
        config: &ModelConfig,
        size: usize,
        top: usize,
    ) -> std::result::Result<Self, ConfigError> {
        let own = &config.attention;
        let kept = Attention::kept_keys(kind);
        let mut given = Given::default();
        for key in &kept {
            if let Some(value) = own.value(key) {
                given.set(key, value);
            }
        }
        [("chunk_size", size), ("top", top)].into_iter().filter(|(key, _)| kept.contains(key)).for_each(|(key, n)| {
            given.set(key, n.value());
        });
        let mut other = Attention::from_keys(kind, given)?;
        let params = own.params(config);
        if let Some(other) = other.registered_mut() {
            other.adopt(own, &|name| params.iter().any(|p| p.name == name));
        }
        other.check_all()?;
        Ok(other)
    }

    /// The kind without the preset, for example `dash`.
    pub fn kind(&self) -> &'static str {
        self.spec().kind
    }

    /// Refuses a value outside its key's range, or values that do not fit each other.
    ///
    /// # Errors
    /// Names the key.
    pub fn check_all(&self) -> std::result::Result<(), ConfigError> {
        keys::check_ranges(&**self)?;
        self.check()
    }

    /// A knob, to be moved, where the variant has it.
    pub fn knob_mut(&mut self, knob: Knob) -> Option<&mut f64> {
        self.registered_mut().and_then(|variant| variant.knob_mut(knob))
    }

    /// See [`Variant::seed_mut`].
    pub fn seed_mut(&mut self) -> Option<&mut usize> {
        self.registered_mut()?.seed_mut()
    }

    /// The value of a knob, where the variant has it.
    pub fn knob(&self, knob: Knob) -> Option<f64> {
        let mut copy = *self;
        copy.knob_mut(knob).map(|x| *x)
    }

    /// Tokens of a chunk, where there are chunks.
    pub fn chunk_size(&self) -> Option<usize> {
        self.chunks().map(|c| c.size)
    }

    /// Attended chunks at most, where the choice is hard.
    pub fn top(&self) -> Option<usize> {
        self.chunks().and_then(|c| c.top)
    }

    /// Mean number of tokens in a query's chunks in sequences of `t` tokens, where it is known before any run: 0 without
    /// chunks, and what a full list holds where the choice is hard. `None` where the router decides.
    pub fn listed(&self, t: usize) -> Option<f64> {
        match self.chunks() {
            None => Some(0.0),
            Some(Chunks { size, top }) => top.map(|top| Attention::listed_at(size, top, t)),
        }
    }

    /// Mean number of tokens in a query's chunks when it has at most `top`: (q mod s) + 1 of its own chunk and s of each
    /// of min(top - 1, q / s) earlier ones.
    pub fn listed_at(chunk_size: usize, top: usize, t: usize) -> f64 {
        let of = |q: usize| q % chunk_size + 1 + chunk_size * (top - 1).min(q / chunk_size);
        (0..t).map(of).sum::<usize>() as f64 / t.max(1) as f64
    }
}

/// Runs the configured variant.
///
/// # Errors
/// When shapes or settings do not fit.
pub fn attend(tape: &Tape, attention: &Attention, x: &Inputs) -> Result<Attended> {
    let (q, k) = (tape.watch("q", x.q)?, tape.watch("k", x.k)?);
    attention.attend(tape, &Inputs { q: &q, k: &k, ..*x })
}

#[cfg(test)]
mod tests;
