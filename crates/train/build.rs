//! Hands to the program what it is made of: the commit, the compiler, and the versions of the packages that decide bits.

use std::process::Command;

fn said(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
}

fn git(args: &[&str]) -> Option<String> {
    said("git", args)
}

/// The version that `package` of a Cargo.lock depends on, where several versions of a dependency stand in it, too.
fn locked(lock: &str, package: &str, dependency: &str) -> Option<String> {
    let block = |name: &str| {
        let start = lock.find(&format!("name = \"{name}\"\n"))?;
        lock[start..].split("\n\n").next()
    };
    // `"rand 0.10.4",` where there are several, `"tokenizers",` where there is one
    let entry = block(package)?.lines().find_map(|l| {
        let entry = l.trim().strip_prefix('"')?.strip_suffix("\",")?;
        let rest = entry.strip_prefix(dependency)?;
        (rest.is_empty() || rest.starts_with(' ')).then(|| rest.trim().to_string())
    })?;
    if !entry.is_empty() {
        return Some(entry);
    }
    block(dependency)?.lines().find_map(|l| Some(l.strip_prefix("version = \"")?.trim_end_matches('"').to_string()))
}

fn main() {
    // a source archive has no commit, and a machine may have no git; an archive unpacked inside another repository has not the
    // commit of that one, which does not know this file
    let known = git(&["ls-files", "--error-unmatch", "build.rs"]).is_some();
    let commit = git(&["rev-parse", "--short=10", "HEAD"]).filter(|_| known).unwrap_or_default();
    let changed = known && git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    println!("cargo::rustc-env=DASHLAB_COMMIT={commit}");
    println!("cargo::rustc-env=DASHLAB_CHANGED={}", if changed { "with changes" } else { "" });

    let rustc = std::env::var("RUSTC").ok().and_then(|rustc| said(&rustc, &["--version"]));
    let rustc = rustc.and_then(|v| v.split(' ').nth(1).map(str::to_string));
    let lock = std::fs::read_to_string("../../Cargo.lock").unwrap_or_default();
    // random numbers and tokens; the arithmetic is this workspace's own
    let packages = [("dash-core", "rand"), ("dash-core", "rand_chacha"), ("dash-data", "tokenizers")];
    let packages = packages.iter().map(|(of, name)| (*name, locked(&lock, of, name)));
    let versions: Vec<String> = std::iter::once(("rustc", rustc))
        .chain(packages)
        .map(|(name, version)| format!("{name} {}", version.as_deref().unwrap_or("unknown")))
        .collect();
    println!("cargo::rustc-env=DASHLAB_PACKAGES={}", versions.join(","));

    // what moves when a commit is made, checked out or prepared, and the sources themselves
    for name in ["HEAD", "index"] {
        if let Some(path) = git(&["rev-parse", "--path-format=absolute", "--git-path", name]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    println!("cargo::rerun-if-changed=../../crates");
    println!("cargo::rerun-if-changed=../../Cargo.lock");
}
