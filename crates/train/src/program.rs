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

/// A word as a shell takes it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:@+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// The command line of this process, so that a run goes on: with `--resume`, unless it says already that the run continues.
pub fn command_to_resume() -> String {
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    to_resume(&words)
}

fn to_resume(words: &[String]) -> String {
    let continues = |word: &String| word == "--resume" || word.starts_with("--resume=") || word.starts_with("--extend");
    // what watches over this process does not watch over the next
    let own = words
        .iter()
        .enumerate()
        .filter(|(i, word)| *word != "--with-parent" && (*i == 0 || words[i - 1] != "--with-parent"));
    let more = if words.iter().any(continues) { "" } else { " --resume" };
    own.map(|(_, word)| quoted(word)).collect::<Vec<_>>().join(" ") + more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        assert_eq!(quoted("run.steps=3"), "run.steps=3");
        assert_eq!(quoted("router={}"), "'router={}'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn the_command_that_goes_on_is_the_whole_one() {
        let again = |words: &[&str]| to_resume(&words.iter().map(|w| w.to_string()).collect::<Vec<_>>());
        let set = ["train", "--config", "a b.toml", "--set", "task={}"];
        assert_eq!(again(&set), "train --config 'a b.toml' --set 'task={}' --resume");
        let supervised = ["train", "--config", "c.toml", "--resume=auto"];
        assert_eq!(again(&supervised), "train --config c.toml --resume=auto");
        let compared = ["train", "--config", "c.toml", "--with-parent", "77", "--force"];
        assert_eq!(again(&compared), "train --config c.toml --force --resume");
        let longer = ["train", "--config", "c.toml", "--extend", "40"];
        assert_eq!(again(&longer), "train --config c.toml --extend 40");
    }
}
