//! Fine-tuning: bytes of a parameter, the floor of a step, what it writes.
//!
//! Full fine-tuning keeps for each parameter 2 bytes of weight (the upper half of the 32-bit master, which is its bfloat16), 2 bytes of the
//! lower half, two moments of 4, and a gradient of 4 (2 where there is one micro-batch). Layers come and go; a step moves
//! all of it once. Floors of a step, the longest of which binds:
//!
//! ```text
//! compute     4 x forward for full (forward, the same again in backward, two products backward), 3 x for LoRA
//! to device   ((14 + g) N + A) / link          from device   ((12 + g) N + A) / link
//! drives      R / read + W / write: a stripe shares reads and writes
//! memory      50 N / copies of host memory
//! R = (14 + g) N - saved reads + A on drives   W = (12 + g) N - saved writes + A on drives   A = 2 h L tokens
//! ```
//!
//! A byte of RAM that holds a weight saves two reads and a write, any other byte one of each.

use serde::Serialize;

use crate::infer::{RUNTIME_BYTES, Term, Time, term};
use crate::machine::Machine;
use crate::make::{Request, Task};
use crate::model::{Layer, Model};
use crate::place::{May, Placed, Room};
use crate::precision::weight_bytes;

/// Tokens whose logits exist at a time.
const LOGITS_CHUNK: u64 = 4096;
/// Bytes of a trained adapter's parameter: weight, master, moments, gradient.
const ADAPTER_BYTES: u64 = 16;

/// A step of fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Parameters that are trained.
    pub trained_parameters: u64,
    /// Tokens of a step.
    pub tokens: u64,
    /// Bytes that a step reads from the drives.
    pub read_bytes: u64,
    /// Bytes that it writes.
    pub write_bytes: u64,
    /// Its time.
    pub time: Option<Time>,
    /// Tokens a second.
    pub tokens_per_second: Option<f64>,
    /// Tokens of a step from which on computing binds.
    pub compute_bound_from_tokens: Option<u64>,
}

/// Bytes by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes {
    /// Runtime, the layers that are at work, activations of a layer.
    working: u64,
    /// Weights (upper halves, or the frozen base).
    weights: u64,
    /// Lower halves and moments.
    state: u64,
    /// Gradients.
    gradients: u64,
    /// Activations that are kept between forward and backward.
    activations: u64,
    /// Adapters with all that belongs to them.
    adapters: u64,
    /// Of the gradient of one parameter.
    gradient: u64,
}

fn tokens(request: &Request) -> u64 {
    request.context.saturating_mul(request.batch).saturating_mul(request.micro_batches)
}

/// Parameters of adapters of this rank on the matrices of attention and of dense feed-forward parts.
pub fn adapter_parameters(model: &Model, rank: u64) -> u64 {
    let adapted = |layer: &Layer| -> u64 {
        layer
            .linears
            .iter()
            .filter(|linear| !matches!(linear.name.as_str(), "router" | "shared_expert_gate"))
            .map(|linear| linear.inputs + linear.outputs)
            .sum()
    };
    model.layers.iter().map(adapted).sum::<u64>().saturating_mul(rank)
}

impl Bytes {
    pub fn of(model: &Model, request: &Request) -> Bytes {
        let parameters = model.parameters();
        let micro = request.context.saturating_mul(request.batch);
        let kept = 2 * model.hidden * model.layers.len() as u64;
        let activations = kept.saturating_mul(tokens(request));
        let largest = |of: &dyn Fn(&Layer) -> u64| model.layers.iter().map(of).max().unwrap_or(0);
        // Inputs and results of a layer's matrices, and their gradients.
        let width = largest(&|layer| {
            layer.linears.iter().map(|linear| linear.outputs).sum::<u64>() + 4 * model.hidden
        });
        let logits = 6 * model.vocabulary * micro.min(LOGITS_CHUNK);
        let moving = (4 * width).saturating_mul(micro).saturating_add(logits) + RUNTIME_BYTES;
        let block = largest(&|layer| layer.dense() + layer.routed()).max(model.embedding);
        match request.task {
            Task::Lora => {
                let weights = weight_bytes(model, request.precision.as_ref()).total();
                let ratio = weights.div_ceil(parameters.max(1)).max(1);
                Bytes {
                    working: moving.saturating_add(2 * ratio * block),
                    weights,
                    state: 0,
                    gradients: 0,
                    activations,
                    adapters: ADAPTER_BYTES * adapter_parameters(model, request.lora_rank),
                    gradient: 0,
                }
            }
            _ => {
                let gradient = if request.micro_batches > 1 { 4 } else { 2 };
                Bytes {
                    // One block with all its state is computed with while the next one arrives.
                    working: moving.saturating_add(2 * (12 + gradient) * block),
                    weights: 2 * parameters,
                    state: 10 * parameters,
                    gradients: gradient * parameters,
                    activations,
                    adapters: 0,
                    gradient,
                }
            }
        }
    }
}

/// Places everything. The drives hold all of it; RAM holds what saves the most.
pub(crate) fn place(request: &Request, bytes: &Bytes, machine: &Machine) -> Placed {
    let vram = machine.gpu.as_ref().map_or(0, |gpu| gpu.memory_bytes);
    let mut room = Room { vram, ram: machine.ram_for_tiers(true), nvme: machine.capacity() };
    let mut placed = Placed::default();
    placed.put(&mut room, "runtime, layers at work, activations of a layer", bytes.working, May::Vram);
    if request.task == Task::Lora {
        placed.put(&mut room, "base model's files", bytes.weights, May::Nvme);
        placed.put(&mut room, "adapters and their state", bytes.adapters, May::Vram);
        let mut files = Room { nvme: u64::MAX, ..room };
        placed.put(&mut files, "frozen weights", bytes.weights, May::Any);
        placed.put(&mut files, "activations between layers", bytes.activations, May::Any);
        return placed;
    }
    let kept = (bytes.weights + bytes.state).saturating_mul(request.generations) + bytes.gradients;
    placed.put(&mut room, "training state, gradients, generations", kept, May::Nvme);
    let mut files = Room { vram: 0, nvme: u64::MAX, ram: room.ram };
    placed.put(&mut files, "weights (bfloat16)", bytes.weights, May::Below);
    placed.put(&mut files, "gradients", bytes.gradients, May::Below);
    placed.put(&mut files, "lower halves and moments", bytes.state, May::Below);
    room.ram = files.ram;
    placed.put(&mut room, "activations between layers", bytes.activations, May::Below);
    placed
}

/// Bytes that tiers hold.
pub(crate) fn used(request: &Request, placed: &Placed) -> Room {
    let mut used = placed.used();
    let files = if request.task == Task::Lora { 3 } else { 2 };
    used.nvme = placed.parts.iter().take(files).map(|part| part.nvme).sum::<u64>()
        + placed.parts.last().map_or(0, |part| part.nvme);
    used
}

/// A step.
pub(crate) fn step(
    model: &Model,
    request: &Request,
    bytes: &Bytes,
    placed: &Placed,
    machine: &Machine,
) -> Step {
    let of = |name: &str| placed.parts.iter().find(|part| part.name == name);
    let ram = |name: &str| of(name).map_or(0, |part| part.ram) as f64;
    let parameters = model.parameters() as f64;
    let activations = bytes.activations as f64;
    let activations_on_drives = of("activations between layers").map_or(0, |part| part.nvme) as f64;
    let lora = request.task == Task::Lora;
    let gradient = bytes.gradient as f64;
    let (htod, dtoh, read, write);
    if lora {
        // Twice over the frozen weights: forward, and again for backward. What is in the GPU's memory stays there.
        let base =
            of("frozen weights").map_or((0.0, 0.0), |part| ((part.ram + part.nvme) as f64, part.nvme as f64));
        let in_vram = of("activations between layers").map_or(0, |part| part.vram) as f64;
        htod = 2.0 * base.0 + activations - in_vram;
        dtoh = activations - in_vram;
        read = 2.0 * base.1 + activations_on_drives;
        write = activations_on_drives;
    } else {
        let weights = ram("weights (bfloat16)");
        let others = ram("gradients") + ram("lower halves and moments");
        htod = (14.0 + gradient) * parameters + activations;
        dtoh = (12.0 + gradient) * parameters + activations;
        read = ((14.0 + gradient) * parameters - 2.0 * weights - others).max(0.0) + activations_on_drives;
        write = ((12.0 + gradient) * parameters - weights - others).max(0.0) + activations_on_drives;
    }
    let all = tokens(request);
    let sequences = (request.batch * request.micro_batches) as f64;
    let logits = 2.0 * model.output_matrix() as f64 * (request.context - 1) as f64;
    let forward = sequences * (model.prefill_flops(0, request.context) + logits);
    let flops = forward * if lora { 3.0 } else { 4.0 };
    let mut terms: Vec<Term> = Vec::new();
    let mut compute = None;
    if let Some(gpu) = &machine.gpu {
        if let Some(rate) = gpu.flops {
            compute = Some(flops / rate.value);
            terms.extend(term("compute", flops / rate.value));
        }
        terms.extend(term("PCIe to device", htod / gpu.htod.value));
        terms.extend(term("PCIe from device", dtoh / gpu.dtoh.value));
        if read + write > 0.0 {
            terms.extend(term("drives", read / machine.read() + write / machine.write()));
        }
        if !lora {
            terms.extend(term("host memory", 50.0 * parameters / machine.ram_copy.value));
        }
    }
    // What moves does so however many tokens a step has, but for activations: where both take as long, more tokens are free.
    let moving =
        terms.iter().filter(|term| term.what != "compute").map(|term| term.seconds).fold(0.0, f64::max);
    let compute_bound_from_tokens =
        compute.map(|seconds| (moving / (seconds / all as f64).max(1e-18)).ceil() as u64);
    // Without the rate of the GPU the floor would be too low to be of use.
    let time = compute.and_then(|_| Time::longest(terms));
    Step {
        trained_parameters: if lora { bytes.adapters / ADAPTER_BYTES } else { model.parameters() },
        tokens: all,
        read_bytes: read as u64,
        write_bytes: write as u64,
        tokens_per_second: time.as_ref().map(|time| all as f64 / time.seconds),
        compute_bound_from_tokens,
        time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Drive, Figure, Gpu, Origin};
    use crate::model::known;

    fn machine(ram: u64, read: f64, write: f64, link: f64, flops: f64) -> Machine {
        let given = |value| Figure::new(value, Origin::Given);
        Machine {
            gpu: Some(Gpu {
                name: "test".into(),
                memory_bytes: 24_000_000_000,
                bandwidth: Some(given(1e12)),
                flops: Some(given(flops)),
                htod: given(link),
                dtoh: given(link),
            }),
            ram_bytes: ram,
            ram_copy: given(1e12),
            drives: vec![Drive {
                name: "test".into(),
                capacity_bytes: 8_000_000_000_000,
                read: given(read),
                write: given(write),
                rated_bytes: given(1e15),
            }],
        }
    }

    fn of(model: &str, machine: &Machine) -> Step {
        let model = known(model).unwrap();
        let request =
            Request { task: Task::Finetune, context: 2048, batch: 1, micro_batches: 8, ..Request::default() };
        let bytes = Bytes::of(&model, &request);
        let placed = place(&request, &bytes, machine);
        // The estimates below were made without activations.
        let activations = bytes.activations;
        let mut step = step(&model, &request, &bytes, &placed, machine);
        let on_drives = placed.parts.last().map_or(0, |part| part.nvme);
        assert!(on_drives == 0 || on_drives == activations, "{placed:#?}");
        step.read_bytes -= on_drives;
        step.write_bytes -= on_drives;
        step
    }

    /// Estimates that were made by hand when the trainer was designed: GB read and written in a step.
    #[test]
    fn bytes_of_a_step() {
        let giga = |bytes: u64| (bytes as f64 / 1e9).round() as u64;
        // 124 GB, 24 of them for the system: 100 pinned.
        let step = of("Llama-3.1-8B", &machine(124_000_000_000, 7e9, 5e9, 25e9, 110e12));
        assert_eq!((giga(step.read_bytes), giga(step.write_bytes)), (28, 28));
        let step = of("Llama-3.1-8B", &machine(64_000_000_000, 7e9, 5e9, 25e9, 110e12));
        assert_eq!((giga(step.read_bytes), giga(step.write_bytes)), (88, 88));
        let step = of("Llama-3.1-70B", &machine(114_000_000_000, 7e9, 5e9, 25e9, 110e12));
        // By hand 70.6 x 10^9 parameters were taken, which gives 1091, 1040 and 364 s; there are 70.554 x 10^9.
        assert_eq!((giga(step.read_bytes), giga(step.write_bytes)), (1090, 1039));
        let floor = step.read_bytes as f64 / 7e9 + step.write_bytes as f64 / 5e9;
        assert_eq!(floor.round(), 363.0);
    }

    #[test]
    fn one_micro_batch_saves_two_bytes_of_each_gradient() {
        let model = known("Llama-3.1-8B").unwrap();
        let request = Request { task: Task::Finetune, micro_batches: 1, ..Request::default() };
        assert_eq!(Bytes::of(&model, &request).gradients, 2 * model.parameters());
        let request = Request { micro_batches: 2, ..request };
        assert_eq!(Bytes::of(&model, &request).gradients, 4 * model.parameters());
    }

    #[test]
    fn adapters_are_counted_by_their_matrices() {
        let model = known("Llama-3.1-8B").unwrap();
        // q and o 4096 + 4096, k and v 4096 + 1024, gate, up and down 4096 + 14336; 32 layers.
        let each = 2 * 8192 + 2 * 5120 + 3 * 18432;
        assert_eq!(adapter_parameters(&model, 16), 32 * 16 * each);
    }
}
