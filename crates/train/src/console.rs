//! What a command tells a person, and what it prints for a program.
//!
//! Progress goes to standard error, and must never end a run: a closed pipe (`2>&1 | head`) or a full disk under a log
//! takes the line, not the run. Results go to standard output, where a reader relies on them: a reader that has gone
//! ends the command quietly, any other error is a failure.
//!
//! This is the program's one global: a progress line can come from anywhere, and every one belongs in `run.log`.

use std::collections::VecDeque;
use std::fmt::Arguments;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::{Failure, Result};

static QUIET: AtomicBool = AtomicBool::new(false);
static RECORD: Mutex<Record> = Mutex::new(Record::Early(VecDeque::new()));

/// Where lines are recorded.
enum Record {
    /// Nowhere yet: what was told before the run had a folder, the last [`EARLY`] lines of it.
    Early(VecDeque<String>),
    /// The run's log.
    File(File),
}

/// Lines that are kept for a log that is not there yet. What was taken of a corpus and its notes come last.
const EARLY: usize = 256;

impl Record {
    /// A full disk takes the line, not the run.
    fn add(&mut self, line: String) {
        match self {
            Record::File(file) => _ = file.write_all(line.as_bytes()),
            Record::Early(lines) => {
                lines.push_back(line);
                if lines.len() > EARLY {
                    lines.pop_front();
                }
            }
        }
    }
}

/// Tells progress in a line: to standard error unless `--quiet`, and to the run's log. Takes what `format!` takes.
macro_rules! tell {
    ($($arg:tt)*) => { $crate::console::tell_line(format_args!($($arg)*)) };
}
pub(crate) use tell;

/// Prints a line of results to standard output and returns [`crate::failure::Result`].
macro_rules! print_line {
    ($($arg:tt)*) => { $crate::console::print_results(format_args!("{}\n", format_args!($($arg)*))) };
}
pub(crate) use print_line;

/// Leaves out progress on standard error; errors and warnings about the result are still told.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether progress is left out.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// From now on every line is also appended to this file, and before them those that were told until now. A file that cannot be opened is told once; the
/// run goes on.
pub fn record_to(path: &Path) {
    match File::options().create(true).append(true).open(path) {
        Ok(file) => {
            let mut record = RECORD.lock().unwrap_or_else(|e| e.into_inner());
            if let Record::Early(lines) = std::mem::replace(&mut *record, Record::File(file)) {
                lines.into_iter().for_each(|line| record.add(line));
            }
        }
        Err(e) => tell_line(format_args!("warning: {}: cannot be written: {e}", path.display())),
    }
}

/// Appends a line to the run's log only: for lines that a progress bar has shown.
pub fn record_line(line: Arguments) {
    RECORD.lock().unwrap_or_else(|e| e.into_inner()).add(format!("{line}\n"));
}

/// See [`tell!`].
pub fn tell_line(line: Arguments) {
    record_line(line);
    if !is_quiet() {
        let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
    }
}

/// The error that ends the command: told also with `--quiet`.
pub fn tell_error(line: Arguments) {
    record_line(line);
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Writes to standard output.
///
/// # Errors
/// [`Failure::ReaderGone`] when nobody reads it any more, [`Failure::Run`] when it cannot be written.
pub fn print_results(text: Arguments) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(Failure::ReaderGone),
        Err(e) => Err(Failure::Run(anyhow::anyhow!("standard output cannot be written: {e}"))),
    }
}
