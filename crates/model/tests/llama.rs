//! Tiny Llamas that transformers saved (`oracle/make_llama.py`), the loss that it gives them, and their damaged twins.

use std::fs;
use std::path::{Path, PathBuf};

use dash_core::{Device, Tape, Tensor};
use dash_model::{LoadError, Model};

const FOLDERS: [&str; 6] =
    ["llama-f32-tied", "llama-bf16-sharded", "llama-f16", "llama3-f32", "qwen2-bf16", "qwen3-f32"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The two sequences that the script used.
fn ids() -> Vec<u32> {
    (0..2u32).flat_map(|i| (0..48u32).map(move |j| (7 * i + 13 * j * j + 5 * i * j) % 96)).collect()
}

/// Mean cross-entropy of each token from those before it.
fn loss(model: &Model) -> f64 {
    let all = ids();
    let rows: Vec<&[u32]> = all.chunks(48).collect();
    let inputs: Vec<u32> = rows.iter().flat_map(|row| &row[..47]).copied().collect();
    let targets: Vec<u32> = rows.iter().flat_map(|row| &row[1..]).copied().collect();
    let (inputs, targets) = (model.ids(&inputs, 2).unwrap(), model.ids(&targets, 2).unwrap());
    let (nll, _) = model.nll((&inputs, &targets), None).unwrap();
    let nll = nll.to_f64().unwrap();
    assert_eq!(nll.len(), 94);
    nll.iter().sum::<f64>() / 94.0
}

#[test]
fn the_loss_is_that_of_transformers() {
    for name in FOLDERS {
        let model = Model::load(&fixture(name), &Device::cpu(1).unwrap()).unwrap();
        let told: serde_json::Value =
            serde_json::from_slice(&fs::read(fixture(name).join("loss.json")).unwrap()).unwrap();
        let (got, want) = (loss(&model), told["loss"].as_f64().unwrap());
        // both in f32: some hundred roundings of 6e-8 on a loss of 5, two orders below what is asked for (1e-3)
        assert!((got - want).abs() < 1e-5, "{name}: {got}, transformers {want}");
        let theta = if name == "llama3-f32" { 500.0 } else { 5000.0 };
        assert_eq!((model.positions(), model.config().rope_theta), (64, theta));
        let tape = Tape::inference();
        // three biases in each of two layers, and two norms
        let count = match name {
            "llama-f32-tied" => 20,
            "qwen2-bf16" => 26,
            "qwen3-f32" => 25,
            _ => 21,
        };
        assert_eq!(model.leaves(&tape).len(), count, "{name}");
    }
}

/// A copy of a fixture in which a file is changed.
fn told(name: &str, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join(file);
    let before = fs::read(&path).unwrap();
    fs::write(&path, change(before)).unwrap();
    let Err(e) = Model::load(dir.path(), &Device::cpu(1).unwrap()) else {
        panic!("{file} of {name} is wrong and was read")
    };
    assert!(matches!(e, LoadError::Read { .. } | LoadError::Damaged { .. } | LoadError::Unfit { .. }));
    e.to_string()
}

fn swapped(from: &str, to: &str) -> impl FnOnce(Vec<u8>) -> Vec<u8> {
    let (from, to) = (from.to_string(), to.to_string());
    move |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(&from), "{from}");
        text.replacen(&from, &to, 1).into_bytes()
    }
}

#[test]
fn an_index_that_does_not_fit_its_files_is_told() {
    let (name, index) = ("llama-bf16-sharded", "model.safetensors.index.json");
    let line = "\"model.norm.weight\": \"model-00002-of-00003.safetensors\"";
    let text = fs::read_to_string(fixture(name).join(index)).unwrap();
    let line = text.lines().find(|l| l.contains("model.norm.weight")).map_or(line, |l| l.trim().trim_end_matches(','));
    let elsewhere = told(name, index, swapped(line, "\"model.norm.weight\": \"../model.safetensors\""));
    assert!(elsewhere.contains("names \"../model.safetensors\", which is no file beside it"), "{elsewhere}");
    let missing = told(name, index, swapped(line, "\"model.norm.weight\": \"model-00009-of-00003.safetensors\""));
    assert!(missing.contains("says that model-00009-of-00003.safetensors holds model.norm.weight, which"), "{missing}");
    let other = "\"model.layers.1.input_layernorm.weight\": \"model-00002-of-00003.safetensors\",";
    let unnamed = told(name, index, swapped(other, ""));
    assert!(unnamed.contains("says nothing of model.layers.1.input_layernorm.weight, which"), "{unnamed}");
    let extra = told(name, index, swapped(line, &format!("{line},\n\"a\": \"model-00001-of-00003.safetensors\"")));
    assert!(extra.contains("says that model-00001-of-00003.safetensors holds a, which it does not"), "{extra}");
    assert!(told(name, index, |_| b"{}".to_vec()).contains("weight_map"));
    let none = told(name, index, |_| b"{\"weight_map\": {}}".to_vec());
    assert!(none.contains("index.json: parameter model.embed_tokens.weight is missing"), "{none}");
    let file = "model-00003-of-00003.safetensors";
    assert!(told(name, file, |bytes| bytes[..bytes.len() - 2].to_vec()).contains(file));
}

#[cfg(unix)]
#[test]
fn weights_without_an_end_are_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("llama-f16").join("config.json"), dir.path().join("config.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("model.safetensors")).unwrap();
    let told = Model::load(dir.path(), &Device::cpu(1).unwrap()).map(|_| ()).unwrap_err().to_string();
    assert!(told.contains("model.safetensors: is a pipe or a device, expected a file"), "{told}");
}

#[test]
fn one_file_beside_an_index_has_to_hold_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("llama-bf16-sharded")).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    }
    let device = Device::cpu(1).unwrap();
    let load = || Model::load(dir.path(), &device).map_err(|e| e.to_string());
    let single = dir.path().join("model.safetensors");
    let all: Vec<(String, Tensor)> =
        load().unwrap().params().iter().map(|p| (p.name.clone(), p.value.clone())).collect();
    let write = |all: &[(String, Tensor)]| {
        let bytes: Vec<(&String, Vec<usize>, Vec<u8>)> = all
            .iter()
            .map(|(name, x)| {
                let bytes = x.as_slice::<f32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
                (name, x.shape().to_vec(), bytes)
            })
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        });
        fs::write(&single, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    write(&all);
    assert!(load().is_ok(), "the same numbers in another type");
    let mut other = all.clone();
    let name = other[3].0.clone();
    let mut numbers = other[3].1.to_vec::<f32>().unwrap();
    numbers[0] += 1.0;
    other[3].1 = Tensor::from_vec(&device, other[3].1.shape(), numbers).unwrap();
    write(&other);
    let told = load().err().unwrap();
    assert!(told.contains(&format!("leads to another {name}")) && told.contains("remove the one"), "{told}");
    write(&all[1..]);
    assert!(load().err().unwrap().contains(&format!("leads to {}, which model.safetensors does not have", all[0].0)));
    write(&all);
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).unwrap();
    let gone = load().err().unwrap();
    assert!(gone.contains("which have to be one model, but") && gone.contains("model-00002-of"), "{gone}");
}

/// Files of transformers before 4.32 (Llama 2) hold the frequencies of the angles beside the weights, in the type of the weights.
#[test]
fn frequencies_beside_the_weights_are_those_of_the_configuration_or_refused() {
    let with = |theta: f64, round: fn(f32) -> f32| {
        move |bytes: Vec<u8>| {
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let angles: Vec<u8> =
                (0..4).flat_map(|i| round(theta.powf(-f64::from(i) / 4.0) as f32).to_le_bytes()).collect();
            let mut all = file.tensors();
            for layer in 0..2 {
                let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![4], &angles).unwrap();
                all.push((format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"), view));
            }
            safetensors::serialize(all, None).unwrap()
        }
    };
    let bf16: fn(f32) -> f32 = |x| f32::from_bits((x.to_bits() + 0x8000) & 0xffff_0000);
    for round in [|x| x, bf16] {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read(fixture("llama-f16").join(name)).unwrap();
        fs::write(dir.path().join("config.json"), read("config.json")).unwrap();
        fs::write(dir.path().join("model.safetensors"), with(5000.0, round)(read("model.safetensors"))).unwrap();
        let device = Device::cpu(1).unwrap();
        let (here, plain) = (Model::load(dir.path(), &device), Model::load(&fixture("llama-f16"), &device));
        assert_eq!(loss(&here.unwrap()), loss(&plain.unwrap()));
    }
    let e = told("llama-f16", "model.safetensors", with(1e4, |x| x));
    assert!(e.contains("rotary_emb.inv_freq holds other rotary angles than the configuration describes"), "{e}");
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let infinite = |mut bytes: Vec<u8>| {
        let last = bytes.len() - 2;
        bytes[last..].copy_from_slice(&0x7c00u16.to_le_bytes());
        bytes
    };
    let e = told("llama-f16", "model.safetensors", infinite);
    assert!(e.contains("model.safetensors: model.") && e.contains("not finite"), "{e}");
}

#[test]
fn what_changes_the_arithmetic_is_refused_by_its_key() {
    let refused = |from: &str, to: &str, key: &str| {
        let e = told("llama-f16", "config.json", swapped(from, to));
        assert!(e.contains("config.json") && e.contains(key), "{e}");
    };
    refused(
        "\"rope_type\": \"default\"",
        "\"rope_type\": \"llama3\"",
        "factor is missing, which rope_type \"llama3\" needs",
    );
    refused("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"", "rope_type is \"yarn\"");
    refused("\"attention_bias\": false", "\"attention_bias\": true", "attention_bias is true");
    refused(
        "\"model_type\": \"llama\"",
        "\"model_type\": \"phi\"",
        "model_type is \"phi\", expected \"llama\", \"qwen2\"",
    );
    let qwen = told("llama-f16", "config.json", swapped("\"model_type\": \"llama\"", "\"model_type\": \"qwen3\""));
    assert!(qwen.contains("self_attn.q_norm.weight is missing"), "{qwen}");
    refused("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act is \"gelu\"");
    refused("\"use_cache\": true", "\"sliding_window\": 32", "sliding_window is 32, expected null or nothing");
    refused("\"use_cache\": true", "\"rope_interleaved\": true", "rope_interleaved is true, expected false or nothing");
    let used =
        told("qwen2-bf16", "config.json", swapped("\"use_sliding_window\": false", "\"use_sliding_window\": true"));
    assert!(used.contains("use_sliding_window is true, expected false"), "{used}");
    let slid = told("qwen3-f32", "config.json", swapped("\"full_attention\"", "\"sliding_attention\""));
    assert!(slid.contains("layer_types has \"sliding_attention\""), "{slid}");
    let other = told("llama-f16", "config.json", swapped("\"intermediate_size\": 48", "\"intermediate_size\": 40"));
    assert!(other.contains("has shape [48, 32], the configuration asks for [40, 32]"), "{other}");
    let tied = told("llama-f16", "config.json", swapped("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"));
    assert!(tied.contains("belongs to no parameter of the model"), "{tied}");
}
