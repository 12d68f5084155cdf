//! What `--version` says, and what reports name as their maker.

use dash_core::device::Level;

/// `0.1.0 (commit 1234567890 with changes; instruction set AVX-512)`: enough to build the same program again.
pub fn version() -> String {
    let commit = match (env!("DASHLAB_COMMIT"), env!("DASHLAB_CHANGED")) {
        ("", _) => "commit unknown".to_string(),
        (commit, "") => format!("commit {commit}"),
        (commit, changed) => format!("commit {commit} {changed}"),
    };
    let level = match dash_core::device::level() {
        Level::Baseline => "baseline",
        Level::Avx2 => "AVX2",
        Level::Avx512 => "AVX-512",
    };
    format!("{} ({commit}; instruction set {level})", env!("CARGO_PKG_VERSION"))
}
