//! `provenance.json` of a run folder: what started the run and what went on with it, one entry for each process, oldest first.
//!
//! A run has the same bits on the same build and instruction set, and on a GPU on the same card with the same libraries. Where a
//! later process had another, its entry says so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use dash_core::{CudaDevice, Device};
use dash_data::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::device::threads;
use crate::console::tell;
use crate::files::replace_file;
use crate::program;

const FILE: &str = "provenance.json";

/// A process that began to train the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// When, in UTC: `2026-11-26T17:10:14Z`.
    pub time: String,
    /// Updates that the run had made by then.
    pub step: u64,
    /// The folder in which it was started, from which relative paths of the configuration are meant; empty in earlier entries.
    #[serde(default)]
    pub folder: PathBuf,
    /// Updates in all that the run was extended to by this start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extended: Option<u64>,
    /// The command line, program first.
    pub command: Vec<String>,
    /// Version of the program.
    pub version: String,
    /// Commit of the program, or `unknown`: a source archive has none.
    pub commit: String,
    /// Whether files differed from that commit.
    pub changed: bool,
    /// The device: `cpu`, or a GPU with its name, `cuda:0 (NVIDIA H100 80GB HBM3)`.
    pub device: String,
    /// Instruction set of the CPU's kernels.
    pub instruction_set: String,
    /// Threads of the CPU. No bit depends on them.
    pub threads: usize,
    /// Versions of the compiler and of the packages that decide bits.
    pub packages: BTreeMap<String, String>,
    /// Versions of the driver and the libraries of a GPU; of none where the CPU trains.
    #[serde(default)]
    pub libraries: BTreeMap<String, String>,
    /// Hash of the tokenizer.json that wrote the training text; none for a task without text, and in earlier entries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// The host's processor, as the system names it.
    pub processor: String,
    /// The host's system and its kind of processor.
    pub system: String,
    /// Processes that train together; the bits do not depend on it.
    #[serde(default = "one")]
    pub processes: usize,
}

fn one() -> usize {
    1
}

impl Start {
    fn now(
        (device, processes): (&Device, usize),
        step: u64,
        extended: Option<u64>,
        tokenizer: Option<&Tokenizer>,
    ) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let owned = |(name, version): (&str, &str)| (name.to_string(), version.to_string());
        let (name, libraries) = match device {
            Device::Cpu(_) => (device.name().into(), BTreeMap::new()),
            Device::Cuda(gpu) => (format!("{gpu:?}"), libraries(gpu)),
        };
        Start {
            time: utc(seconds),
            step,
            folder: std::env::current_dir().unwrap_or_default(),
            extended,
            command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            commit: program::commit().unwrap_or("unknown").into(),
            changed: program::changed(),
            device: name,
            instruction_set: program::instruction_set().into(),
            threads: threads(device),
            packages: program::packages().map(owned).collect(),
            libraries,
            tokenizer: tokenizer.map(named),
            processor: processor(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processes,
        }
    }

    /// All that the bits of a run may depend on besides its configuration and data, with the names that people read.
    fn decides(&self) -> Vec<(&str, String)> {
        let changes = if self.changed { " with changes" } else { "" };
        let mut all = vec![
            ("version", self.version.clone()),
            ("commit", format!("{}{changes}", self.commit)),
            ("device", self.device.clone()),
            ("instruction set", self.instruction_set.clone()),
            ("processor", self.processor.clone()),
            ("system", self.system.clone()),
        ];
        let versions = self.libraries.iter().chain(&self.packages);
        all.extend(versions.map(|(name, version)| (name.as_str(), version.clone())));
        all
    }

    /// Build and machine in a line, with the libraries of a GPU: `version 0.1.0, commit 1234567890, device cpu, instruction set AVX2,
    /// processor AMD EPYC`.
    pub fn maker(&self) -> String {
        let told = |name: &str| name != "system" && !self.packages.contains_key(name);
        let values = self.decides().into_iter().filter(|(name, _)| told(name));
        values.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
    }

    /// What is other than at an earlier start, `instruction set AVX2 -> AVX-512`; empty where nothing is.
    fn changes_since(&self, earlier: &Start) -> String {
        let (before, now) = (earlier.decides(), self.decides());
        let was = |name: &str| before.iter().find(|(n, _)| *n == name).map_or("none", |(_, value)| value.as_str());
        let other = now.iter().filter(|(name, value)| was(name) != value);
        other.map(|(name, value)| format!("{name} {} -> {value}", was(name))).collect::<Vec<_>>().join("; ")
    }
}

/// `2026-11-26T17:10:14Z`. Days to a date of the Gregorian calendar: eras of 400 years that begin in March, as in Howard Hinnant's
/// "chrono-compatible low-level date algorithms".
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + carry;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

/// Versions of what a GPU's bits depend on besides the card.
fn libraries(gpu: &CudaDevice) -> BTreeMap<String, String> {
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let named = gpu.versions().map(|(name, version)| (name.to_string(), version));
    named.into_iter().chain([("NVIDIA driver".to_string(), driver(&module))]).collect()
}

/// The driver's version in /proc/driver/nvidia/version, a number with points; else `unknown`.
fn driver(text: &str) -> String {
    let is_version = |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.split_whitespace().find(is_version).unwrap_or("unknown").to_string()
}

/// The name in /proc/cpuinfo, whose lines differ between kinds of processors; else `unknown`.
fn processor(cpuinfo: &str) -> String {
    let of = |key: &str| cpuinfo.lines().find_map(|l| l.split_once(':').filter(|(k, _)| k.trim() == key));
    let found = ["model name", "Model", "cpu model", "uarch", "cpu"].into_iter().find_map(of);
    found.map_or("unknown".into(), |(_, name)| name.trim().to_string())
}

fn values(path: &Path) -> anyhow::Result<Vec<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display())),
        // a run of an earlier build
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// The starts of the run in a folder; empty where no one wrote them down.
///
/// # Errors
/// When the file is damaged or cannot be read.
pub fn read(folder: &Path) -> anyhow::Result<Vec<Start>> {
    let path = folder.join(FILE);
    let parse = |v| serde_json::from_value(v).with_context(|| format!("{} is damaged", path.display()));
    values(&path)?.into_iter().map(parse).collect()
}

/// A tokenizer as provenance.json names it: by the hash of its file.
fn named(tokenizer: &Tokenizer) -> String {
    format!("{:032x}", tokenizer.hash())
}

/// Whether a tokenizer is the one that wrote the training text of a run with these starts. Where none says which that is, any may be.
pub fn trained_with(starts: &[Start], tokenizer: &Tokenizer) -> bool {
    starts.iter().rev().find_map(|s| s.tokenizer.as_ref()).is_none_or(|name| *name == named(tokenizer))
}

/// How a process begins to train a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins {
    /// A new one.
    Anew,
    /// One that is there, as far as it was to go.
    Resumed,
    /// One that is there, up to so many updates in all.
    Extended(u64),
}

/// Writes this process, the first of so many, down as a start at `step` on text that `tokenizer` wrote, behind the starts that a run has which is there. Tells what has changed since the last
/// one. A list that is damaged is put aside and told.
///
/// # Errors
/// When the file cannot be written.
pub fn record(
    folder: &Path,
    (device, processes): (&Device, usize),
    step: u64,
    begins: Begins,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<()> {
    let path = folder.join(FILE);
    // as they are: keys of a later build stay
    let mut all = match if begins == Begins::Anew { Ok(Vec::new()) } else { values(&path) } {
        Ok(all) => all,
        Err(e) => {
            let aside = folder.join(format!("{FILE}.damaged"));
            std::fs::rename(&path, &aside).with_context(|| format!("{e:#}; it cannot be put aside"))?;
            tell!("warning: {e:#}; it is kept as {}, and a new list begins", aside.display());
            Vec::new()
        }
    };
    let extended = match begins {
        Begins::Extended(steps) => Some(steps),
        Begins::Anew | Begins::Resumed => None,
    };
    let now = Start::now((device, processes), step, extended, tokenizer);
    let last = all.last().and_then(|v| serde_json::from_value::<Start>(v.clone()).ok());
    let changes = last.map_or(String::new(), |last| now.changes_since(&last));
    if !changes.is_empty() {
        tell!(
            "note: other than at the last start: {changes}. The same bits are promised for the same build and instruction set only, on a GPU for the same card and libraries"
        );
    }
    all.push(serde_json::to_value(now)?);
    replace_file(&path, &serde_json::to_vec_pretty(&all)?)
}

/// For people: the first start, every later one at which something that bits may depend on had changed, and how many there were.
pub fn lines(starts: &[Start]) -> Vec<String> {
    let Some(first) = starts.first() else { return Vec::new() };
    let mut out = vec![format!("started {}: {}, {} threads", first.time, first.maker(), first.threads)];
    for pair in starts.windows(2) {
        let changes = pair[1].changes_since(&pair[0]);
        if !changes.is_empty() {
            out.push(format!("at step {}, {}: {changes}", pair[1].step, pair[1].time));
        }
    }
    if starts.len() > 1 {
        out.push(format!("{} starts in all", starts.len()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates_of_the_calendar() {
        // from `date -u -d @SECONDS`
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), date);
        }
    }

    #[test]
    fn processors_are_named_as_the_system_does() {
        let x86 =
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R14\n";
        assert_eq!(processor(x86), "AMD EPYC 9R14");
        let arm = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd\n\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 4\n";
        assert_eq!(processor(arm), "Raspberry Pi 4");
        assert_eq!(processor(""), "unknown");
    }

    #[test]
    fn starts_add_up_and_what_changed_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let device = Device::cpu(2).unwrap();
        assert_eq!(read(dir.path()).unwrap(), []);
        record(dir.path(), (&device, 1), 0, Begins::Anew, None).unwrap();
        record(dir.path(), (&device, 1), 5, Begins::Extended(9), None).unwrap();
        let mut starts = read(dir.path()).unwrap();
        assert_eq!(starts.iter().map(|s| (s.step, s.threads)).collect::<Vec<_>>(), [(0, 2), (5, 2)]);
        assert_eq!(lines(&starts).len(), 2);
        assert_eq!((starts[0].extended, starts[1].extended), (None, Some(9)));

        starts[1].instruction_set = "another".into();
        starts[1].packages.insert("rand".into(), "0.0.1".into());
        let said = lines(&starts).join("\n");
        assert!(said.contains("at step 5") && said.contains("-> another; rand"), "{said}");
        assert!(said.contains("2 starts in all"), "{said}");

        // keys of a later build stay, and a folder that holds no run begins a new list
        let mut values = values(&dir.path().join(FILE)).unwrap();
        values[0]["later"] = 1.into();
        std::fs::write(dir.path().join(FILE), serde_json::to_vec(&values).unwrap()).unwrap();
        record(dir.path(), (&device, 1), 7, Begins::Resumed, None).unwrap();
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(text.contains("\"later\": 1") && read(dir.path()).unwrap().len() == 3);
        record(dir.path(), (&device, 1), 0, Begins::Anew, None).unwrap();
        assert_eq!(read(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn other_libraries_of_a_gpu_are_said() {
        let dir = tempfile::tempdir().unwrap();
        record(dir.path(), (&Device::cpu(1).unwrap(), 1), 0, Begins::Anew, None).unwrap();
        let mut first = read(dir.path()).unwrap().remove(0);
        assert_eq!(first.libraries, BTreeMap::new());
        // as a build before this key wrote it
        let mut value = serde_json::to_value(&first).unwrap();
        value.as_object_mut().unwrap().remove("libraries").unwrap();
        assert_eq!(serde_json::from_value::<Start>(value).unwrap(), first);

        let versions = |nvrtc: &str, cublas: &str| {
            [("NVRTC", nvrtc), ("cuBLASLt", cublas)].map(|(name, v)| (name.to_string(), v.to_string())).into()
        };
        first.device = "cuda:0 (NVIDIA H100 80GB HBM3)".into();
        first.libraries = versions("13.0", "13.0.2");
        assert!(first.maker().ends_with(", NVRTC 13.0, cuBLASLt 13.0.2"), "{}", first.maker());
        let mut second = first.clone();
        assert_eq!(second.changes_since(&first), "");
        second.libraries = versions("13.0", "13.4.1");
        assert_eq!(second.changes_since(&first), "cuBLASLt 13.0.2 -> 13.4.1");
        assert!(lines(&[first, second]).join("\n").contains("cuBLASLt 13.0.2 -> 13.4.1"));

        let file = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\n\
                    GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n";
        assert_eq!((driver(file), driver("")), ("580.95.05".into(), "unknown".into()));
    }

    #[test]
    fn a_damaged_list_is_kept_aside_and_stops_no_run() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "[{\"time\"").unwrap();
        assert!(format!("{:#}", read(dir.path()).unwrap_err()).contains("provenance.json is damaged"));
        record(dir.path(), (&Device::cpu(1).unwrap(), 1), 3, Begins::Resumed, None).unwrap();
        assert_eq!(read(dir.path()).unwrap().len(), 1);
        assert_eq!(std::fs::read_to_string(dir.path().join("provenance.json.damaged")).unwrap(), "[{\"time\"");
    }
}
