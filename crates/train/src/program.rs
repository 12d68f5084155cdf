//! What this program is made of: version, commit, and what else decides its bits. `build.rs` finds it out.

use dash_core::device::Level;

/// The commit, shortened; none where the sources are an archive or git is missing.
pub fn commit() -> Option<&'static str> {
    Some(env!("DASHLAB_COMMIT")).filter(|commit| !commit.is_empty())
}

/// Whether files differed from the commit when it was built.
pub fn changed() -> bool {
    !env!("DASHLAB_CHANGED").is_empty()
}

/// Name and version of the compiler and of the packages that decide bits.
pub fn packages() -> impl Iterator<Item = (&'static str, &'static str)> {
    env!("DASHLAB_PACKAGES").split(',').filter_map(|p| p.split_once(' '))
}

/// The instruction set that kernels run in on this processor.
pub fn instruction_set() -> &'static str {
    match dash_core::device::level() {
        Level::Baseline => "baseline",
        Level::Avx2 => "AVX2",
        Level::Avx512 => "AVX-512",
    }
}

/// `commit 1234567890 with changes`
fn commit_words() -> String {
    let changes = if changed() { " with changes" } else { "" };
    format!("commit {}{changes}", commit().unwrap_or("unknown"))
}

/// What the program calls itself in what it writes: `train 0.1.0 (commit 1234567890)`.
pub fn build() -> String {
    format!("train {} ({})", env!("CARGO_PKG_VERSION"), commit_words())
}

/// What `--version` says behind the name: enough to build the same program again.
pub fn version() -> String {
    format!("{} ({}; instruction set {})", env!("CARGO_PKG_VERSION"), commit_words(), instruction_set())
}
