//! Inputs from seeds: cuts, flips, extreme numbers in bytes and in digits, stretches of this and other seeds, words of the formats.

use std::fs;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

/// The seeds of a target: the files of `fuzz/corpus/NAME`, by name.
pub fn seeds(fuzz: &Path, name: &str) -> Vec<Vec<u8>> {
    let folder = fuzz.join("corpus").join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    paths.iter().map(|p| fs::read(p).expect("a seed")).collect()
}

/// Runs a target over all its seeds and over `inputs` made of them, of which some have to be usable and some not.
#[allow(dead_code, reason = "the driver has a loop of its own")]
pub fn replay(fuzz: &Path, name: &str, target: fn(&[u8]) -> bool, inputs: u64) {
    let seeds = seeds(fuzz, name);
    // every one, not as far as the first usable one: what once crashed is among them
    let good = seeds.iter().filter(|seed| target(seed)).count();
    assert!(seeds.len() > 1 && good > 0, "{name}: no usable seed");
    let usable = (0..inputs).filter(|&i| target(&mutate(&seeds, &mut Draws::of(2, i)))).count() as u64;
    assert!(usable > inputs / 300 && usable < inputs, "{name}: {usable} of {inputs} usable");
}

/// Draws for one input: what it draws is no format.
pub struct Draws(u64);

impl Draws {
    /// Those of an input, by its number, so that any one can be made again.
    pub fn of(seed: u64, input: u64) -> Self {
        Draws(xxh3_64(&[seed.to_le_bytes(), input.to_le_bytes()].concat()))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        xxh3_64(&self.0.to_le_bytes())
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

const NUMBERS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "1e308",
    "1e999",
    "-0.0",
    "5e-324",
    "nan",
    "inf",
    "0.5",
];

const WORDS: [&str; 34] = [
    "null",
    "true",
    "false",
    "{}",
    "[]",
    "\"\"",
    "\"",
    "'",
    "\\",
    "\\u0000",
    "\\ud800",
    "\\ud83d\\ude00",
    "\u{0}",
    "\u{feff}",
    "\u{e4}",
    "\u{1f600}",
    "\u{2028}",
    "\r",
    "\n",
    "\t",
    " ",
    "        ",
    ",",
    ":",
    "=",
    "[",
    "]",
    "{",
    "}",
    "<|endoftext|>",
    "<unk>",
    "\n[",
    "\n#--set ",
    ".",
];

const EXTREMES: [u64; 12] = [
    0,
    1,
    u64::MAX,
    1 << 63,
    1 << 62,
    1 << 61,
    1 << 32,
    (1 << 63) + 5,
    u64::MAX - 71,
    u32::MAX as u64,
    0x7ff8_0000_0000_0000,
    1 << 16,
];

/// One to six changes to one of the seeds, or a cut of two of them.
pub fn mutate(seeds: &[Vec<u8>], draws: &mut Draws) -> Vec<u8> {
    let mut x = seeds[draws.below(seeds.len())].clone();
    for _ in 0..1 + draws.below(6) {
        change(&mut x, seeds, draws);
        x.truncate(1 << 20);
    }
    x
}

fn change(x: &mut Vec<u8>, seeds: &[Vec<u8>], draws: &mut Draws) {
    let at = draws.below(x.len() + 1);
    let rest = x.len() - at;
    match draws.below(10) {
        0 if rest > 0 => x[at] ^= 1 << draws.below(8),
        1 if rest > 0 => x[at] = draws.next() as u8,
        2 => {
            let bytes = EXTREMES[draws.below(EXTREMES.len())].to_le_bytes();
            let n = [4, 8][draws.below(2)].min(rest);
            x[at..at + n].copy_from_slice(&bytes[..n]);
        }
        3 => number(x, at, draws),
        4 => x.truncate(at),
        5 => {
            let n = draws.below(64).min(rest);
            x.drain(at..at + n);
        }
        6 => {
            let n = draws.below(64).min(rest);
            let times = [1, 1, 2, 30][draws.below(4)];
            let stretch = x[at..at + n].repeat(times);
            x.splice(at..at, stretch);
        }
        7 => {
            let other = &seeds[draws.below(seeds.len())];
            let from = draws.below(other.len() + 1);
            let n = draws.below(200).min(other.len() - from);
            let over = draws.below(200).min(rest);
            x.splice(at..at + over, other[from..from + n].iter().copied());
        }
        8 => {
            let word = WORDS[draws.below(WORDS.len())].as_bytes();
            let over = if draws.below(2) == 0 { word.len().min(rest) } else { 0 };
            x.splice(at..at + over, word.iter().copied());
        }
        _ => swap_lines(x, draws),
    }
}

/// Puts another number in the place of the next digits.
fn number(x: &mut Vec<u8>, at: usize, draws: &mut Draws) {
    let digit = |b: &u8| b.is_ascii_digit();
    let Some(start) = x[at..].iter().position(digit).map(|i| at + i) else { return };
    let end = start + x[start..].iter().take_while(|b| digit(b)).count();
    x.splice(start..end, NUMBERS[draws.below(NUMBERS.len())].bytes());
}

fn swap_lines(x: &mut Vec<u8>, draws: &mut Draws) {
    let mut lines: Vec<&[u8]> = x.split(|b| *b == b'\n').collect();
    let (a, b) = (draws.below(lines.len()), draws.below(lines.len()));
    lines.swap(a, b);
    *x = lines.join(&b'\n');
}
