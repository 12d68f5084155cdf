#![no_main]

#[path = "../src/data.rs"]
#[allow(dead_code)]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    targets::tokens(data);
});
