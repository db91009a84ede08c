//! A load: plan, allocation, transfer, and only then tensors.

use std::sync::Arc;
use std::time::Instant;

use engine::tensors::Dtype;

use crate::control::Control;
use crate::cufile::{self, Files};
use crate::driver::{DeviceInfo, DeviceMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{Lane, Run};
use crate::paths::{BOUNCE, Decision, PathChoice, PathOptions, Paths};
use crate::plan::Plan;
use crate::report::{NotTaken, Report, bound_by};

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

/// Loads what a plan says, by the best way that can be trusted here. On an error nothing is on the device, and nothing is
/// taken there.
pub fn load(lane: &mut Lane, plan: &Plan, control: &mut Control<'_>) -> Result<Loaded> {
    load_by(lane, plan, &Paths::here(), &PathOptions::default(), control)
}

/// As [`load`], by a way of the caller's choice. Where cuFile was taken and fails, the bounce path takes over and the report
/// says so, unless cuFile was asked for.
pub fn load_by(
    lane: &mut Lane,
    plan: &Plan,
    paths: &Paths,
    options: &PathOptions,
    control: &mut Control<'_>,
) -> Result<Loaded> {
    let begun = Begun::new(lane, plan, paths, options, control)?;
    let memory = Arc::new(DeviceMemory::new(lane.driver(), plan.device_bytes()).map_err(|error| {
        error.context(format!("load {} tensors of {} sources", plan.tensors().len(), plan.sources().len()))
    })?);
    let report = carry_out(lane, plan, paths, options, control, begun, plan.runs(memory.address()))?;
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
    Ok(Loaded { tensors, report })
}

/// As [`load_by`], into memory that is there already: `places` has an address on the device for each tensor of the plan, in its order, with
/// room for its bytes, that nobody else uses until this returns. After an error there may be anything in it.
///
/// Where some of it is no memory of the device, nothing is written.
pub fn load_into(
    lane: &mut Lane,
    plan: &Plan,
    places: &[u64],
    paths: &Paths,
    options: &PathOptions,
    control: &mut Control<'_>,
) -> Result<Report> {
    if places.len() != plan.tensors().len() {
        let context = format!("load {} tensors to {} places", plan.tensors().len(), places.len());
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    for (tensor, place) in plan.tensors().iter().zip(places).filter(|(tensor, _)| tensor.len > 0) {
        let tried =
            |error: Error| error.context(format!("load tensor {:?} to where it is wanted", tensor.name));
        lane.driver().check_range(*place, tensor.len).map_err(tried)?;
    }
    let begun = Begun::new(lane, plan, paths, options, control)?;
    let runs = plan.runs_to(|number, _| places[number]);
    let report = carry_out(lane, plan, paths, options, control, begun, runs)?;
    // Nothing was taken for it.
    Ok(Report { device_bytes: 0, device_extra_bytes: 0, ..report })
}

/// A load whose way is chosen.
struct Begun {
    device: DeviceInfo,
    decision: Decision,
    path_seconds: f64,
    started: Instant,
    cpu_before: f64,
}

impl Begun {
    fn new(
        lane: &mut Lane,
        plan: &Plan,
        paths: &Paths,
        options: &PathOptions,
        control: &mut Control<'_>,
    ) -> Result<Begun> {
        let choosing = Instant::now();
        let device = lane.driver().info()?;
        let decision = paths.decide(lane, plan.sources(), options, control)?;
        let path_seconds = choosing.elapsed().as_secs_f64();
        Ok(Begun { device, decision, path_seconds, started: Instant::now(), cpu_before: cpu_seconds() })
    }
}

/// Moves what `runs` say, and reports.
fn carry_out(
    lane: &mut Lane,
    plan: &Plan,
    paths: &Paths,
    options: &PathOptions,
    control: &mut Control<'_>,
    begun: Begun,
    runs: Vec<Run>,
) -> Result<Report> {
    let Begun { device, mut decision, path_seconds, started, cpu_before } = begun;
    let describe = |number| plan.describe(number);
    let mut path = BOUNCE;
    let (mut staging_bytes, mut by_cufile) = (0, None);
    if let Some((cufile, name)) = decision.cufile.take() {
        let moved = Files::open(&cufile, plan.sources()).and_then(|files| {
            let gap = lane.options().gap;
            cufile::read(
                lane.driver(),
                &cufile,
                options.cufile,
                plan.sources(),
                &files,
                &runs,
                gap,
                &describe,
                control,
            )
        });
        match moved {
            Ok((transfer, staging)) => (path, staging_bytes, by_cufile) = (name, staging, Some(Ok(transfer))),
            Err(error) if options.choice == PathChoice::CuFile || is_callers(&error) => {
                by_cufile = Some(Err(error))
            }
            Err(error) => {
                // Its self-test is made again before it is trusted again.
                if error.kind() != ErrorKind::OutOfDeviceMemory {
                    paths.forget(&decision.relied_on);
                }
                let why = format!("it failed, and the bounce path loaded everything: {error}");
                decision.not_taken.insert(0, NotTaken { path: name, why });
            }
        }
    }
    let moved = match by_cufile {
        Some(moved) => moved,
        None => lane.read(plan.sources(), &runs, &describe, control),
    };
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
    let seconds = started.elapsed().as_secs_f64();
    let notes = plan.sources().iter().filter_map(|source| source.note()).chain(transfer.note.as_deref());
    Ok(Report {
        not_taken: decision.not_taken,
        device,
        path,
        sources: plan.sources().len(),
        tensors: plan.tensors().len(),
        path_seconds,
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
        settings: lane.options().into(),
        bound_by: bound_by(&transfer),
        reads: transfer.reads,
        batches: transfer.batches,
        copies: transfer.copies,
        pinned_bytes: lane.pinned_bytes(),
        device_bytes: plan.device_bytes(),
        device_extra_bytes: plan.padding_bytes(),
        staging_bytes,
        cached_sources: plan.sources().iter().filter(|source| source.is_cached()).count(),
        verified_sources: plan.sources().iter().filter(|source| source.is_verified()).count(),
        backend: transfer.backend.clone(),
        fixed_buffers: transfer.fixed_buffers,
        notes: notes.map(str::to_owned).collect(),
    })
}

/// Whether an error is the caller's wish or the source's doing, which another way would not change.
fn is_callers(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Timeout | ErrorKind::Changed)
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
