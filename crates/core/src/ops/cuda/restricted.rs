//! What threads of a kernel exchange through memory must not go through a pointer that is `__restrict__`. To the compiler no barrier
//! changes what such a pointer names, so it may read an element before the barrier that orders the read after another thread's
//! write. It did: `summary_forward` with chunks of 4 and 8 read the last score of a chunk from what the memory held before.
//!
//! Read off the PTX, in which the compiler has made its choice: no parameter may be both read and written by a kernel that has a
//! barrier, but those below, of which each thread reads only what it has written itself.

use std::collections::HashMap;

use crate::device::cuda::Unit;

/// (kernel, parameter): why that parameter may be.
const OWN: [(&str, &str, &str); 3] = [
    ("attention_rows", "dbias", "the two halves of a chunk of 128 keys are added by the lane that has the token"),
    ("entmax_forward", "p", "a thread solves, overwrites and reads its own columns"),
    ("scan_sums", "sums", "a thread overwrites the sum that it has read"),
];

/// What a restricted parameter of a unit's kernels may carry from thread to thread, a line each; counts uses of [`OWN`] in `used`.
pub fn faults(unit: &Unit, ptx: &str, used: &mut [bool; OWN.len()]) -> Vec<String> {
    let mut faults = Vec::new();
    for (kernel, parameter) in exchanged(unit.source.text, ptx) {
        match OWN.iter().position(|own| (own.0, own.1) == (&kernel, &parameter)) {
            Some(i) => used[i] = true,
            None => faults.push(format!(
                "{}: {kernel} has a barrier and both reads and writes {parameter}, which is restricted: exchange it in registers or \
                 shared memory, drop __restrict__, or tell why in restricted.rs",
                unit.key()
            )),
        }
    }
    faults
}

/// Restricted parameters that a kernel with a barrier reads and writes: (kernel, parameter).
fn exchanged(source: &str, ptx: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in ptx.split(".entry ").skip(1) {
        let kernel = entry.split('(').next().unwrap_or_default().trim();
        let parameters = parameters(source, kernel);
        let (read, written, barrier) = uses(entry);
        let both = |i: usize| barrier && (read & written) >> i & 1 == 1;
        let names = parameters.iter().enumerate().filter(|(i, (_, restricted))| both(*i) && *restricted);
        found.extend(names.map(|(_, (name, _))| (kernel.to_string(), name.clone())));
    }
    found
}

/// Name of every parameter of a kernel, and whether it is restricted.
fn parameters(source: &str, kernel: &str) -> Vec<(String, bool)> {
    let head = source.split(&format!("\n{kernel}(")).nth(1).or_else(|| source.split(&format!(" {kernel}(")).nth(1));
    let list = head.and_then(|text| text.split(')').next()).unwrap_or_else(|| panic!("{kernel} stands in its source"));
    let of = |p: &str| (p.rsplit([' ', '*']).next().unwrap_or_default().to_string(), p.contains("__restrict__"));
    list.split(',').map(|p| of(p.trim())).collect()
}

/// Parameters that are read through the path that sees writes, and that are written, a bit each; whether there is a barrier.
fn uses(body: &str) -> (u64, u64, bool) {
    let lines: Vec<&str> = body.lines().map(|line| line.trim().trim_end_matches(';')).collect();
    let mut from: HashMap<&str, u64> = HashMap::new();
    let (mut read, mut written) = (0, 0);
    // a loop carries an address backwards, so until nothing changes
    loop {
        let before: u32 = from.values().map(|bits| bits.count_ones()).sum();
        for line in &lines {
            let line =
                if line.starts_with('@') { line.split_once(' ').map_or("", |(_, rest)| rest.trim()) } else { line };
            let Some((op, operands)) = line.split_once(|c: char| c.is_whitespace()) else { continue };
            let registers: Vec<&str> = operands
                .split([',', ' ', '[', ']', '{', '}', '+', '\t'])
                .filter(|word| word.starts_with("%r"))
                .collect();
            let origin =
                |names: &[&str]| names.iter().fold(0, |bits, name| bits | from.get(name).copied().unwrap_or(0));
            let address = || {
                origin(
                    &operands
                        .split('[')
                        .nth(1)
                        .map(|a| vec![a.split([']', '+']).next().unwrap_or("")])
                        .unwrap_or_default(),
                )
            };
            match op.split('.').next().unwrap_or_default() {
                "ld" if op.starts_with("ld.param") => {
                    let number = operands.split("_param_").nth(1).and_then(|n| n.split([']', '+']).next());
                    if let (Some(to), Some(Ok(number))) = (registers.first(), number.map(str::parse::<u32>)) {
                        *from.entry(to).or_default() |= 1u64.checked_shl(number).unwrap_or(0);
                    }
                }
                "ld" if !op.contains(".nc") => read |= address(),
                "ld" => {}
                "st" => written |= address(),
                // an atomic operation reads what is there when it writes
                "atom" | "red" => written |= address(),
                _ => {
                    if let Some((to, rest)) = registers.split_first() {
                        let bits = origin(rest);
                        *from.entry(to).or_default() |= bits;
                    }
                }
            }
        }
        if before == from.values().map(|bits| bits.count_ones()).sum::<u32>() {
            break;
        }
    }
    (read, written, lines.iter().any(|line| line.contains("bar.") || line.contains("barrier.")))
}

/// The form that `summary_forward` had.
static BEFORE: crate::device::cuda::Source = crate::device::cuda::Source {
    name: "restricted",
    text: "
extern \"C\" __global__ void through_memory(const float* __restrict__ x, float* __restrict__ kept, float* __restrict__ out) {
    const int lane = threadIdx.x % 32;
    float sum = 0;
    for (int j = 0; j < 4; j++) {
        const float z = warp_sum(x[j * 32 + lane]);
        if (lane == j) kept[j] = z;
    }
    __syncwarp();
    for (int j = 0; j < 4; j++) sum += expf(kept[j]);
    out[lane] = sum;
}
extern \"C\" __global__ void own(const float* __restrict__ x, float* __restrict__ kept, float* __restrict__ out) {
    __shared__ float scratch[32];
    kept[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = block_sum(kept[threadIdx.x + 1024], scratch);
}",
};

#[test]
fn an_exchange_through_a_restricted_pointer_is_found() {
    use crate::device::cuda::Compiler;
    let compiler = match Compiler::open(&super::testing::folders()) {
        Ok(compiler) => compiler,
        Err(e) => return eprintln!("not run: no NVRTC. {e}"),
    };
    let unit = Unit::new(&BEFORE, []);
    let found = exchanged(BEFORE.text, &compiler.compile(&unit, "sm_90a").unwrap().ptx);
    let named = |kernel: &str| (kernel.to_string(), "kept".to_string());
    assert_eq!(found, [named("through_memory"), named("own")]);
}

/// Kernels that are launched early: those of one token of generation.
const EARLY: [&str; 6] =
    ["decode_combine", "decode_combine_few", "decode_split", "route_products", "route_scores", "route_solve"];

/// Of the kernels of a source that are [`EARLY`], or wait: those that read something before they wait, and the names of all. Nothing may be read through a
/// restricted pointer, because a compiler may move such a load before the wait.
fn early(source: &str) -> (Vec<String>, Vec<String>) {
    let (mut faults, mut names) = (Vec::new(), Vec::new());
    for kernel in source.split("extern \"C\" __global__").skip(1) {
        let (head, body) = kernel.split_once('{').unwrap_or((kernel, ""));
        // what stands before the parameters: bounds of the launch, and the name
        let before = head.split_once("const ").map_or(head, |(before, _)| before);
        let name = before.trim_end().trim_end_matches('(').rsplit(|c: char| c.is_whitespace() || c == ')').next();
        let name = name.unwrap_or_default().to_string();
        let waits = body.trim_start().starts_with("begin_early();");
        if !(waits || EARLY.contains(&&name[..])) {
            continue;
        }
        let reads = head.split(',').any(|p| p.contains("const ") && p.contains("__restrict__"));
        if reads || !waits {
            faults.push(name.clone());
        }
        names.push(name);
    }
    (faults, names)
}

#[test]
fn kernels_that_begin_early_wait_before_they_read() {
    let mut found = std::collections::BTreeSet::new();
    for unit in super::units() {
        let (faults, names) = early(unit.source.text);
        assert_eq!(faults, [""; 0], "{}", unit.key());
        found.extend(names);
    }
    assert!(found.iter().eq(&EARLY), "{found:?} wait or are launched early");
    let of = |name: &str, parameter: &str, body: &str| {
        let other = "extern \"C\" __global__ void other(const float* __restrict__ x) {\n    x[0];\n}\n";
        early(&format!(
            "{other}extern \"C\" __global__ void __launch_bounds__(128, 4)\n{name}({parameter}) {{\n    {body}\n}}"
        ))
        .0
    };
    assert_eq!(of("f", "const float* x, float* __restrict__ y", "begin_early();"), [""; 0]);
    assert_eq!(of("f", "const float* __restrict__ x", "begin_early();"), ["f"]);
    assert_eq!(of("route_solve", "const float* x", "const float a = *x;\n    begin_early();"), ["route_solve"]);
}
