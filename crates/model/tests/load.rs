//! A folder with `config.json` and `model.safetensors` becomes a model, or is refused with the reason.

use std::fs;
use std::path::Path;

use dash_core::{DType, Device};
use dash_model::{Dash, Dense, Model, ModelConfig, TopK};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const VOCAB: usize = 11;

fn written(folder: &Path, config: &ModelConfig, change: impl Fn(&mut Value)) -> Model {
    let model = Model::new(config.clone(), VOCAB, 24, 1, &Device::cpu(1).unwrap(), DType::F32).unwrap();
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let all: Vec<_> = model.params().iter().map(|p| (&p.name, &p.value)).collect();
    let data: Vec<_> = all.iter().map(|(_, x)| bytes(x.as_slice().unwrap())).collect();
    let views = all
        .iter()
        .zip(&data)
        .map(|((name, x), data)| (name.as_str(), TensorView::new(Dtype::F32, x.shape().to_vec(), data).unwrap()));
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let mut json = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": config.width, "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": 24, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings, "dashlab": {"attention": config.attention},
    });
    change(&mut json);
    fs::write(folder.join("config.json"), json.to_string()).unwrap();
    model
}

#[test]
fn what_was_written_is_what_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let plain = ModelConfig::new(2, 16, (4, 2), 24);
    let attentions = [Dense {}.into(), TopK { chunk_size: 4, ..TopK::default() }.into(), Dash::default().into()];
    for (attention, tie_embeddings) in attentions.into_iter().flat_map(|a| [(a, true), (a, false)]) {
        let config = ModelConfig { attention, tie_embeddings, rope_theta: 5e5, ..plain.clone() };
        let model = written(folder.path(), &config, |_| {});
        let loaded = Model::load(folder.path(), &Device::cpu(1).unwrap()).unwrap();
        assert_eq!((loaded.config(), loaded.positions(), loaded.vocab()), (&config, 24, VOCAB));
        for (a, b) in model.params().iter().zip(loaded.params().iter()) {
            assert_eq!((&a.name, a.value.to_f64().unwrap()), (&b.name, b.value.to_f64().unwrap()));
        }
    }
}

/// The factor on the scores that a controller ended with has no short decimal form, and must come back to the last bit.
#[test]
fn every_number_comes_back_to_the_last_bit() {
    let mut rng = dash_core::rng::Rng::new(3);
    for _ in 0..10_000 {
        let gamma = rng.normal().abs().exp();
        let config = Dash { gamma, ..Dash::default() };
        let text = json!({"attention": dash_model::Attention::from(config)}).to_string();
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["attention"]["gamma"].as_f64().unwrap().to_bits(), gamma.to_bits(), "{gamma} in {text}");
    }
}

#[test]
fn a_plain_llama_is_dense_and_may_store_its_embedding_twice() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig { attention: Dense {}.into(), ..ModelConfig::new(1, 16, (2, 2), 24) };
    written(folder.path(), &config, |json| {
        for key in ["dashlab", "num_key_value_heads", "rope_theta"] {
            json.as_object_mut().unwrap().remove(key);
        }
        json["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
        json["rope_scaling"] = Value::Null;
    });
    assert_eq!(Model::load(folder.path(), &Device::cpu(1).unwrap()).unwrap().config(), &config);
}

#[test]
fn an_output_of_its_own_is_not_dropped_where_embeddings_are_tied() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig { attention: Dense {}.into(), ..ModelConfig::new(1, 16, (2, 2), 24) };
    let untied = ModelConfig { tie_embeddings: false, ..config };
    written(folder.path(), &untied, |json| json["tie_word_embeddings"] = json!(true));
    let told = Model::load(folder.path(), &Device::cpu(1).unwrap()).map(|_| ()).unwrap_err().to_string();
    assert!(told.contains("lm_head.weight is not model.embed_tokens.weight, though the configuration ties"), "{told}");
}

#[test]
fn what_it_does_not_compute_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::new(1, 16, (2, 1), 24);
    let refused = |change: &dyn Fn(&mut Value), expected: &str| {
        written(folder.path(), &config, change);
        let told = Model::load(folder.path(), &Device::cpu(1).unwrap()).map(|_| ()).unwrap_err().to_string();
        assert!(told.starts_with(&folder.path().display().to_string()) && told.contains(expected), "{told}");
    };
    refused(
        &|json| json["model_type"] = json!("mistral"),
        "model_type is \"mistral\", expected \"llama\", \"qwen2\", \"qwen3\" or \"dashlab\"",
    );
    refused(&|json| json["hidden_act"] = json!("gelu"), "hidden_act is \"gelu\", expected \"silu\"");
    refused(&|json| json["rope_scaling"] = json!({"factor": 8}), "rope_type is left out with factor 8, expected");
    refused(&|json| json["rope_parameters"] = json!({"rope_type": "llama3"}), "factor is missing");
    let nsa = |json: &mut Value| {
        json["dashlab"] = json!({"attention": {"kind": "nsa"}, "qk_norm": true});
    };
    refused(&nsa, "model.qk_norm: means nothing to keys and values that nsa's other branches have");
    refused(&|json| json["mlp_bias"] = json!(true), "mlp_bias is true, expected false");
    let unnamed = |json: &mut Value| {
        json["model_type"] = json!("dashlab");
        json.as_object_mut().unwrap().remove("dashlab");
    };
    refused(&unnamed, "there is no dashlab.attention");
    refused(&|json| json["dashlab"]["attention"]["kind"] = json!("dense"), "means nothing to kind \"dense\"");
    refused(&|json| json["num_key_value_heads"] = json!(3), "model.kv_heads: 3 does not divide heads = 2");
    refused(&|json| json["hidden_size"] = json!(32), "has shape");
    refused(&|json| json["num_hidden_layers"] = json!(2), "is missing");
    refused(&|json| json["vocab_size"] = json!(u64::MAX), "config.json");
    let dense = |json: &mut Value| json["dashlab"]["attention"] = json!({"kind": "dense"});
    refused(&dense, "belongs to no parameter of the model that the configuration describes");
    let positions = |n: u64| move |json: &mut Value| json["max_position_embeddings"] = json!(n);
    for n in [0, 1 << 40, u64::MAX] {
        refused(&positions(n), &format!("max_position_embeddings is {n}, expected 1 to"));
    }
    written(folder.path(), &config, |_| {});
    fs::write(folder.path().join("model.safetensors"), "{").unwrap();
    let told = |what: &str| {
        let told = Model::load(folder.path(), &Device::cpu(1).unwrap()).map(|_| ()).unwrap_err().to_string();
        assert!(told.contains(what), "{told}");
    };
    told("model.safetensors is damaged");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    told("holds no model.safetensors and no model.safetensors.index.json");
    fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    told("pytorch_model.bin is not read: transformers writes safetensors");
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    told("model.safetensors cannot be read");
    fs::remove_dir(folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
        .unwrap();
    told("git lfs pull");
    fs::write(folder.path().join("config.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
        .unwrap();
    told("config.json: holds a pointer of Git LFS");
    fs::write(folder.path().join("config.json"), "{\"model_type\": 3}").unwrap();
    told("config.json is damaged");
}
