//! Where an export may be written.

use std::fs;

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
