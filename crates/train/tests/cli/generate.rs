//! Text that comes as it is written, prompts from standard input, and what ends it early.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::sandbox::{Sandbox, error_of, kill, succeeded};

/// `train generate --model runs/test ARGS`, reading `input` where there is some.
fn started(s: &Sandbox, args: &[&str], input: Option<&[u8]>) -> Child {
    let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
    c.args(["generate", "--model", "runs/test"]).args(args).current_dir(s.dir.path());
    c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    if let Some(input) = input {
        let mut stdin = child.stdin.take().unwrap();
        // a request that is refused reads nothing
        let _ = stdin.write_all(input);
    }
    child
}

#[test]
fn prompts_come_from_standard_input_and_the_cache_changes_no_token() {
    let s = Sandbox::new();
    s.train("test", &[], false);
    let run = |args: &[&str], input: &[u8]| {
        let o = started(&s, args, Some(input)).wait_with_output().unwrap();
        succeeded(&o);
        String::from_utf8(o.stdout).unwrap()
    };
    // longer than the 48 tokens that the model reads at once
    let long = ["--prompt", "the router of the chunk", "--max-tokens", "70"];
    let text = s.out(&[&["generate", "--model", "runs/test"], &long[..]].concat());
    assert!(text.starts_with("the router of the chunk") && text.ends_with('\n') && text.len() > 80);
    assert_eq!(run(&[&long[..], &["--no-cache"]].concat(), b""), text);
    assert_eq!(run(&["--stdin", "--max-tokens", "70"], b"the router of the chunk\n"), text);

    let lines = run(&["--stdin=lines", "--json", "--max-tokens", "9"], b"the router\n\nof two words\n");
    let objects: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let prompts: Vec<&str> = objects.iter().map(|o| o["prompt"].as_str().unwrap()).collect();
    assert_eq!(prompts, ["the router", "", "of two words"]);
    let alone = run(&["--prompt", "of two words", "--json", "--max-tokens", "9"], b"");
    let alone: Value = serde_json::from_str(&alone).unwrap();
    assert_eq!((&alone["text"], &alone["tokens"]), (&objects[2]["text"], &objects[2]["tokens"]));
    assert_eq!(alone["tokens"].as_array().unwrap().len(), 9);
    assert_eq!((alone["stop"].as_str(), alone["seed"].as_u64()), (Some("max-tokens"), Some(0)));

    let told = |args: &[&str], input: &[u8], status| {
        error_of(&started(&s, args, Some(input)).wait_with_output().unwrap(), status)
    };
    assert!(told(&["--stdin=lines"], b"fine\n\xff\n", 2).contains("line 2: byte 1 is not valid UTF-8"));
    assert!(told(&[], b"", 2).contains("--prompt <PROMPT>|--stdin"));
    let cut = told(&["--prompt", &"chunk ".repeat(90), "--max-tokens", "1"], b"", 0);
    assert!(cut.contains("the model was trained on 48 and reads the last ones"), "{cut}");
}

#[test]
fn a_reader_that_goes_and_ctrl_c_end_it_quietly() {
    let s = Sandbox::new();
    s.train("test", &[], false);
    let endless = ["--prompt", "the router", "--max-tokens", "1000000000"];
    // what has been read so far arrives before the text is done
    let mut child = started(&s, &endless, None);
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0; 40];
    stdout.read_exact(&mut first).unwrap();
    assert!(first.starts_with(b"the router"));
    drop(stdout);
    assert_eq!(error_of(&child.wait_with_output().unwrap(), 0), "");

    let mut child = started(&s, &endless, None);
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    let rest = std::thread::spawn(move || {
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).unwrap();
        rest
    });
    kill(&mut child, "INT");
    assert_eq!(error_of(&child.wait_with_output().unwrap(), 130), "");
    assert!(rest.join().unwrap().ends_with(b"\n"));

    // while it waits for a prompt
    let mut child = started(&s, &["--stdin=lines", "--max-tokens", "1"], None);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"the\n").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut first[..3]).unwrap();
    kill(&mut child, "INT");
    assert_eq!(error_of(&child.wait_with_output().unwrap(), 130), "");
    drop(stdin);
}
