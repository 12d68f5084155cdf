//! Finding and reading golden files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dash_core::{DType, Device, Tensor, testing};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;

/// One file.
pub struct Golden {
    pub name: String,
    pub config: Value,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
    device: Device,
}

/// Where golden files lie: the project's own, or those of the folder that DASHLAB_GOLDEN names, from the workspace's root.
fn folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.join(std::env::var_os("DASHLAB_GOLDEN").unwrap_or("oracle/golden".into()))
}

fn paths(kind: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder().join(kind)).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    paths
}

/// All files of a kind. The project's own folder must hold some; another may lack the kind, but not all of them.
pub fn all(kind: &str) -> Vec<Golden> {
    let (folder, files) = (folder(), paths(kind));
    let kinds = ["attention", "entmax", "model", "optim"];
    assert!(kinds.contains(&kind));
    if std::env::var_os("DASHLAB_GOLDEN").is_none() {
        assert!(!files.is_empty(), "{} holds no golden file in {kind}/", folder.display());
    } else {
        let some = kinds.iter().any(|kind| !paths(kind).is_empty());
        assert!(some, "DASHLAB_GOLDEN: {} holds no golden file in any of {kinds:?}", folder.display());
        println!("{}: {} golden files in {kind}/", folder.display(), files.len());
    }
    files.iter().map(|p| Golden::read(p)).collect()
}

impl Golden {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let config = header.metadata().as_ref().and_then(|m| m.get("config")).expect("metadata has a config");
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(|(name, view)| {
            let words = view.data().chunks_exact(8).map(|b| <[u8; 8]>::try_from(b).unwrap());
            let data = match view.dtype() {
                Dtype::F64 => words.map(f64::from_le_bytes).collect(),
                Dtype::I64 => words.map(|b| i64::from_le_bytes(b) as f64).collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, (view.shape().to_vec(), data))
        });
        Golden {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            config: serde_json::from_str(config).unwrap(),
            tensors: tensors.collect(),
            device: testing::device(),
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn numbers(&self, name: &str) -> &[f64] {
        &self.tensors[name].1
    }

    pub fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].0
    }

    pub fn tensor(&self, name: &str, dtype: DType) -> Tensor {
        let (shape, data) = self.tensors.get(name).unwrap_or_else(|| panic!("{} has no {name}", self.name));
        Tensor::from_vec(&self.device, shape, data.clone()).unwrap().to_dtype(dtype).unwrap()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.numbers(name).iter().map(|&x| x as u32).collect()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn number(&self, key: &str) -> f64 {
        self.config[key].as_f64().unwrap_or_else(|| panic!("{}: {key}", self.name))
    }

    pub fn size(&self, key: &str) -> usize {
        self.number(key) as usize
    }

    pub fn text(&self, key: &str) -> &str {
        self.config[key].as_str().unwrap_or_else(|| panic!("{}: {key}", self.name))
    }
}

/// Largest difference and largest golden value. NaN is infinitely far.
pub fn difference(got: &Tensor, want: &[f64]) -> (f64, f64) {
    let got = got.to_f64().unwrap();
    assert_eq!(got.len(), want.len());
    let worst = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m: f64, d| if d.is_nan() { f64::INFINITY } else { m.max(d) });
    (worst, want.iter().fold(0.0, |m, x| m.max(x.abs())))
}

/// Difference relative to the largest element. A gradient that is zero in exact arithmetic (that of NSA's position
/// embedding: a linear compression shifts every window's key alike, and softmax does not see it) comes out as the rounding
/// of a sum on both sides. The largest case has 4 heads x 96 queries x 9 windows, some 3500 terms, each a difference of
/// products of 16 normals, of size sqrt(16): 4 x sqrt(3500) x 1.1e-16 = 3e-14, and the largest of many such sums is a few
/// times that. Below 1e-4 the difference counts absolutely, so that 1e-9 of it is 1e-13.
pub fn error(got: &Tensor, want: &[f64]) -> f64 {
    let (difference, scale) = difference(got, want);
    difference / scale.max(1e-4)
}
