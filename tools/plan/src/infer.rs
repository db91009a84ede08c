//! Inference: what it needs, and how fast it can be.

use serde::Serialize;

use crate::machine::Machine;
use crate::make::Request;
use crate::model::Model;
use crate::place::{May, Placed, Room};
use crate::precision::{WeightBytes, weight_bytes};

/// Memory that CUDA, its libraries and the framework take on the GPU.
pub const RUNTIME_BYTES: u64 = 1 << 30;
/// Tokens of a prompt that are computed at a time.
const PREFILL_CHUNK: u64 = 2048;

/// One thing that takes time, if it alone did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Term {
    /// What it is.
    pub what: &'static str,
    /// Seconds.
    pub seconds: f64,
}

/// A time, and what makes it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Time {
    /// The longest of the terms: all of them overlap at best.
    pub seconds: f64,
    /// The term that is it.
    pub bound: &'static str,
    /// All of them.
    pub terms: Vec<Term>,
}

impl Time {
    /// The longest of terms; those that could not be known are not among them.
    pub fn longest(terms: Vec<Term>) -> Option<Time> {
        let longest = terms.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds))?;
        Some(Time { seconds: longest.seconds, bound: longest.what, terms: terms.clone() })
    }
}

pub(crate) fn term(what: &'static str, seconds: f64) -> Option<Term> {
    seconds.is_finite().then_some(Term { what, seconds })
}

/// Time to the first token of a prompt as long as the context.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FirstToken {
    /// The whole prompt is computed.
    pub compute: Option<Time>,
    /// Its keys and values are loaded from the drives.
    pub load: Option<Time>,
    /// The head is computed while the tail is loaded.
    pub both_seconds: Option<f64>,
    /// Tokens that are computed then.
    pub both_computed_tokens: u64,
}

/// How fast inference can be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// The weights from the drives to where they live.
    pub load: Option<Time>,
    /// Time to the first token.
    pub first_token: FirstToken,
    /// One step: a token for each sequence of the batch.
    pub step: Option<Time>,
    /// Tokens a second, of all sequences of the batch together.
    pub tokens_per_second: Option<f64>,
}

/// What is needed, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub weights: WeightBytes,
    /// Keys and values of the sequences that run.
    pub running: u64,
    /// Of those that wait.
    pub waiting: u64,
    /// CUDA, framework, activations.
    pub runtime: u64,
}

impl Bytes {
    pub fn of(model: &Model, request: &Request) -> Bytes {
        let session = session_bytes(model, request, request.context);
        Bytes {
            weights: weight_bytes(model, request.precision.as_ref()),
            running: session.saturating_mul(request.batch),
            waiting: session.saturating_mul(request.sessions.saturating_sub(request.batch)),
            runtime: RUNTIME_BYTES + workspace(model, request),
        }
    }

    /// What must be in the GPU's memory for nothing to be streamed.
    pub fn resident(&self) -> u64 {
        self.weights.total().saturating_add(self.running).saturating_add(self.runtime)
    }
}

/// Bytes of the KV cache of one sequence.
pub fn session_bytes(model: &Model, request: &Request, context: u64) -> u64 {
    request.cache.1.bytes_of(model.cache_elements_of(context, request.latent))
}

/// Activations of a layer for the tokens that are computed at a time, and the logits.
fn workspace(model: &Model, request: &Request) -> u64 {
    let tokens = request.context.min(PREFILL_CHUNK).max(request.batch);
    let widest = model
        .layers
        .iter()
        .map(|layer| layer.linears.iter().map(|linear| linear.outputs).sum::<u64>() + 4 * model.hidden)
        .max()
        .unwrap_or(0);
    (2 * tokens).saturating_mul(widest).saturating_add(4 * request.batch * model.vocabulary)
}

/// Places everything.
pub(crate) fn place(bytes: &Bytes, machine: &Machine) -> Placed {
    let vram = machine.gpu.as_ref().map_or(0, |gpu| gpu.memory_bytes);
    let mut room = Room { vram, ram: machine.ram_for_tiers(false), nvme: machine.capacity() };
    let mut placed = Placed::default();
    let WeightBytes { dense, experts, .. } = bytes.weights;
    placed.put(&mut room, "model files", bytes.weights.total(), May::Nvme);
    placed.put(&mut room, "KV store, all sessions", bytes.running + bytes.waiting, May::Nvme);
    if vram > 0 {
        placed.put(&mut room, "runtime and activations", bytes.runtime, May::Vram);
    } else {
        placed.put(&mut room, "runtime and activations", bytes.runtime, May::Below);
    }
    // In the order of how often a byte is read for a token. Files on the drives count once, whatever is read from them again.
    let mut files = Room { nvme: u64::MAX, ..room };
    placed.put(&mut files, "weights of every token", dense, May::Any);
    placed.put(&mut files, "KV cache, running", bytes.running, May::Any);
    if experts > 0 {
        placed.put(&mut files, "weights of experts", experts, May::Any);
    }
    if bytes.waiting > 0 {
        placed.put(&mut files, "KV cache, waiting", bytes.waiting, May::Any);
    }
    // What is read from the files where they lie needs no room of its own.
    for part in &mut placed.parts[3..] {
        if part.nvme > 0 {
            part.name.push_str(" (rest from the files)");
        }
    }
    placed
}

/// Bytes that the tiers hold; what is read from files again is not counted twice.
pub(crate) fn used(placed: &Placed) -> Room {
    let mut used = placed.used();
    used.nvme = placed.parts.iter().take(3).map(|part| part.nvme).sum();
    used
}

/// Share of a layer's experts that a batch of so many tokens visits, where routes are independent.
fn touched(model: &Model, batch: u64) -> f64 {
    match model.layers.iter().find_map(|layer| layer.experts) {
        Some(experts) if experts.count > 0 => {
            let missed = 1.0 - experts.used as f64 / experts.count as f64;
            1.0 - missed.powf(batch as f64)
        }
        _ => 0.0,
    }
}

/// Bytes of each tier that one pass over the model reads.
struct Pass {
    vram: f64,
    ram: f64,
    nvme: f64,
}

fn pass(model: &Model, bytes: &Bytes, placed: &Placed, tokens: u64, with_cache: bool) -> Pass {
    let mut pass = Pass { vram: 0.0, ram: 0.0, nvme: 0.0 };
    for part in &placed.parts[3..] {
        let share = if part.name.starts_with("weights of every token") {
            1.0 - bytes.weights.lookup as f64 / bytes.weights.dense.max(1) as f64
        } else if part.name.starts_with("weights of experts") {
            touched(model, tokens)
        } else if part.name.starts_with("KV cache, running") && with_cache {
            1.0
        } else {
            0.0
        };
        pass.vram += share * part.vram as f64;
        pass.ram += share * part.ram as f64;
        pass.nvme += share * part.nvme as f64;
    }
    pass
}

/// Terms of reading the weights once: from the GPU's memory, over the link, from the drives.
fn reads(pass: &Pass, machine: &Machine) -> Vec<Term> {
    let Some(gpu) = &machine.gpu else { return Vec::new() };
    let bandwidth = gpu.bandwidth.map_or(f64::NAN, |figure| figure.value);
    // What is streamed passes the GPU's memory, too.
    let streamed = pass.ram + pass.nvme;
    let mut terms: Vec<Term> =
        term("GPU memory", (pass.vram + 2.0 * streamed) / bandwidth).into_iter().collect();
    if streamed > 0.0 {
        terms.extend(term("PCIe", streamed / gpu.htod.value));
    }
    if pass.nvme > 0.0 {
        terms.extend(term("drives", pass.nvme / machine.read()));
    }
    terms
}

/// How fast it can be. `None` of a time: there is no GPU, or nothing is known of what it is made of.
pub(crate) fn speed(
    model: &Model,
    request: &Request,
    bytes: &Bytes,
    placed: &Placed,
    machine: &Machine,
) -> Speed {
    let Some(gpu) = &machine.gpu else { return into_memory(model, request, placed, machine) };
    let from_drives = |bytes: f64| -> Vec<Term> {
        let drives = (machine.read() > 0.0).then(|| term("drives", bytes / machine.read())).flatten();
        drives.into_iter().chain(term("PCIe", bytes / gpu.htod.value)).collect()
    };
    let in_vram: u64 =
        placed.parts[3..].iter().filter(|part| part.name.starts_with("weights")).map(|part| part.vram).sum();
    let load = Time::longest(from_drives(in_vram as f64));
    let flops = gpu.flops.map_or(f64::NAN, |figure| figure.value);

    let computing = |tokens: u64| -> Option<Time> {
        let mut terms = reads(&pass(model, bytes, placed, tokens, false), machine);
        terms.extend(term("compute", model.prefill_flops(0, tokens) / flops));
        // Without the GPU's rate, what is left would promise too much.
        if flops.is_finite() { Time::longest(terms) } else { None }
    };
    let session = session_bytes(model, request, request.context) as f64;
    let one = reads(&pass(model, bytes, placed, 1, false), machine);
    let last = Time::longest(one).map_or(0.0, |time| time.seconds);
    let loading = Time::longest(from_drives(session)).map(|mut time| {
        time.terms.extend(term("the last token", last));
        time.seconds += last;
        time
    });
    let (both_seconds, both_computed_tokens) = both(model, request, &computing, &from_drives, last);
    let first_token =
        FirstToken { compute: computing(request.context), load: loading, both_seconds, both_computed_tokens };

    let mut terms = reads(&pass(model, bytes, placed, request.batch, true), machine);
    let batch = request.batch as f64;
    let attention: f64 = model
        .layers
        .iter()
        .map(|layer| 2.0 * layer.attention_width as f64 * layer.cache.kept(request.context) as f64)
        .sum();
    terms.extend(term("compute", batch * (2.0 * model.active() as f64 + attention) / flops));
    let step = if gpu.bandwidth.is_some() { Time::longest(terms) } else { None };
    let tokens_per_second = step.as_ref().map(|step| batch / step.seconds);
    Speed { load, first_token, step, tokens_per_second }
}

/// Without a GPU nothing is known of computing; what is loaded goes into memory.
fn into_memory(model: &Model, request: &Request, placed: &Placed, machine: &Machine) -> Speed {
    let drives =
        |bytes: f64| (machine.read() > 0.0).then(|| term("drives", bytes / machine.read())).flatten();
    let in_ram: u64 =
        placed.parts[3..].iter().filter(|part| part.name.starts_with("weights")).map(|part| part.ram).sum();
    // Blocks are read into buffers that are there; weights are copied into memory that is new.
    let restore =
        Time::longest(drives(session_bytes(model, request, request.context) as f64).into_iter().collect());
    let copied = term("memory", in_ram as f64 / machine.ram_copy.value);
    let load = Time::longest(drives(in_ram as f64).into_iter().chain(copied).collect());
    let first_token =
        FirstToken { compute: None, load: restore, both_seconds: None, both_computed_tokens: 0 };
    Speed { load, first_token, step: None, tokens_per_second: None }
}

/// The best split of a prompt: tokens before it are computed while the keys and values behind it are loaded.
fn both(
    model: &Model,
    request: &Request,
    computing: &impl Fn(u64) -> Option<Time>,
    from_drives: &impl Fn(f64) -> Vec<Term>,
    last: f64,
) -> (Option<f64>, u64) {
    let context = request.context;
    let at = |tokens: u64| -> Option<(f64, f64)> {
        let computed = if tokens == 0 { 0.0 } else { computing(tokens)?.seconds };
        let left = session_bytes(model, request, context) - session_bytes(model, request, tokens);
        let loaded = if left == 0 { 0.0 } else { Time::longest(from_drives(left as f64))?.seconds + last };
        Some((computed, loaded))
    };
    // Computing takes longer with more tokens, loading the rest shorter: the split is where they meet.
    let (mut low, mut high) = (0, context);
    while low < high {
        let middle = low + (high - low) / 2;
        match at(middle) {
            Some((computed, loaded)) if computed >= loaded => high = middle,
            Some(_) => low = middle + 1,
            None => return (None, 0),
        }
    }
    let best = [low.saturating_sub(1), low, 0, context]
        .into_iter()
        .filter_map(|tokens| at(tokens).map(|(computed, loaded)| (computed.max(loaded), tokens)))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or((None, 0), |(seconds, tokens)| (Some(seconds), tokens))
}

/// The longest context for which everything of the running batch is in the GPU's memory, and for which it has room at all.
pub(crate) fn longest_context(model: &Model, request: &Request, machine: &Machine) -> (u64, u64) {
    let most = model.max_context.unwrap_or(1 << 24).max(request.context).min(1 << 24);
    let longest = |fits: &dyn Fn(&Request) -> bool| {
        let with = |context| Request { context, ..request.clone() };
        if fits(&with(most)) {
            return most;
        }
        let (mut low, mut high) = (0, most);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(&with(middle)) { low = middle } else { high = middle }
        }
        low
    };
    let vram = machine.gpu.as_ref().map_or(0, |gpu| gpu.memory_bytes);
    let resident = longest(&|request| Bytes::of(model, request).resident() <= vram);
    let anywhere = longest(&|request| place(&Bytes::of(model, request), machine).fits());
    (resident, anywhere)
}
