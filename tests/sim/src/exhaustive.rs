//! Short workloads, each with a power cut after every write and flush that its devices see, and several ideas of what survives.

use std::collections::HashSet;

use nvme::{SimImage, Survivors};

use crate::act::Act;
use crate::check;
use crate::config::{Config, Machine};
use crate::driver::identify;
use crate::kv::Promise;
use crate::model::State;
use crate::world::{self, Stop, World, violation};
use engine::{ErrorKind, Pool};

/// A named workload.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What it is about.
    pub name: &'static str,
    /// The pool.
    pub config: Config,
    /// Made durable first, without cuts.
    pub before: Vec<Act>,
    /// What is cut.
    pub acts: Vec<Act>,
}

/// What a workload's cuts came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// Places of cuts: writes and flushes, and the end.
    pub points: u64,
    /// Cuts: places times what survived.
    pub cuts: u64,
}

const LARGE: Config = Config { members: 4, lba: 4096, chunk: 4096, stripe: 4096, data: 1 << 20, ram: 0 };
const PAIR: Config = Config { members: 2, lba: 512, chunk: 4096, stripe: 8192, data: 1 << 20, ram: 0 };
const TIGHT: Config = Config { data: 1 << 20, ..Config::SMALL };

fn put(path: &str, len: usize) -> Act {
    Act::Put { path: path.into(), len, fill: len as u64 }
}

fn write(path: &str, offset: usize, len: usize) -> Act {
    Act::Write { path: path.into(), offset, len, fill: 77 + offset as u64 }
}

fn import(path: &str, len: usize, commit: bool) -> Act {
    Act::Import { path: path.into(), len, fill: 5, reserve: true, commit }
}

fn rename(from: &str, to: &str) -> Act {
    Act::Rename { from: from.into(), to: to.into(), exchange: false }
}

fn open(slot: usize, path: &str) -> Act {
    Act::Open { slot, path: path.into(), truncate: false }
}

fn write_at(slot: usize, offset: usize, len: usize) -> Act {
    Act::WriteAt { slot, offset, len, fill: 900 + slot as u64 + offset as u64 }
}

fn unlink(path: &str) -> Act {
    Act::Unlink { path: path.into() }
}

fn mkdir(path: &str) -> Act {
    Act::Mkdir { path: path.into() }
}

fn xattr(path: &str, name: &str, len: usize) -> Act {
    Act::SetXattr { path: path.into(), name: name.into(), len, fill: 3 }
}

fn kv_put(first: u64, count: u64) -> Act {
    Act::KvPut { space: 0, first, count }
}

fn kv_flush(whole: bool) -> Act {
    Act::KvFlush { whole }
}

/// All of them.
pub fn workloads() -> Vec<Workload> {
    let sync = || Act::Sync;
    let small = Config::SMALL;
    let old = || vec![put("a", 9000), put("b", 5000)];
    let one = |name, config, before, acts| Workload { name, config, before, acts };
    vec![
        one("create", small, vec![], vec![Act::Create { path: "a".into() }, sync()]),
        one("put", small, vec![], vec![put("a", 10_000), sync()]),
        one("put on two members", PAIR, vec![], vec![put("a", 50_000), sync()]),
        one(
            "put on four members of 4096-byte blocks",
            LARGE,
            vec![],
            vec![put("a", 30_000), put("b", 20_000), sync()],
        ),
        one("overwrite whole", small, old(), vec![put("a", 20_000), sync()]),
        one("overwrite in the middle", PAIR, old(), vec![write("a", 4000, 3000), sync()]),
        one("overwrite in the middle, large blocks", LARGE, old(), vec![write("a", 100, 8000), sync()]),
        one("append", small, old(), vec![write("a", 9000, 6000), sync(), write("a", 15_000, 10), sync()]),
        one("write beyond the end", small, old(), vec![write("a", 30_000, 100), sync()]),
        one("truncate", small, old(), vec![Act::Truncate { path: "a".into(), len: 100 }, sync()]),
        one(
            "shrink and grow",
            small,
            old(),
            vec![
                Act::Truncate { path: "a".into(), len: 4100 },
                sync(),
                Act::Truncate { path: "a".into(), len: 12_000 },
                sync(),
            ],
        ),
        one(
            "punch a hole",
            small,
            old(),
            vec![
                open(0, "a"),
                Act::Punch { slot: 0, offset: 1000, len: 7500 },
                Act::Close { slot: 0 },
                sync(),
            ],
        ),
        one("rename", small, old(), vec![rename("a", "c"), sync()]),
        one("rename over another", small, old(), vec![rename("a", "b"), sync(), put("d", 9000), sync()]),
        one(
            "exchange",
            small,
            old(),
            vec![Act::Rename { from: "a".into(), to: "b".into(), exchange: true }, sync()],
        ),
        one(
            "link and unlink",
            small,
            old(),
            vec![
                Act::Link { from: "a".into(), to: "c".into() },
                sync(),
                unlink("a"),
                sync(),
                unlink("c"),
                sync(),
            ],
        ),
        one(
            "delete and use the space again",
            small,
            old(),
            vec![unlink("a"), sync(), put("c", 12_000), sync()],
        ),
        one(
            "directories",
            small,
            vec![mkdir("d"), put("d/a", 3000)],
            vec![
                mkdir("e"),
                rename("d/a", "e/a"),
                sync(),
                Act::Rmdir { path: "d".into() },
                rename("e", "d"),
                sync(),
            ],
        ),
        one(
            "symbolic links and modes",
            small,
            old(),
            vec![
                Act::Symlink { path: "s".into(), target: "a".into() },
                Act::Chmod { path: "a".into(), mode: 0o600 },
                sync(),
            ],
        ),
        one(
            "extended attributes",
            small,
            vec![put("a", 100), xattr("a", "user.a", 50)],
            vec![
                xattr("a", "user.b", 9000),
                sync(),
                Act::RemoveXattr { path: "a".into(), name: "user.a".into() },
                sync(),
            ],
        ),
        one("import", small, vec![], vec![import("a", 40_000, true)]),
        one("import over another", PAIR, old(), vec![import("a", 20_000, true)]),
        one("import given up", small, old(), vec![import("c", 20_000, false), sync()]),
        one(
            "fsync of what is open",
            small,
            old(),
            vec![
                open(0, "a"),
                write_at(0, 0, 5000),
                Act::Fsync { slot: 0 },
                write_at(0, 2000, 9000),
                Act::Fsync { slot: 0 },
                write_at(0, 0, 100),
            ],
        ),
        one(
            "two writers",
            PAIR,
            old(),
            vec![
                open(0, "a"),
                open(1, "b"),
                write_at(0, 0, 9000),
                write_at(1, 4000, 9000),
                Act::Fsync { slot: 0 },
                write_at(1, 0, 200),
                Act::Close { slot: 1 },
                rename("b", "c"),
                sync(),
            ],
        ),
        one(
            "an unlinked file that is written",
            small,
            old(),
            vec![
                open(0, "a"),
                unlink("a"),
                write_at(0, 0, 9000),
                Act::Fsync { slot: 0 },
                sync(),
                Act::Close { slot: 0 },
            ],
        ),
        one(
            "the same space over and over",
            TIGHT,
            old(),
            (0..4).flat_map(|round| [put("a", 9000 + round), sync()]).collect(),
        ),
        one(
            "a full pool",
            TIGHT,
            vec![put("a", 500_000), put("b", 500_000)],
            vec![unlink("a"), put("c", 600_000), sync()],
        ),
        one("close and open", small, old(), vec![put("c", 3000), Act::Reopen, put("d", 100), sync()]),
        one(
            "generations that are kept",
            small,
            vec![import("a", 9000, true), Act::Keep { path: "a".into(), count: 2 }],
            vec![
                import("a", 20_000, true),
                put("b", 5000),
                rename("b", "a"),
                sync(),
                import("a", 3000, true),
                unlink("a"),
                sync(),
            ],
        ),
        one(
            "a region that is rolled back",
            PAIR,
            vec![
                import("a", 9000, true),
                Act::Keep { path: "a".into(), count: 2 },
                import("a", 20_000, true),
            ],
            vec![
                Act::RollBack { path: "a".into(), which: 0 },
                sync(),
                import("a", 4000, true),
                Act::RollBack { path: "a".into(), which: 1 },
                sync(),
                Act::Keep { path: "a".into(), count: 0 },
                sync(),
            ],
        ),
        one(
            "a KV store that is made, and filled",
            small,
            vec![put("a", 9000)],
            vec![kv_put(0, 4), kv_flush(false), kv_put(4, 3), put("b", 100), sync(), kv_flush(false)],
        ),
        one(
            "a KV store that makes room",
            TIGHT,
            // As many blocks as it has slots.
            [0, 8, 16].map(|first| kv_put(first, 8)).into_iter().chain([kv_flush(false)]).collect(),
            vec![kv_put(30, 3), kv_flush(false), kv_put(33, 3), kv_flush(false), kv_put(36, 2)],
        ),
        one(
            "a KV store on two members, its logs taking turns",
            PAIR,
            vec![kv_put(0, 6), kv_flush(false)],
            vec![
                kv_put(6, 2),
                kv_flush(true),
                Act::KvRemove { space: 0, first: 1, count: 2 },
                kv_flush(false),
                kv_put(1, 1),
                kv_flush(false),
                kv_put(10, 1),
                kv_flush(true),
            ],
        ),
        one(
            "a KV store with a checkpoint beside its commits",
            small,
            // Three commits: a checkpoint is due.
            (0..3).flat_map(|n| [kv_put(4 * n, 4), kv_flush(false)]).collect(),
            vec![
                Act::KvStep,
                kv_put(12, 2),
                Act::KvStep,
                Act::KvRemove { space: 0, first: 1, count: 2 },
                kv_flush(false),
                Act::KvStep,
                kv_put(1, 1),
                kv_flush(false),
                Act::KvStep,
                Act::KvRemove { space: 0, first: 11, count: 1 },
                Act::KvStep,
                Act::KvStep,
                Act::KvStep,
                kv_put(20, 2),
                kv_flush(false),
            ],
        ),
        one(
            "a KV store that is closed and opened",
            small,
            vec![kv_put(0, 4)],
            vec![kv_put(4, 4), Act::Reopen, kv_put(8, 2), kv_flush(false)],
        ),
        one(
            "a catalog that grows",
            small,
            vec![put("a", 10)],
            vec![
                xattr("a", "user.0", 60_000),
                xattr("a", "user.1", 60_000),
                sync(),
                xattr("a", "user.2", 60_000),
                xattr("a", "user.3", 60_000),
                sync(),
            ],
        ),
    ]
}

/// What a machine's devices may hold after a cut: nothing and all of what was not flushed, each write alone, and some by chance.
fn patterns(machine: &Machine, thorough: bool) -> Vec<Vec<SimImage>> {
    let all = |which: Survivors| -> Vec<SimImage> {
        machine.devices.iter().map(|device| device.survivors(which)).collect()
    };
    let pending: Vec<usize> = machine.devices.iter().map(|device| device.unflushed()).collect();
    let mut patterns = vec![all(Survivors::None)];
    if pending.iter().sum::<usize>() == 0 {
        return patterns;
    }
    patterns.push(all(Survivors::All));
    for (lone, count) in pending.iter().enumerate() {
        // Of long series every third, so that no workload takes minutes.
        let step = if thorough || *count <= 6 { 1 } else { 3 };
        for index in (0..*count).step_by(step) {
            for which in [Survivors::Only(index), Survivors::AllBut(index)] {
                let other =
                    if matches!(which, Survivors::Only(_)) { Survivors::None } else { Survivors::All };
                let image = |(at, device): (usize, &std::sync::Arc<nvme::SimDevice>)| {
                    device.survivors(if at == lone { which } else { other })
                };
                patterns.push(machine.devices.iter().enumerate().map(image).collect());
                if !thorough {
                    break;
                }
            }
        }
    }
    for seed in 0..if thorough { 8 } else { 2 } {
        patterns.push(machine.survivors(machine.power.changes() * 31 + seed));
    }
    patterns
}

/// The tree after `acts`, and devices that were left without a proper close.
fn prepare(workload: &Workload) -> Result<(Vec<SimImage>, State, Promise), Stop> {
    let mut world = World::fresh(&workload.config, None)?;
    let kv = workload.before.iter().any(|act| matches!(act, Act::KvPut { .. }));
    let last = [kv_flush(false), Act::Sync];
    for act in workload.before.iter().chain(&last[usize::from(!kv)..]) {
        world.act(act)?;
    }
    let (machine, mut candidates, promise) = world.crash();
    let images = machine.devices.iter().map(|device| device.survivors(Survivors::None)).collect();
    Ok((images, candidates.remove(0), promise))
}

/// Cuts the power after every write and flush of a workload, the opening of its pool included.
pub fn run(workload: &Workload, thorough: bool) -> Result<Count, String> {
    exhaust(workload, thorough).map_err(|stop| match stop {
        Stop::Violation(text) => format!("workload {:?}: {text}", workload.name),
        Stop::Power => format!("workload {:?}: the power went off by itself", workload.name),
    })
}

fn exhaust(workload: &Workload, thorough: bool) -> Result<Count, Stop> {
    let config = &workload.config;
    let (images, state, before) = prepare(workload)?;
    let mut count = Count::default();
    loop {
        let machine = Machine::new(config, &images, None);
        machine.power.cut_after(count.points);
        let (machine, candidates, promise, place) = match world::open(&machine, &config.open_options()) {
            Ok(session) => {
                let mut world = World::new(config, machine, session, state.clone(), before.clone());
                let mut place = "the last act".to_owned();
                for act in &workload.acts {
                    match world.act(act) {
                        Ok(()) => {}
                        Err(Stop::Power) => {
                            place = act.to_string();
                            break;
                        }
                        Err(stop) => return Err(stop),
                    }
                }
                let over = !world.machine.power.is_off();
                let (machine, candidates, promise) = world.crash();
                if over {
                    // No write is left that was not cut.
                    count.cuts += verify(config, &machine, &candidates, &promise, thorough, "the end")?;
                    count.points += 1;
                    return Ok(count);
                }
                (machine, candidates, promise, place)
            }
            Err(Stop::Power) => (machine, vec![state.clone()], before.clone(), "opening".to_owned()),
            Err(stop) => return Err(stop),
        };
        let place = format!("a cut after {} writes and flushes ({place})", count.points);
        count.cuts += verify(config, &machine, &candidates, &promise, thorough, &place)?;
        count.points += 1;
    }
}

/// Opens what each pattern leaves.
fn verify(
    config: &Config,
    cut: &Machine,
    candidates: &[State],
    promise: &Promise,
    thorough: bool,
    place: &str,
) -> Result<u64, Stop> {
    let mut cuts = 0;
    for (index, images) in patterns(cut, thorough).iter().enumerate() {
        cuts += 1;
        let looked = look(config, images, candidates, promise);
        if let Err(Stop::Violation(text)) = looked {
            return violation(format!("{place}, pattern {index}: {text}"));
        }
        looked?;
    }
    Ok(cuts)
}

fn look(config: &Config, images: &[SimImage], candidates: &[State], promise: &Promise) -> Result<(), Stop> {
    let machine = Machine::new(config, images, None);
    let session = world::open(&machine, &config.open_options())?;
    let (state, _) = identify(config, &session, candidates)?;
    let mut world = World::new(config, machine, session, state, promise.clone());
    world.count()?;
    world.check_kv()?;
    world.count()
}

/// Cuts the power after every write and flush of making a pool: there is none afterwards, or an empty one.
pub fn format(config: &Config) -> Result<Count, String> {
    let mut count = Count::default();
    let mut kinds = HashSet::new();
    loop {
        let machine = Machine::new(config, &config.blank(), None);
        machine.power.cut_after(count.points);
        let made = Pool::format_devices(&machine.as_devices(), &config.format_options());
        let over = !machine.power.is_off();
        if let (Err(error), true) = (&made, over) {
            return Err(format!("format: {}", error.chain()));
        }
        for images in patterns(&machine, true) {
            count.cuts += 1;
            let place = || format!("format, a cut after {} writes and flushes", count.points);
            let after = Machine::new(config, &images, None);
            match Pool::open_devices(&after.as_devices(), &config.open_options()) {
                Ok(pool) => {
                    let found = check::examine(&engine::Session::over(pool, &Default::default()), config);
                    match found {
                        Ok(state) if state.is_empty() => {}
                        Ok(state) => return Err(format!("{}: a new pool holds {:?}", place(), state.keys())),
                        Err(stop) => return Err(format!("{}: {stop:?}", place())),
                    }
                }
                Err(error) => {
                    kinds.insert(error.kind());
                    let fits = matches!(error.kind(), ErrorKind::NotAPool | ErrorKind::MissingMember);
                    if over || !fits {
                        return Err(format!("{}: {}", place(), error.chain()));
                    }
                }
            }
        }
        count.points += 1;
        if over {
            return Ok(count);
        }
    }
}
