//! A file above 400 lines says why at its head, a function above 60 in the comment above it: "Above 400 lines: ...".

use std::fs;
use std::path::Path;

/// Folders with the project's sources.
const FOLDERS: [&str; 3] = ["crates", "fuzz", "oracle"];
/// Lines at the head of a file in which its reason stands.
const HEAD: usize = 12;

/// Texts of all sources below a folder, with their paths.
fn read(folder: &Path, into: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let extension = path.extension().and_then(|e| e.to_str());
        if path.is_dir() && !path.ends_with("target") {
            read(&path, into);
        } else if matches!(extension, Some("rs" | "cu" | "cuh" | "py")) {
            into.push((path.display().to_string(), fs::read_to_string(&path).unwrap()));
        }
    }
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// Whether a function begins with this line.
fn begins(language: &str, line: &str, before: &str) -> bool {
    let text = line.trim_start();
    match language {
        "rs" => {
            let is_modifier = |word: &str| {
                ["pub", "default", "async", "const", "unsafe", "extern"].contains(&word) || word == "\"C\""
            };
            let scope = |word: &str| word.starts_with("pub(") || word.ends_with(')') && !word.contains('(');
            text.split(' ').find(|word| !is_modifier(word) && !scope(word)) == Some("fn")
        }
        "py" => text.starts_with("def ") || text.starts_with("async def "),
        // at the margin; in a struct behind one of our words
        _ if indent(line) > 0 => ["METHOD ", "INLINE ", "template "].iter().any(|word| text.starts_with(word)),
        _ => {
            let is_other = text.is_empty() || text.starts_with(['/', '#', '}']) || text.starts_with("struct ");
            let is_middle = before.starts_with("extern ") || before.starts_with("template ");
            !is_other
                && !is_middle
                && (text.contains('(') || text.starts_with("extern ") || text.starts_with("template "))
        }
    }
}

/// Lines of the function that begins with the first line.
fn length(language: &str, lines: &[&str]) -> usize {
    let margin = indent(lines[0]);
    if language == "py" {
        let is_outside = |l: &&str| !l.trim().is_empty() && indent(l) <= margin && !l.trim_start().starts_with(')');
        let end = 1 + lines[1..].iter().position(is_outside).unwrap_or(lines.len() - 1);
        return lines[..end].iter().rposition(|l| !l.trim().is_empty()).unwrap_or(0) + 1;
    }
    if lines[0].ends_with([';', '}']) {
        return 1;
    }
    // a signature alone ends with a semicolon
    let is_end = |l: &&str| indent(l) == margin && matches!(l.trim(), "}" | "};");
    let is_bare = |l: &&str| indent(l) == margin && l.trim_start().starts_with(')') && l.ends_with(';');
    lines.iter().position(|l| is_end(l) || is_bare(l)).map_or(lines.len(), |end| end + 1)
}

/// Whether the comments and attributes right above a line have a reason.
fn has_reason(above: &[&str]) -> bool {
    let of_function = above.iter().rev().take_while(|l| l.trim_start().starts_with(['/', '#', '@']));
    of_function.into_iter().any(|l| l.contains("Above 60 lines: "))
}

/// What is too long without a reason, and how many functions there are.
fn faults(path: &str, text: &str) -> (Vec<String>, usize) {
    let language = path.rsplit('.').next().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut out = Vec::new();
    if lines.len() > 400 && !lines[..HEAD].iter().any(|l| l.contains("Above 400 lines: ")) {
        out.push(format!("{path} has {} lines and no reason among the first {HEAD}", lines.len()));
    }
    let starts = (0..lines.len()).filter(|&i| begins(language, lines[i], if i > 0 { lines[i - 1] } else { "" }));
    let starts: Vec<usize> = starts.collect();
    for &i in &starts {
        let length = length(language, &lines[i..]);
        if length > 60 && !has_reason(&lines[..i]) {
            out.push(format!("{path}:{} is a function of {length} lines without a reason above it", i + 1));
        }
    }
    (out, starts.len())
}

#[test]
fn what_is_long_says_why() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut sources = Vec::new();
    FOLDERS.iter().for_each(|folder| read(&root.join(folder), &mut sources));
    for (language, files, least) in [("rs", 250, 2000), ("cu", 20, 60), ("py", 6, 60)] {
        let of: Vec<_> = sources.iter().filter(|(path, _)| path.ends_with(&format!(".{language}"))).collect();
        let functions: usize = of.iter().map(|(path, text)| faults(path, text).1).sum();
        assert!(of.len() >= files && functions >= least, "{} files of {language}, {functions} functions", of.len());
    }
    let all: Vec<String> = sources.iter().flat_map(|(path, text)| faults(path, text).0).collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn a_long_function_and_a_long_file_are_found_in_every_language() {
    let body = |lines: usize, indent: &str| format!("{indent}x = 1;\n").repeat(lines);
    let long = [
        ("a.rs", "    pub(crate) const fn f(\n        a: u8,\n    ) -> u8 {\n", "        ", "    }\n", "    // "),
        ("a.rs", "pub unsafe extern \"C\" fn f() {\n", "    ", "}\n", "/// "),
        ("a.cu", "extern \"C\" __global__ void __launch_bounds__(32)\nf(int a,\n  int b) {\n", "    ", "}\n", "// "),
        ("a.cu", "template <int N>\nINLINE float f(int a) {\n", "    ", "}\n", "// "),
        ("a.cuh", "    METHOD int f() const {\n", "        ", "    }\n", "    // "),
        ("a.py", "    def f(\n        a,\n    ):\n", "        ", "\n\n", "    # "),
    ];
    for (path, head, inside, end, comment) in long {
        let signature = head.lines().count() + end.trim().lines().count();
        let of = |lines: usize, above: &str| faults(path, &format!("{above}{head}{}{end}", body(lines, inside)));
        assert_eq!(of(60 - signature, ""), (Vec::new(), 1), "{head}");
        assert_eq!(of(61 - signature, "").0.len(), 1, "{head}");
        assert!(of(61 - signature, "").0[0].contains(":1 is a function of 61 lines"), "{head}");
        assert_eq!(of(61 - signature, &format!("{comment}Above 60 lines: it is so.\n")), (Vec::new(), 1), "{head}");
        assert_eq!(of(61 - signature, &format!("{comment}Above 60 lines: of another.\n\n")).0.len(), 1, "{head}");
        let file = |lines: usize, above: &str| faults(path, &format!("{above}{}", "\n".repeat(lines))).0.len();
        assert_eq!((file(400, ""), file(401, ""), file(400, "// Above 400 lines: it is so.\n")), (0, 1, 0));
    }
}
