//! Drives the binary as a user does.

mod bench;
mod compare;
#[cfg(unix)]
mod documents;
#[cfg(unix)]
mod export;
mod figures;
#[cfg(unix)]
mod generate;
mod guide;
mod plots;
mod python;
#[cfg(unix)]
mod requests;
#[cfg(unix)]
mod resume;
mod rows;
mod run;
mod sandbox;
#[cfg(unix)]
mod trouble;
mod whole;
mod yoke;
