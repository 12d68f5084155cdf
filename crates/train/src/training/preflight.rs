//! What a run will cost, printed before it starts.
//! Above 400 lines: the estimate, what is refused by it and what is printed of it read one set of counts.

use std::sync::Arc;
use std::time::Instant;

use dash_core::device::cpu_multiplies_bf16;
use dash_core::ops::attention::cuda::why_whole_rows;
use dash_core::{DType, Device, Tape, Tensor, ops};
use dash_data::{PackedEpoch, Shard};
use dash_model::{Compute, Group, Model, flops, parameters, parameters_in};

use super::limits;
use super::optim::rule;
use super::pace::peak;
use crate::config::{Config, DeviceName, word};
use crate::console::tell;
use crate::failure::{Failure, Result};

/// Share of the measured matrix-product rate that a whole step reaches: what this trainer measures on bench-cpu.toml.
const STEP_EFFICIENCY: f64 = 0.75;

/// The same on a GPU: what gpu-small.toml measures with dense attention; small models are bound by the launches and take longer.
const GPU_EFFICIENCY: f64 = 0.2;

/// Bytes of the program itself, its threads and the scratch memory of their tasks: measured, 16 to 20 MB.
const PROCESS: f64 = 18e6;

/// Bytes of a card that are taken before a model is: workspace of the products, compiled kernels.
const GPU_PROCESS: f64 = 300e6;

/// Scalars of the optimiser's state.
fn optimizer_state(config: &Config) -> f64 {
    let (c, vocab, rule) = (&config.model, config.data.vocab_size, rule(config.optim.kind));
    let of = |group| {
        let count = parameters_in(c, vocab, group).map_or(f64::INFINITY, |n| n as f64);
        rule.slots(group).len() as f64 * count
    };
    [Group::Embedding, Group::Matrix, Group::Vector].map(of).iter().sum()
}

/// Bytes that a training process needs at its peak: weights, gradients and the optimiser's state, and what the tape keeps for backward.
pub fn memory_bytes(config: &Config, params: usize) -> f64 {
    let m = &config.model;
    let tokens = (config.data.seq_len * config.data.batch_size) as f64;
    // beyond what counts of elements can say
    if tokens * (m.width + m.ffn) as f64 > 1e18 {
        return f64::INFINITY;
    }
    // gate and up are kept in panels of 32 features
    let (c, f) = (m.width as f64, m.ffn.next_multiple_of(32) as f64);
    let (h, g, d) = (m.heads as f64, m.kv_heads as f64, m.head_dim as f64);
    // Kept per token and layer: block input and its norm, q k v before rope is freed, q k after, attention output and
    // lse, residual, its norm, gate, up.
    let before_norm = if m.qk_norm { (h + g) * d } else { 0.0 };
    let layer = 4.0 * c + 2.0 * h * d + 2.0 * g * d + h + 2.0 * f + before_norm;
    let own = m.attention.cost(m, config.data.seq_len).kept;
    let logits = 1024.0f64.min(tokens) * config.data.vocab_size as f64;
    let head = 2.0 * tokens * c + config.data.vocab_size as f64 * c;
    // the feed-forward layer with the gradient that enters it, or attention
    let ffn = tokens * c + ops::swiglu_scratch(config.data.seq_len * config.data.batch_size, m.width, m.ffn) as f64;
    let backward = ffn.max(tokens * (4.0 * h * d + 4.0 * g * d));
    // with recomputation: every block's input, and one block in full
    let layers = m.layers as f64;
    let kept = if m.recompute { layers * c + layer + own } else { layers * (layer + own) };
    // sums of earlier micro-batches beside the gradients of the running one
    let sums = (super::accumulate::held(config.data.grad_accum) * params) as f64;
    // the ids of every micro-batch, inputs and targets, and what holds them
    let ids = config.data.grad_accum as f64 * (8.0 * tokens + 96.0);
    // documents that are taken apart lie beside what they are taken from, and of the many lengths of their buffers few meet one that waits: measured
    // 1.8 to 2.4 times, within some hundred updates
    let apart = if config.data.document_mask { 2.0 } else { 1.0 };
    let activations = apart * (tokens * kept + logits + head + backward);
    PROCESS + ids + 4.0 * (2.0 * params as f64 + optimizer_state(config) + sums + activations)
}

/// Refuses a run that this machine cannot hold, before anything is allocated, prepared or written; with `force` it only warns.
/// `at_once` such runs share the machine.
///
/// # Errors
/// A wrong request that says what is needed, what is there, and the largest value that fits.
pub fn check_fits(config: &Config, at_once: usize, force: bool) -> Result<()> {
    let params = parameters(&config.model, config.data.vocab_size).map_err(Failure::request)?;
    let memory = match config.run.device_name().map_err(Failure::request)? {
        DeviceName::Cpu => {
            check_compute(config.model.compute, cpu_multiplies_bf16())?;
            too_little_memory(config, params, at_once)
        }
        // the card is asked when it is open: `check_fits_gpu`
        DeviceName::Cuda(_) => None,
    };
    let complaints = [memory, too_little_disk(config, params)];
    for what in complaints.into_iter().flatten() {
        refuse(&what, force)?;
    }
    let warmup = config.optim.warmup_steps;
    if warmup > config.run.steps {
        tell!(
            "warning: optim.warmup_steps = {warmup} is longer than the run of {} updates: the learning rate ends at {:.1} % of optim.lr",
            config.run.steps,
            100.0 * config.run.steps as f64 / warmup as f64
        );
    }
    Ok(())
}

/// Refuses steps that the memory cannot hold, of a command that writes nothing. A card refuses by itself, op by op.
///
/// # Errors
/// As [`check_fits`].
pub fn check_memory(config: &Config) -> Result<()> {
    let params = parameters(&config.model, config.data.vocab_size).map_err(Failure::request)?;
    match config.run.device_name().map_err(Failure::request)? {
        DeviceName::Cpu => too_little_memory(config, params, 1).map_or(Ok(()), |what| Err(Failure::request(what))),
        DeviceName::Cuda(_) => Ok(()),
    }
}

/// Refuses a run that the GPU cannot hold, before its data is prepared; with `force` it only warns. `at_once` such runs share the
/// card. On a CPU there is nothing to ask: [`check_fits`].
///
/// # Errors
/// A wrong request that says what is needed, what is there, and the largest value that fits.
pub fn check_fits_gpu(config: &Config, device: &Device, at_once: usize, force: bool) -> Result<()> {
    let gpu = match device {
        Device::Cpu(_) => return Ok(()),
        Device::Cuda(gpu) => gpu,
    };
    let params = parameters(&config.model, config.data.vocab_size).map_err(Failure::request)?;
    let have = gpu.free_memory()? as f64 / at_once as f64;
    let of = Room { have, at_once, place: format!("of {device}"), need: gpu_memory_bytes };
    of.too_little(config, params).map_or(Ok(()), |what| refuse(&what, force))
}

fn refuse(what: &str, force: bool) -> Result<()> {
    if !force {
        return Err(Failure::request(format!("{what}. --force starts it anyway")));
    }
    tell!("warning: {what}");
    Ok(())
}

/// Bytes of the card's memory that a run needs at its peak: weights with their rounded copies, gradients and the optimiser's state, and
/// what the tape keeps for backward.
pub fn gpu_memory_bytes(config: &Config, params: usize) -> f64 {
    let m = &config.model;
    let tokens = (config.data.seq_len * config.data.batch_size) as f64;
    let (c, f, vocab) = (m.width as f64, m.ffn as f64, config.data.vocab_size as f64);
    let (h, g, d) = (m.heads as f64, m.kv_heads as f64, m.head_dim as f64);
    // of an operand: bf16, or f32
    let (narrow, weight) = match m.compute {
        Compute::Bf16 => (2.0, 6.0),
        Compute::F32 => (4.0, 4.0),
    };
    // Kept per token and layer: block input, residual; operands: both norms, q, k, v, attention output, gate, up; lse.
    let own = 4.0 * m.attention.cost(m, config.data.seq_len).kept;
    let before_norm = if m.qk_norm { 4.0 * (h + g) * d } else { 0.0 };
    let layer = 8.0 * c + narrow * (2.0 * c + 2.0 * (h + g) * d + 2.0 * f) + 4.0 * h + own + before_norm;
    let layers = m.layers as f64;
    // weights that are multiplied together lie side by side; rounded ones are counted with the weights
    let joined = if narrow == 4.0 { layers * c * ((h + 2.0 * g) * d + 2.0 * f) * narrow } else { 0.0 };
    let kept = if m.recompute { 4.0 * layers * c + layer } else { layers * layer };
    let logits = 4096.0f64.min(tokens) * vocab * (4.0 + narrow);
    let head = tokens * c * (8.0 + narrow) + 4.0 * vocab * c;
    // the feed-forward layer: dh, dgate, dup, h, dx and dy in both forms
    let backward = tokens * (4.0 * narrow * f + (8.0 + narrow) * c);
    let state = (weight + 4.0) * params as f64 + 4.0 * optimizer_state(config);
    let sums = 4.0 * (super::accumulate::held(config.data.grad_accum) * params) as f64;
    GPU_PROCESS + state + joined + sums + tokens * kept + logits.max(backward) + head
}

/// A run that asked for bf16 must not train in f32 without a word.
fn check_compute(compute: Compute, cpu_can: bool) -> Result<()> {
    if compute == Compute::Bf16 && !cpu_can {
        return Err(Failure::request(
            "model.compute: this processor does not multiply bf16 (that takes AVX512_BF16: AMD Zen 4, Intel Cooper Lake or Sapphire \
             Rapids, and later); use model.compute = \"f32\"",
        ));
    }
    Ok(())
}

/// A number of tokens for people: as many digits as it needs.
pub fn count(n: f64) -> String {
    match n {
        n if n < 1e4 => format!("{n:.0}"),
        n if n < 1e6 => format!("{:.1} k", n / 1e3),
        n => format!("{:.1} M", n / 1e6),
    }
}

/// A size of text for people.
pub fn size(bytes: u64) -> String {
    match bytes as f64 {
        n if n < 1e4 => format!("{n:.0} bytes"),
        n if n < 1e6 => format!("{:.1} kB", n / 1e3),
        n => format!("{:.1} MB", n / 1e6),
    }
}

/// Bytes for people.
fn bytes(n: f64) -> String {
    match n {
        n if n < 1e7 => format!("{:.0} kB", n / 1e3),
        n if n < 1e9 => format!("{:.0} MB", n / 1e6),
        n => format!("{:.1} GB", n / 1e9),
    }
}

fn too_little_memory(config: &Config, params: usize, at_once: usize) -> Option<String> {
    let have = limits::memory()? / at_once as f64;
    Room { have, at_once, place: "of memory".into(), need: memory_bytes }.too_little(config, params)
}

/// Memory that one run can have.
struct Room {
    /// Bytes for each run.
    have: f64,
    /// Runs that share the memory.
    at_once: usize,
    /// For messages.
    place: String,
    /// Bytes that a run of a configuration with so many parameters needs.
    need: fn(&Config, usize) -> f64,
}

impl Room {
    /// What to do where a run does not fit.
    fn too_little(&self, config: &Config, params: usize) -> Option<String> {
        let need = (self.need)(config, params);
        if need <= self.have {
            return None;
        }
        let with = |batch: usize| {
            let data = crate::config::Data { batch_size: batch, ..config.data.clone() };
            (self.need)(&Config { data, ..config.clone() }, params)
        };
        // the largest batch that fits: memory grows with it
        let (mut fits, mut exceeds) = (0, config.data.batch_size);
        while exceeds - fits > 1 {
            let middle = fits + (exceeds - fits) / 2;
            if with(middle) <= self.have {
                fits = middle;
            } else {
                exceeds = middle;
            }
        }
        let remedy = if fits > 0 {
            format!(
                "lower it to at most {fits}, and raise data.grad_accum for as many tokens an update, or set model.recompute = true"
            )
        } else {
            let one = crate::config::Data { batch_size: 1, grad_accum: 1, ..config.data.clone() };
            let accumulated = (self.need)(&Config { data: one, ..config.clone() }, params) <= self.have;
            let lower = if accumulated { "data.grad_accum" } else { "data.seq_len, model.width or model.layers" };
            format!("even one sequence takes {}; lower {lower}", bytes(with(1)))
        };
        let share =
            if self.at_once > 1 { format!(" for each of {} runs at a time", self.at_once) } else { String::new() };
        Some(format!(
            "data.batch_size: {} sequences of {} tokens need about {} {}, {} are free{share}: {remedy}",
            config.data.batch_size,
            config.data.seq_len,
            bytes(need),
            self.place,
            bytes(self.have),
        ))
    }
}

/// Weights and the optimiser's state in f32, for every checkpoint that is kept and the one that is being written.
fn too_little_disk(config: &Config, params: usize) -> Option<String> {
    let kept = config.checkpoint.keep_last.saturating_add(config.checkpoint.keep_best);
    let saved = match config.checkpoint.every {
        0 => 1,
        every => usize::try_from(config.run.steps.div_ceil(every)).unwrap_or(usize::MAX),
    };
    let one = 4.0 * (params as f64 + optimizer_state(config));
    let need = one * (kept.min(saved) as f64 + 1.0);
    let have = limits::disk(&config.run.dir)?;
    (need > have).then(|| {
        format!(
            "checkpoint.keep_last: {} checkpoints of {} need {}, {} are free in {}: keep fewer, or choose another run.dir",
            kept.min(saved),
            bytes(one),
            bytes(need),
            bytes(have),
            config.run.dir.display()
        )
    })
}

/// Rate of a product on this device in the model's precision, in FLOP/s: best of twenty, 30 ms in all.
///
/// # Errors
/// When the device fails.
pub fn matmul_rate(device: &Device, compute: Compute) -> dash_core::Result<f64> {
    let (tape, n) = match device {
        Device::Cpu(_) => (Tape::inference(), 512),
        Device::Cuda(_) => (Tape::inference().computing(compute.into()), 4096),
    };
    let x = tape.leaf(Tensor::full(device, &[n, n], DType::F32, 0.5)?);
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        let product = ops::linear(&tape, &x, &x)?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
        drop(product);
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

/// The text and the task that a run of `total` tokens sees. Padding is among these, so it is among those of an epoch of packed documents.
fn material(config: &Config, train_tokens: usize, packed: Option<PackedEpoch>, total: f64) -> String {
    let task = config.task.as_ref().map(|t| {
        let shortcut = t.shortcut(config.data.seq_len, config.data.vocab_size).accuracy;
        format!("task {} ({shortcut:.3} of its answers without matching a key)", word(&t.kind))
    });
    let text = (train_tokens > 0).then(|| {
        let epoch = packed.map_or(train_tokens as f64, |p| f64::from(p.sequences) * config.data.seq_len as f64);
        let epochs = total / epoch;
        format!("{} tokens of text ({epochs:.2} epochs)", count(train_tokens as f64))
    });
    text.into_iter().chain(task).collect::<Vec<_>>().join(" and ")
}

/// Told once where attention on a GPU does not stream: its memory is not what [`gpu_memory_bytes`] counts.
fn whole_rows(config: &Config, device: &Device) -> String {
    let (m, heads) = (&config.model, (config.model.heads / config.model.kv_heads.max(1)).max(1));
    let why = match device {
        Device::Cpu(_) => None,
        Device::Cuda(_) if m.attention.keeps_scores() => {
            Some(format!("kind {:?} scores every token", m.attention.kind()))
        }
        Device::Cuda(_) => why_whole_rows(m.compute.into(), m.head_dim, heads, m.attention.chunk_size()),
    };
    why.map_or(String::new(), |why| {
        format!("warning   attention keeps whole rows of scores on this GPU ({why}): memory grows with the square of data.seq_len\n")
    })
}

/// What the shards take: they were just checked byte by byte, so that they count as resident.
fn mapped(train: &[Arc<Shard>]) -> String {
    match train.iter().map(|s| s.bytes()).sum() {
        0usize => String::new(),
        bytes => format!(" and {:.0} MB of mapped text", bytes as f64 / 1e6),
    }
}

/// The report.
///
/// # Errors
/// When the device fails.
pub fn report(
    config: &Config,
    (model, device): (&Model, &Device),
    (train, packed): (&[Arc<Shard>], Option<PackedEpoch>),
) -> dash_core::Result<String> {
    let train_tokens: usize = train.iter().map(|s| s.len()).sum();
    let params = model.params().numel();
    let per_step = config.tokens_per_step();
    let total = per_step as f64 * config.run.steps as f64;
    let (t, attention) = (config.data.seq_len, &config.model.attention);
    let (listed, assumed) = match attention.listed(t) {
        Some(listed) => (listed, ""),
        None => (0.5 * (t as f64 + 1.0) / 2.0, " (assuming half of the tokens are attended)"),
    };
    let at_most = if config.data.document_mask { " at most, were all documents as long as a sequence" } else { "" };
    let work = flops(&config.model, config.data.vocab_size, t, attention.attended(t, listed));
    let step_flops = work.total() * per_step as f64;
    let rate = matmul_rate(device, config.model.compute)?;
    let efficiency = match device {
        Device::Cpu(_) => STEP_EFFICIENCY,
        Device::Cuda(_) => GPU_EFFICIENCY,
    };
    let seconds = step_flops * config.run.steps as f64 / (rate * efficiency);
    let attention = match attention.chunk_size() {
        None => attention.kind().to_string(),
        Some(size) => format!("{}, {} chunks of {size}", attention.kind(), t.div_ceil(size)),
    };
    let mapped = mapped(train);
    Ok(format!(
        "run       {}\n\
         model     {:.2} M parameters, {} layers, width {}, {} heads, {} kv heads, attention {attention}\n\
         data      {}; this run sees {} tokens, {per_step} a step\n\
         compute   {:.1} GFLOP a step{assumed}{at_most}; {}, {:.0} GFLOP/s in a matrix product\n\
         memory    about {:.0} MB{mapped}\n\
         time      about {}\n{}",
        config.folder().display(),
        params as f64 / 1e6,
        config.model.layers,
        config.model.width,
        config.model.heads,
        config.model.kv_heads,
        material(config, train_tokens, packed, total),
        count(total),
        step_flops / 1e9,
        match (device, peak(device, config.model.compute)) {
            (Device::Cpu(cpu), _) => format!("{} threads", cpu.threads()),
            (Device::Cuda(_), None) => format!("{device}, whose peak is not known, so no MFU is told"),
            (Device::Cuda(_), Some(peak)) => format!("{device}, MFU against {:.0} TFLOP/s in bf16", peak / 1e12),
        },
        rate / 1e9,
        match device {
            Device::Cpu(_) => memory_bytes(config, params) / 1e6,
            Device::Cuda(_) => gpu_memory_bytes(config, params) / 1e6,
        },
        duration(seconds),
        whole_rows(config, device),
    ))
}

/// Seconds for people.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::reference::SMALLEST;

    #[test]
    fn a_run_that_a_gpu_cannot_hold_is_told_the_largest_batch_that_fits() {
        let set = ["run.device=cuda", "data.batch_size=100000", "data.seq_len=512"].map(String::from);
        let config = Config::from_text(SMALLEST, &set, Path::new("small.toml")).unwrap();
        let params = parameters(&config.model, config.data.vocab_size).unwrap();
        let with = |batch_size| {
            let data = crate::config::Data { batch_size, ..config.data.clone() };
            Config { data, ..config.clone() }
        };
        let room = Room { have: 4e9, at_once: 2, place: "of cuda:0 (a card)".into(), need: gpu_memory_bytes };
        let told = room.too_little(&config, params).expect("it does not fit");
        assert!(told.contains("of cuda:0 (a card), 4.0 GB are free for each of 2 runs at a time"), "{told}");
        let words: Vec<&str> = told.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "most").unwrap() + 1;
        let most: usize = words[at].trim_end_matches(',').parse().unwrap();
        assert!(room.too_little(&with(most), params).is_none() && room.too_little(&with(most + 1), params).is_some());
        let none = Room { have: 1e6, ..room }.too_little(&config, params).unwrap();
        assert!(
            none.contains("even one sequence takes")
                && none.ends_with("lower data.seq_len, model.width or model.layers")
        );
        // the ids of all micro-batches are there at once: 2^31 of 8 bytes a token and more
        let data = crate::config::Data { batch_size: 1, grad_accum: 1 << 31, ..config.data.clone() };
        let many = Config { data, ..config.clone() };
        let room = Room { have: 4e9, at_once: 1, place: "of memory".into(), need: memory_bytes };
        let told = room.too_little(&many, params).expect("it does not fit");
        assert!(told.ends_with("lower data.grad_accum"), "{told}");
    }

    /// The smallest configuration, of a text in the place of its task.
    fn of_text(set: &[&str]) -> Config {
        let text = SMALLEST.replace("[task]\nkind = \"recall\"\n", "");
        let set: Vec<String> = ["data.source=text", "data.path=x"].iter().chain(set).map(|s| s.to_string()).collect();
        Config::from_text(&text, &set, Path::new("small.toml")).unwrap()
    }

    #[test]
    fn documents_that_are_taken_apart_need_twice_the_activations() {
        let of = |set: &[&str]| {
            let config = of_text(set);
            memory_bytes(&config, parameters(&config.model, config.data.vocab_size).unwrap())
        };
        // what a batch of twice the sequences takes beside ids and weights
        let [one, apart, two] = [
            &["data.batch_size=64", "data.seq_len=512"][..],
            &["data.batch_size=64", "data.seq_len=512", "data.document_mask=true"],
            &["data.batch_size=128", "data.seq_len=512"],
        ]
        .map(of);
        assert!(one < apart && (apart / two - 1.0).abs() < 0.1, "{one} {apart} {two}");
    }

    #[test]
    fn an_epoch_of_packed_documents_has_its_padding() {
        let config = of_text(&["data.seq_len=100"]);
        let packed = PackedEpoch { sequences: 20, pieces: 30, padding: 0.5 };
        let told = [None, Some(packed)].map(|packed| material(&config, 1000, packed, 4000.0));
        assert_eq!(told, ["1000 tokens of text (4.00 epochs)", "1000 tokens of text (2.00 epochs)"]);
    }

    #[test]
    fn small_numbers_of_tokens_and_bytes_keep_their_digits() {
        assert_eq!([960.0, 14_211.0, 2_250_000.0].map(count), ["960", "14.2 k", "2.2 M"]);
        assert_eq!([12, 51_300, 2_400_000].map(size), ["12 bytes", "51.3 kB", "2.4 MB"]);
        assert_eq!([51_300.0, 2.4e7, 9.27e10].map(bytes), ["51 kB", "24 MB", "92.7 GB"]);
    }

    #[test]
    fn bf16_is_refused_where_nothing_multiplies_it() {
        let Err(Failure::Request(e)) = check_compute(Compute::Bf16, false) else { panic!("a wrong request") };
        assert!(e.to_string().contains("AVX512_BF16") && e.to_string().contains("\"f32\""), "{e}");
        assert!(check_compute(Compute::Bf16, true).is_ok() && check_compute(Compute::F32, false).is_ok());
    }
}
