//! A plan from its first act to its last power cut.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use engine::Session;
use nvme::{SimChange, SimHook, SimImage};

use crate::act::Act;
use crate::check;
use crate::config::{Config, Machine};
use crate::kv::{Kv, Promise};
use crate::model::State;
use crate::plan::Plan;
use crate::world::{self, Stop, World};

/// How a plan is run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What the devices do wrong: for tests of the checks.
    pub hook: Option<Arc<dyn SimHook>>,
    /// Keep every write and flush in the outcome.
    pub record: bool,
}

/// How a plan ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Power cuts.
    pub cuts: u64,
    /// Blocks of KV stores that had to outlive one.
    pub kv_blocks: u64,
    /// What is not as promised.
    pub violation: Option<String>,
    /// What happened, a line each.
    pub trace: Vec<String>,
    /// Every write and flush.
    pub changes: Vec<SimChange>,
}

/// What is not as promised, if anything. A panic is a violation.
pub(crate) fn violation_of(run: impl FnOnce() -> Result<(), Stop>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => None,
        Ok(Err(Stop::Violation(text))) => Some(text),
        Ok(Err(Stop::Power)) => Some("the power went off by itself".into()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Some(format!("a panic: {text}"))
        }
    }
}

/// Runs a plan. A panic is a violation.
pub fn run(plan: &Plan, options: &Options) -> Outcome {
    let mut outcome = Outcome::default();
    outcome.violation = violation_of(|| rounds(plan, options, &mut outcome));
    if let Some(violation) = &outcome.violation {
        outcome.trace.push(format!("VIOLATION: {violation}"));
    }
    outcome
}

fn rounds(plan: &Plan, options: &Options, outcome: &mut Outcome) -> Result<(), Stop> {
    let config = &plan.config;
    let mut images = config.formatted();
    let mut candidates = vec![State::new()];
    let mut promise = Promise::default();
    let mut recovery: &[(u64, u64)] = &[];
    for (index, round) in plan.rounds.iter().enumerate() {
        outcome.trace.push(format!("round {index}"));
        let mut world = recover(config, images, &candidates, promise, recovery, options, outcome)?;
        let before = world.machine.power.changes();
        world.machine.power.cut_after(round.cut);
        for act in &round.acts {
            let result = world.act(act);
            let result = match result {
                Ok(()) => "ok",
                Err(Stop::Power) => "the power goes off",
                Err(stop) => {
                    outcome.trace.push(format!("{act}"));
                    collect(&world.machine, options, outcome);
                    return Err(stop);
                }
            };
            outcome.trace.push(format!("{act}: {result}"));
            if world.machine.power.is_off() {
                break;
            }
        }
        outcome
            .trace
            .push(format!("power cut after {} writes and flushes", world.machine.power.changes() - before));
        outcome.cuts += 1;
        let machine;
        (machine, candidates, promise) = world.crash();
        collect(&machine, options, outcome);
        images = machine.survivors(round.survivors);
        recovery = &round.recovery;
    }
    let mut world = recover(config, images, &candidates, promise, recovery, options, outcome)?;
    // And the pool can be used as if nothing had happened.
    let usable = [
        Act::Unlink { path: "f0".into() },
        Act::Unlink { path: "f1".into() },
        Act::Import { path: "usable".into(), len: 70_000, fill: 7, reserve: true, commit: true },
        Act::Read { path: "usable".into() },
        Act::KvPut { space: 0, first: 100, count: 4 },
        Act::KvGet { space: 0, first: 100, count: 4 },
        Act::Reopen,
    ];
    for act in &usable {
        outcome.trace.push(format!("{act}"));
        world.act(act)?;
    }
    collect(&world.machine, options, outcome);
    world.finish().map(drop)
}

fn collect(machine: &Machine, options: &Options, outcome: &mut Outcome) {
    if options.record {
        outcome.changes.extend(machine.power.recorded());
    }
}

fn machine(config: &Config, images: &[SimImage], options: &Options) -> Machine {
    let machine = Machine::new(config, images, options.hook.clone());
    if options.record {
        machine.power.record();
    }
    machine
}

/// Opens a pool after a power cut (with more of them on the way), and finds out which moment it shows.
fn recover(
    config: &Config,
    mut images: Vec<SimImage>,
    candidates: &[State],
    promise: Promise,
    cuts: &[(u64, u64)],
    options: &Options,
    outcome: &mut Outcome,
) -> Result<World, Stop> {
    for (after, survivors) in cuts {
        let machine = machine(config, &images, options);
        machine.power.cut_after(*after);
        match world::open(&machine, &config.open_options()) {
            Ok(session) => {
                // The store may be cut while it is opened, too.
                if let Some(pool) = session.pool().filter(|pool| pool.resolve(crate::kv::DIRECTORY).is_ok()) {
                    drop(Kv::open_engine(pool, config));
                }
                machine.power.cut();
                drop(session);
            }
            Err(Stop::Power) => {}
            Err(stop) => return Err(stop),
        }
        outcome.cuts += 1;
        let changes = machine.power.changes();
        outcome.trace.push(format!("power cut while opening, after {changes} writes and flushes"));
        collect(&machine, options, outcome);
        images = machine.survivors(*survivors);
    }
    let machine = machine(config, &images, options);
    let session = world::open(&machine, &config.open_options())?;
    let (state, which) = identify(config, &session, candidates)?;
    outcome.trace.push(format!("opened: the tree is moment {which} of {}", candidates.len()));
    let mut world = World::new(config, machine, session, state, promise);
    world.count()?;
    outcome.kv_blocks += world.check_kv()?;
    world.count()?;
    Ok(world)
}

/// Which of the candidates the pool shows.
pub fn identify(config: &Config, session: &Session, candidates: &[State]) -> Result<(State, usize), Stop> {
    let found = check::examine(session, config)?;
    let mut differences = Vec::new();
    for (index, candidate) in candidates.iter().enumerate() {
        match check::compare(&found, candidate) {
            None => return Ok((candidate.clone(), index)),
            Some(difference) => differences.push(format!("moment {index}: {difference}")),
        }
    }
    world::violation(format!("the tree is of no moment that may be: {}", differences.join("; ")))
}
