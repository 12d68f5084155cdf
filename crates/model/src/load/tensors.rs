//! The tensors of safetensors files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use dash_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;

use super::{LoadError, equal};

/// All bytes of a file. What has no end (a device) or waits for a writer (a pipe) is refused before it is read.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let refused = |what| LoadError::Read { path: path.to_path_buf(), what };
    let kind = std::fs::metadata(path).map_err(refused)?.file_type();
    if !kind.is_file() && !kind.is_dir() {
        let what = "is a pipe or a device, expected a file".into();
        return Err(LoadError::Unfit { path: path.to_path_buf(), what });
    }
    let bytes = std::fs::read(path).map_err(refused)?;
    if bytes.starts_with(b"version https://git-lfs") {
        let what = "holds a pointer of Git LFS and not the file; bring it with git lfs pull".into();
        return Err(LoadError::Unfit { path: path.to_path_buf(), what });
    }
    Ok(bytes)
}

/// The tensors of a safetensors file, by name.
///
/// # Errors
/// When the file cannot be read or is no safetensors file, a tensor is not of f32, bf16 or f16, or the device has no memory left.
pub fn read_tensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>, LoadError> {
    parse_tensors(&read(path)?, path, device)
}

/// The f32 values of little-endian numbers; every bf16 (8 bits of mantissa) and f16 (11 bits) is one exactly. `None` for other types.
fn numbers(data: &[u8], dtype: Dtype) -> Option<Vec<f32>> {
    let halves = || data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Some(match dtype {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => halves().map(|b| f32::from_bits(u32::from(b) << 16)).collect(),
        Dtype::F16 => halves().map(from_f16).collect(),
        _ => return None,
    })
}

/// IEEE 754 binary16: sign, 5 bits of exponent, 10 of mantissa.
fn from_f16(bits: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(bits >> 15) << 31, u32::from(bits >> 10 & 31), u32::from(bits & 0x3ff));
    match exponent {
        // below 2^-14 in steps of 2^-24
        0 => f32::from_bits(sign | (mantissa as f32 * 2f32.powi(-24)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// The file that says what tensors a folder has: its index where there is no `model.safetensors`.
pub(super) fn described_by(folder: &Path) -> PathBuf {
    let [single, index] = [SINGLE, INDEX].map(|name| folder.join(name));
    if single.is_file() || !index.is_file() { single } else { index }
}

/// Refuses a folder without weights. What is there under the name is read, and told, by who reads.
fn has_weights(folder: &Path) -> Result<(), LoadError> {
    let there = |name: &str| folder.join(name).symlink_metadata().is_ok();
    if there(SINGLE) || there(INDEX) {
        return Ok(());
    }
    let other = ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|name| there(name));
    let other = other.map_or(String::new(), |name| {
        format!("; {name} is not read: transformers writes safetensors with save_pretrained(FOLDER, safe_serialization=True)")
    });
    let what = format!("holds no model.safetensors and no model.safetensors.index.json, so it has no weights{other}");
    Err(LoadError::Unfit { path: folder.to_path_buf(), what })
}

/// The tensors of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names. Where both are there they have to
/// hold the same: nobody could say which of two models is meant.
///
/// # Errors
/// As [`read_tensors`], or when the index names a tensor that its file does not have, or a file elsewhere, or other tensors than
/// `model.safetensors` has.
pub fn read_folder(folder: &Path, device: &Device) -> Result<HashMap<String, Tensor>, LoadError> {
    has_weights(folder)?;
    let [single, index] = [SINGLE, INDEX].map(|name| folder.join(name));
    if described_by(folder) == index {
        let mut all = HashMap::new();
        each_of_index(folder, device, |name, tensor| {
            all.insert(name, tensor);
            Ok(())
        })?;
        return Ok(all);
    }
    let all = read_tensors(&single, device)?;
    if index.is_file() {
        same_as_index(folder, &all, device)
            .map_err(|e| LoadError::Unfit { path: folder.to_path_buf(), what: format!("{BOTH}, but {e}; {REMOVE}") })?;
    }
    Ok(all)
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const BOTH: &str = "holds model.safetensors and model.safetensors.index.json, which have to be one model";
const REMOVE: &str = "remove the one that is not meant";

/// Refuses an index that does not lead to these tensors, the ones of `model.safetensors`.
fn same_as_index(folder: &Path, single: &HashMap<String, Tensor>, device: &Device) -> Result<(), LoadError> {
    let unlike = |what: String| LoadError::Unfit { path: folder.join(INDEX), what };
    let mut count = 0;
    each_of_index(folder, device, |name, tensor| {
        count += 1;
        match single.get(&name) {
            Some(own) if equal(own, &tensor) => Ok(()),
            Some(_) => Err(unlike(format!("leads to another {name}"))),
            None => Err(unlike(format!("leads to {name}, which model.safetensors does not have"))),
        }
    })?;
    if count == single.len() { Ok(()) } else { Err(unlike(format!("leads to {count} of {} tensors", single.len()))) }
}

/// Gives the tensors of the files that the index names, file by file.
fn each_of_index(
    folder: &Path,
    device: &Device,
    mut each: impl FnMut(String, Tensor) -> Result<(), LoadError>,
) -> Result<(), LoadError> {
    let index = folder.join(INDEX);
    let damaged = |what: String| LoadError::Damaged { path: index.clone(), what };
    let parsed: Index = serde_json::from_slice(&read(&index)?).map_err(|e| damaged(e.to_string()))?;
    let files: BTreeSet<&String> = parsed.weight_map.values().collect();
    let mut seen = BTreeSet::new();
    for file in files {
        if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
            return Err(damaged(format!("names {file:?}, which is no file beside it")));
        }
        for (name, tensor) in read_tensors(&folder.join(file), device)? {
            match parsed.weight_map.get(&name) {
                Some(named) if named == file => {}
                Some(other) => return Err(damaged(format!("says that {other} holds {name}, which {file} holds"))),
                None => return Err(damaged(format!("says nothing of {name}, which {file} holds"))),
            }
            seen.insert(name.clone());
            each(name, tensor)?;
        }
    }
    match parsed.weight_map.iter().find(|(name, _)| !seen.contains(*name)) {
        Some((name, file)) => Err(damaged(format!("says that {file} holds {name}, which it does not"))),
        None => Ok(()),
    }
}

/// `model.safetensors.index.json`
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// As [`read_tensors`], from the bytes of the file; `path` names it in messages.
///
/// # Errors
/// As [`read_tensors`].
pub fn parse_tensors(bytes: &[u8], path: &Path, device: &Device) -> Result<HashMap<String, Tensor>, LoadError> {
    let damaged = |what: String| LoadError::Damaged { path: path.to_path_buf(), what };
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| damaged(format!("{e}; {} bytes are no whole safetensors file: bring it again", bytes.len())))?;
    let mut out = HashMap::new();
    for (name, view) in file.tensors() {
        let data = numbers(view.data(), view.dtype());
        let data =
            data.ok_or_else(|| damaged(format!("tensor {name} is {:?}, expected F32, BF16 or F16", view.dtype())))?;
        let tensor =
            Tensor::from_vec(device, view.shape(), data).map_err(|e| damaged(format!("tensor {name}: {e}")))?;
        out.insert(name, tensor);
    }
    Ok(out)
}
