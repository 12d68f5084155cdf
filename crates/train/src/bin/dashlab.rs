//! `train` under a name of its own, for `cargo install --path crates/train --bin dashlab`.

fn main() -> std::process::ExitCode {
    train::commands::main()
}
