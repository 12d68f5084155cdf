//! `train`: see `train --help`.

fn main() -> std::process::ExitCode {
    train::commands::main()
}
