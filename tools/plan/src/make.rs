//! A request, a model and a machine -> a plan.

use serde::Serialize;
use serde_json::{Value, json};

use crate::buy::{self, Offer};
use crate::infer::{self, Speed};
use crate::machine::Machine;
use crate::model::{Model, known, known_names};
use crate::place::{Part, Placed};
use crate::precision::{CACHES, Precision, Rate, precision, weight_bytes};
use crate::train::{self, Step};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Tokens are made.
    Infer,
    /// All parameters are trained.
    Finetune,
    /// Adapters are trained, the model is frozen.
    Lora,
}

/// What a plan is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What is to be done.
    pub task: Task,
    /// How weights are stored; `None`: as in the files.
    pub precision: Option<Precision>,
    /// How keys and values are stored.
    pub cache: (&'static str, Rate),
    /// Whether MLA's latent vectors are kept instead of keys and values.
    pub latent: bool,
    /// Tokens of a sequence.
    pub context: u64,
    /// Sequences at a time.
    pub batch: u64,
    /// Sequences whose KV cache is kept.
    pub sessions: u64,
    /// Micro-batches of a training step.
    pub micro_batches: u64,
    /// Rank of adapters.
    pub lora_rank: u64,
    /// How many whole training states the drives keep: 2 can be rolled back.
    pub generations: u64,
    /// Hours a day that the machine works.
    pub hours_per_day: f64,
    /// Tokens a day whose keys and values are written to the drives; `None`: each session once a day.
    pub tokens_per_day: Option<u64>,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            task: Task::Infer,
            precision: precision("bf16"),
            cache: CACHES[2],
            latent: true,
            context: 8192,
            batch: 1,
            sessions: 1,
            micro_batches: 1,
            lora_rank: 16,
            generations: 2,
            hours_per_day: 24.0,
            tokens_per_day: None,
        }
    }
}

/// Memory and drives that are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Of the GPU's memory: for nothing to be streamed (inference), at least (training).
    pub vram_bytes: u64,
    /// The least that works: the rest is streamed.
    pub vram_least_bytes: u64,
    /// Host memory that the plan uses.
    pub ram_bytes: u64,
    /// Drives: files, KV store, training state.
    pub nvme_bytes: u64,
}

/// What drives take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Wear {
    /// Bytes written in a day.
    pub bytes_per_day: f64,
    /// Bytes that all drives are rated for.
    pub rated_bytes: f64,
    /// Years until then.
    pub years: Option<f64>,
    /// Steps of training until then.
    pub steps: Option<f64>,
}

/// How far it goes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Tokens of context with everything in the GPU's memory.
    pub context_resident: Option<u64>,
    /// Tokens of context that have room anywhere.
    pub context_anywhere: Option<u64>,
    /// The largest model of the built-in table that fits as this one would.
    pub largest_known: Option<String>,
    /// Parameters that fit at this many bytes for each.
    pub parameters: u64,
}

/// A plan.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// What was asked.
    pub request: Value,
    /// The model.
    pub model: Value,
    /// The machine, with the origin of each figure.
    pub machine: Machine,
    /// What is needed.
    pub needs: Needs,
    /// Where each part lives.
    pub parts: Vec<Part>,
    /// Whether all of it has its place.
    pub fits: bool,
    /// Bytes that must be in the GPU's memory and have no room there.
    pub short_vram_bytes: u64,
    /// Bytes that have room nowhere.
    pub short_nvme_bytes: u64,
    /// Inference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub infer: Option<Speed>,
    /// Fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<Step>,
    /// What drives take.
    pub wear: Wear,
    /// How far it goes.
    pub limits: Limits,
    /// What would help, the most first.
    pub buy: Vec<Offer>,
    /// What the reader should know.
    pub notes: Vec<String>,
}

/// What a machine makes of a request, without the questions that ask for it again with another machine or model.
pub(crate) struct Outcome {
    pub placed: Placed,
    pub needs: Needs,
    pub speed: Option<Speed>,
    pub step: Option<Step>,
}

impl Outcome {
    /// Seconds of what is asked for: a token, or a step. Infinite where it does not fit or nothing is known.
    pub fn seconds(&self) -> f64 {
        let step = self.step.as_ref().and_then(|step| step.time.as_ref()).map(|time| time.seconds);
        let token = self.speed.as_ref().and_then(|speed| speed.step.as_ref()).map(|time| time.seconds);
        match step.or(token) {
            Some(seconds) if self.placed.fits() => seconds,
            _ => f64::INFINITY,
        }
    }

    /// Seconds to the first token, the best way.
    pub fn first_token(&self) -> f64 {
        let first = self.speed.as_ref().map(|speed| &speed.first_token);
        first.and_then(|first| first.both_seconds).unwrap_or(f64::INFINITY)
    }
}

pub(crate) fn outcome(model: &Model, request: &Request, machine: &Machine) -> Outcome {
    match request.task {
        Task::Infer => {
            let bytes = infer::Bytes::of(model, request);
            let placed = infer::place(&bytes, machine);
            let speed = infer::speed(model, request, &bytes, &placed, machine);
            let used = infer::used(&placed);
            let needs = Needs {
                vram_bytes: bytes.resident(),
                vram_least_bytes: bytes.runtime,
                ram_bytes: used.ram,
                nvme_bytes: bytes.weights.total().saturating_add(bytes.running).saturating_add(bytes.waiting),
            };
            Outcome { placed, needs, speed: Some(speed), step: None }
        }
        Task::Finetune | Task::Lora => {
            let bytes = train::Bytes::of(model, request);
            let placed = train::place(request, &bytes, machine);
            let step = train::step(model, request, &bytes, &placed, machine);
            let used = train::used(request, &placed);
            let short = placed.short_nvme;
            let least =
                placed.parts[0].bytes + if request.task == Task::Lora { placed.parts[2].bytes } else { 0 };
            let needs = Needs {
                vram_bytes: used.vram.max(least),
                vram_least_bytes: least,
                ram_bytes: used.ram,
                nvme_bytes: used.nvme.saturating_add(short),
            };
            Outcome { placed, needs, speed: None, step: Some(step) }
        }
    }
}

/// Makes a plan.
///
/// Errors, in words: numbers that make no sense together.
pub fn make(model: &Model, request: &Request, machine: &Machine) -> Result<Plan, String> {
    if request.context == 0 || request.batch == 0 || request.sessions == 0 || request.micro_batches == 0 {
        return Err("context, batch, sessions and micro-batches are at least 1".into());
    }
    let request = &Request { sessions: request.sessions.max(request.batch), ..request.clone() };
    let found = outcome(model, request, machine);
    let mut notes = model.notes.clone();
    if let Some(most) = model.max_context.filter(|most| *most < request.context) {
        notes.push(format!(
            "the model was made for {most} tokens, fewer than the context of {}",
            request.context
        ));
    }
    if request.task != Task::Infer {
        notes.push(
            "training beyond memory is not in this version of nvtier: this is what its design takes".into(),
        );
    }
    if machine.gpu.is_none() {
        notes.push(match request.task {
            Task::Infer => "no GPU: times are those of loading into memory, nothing is said about computing; name one with --gpu".into(),
            _ => "no GPU: nothing is said about times; name one with --gpu".into(),
        });
    } else if machine.gpu.as_ref().is_some_and(|gpu| gpu.flops.is_none()) {
        notes.push(
            "how fast this GPU computes is not in the table: give --tflops for times that need it".into(),
        );
    }
    Ok(Plan {
        request: json!({
            "task": request.task,
            "precision": request.precision.map_or("stored", |precision| precision.name),
            "kv_precision": request.cache.0,
            "context": request.context,
            "batch": request.batch,
            "sessions": request.sessions,
            "micro_batches": request.micro_batches,
            "lora_rank": request.lora_rank,
            "generations": request.generations,
            "hours_per_day": request.hours_per_day,
        }),
        model: describe(model, request),
        machine: machine.clone(),
        needs: found.needs,
        fits: found.placed.fits(),
        short_vram_bytes: found.placed.short_vram,
        short_nvme_bytes: found.placed.short_nvme,
        wear: wear(model, request, machine, &found),
        limits: limits(model, request, machine),
        buy: buy::offers(model, request, machine, &found),
        infer: found.speed,
        train: found.step,
        parts: found.placed.parts,
        notes,
    })
}

fn describe(model: &Model, request: &Request) -> Value {
    let rate = request.cache.1;
    let weights = weight_bytes(model, request.precision.as_ref());
    let windows: Vec<u64> = model.layers.iter().filter_map(|layer| layer.cache.window).collect();
    let per_token = |latent| rate.bytes_of(model.cache_elements(latent));
    json!({
        "name": model.name,
        "source": model.source,
        "architecture": model.architecture,
        "exactness": model.exactness,
        "parameters": model.parameters(),
        "active_parameters": model.active(),
        "embedding_parameters": model.embedding,
        "tied": model.tied(),
        "experts_parameters": model.routed(),
        "layers": model.layers.len(),
        "hidden": model.hidden,
        "vocabulary": model.vocabulary,
        "max_context": model.max_context,
        "weights_bytes": weights.total(),
        "stored": model.stored,
        "kv": {
            "elements_per_token": model.cache_elements(request.latent),
            "bytes_per_token": per_token(request.latent),
            "bytes_per_token_expanded": per_token(false),
            "bytes_per_session": infer::session_bytes(model, request, request.context),
            "layers_with_window": windows.len(),
            "window": windows.first(),
            "latent": model.layers.iter().any(|layer| layer.cache.latent.is_some()) && request.latent,
        },
    })
}

fn wear(model: &Model, request: &Request, machine: &Machine, found: &Outcome) -> Wear {
    let rated_bytes = machine.rated();
    let mut steps = None;
    let bytes_per_day = match &found.step {
        Some(step) => {
            let written = step.write_bytes as f64;
            steps = (written > 0.0).then(|| rated_bytes / written);
            let per_day =
                step.time.as_ref().map_or(0.0, |time| request.hours_per_day * 3600.0 / time.seconds);
            written * per_day
        }
        None => {
            let tokens = request
                .tokens_per_day
                .map_or(request.context.saturating_mul(request.sessions) as f64, |n| n as f64);
            tokens * request.cache.1.bytes_of(model.cache_elements(request.latent)) as f64
        }
    };
    let years = (bytes_per_day > 0.0 && rated_bytes > 0.0).then(|| rated_bytes / bytes_per_day / 365.25);
    Wear { bytes_per_day, rated_bytes, years, steps }
}

fn limits(model: &Model, request: &Request, machine: &Machine) -> Limits {
    let infer = request.task == Task::Infer;
    let contexts = infer.then(|| infer::longest_context(model, request, machine));
    // A model of the table is asked for in the precision of this one, or, where that is that of files, in the nearest.
    let bits =
        weight_bytes(model, request.precision.as_ref()).total() as f64 / model.parameters().max(1) as f64;
    let asked = Request {
        precision: request.precision.or_else(|| {
            let rates = crate::precision::PRECISIONS.iter();
            rates.min_by(|a, b| distance(a, bits).total_cmp(&distance(b, bits))).copied()
        }),
        ..request.clone()
    };
    let vram = machine.gpu.as_ref().map_or(0, |gpu| gpu.memory_bytes);
    let fits = |other: &Model| {
        if infer && vram > 0 {
            infer::Bytes::of(other, &asked).resident() <= vram
        } else {
            outcome(other, &asked, machine).placed.fits()
        }
    };
    let largest_known = known_names()
        .iter()
        .filter_map(|name| known(name))
        .filter(|other| fits(other))
        .max_by_key(Model::parameters)
        .map(|other| other.name);
    let parameters = if infer {
        let bytes = infer::Bytes::of(model, request);
        let room = if vram > 0 { vram } else { machine.ram_for_tiers(false) };
        (room.saturating_sub(bytes.running).saturating_sub(bytes.runtime) as f64 / bits.max(1e-9)) as u64
    } else {
        let each = match request.task {
            Task::Lora => bits,
            _ => 12.0 * request.generations as f64 + if request.micro_batches > 1 { 4.0 } else { 2.0 },
        };
        (machine.capacity() as f64 / each.max(1e-9)) as u64
    };
    Limits {
        context_resident: contexts.map(|(resident, _)| resident),
        context_anywhere: contexts.map(|(_, anywhere)| anywhere),
        largest_known,
        parameters,
    }
}

fn distance(precision: &Precision, bytes: f64) -> f64 {
    (precision.linear.bytes as f64 / precision.linear.block as f64 - bytes).abs()
}
