//! A load: plan, allocation, transfer, and only then tensors.

use std::sync::Arc;
use std::time::Instant;

use engine::tensors::Dtype;

use crate::control::Control;
use crate::driver::DeviceMemory;
use crate::error::Result;
use crate::lane::Lane;
use crate::plan::Plan;
use crate::report::{Report, bound_by, not_taken};

/// A tensor on the device. Its memory is given back when the last tensor of its load is dropped.
#[derive(Clone, Debug)]
pub struct LoadedTensor {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Lengths in C order.
    pub shape: Vec<u64>,
    /// Where it is on the device, aligned to 256 bytes; with 260,000 tensors and more, to 16 at least.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    memory: Arc<DeviceMemory>,
}

impl LoadedTensor {
    /// What holds it.
    pub fn memory(&self) -> &Arc<DeviceMemory> {
        &self.memory
    }
}

/// All tensors of a load, and how it went.
#[derive(Debug)]
pub struct Loaded {
    /// In the order of the sources.
    pub tensors: Vec<LoadedTensor>,
    /// How it went.
    pub report: Report,
}

/// Loads what a plan says. On an error nothing is on the device, and nothing is taken there.
pub fn load(lane: &mut Lane, plan: &Plan, control: &mut Control<'_>) -> Result<Loaded> {
    let (started, cpu_before) = (Instant::now(), cpu_seconds());
    let device = lane.driver().info()?;
    let memory = Arc::new(DeviceMemory::new(lane.driver(), plan.device_bytes()).map_err(|error| {
        error.context(format!("load {} tensors of {} sources", plan.tensors().len(), plan.sources().len()))
    })?);
    let runs = plan.runs(memory.address());
    let moved = lane.read(plan.sources(), &runs, &|number| plan.describe(number), control);
    // A file that was truncated or written to says so, whatever the reads said.
    if let Err(error) = moved {
        for source in plan.sources() {
            if error.kind() != crate::ErrorKind::Cancelled {
                source.check_unchanged()?;
            }
        }
        return Err(error);
    }
    let transfer = moved?;
    for source in plan.sources() {
        source.check_unchanged()?;
    }
    let tensors: Vec<LoadedTensor> = plan
        .tensors()
        .iter()
        .map(|tensor| LoadedTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            address: memory.address() + tensor.offset,
            len: tensor.len,
            memory: memory.clone(),
        })
        .collect();
    let seconds = started.elapsed().as_secs_f64();
    let notes = plan.sources().iter().filter_map(|source| source.note()).chain(transfer.note.as_deref());
    let report = Report {
        not_taken: not_taken(&device),
        device,
        path: "bounce",
        sources: plan.sources().len(),
        tensors: tensors.len(),
        bytes: transfer.bytes,
        read_bytes: transfer.read_bytes,
        tier_bytes: transfer.tier_bytes,
        mapped_bytes: transfer.mapped_bytes,
        seconds,
        gb_per_second: transfer.bytes as f64 / seconds.max(1e-9) / 1e9,
        setup_seconds: lane.setup().as_secs_f64(),
        read_busy_seconds: transfer.io_busy.as_secs_f64(),
        copy_busy_seconds: transfer.copy_busy.as_secs_f64(),
        read_wait_seconds: transfer.io_wait.as_secs_f64(),
        copy_wait_seconds: transfer.copy_wait.as_secs_f64(),
        verify_seconds: transfer.verify.as_secs_f64(),
        cpu_seconds: cpu_seconds() - cpu_before,
        bound_by: bound_by(&transfer),
        reads: transfer.reads,
        batches: transfer.batches,
        copies: transfer.copies,
        pinned_bytes: lane.pinned_bytes(),
        device_bytes: plan.device_bytes(),
        device_extra_bytes: plan.padding_bytes(),
        cached_sources: plan.sources().iter().filter(|source| source.is_cached()).count(),
        verified_sources: plan.sources().iter().filter(|source| source.is_verified()).count(),
        backend: transfer.backend.clone(),
        fixed_buffers: transfer.fixed_buffers,
        notes: notes.map(str::to_owned).collect(),
    };
    Ok(Loaded { tensors, report })
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
