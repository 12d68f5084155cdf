//! Where an export may be written.

use std::fs;

use dash_core::Device;
use dash_model::Model;
use safetensors::SafeTensors;

use crate::sandbox::{Sandbox, content, error_of};

#[test]
fn an_export_never_takes_the_place_of_anything_but_an_older_export() {
    let s = Sandbox::new();
    assert!(s.command(&[], &["log.tensorboard=false"]).output().unwrap().status.success());
    fs::create_dir(s.path("mine")).unwrap();
    fs::write(s.path("mine/notes.txt"), "precious").unwrap();
    let before = content(s.dir.path());
    let export = |out: &str| s.bin(&["export", "--checkpoint", "runs/test", "--out", out]);
    for (out, why) in [
        ("runs/test", "is a run"),
        ("runs/test/checkpoints/step-00000020", "is a checkpoint"),
        ("mine", "holds something else"),
        ("mine/notes.txt", "is a file"),
        ("..", "is no name"),
    ] {
        let text = error_of(&export(out), 2);
        assert!(text.contains(why), "{out}: {text}");
    }
    assert_eq!(content(s.dir.path()), before, "a refused export changes nothing");
    error_of(&export("hf"), 0);
    let first = content(&s.path("hf"));
    fs::write(s.path("hf/left-over.json"), "{}").unwrap();
    error_of(&export("hf/"), 0);
    assert_eq!(content(&s.path("hf")), first, "the older export is replaced whole");
    // a server under another user reads the weights
    use std::os::unix::fs::PermissionsExt;
    let mode = |name: &str| fs::metadata(s.path("hf").join(name)).unwrap().permissions().mode();
    assert_eq!(mode("model.safetensors"), mode("config.json"));
}

/// Another tokenizer of the same size writes other text without a word from the weights.
#[test]
fn a_tokenizer_that_did_not_train_the_model_is_refused_until_the_run_writes_its_own_anew() {
    let s = Sandbox::new();
    assert!(s.command(&[], &["log.tensorboard=false"]).output().unwrap().status.success());
    let path = s.path("runs/test/tokenizer.json");
    let own = fs::read(&path).unwrap();
    let mut other: serde_json::Value = serde_json::from_slice(&own).unwrap();
    let vocab = other["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
    vocab["a"] = b;
    vocab["b"] = a;
    fs::write(&path, other.to_string()).unwrap();
    let model = ["--model", "runs/test"];
    for command in [vec!["eval"], vec!["generate", "--prompt", "a", "--max-tokens", "2"], vec!["export", "--out", "hf"]]
    {
        let text = error_of(&s.bin(&[&command[..], &model].concat()), 2);
        assert!(text.contains("tokenizer.json: is not the tokenizer that the model was trained with"), "{text}");
    }
    assert!(!s.path("hf").exists());
    error_of(&s.command(&[], &["log.tensorboard=false"]).arg("--resume").output().unwrap(), 0);
    assert!(fs::read(&path).unwrap() == own);
    error_of(&s.bin(&["generate", "--prompt", "a", "--max-tokens", "2", "--model", "runs/test"]), 0);
}

/// The reader of exports in dash-model's examples.
#[path = "../../../model/examples/load_export.rs"]
#[allow(dead_code, reason = "the example's main is not called")]
mod load_export;

/// `Model::load` needs config.json and the weights alone, computes the logits that the export proves itself with, bit by bit, and has
/// the settings that the router was left with, which a schedule moved here.
#[test]
fn an_export_is_loaded_without_the_trainer() {
    for (attention, schedule) in
        [("{kind=\"dense\"}", ""), ("{kind=\"dash\",chunk_size=8}", "gamma"), ("{kind=\"nsa\",chunk_size=8}", "")]
    {
        let s = Sandbox::new();
        let (attention, gamma) = (format!("model.attention={attention}"), "router.gamma={from=1.0,to=3.7,steps=20}");
        let mut set = vec!["log.tensorboard=false", &attention];
        set.extend((schedule == "gamma").then_some(gamma));
        let trained = s.command(&[], &set).output().unwrap();
        assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
        error_of(&s.bin(&["export", "--model", "runs/test", "--out", "hf"]), 0);
        fs::create_dir(s.path("bare")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(s.path("hf").join(name), s.path("bare").join(name)).unwrap();
        }
        let model = Model::load(&s.path("bare"), &Device::cpu(2).unwrap()).unwrap();
        let bytes = fs::read(s.path("hf/parity.safetensors")).unwrap();
        let parity = SafeTensors::deserialize(&bytes).unwrap();
        let numbers = |name: &str| parity.tensor(name).unwrap().data().to_vec();
        let ids: Vec<u32> =
            numbers("ids").chunks_exact(8).map(|id| u32::from_le_bytes(id[..4].try_into().unwrap())).collect();
        let logits = model.logits(&model.ids(&ids, 1).unwrap()).unwrap().to_vec::<f32>().unwrap();
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(bytes == numbers("logits"), "{attention}");
        let continued = load_export::continued(&s.path("hf"), &ids[..5], 3).unwrap();
        assert_eq!((continued.len(), &continued[..5]), (8, &ids[..5]), "{attention}");
    }
}
