//! The fuzz targets of `fuzz/` over their saved inputs and over a few thousand made of them: damaged and made-up configurations, weights and
//! states are an error or something usable, never a panic.

use std::path::Path;

#[path = "../../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../../fuzz/src/train.rs"]
mod targets;

#[test]
fn saved_and_made_up_inputs() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    targets::TARGETS.iter().for_each(|(name, target)| mutate::replay(&fuzz, name, *target, 2000));
}
