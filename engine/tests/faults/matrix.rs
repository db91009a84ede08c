//! A short workload over a raw pool in which operation N goes wrong, for every N and every way to go wrong; and longer runs in
//! which many do. What must hold:
//!
//! - a read gives bytes that were written, or an error that names the place;
//! - a fault that damages nothing on the medium costs nothing that was committed;
//! - one that does is found by a sum, and costs no other region;
//! - after it, the same process closes the pool and opens it again;
//! - nothing hangs.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use engine::{ErrorKind, OpenOptions, Pool, ROOT, Result};
use nvme::{Device, Fault, FaultIo, FaultPlan, SimRng, Verb};

use crate::lab::*;

/// What may be found under a name.
#[derive(Clone, Debug)]
struct Known {
    /// After a crash or an error: one of these.
    possible: Vec<Option<Vec<u8>>>,
    /// It ever was one of these.
    history: Vec<Option<Vec<u8>>>,
}

#[derive(Clone, Debug, Default)]
struct Model(BTreeMap<&'static str, Known>);

impl Model {
    fn begin(names: &[(&'static str, Option<Vec<u8>>)]) -> Model {
        let known = |content: &Option<Vec<u8>>| Known {
            possible: vec![content.clone()],
            history: vec![content.clone()],
        };
        Model(names.iter().map(|(name, content)| (*name, known(content))).collect())
    }

    /// This is tried.
    fn tries(&mut self, name: &'static str, content: Option<Vec<u8>>) {
        let known = self.0.entry(name).or_insert_with(|| Known { possible: vec![None], history: vec![None] });
        known.possible.push(content.clone());
        known.history.push(content);
    }

    /// The last that was tried under `name` is known to be done and durable.
    fn durable(&mut self, name: &'static str) {
        if let Some(known) = self.0.get_mut(name) {
            let last = known.history.last().cloned().flatten();
            known.possible = vec![last];
        }
    }

    fn allows(&self, name: &str, content: &Option<Vec<u8>>, damaged_catalog: bool) -> bool {
        let known = &self.0[name];
        let list = if damaged_catalog { &known.history } else { &known.possible };
        list.contains(content)
            // A region that was made and whose writer failed is there and empty, until the pool is closed.
            || (content.as_ref().is_some_and(Vec::is_empty) && known.possible.contains(&None))
    }
}

fn kept() -> Vec<u8> {
    noise(1, 2 * CHUNK as usize + 777)
}

fn old() -> Vec<u8> {
    noise(2, 2 * CHUNK as usize)
}

fn patched() -> Vec<u8> {
    let mut bytes = old();
    bytes[5000..5100].copy_from_slice(&noise(3, 100));
    bytes
}

fn lab() -> Lab {
    let mut lab = Lab::new(|pool| {
        put(pool, "kept", &kept()).unwrap();
        put(pool, "old", &old()).unwrap();
        put(pool, "gone", &noise(4, 100)).unwrap();
        pool.sync().unwrap();
    });
    // The first superblock copy is damaged, so that opening writes superblocks too.
    lab.scar(200);
    lab
}

fn model() -> Model {
    Model::begin(&[
        ("kept", Some(kept())),
        ("old", Some(old())),
        ("gone", Some(noise(4, 100))),
        ("new", None),
    ])
}

struct Run<'a> {
    case: &'a str,
    model: Model,
    errors: u64,
}

impl Run<'_> {
    /// Whether it worked; an error must say where.
    fn done<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.errors += 1;
                check_names_the_place(&error, self.case);
                None
            }
        }
    }

    fn read(&mut self, pool: &Pool, name: &str) {
        if let Some(content) = self.done(get(pool, name)) {
            let known = &self.model.0[name];
            assert!(
                known.history.contains(&content) || content.as_ref().is_some_and(Vec::is_empty),
                "{}: {name} was read with bytes that nobody wrote",
                self.case
            );
        }
    }

    /// Every verb that a pool has for bytes, names and itself.
    fn work(&mut self, options: &OpenOptions, path: &std::path::Path) {
        let Some(pool) = self.done(Pool::open(path, options)) else { return };
        self.read(&pool, "kept");
        // A new region.
        let new = noise(5, 3 * CHUNK as usize + 1);
        self.model.tries("new", Some(new.clone()));
        let put_new = put(&pool, "new", &new).and_then(|()| pool.sync());
        if self.done(put_new).is_some() {
            self.model.durable("new");
        }
        // A part of one that is there.
        self.model.tries("old", Some(patched()));
        let patch = || {
            let node = pool.lookup(ROOT, name("old"))?.node;
            let handle = pool.open_region(node, engine::Access::ReadWrite, false)?;
            write_all(&handle, 5000, &noise(3, 100))?;
            handle.sync()
        };
        if self.done(patch()).is_some() {
            self.model.durable("old");
        }
        self.model.tries("gone", None);
        if self.done(pool.unlink(ROOT, name("gone")).and_then(|()| pool.sync())).is_some() {
            self.model.durable("gone");
        }
        for name in ["kept", "old", "new", "gone"] {
            self.read(&pool, name);
        }
        if let Some(report) = self.done(pool.verify(None, &mut |_| {})) {
            for bad in report.bad {
                assert!(!bad.path.is_empty() && !bad.reason.is_empty(), "{}: {bad:?}", self.case);
            }
        }
        let _ = self.done(pool.close());
    }
}

/// What a fault can have done to the medium.
#[derive(Debug, Default)]
struct Harm {
    catalog: bool,
    data: bool,
}

fn harm(fired: &[(FaultIo, Fault)]) -> Harm {
    let mut harm = Harm::default();
    for (io, fault) in fired.iter().filter(|(io, _)| io.verb == Verb::Write) {
        let mut hit = |offset: u64| if offset < DATA { harm.catalog = true } else { harm.data = true };
        match fault {
            Fault::Lost | Fault::FlipBit(_) => hit(io.offset),
            Fault::Misdirected(to) => {
                hit(io.offset);
                hit(*to);
            }
            _ => {}
        }
    }
    harm
}

/// After the faults: the pool opens again in this process, and is what it may be. Returns chunks that are damaged.
fn check(case: &str, run: &Run<'_>, harm: &Harm, options: &OpenOptions, path: &std::path::Path) -> u64 {
    let pool = match Pool::open(path, options) {
        Ok(pool) => pool,
        Err(error) if harm.catalog && error.kind() == ErrorKind::Corrupt => return 1,
        Err(error) => panic!("{case}: the pool does not open again: {}", error.chain()),
    };
    let mut damaged = 0;
    for name in run.model.0.keys() {
        match get(&pool, name) {
            Ok(content) => assert!(
                run.model.allows(name, &content, harm.catalog),
                "{case}: {name} has {:?} bytes that it should not have",
                content.map(|bytes| bytes.len())
            ),
            Err(error) if error.kind() == ErrorKind::Corrupt && (harm.data || harm.catalog) => {
                check_names_the_place(&error, case);
                damaged += 1;
            }
            Err(error) => panic!("{case}: {name} cannot be read: {}", error.chain()),
        }
    }
    let report = pool.verify(None, &mut |_| {}).unwrap();
    assert_eq!(report.is_clean(), damaged == 0, "{case}: {report:?}");
    // It takes changes again.
    put(&pool, "after", &noise(9, 20_000)).unwrap_or_else(|error| panic!("{case}: {}", error.chain()));
    assert_eq!(get(&pool, "after").unwrap(), Some(noise(9, 20_000)), "{case}");
    pool.close().unwrap_or_else(|error| panic!("{case}: {}", error.chain()));
    damaged
}

/// One run with these faults; returns errors seen and chunks damaged.
fn run(case: &str, lab: &Lab, plan: &Arc<FaultPlan>, below: &Arc<dyn Device>) -> (u64, u64) {
    let options = faulty(below, plan);
    let mut run = Run { case, model: model(), errors: 0 };
    run.work(&options, &lab.path);
    let harm = harm(&plan.fired());
    plan.lift();
    let damaged = check(case, &run, &harm, &options, &lab.path);
    (run.errors, damaged)
}

#[test]
fn one_fault_at_every_operation() {
    let watchdog = Watchdog::new();
    let lab = lab();
    let plan = Arc::new(FaultPlan::new());
    plan.keep_log();
    assert_eq!(run("no fault", &lab, &plan, &lab.device()), (0, 0));
    let log = plan.log();
    let operations = {
        // Those of the check at the end do not count.
        let plan = Arc::new(FaultPlan::new());
        let mut run = Run { case: "no fault", model: model(), errors: 0 };
        run.work(&faulty(&lab.device(), &plan), &lab.path);
        plan.operations()
    };
    if std::env::var_os("NVTIER_FAULT_LOG").is_some() {
        log.iter().take(operations as usize).for_each(|io| println!("{io:?}"));
    }
    let of = |verb, data: bool| {
        let chosen = log.iter().take(operations as usize);
        chosen.filter(|io| io.verb == verb && (io.offset >= DATA) == data).count()
    };
    println!(
        "{operations} operations: {} reads of data, {} of catalog and superblocks, {} writes of data, {} of catalog and superblocks, {} flushes",
        of(Verb::Read, true),
        of(Verb::Read, false),
        of(Verb::Write, true),
        of(Verb::Write, false),
        of(Verb::Flush, false)
    );
    let mut faults = vec![
        ("EIO", Fault::Errno(5)),
        ("ENOSPC", Fault::Errno(28)),
        ("nothing moved", Fault::Short(0)),
        ("4096 bytes moved", Fault::Short(4096)),
        ("lost", Fault::Lost),
        ("3 s late", Fault::Slow(Duration::from_secs(3))),
        ("never answered", Fault::Hang),
        ("vanished", Fault::Vanish),
        ("misdirected over a region", Fault::Misdirected(DATA)),
        ("misdirected into free space", Fault::Misdirected(DATA + MIB)),
        ("misdirected into the catalog", Fault::Misdirected(ZONE + (64 << 10) + 4096)),
    ];
    for seed in 1..=2 {
        faults.push(("bit flipped", Fault::FlipBit(SimRng::new(seed).next_u64())));
    }
    let (mut runs, mut errors, mut damaged) = (0, 0, 0);
    let mut failures = Vec::new();
    for (what, fault) in faults {
        let before = (runs, errors, damaged);
        for at in 0..operations {
            let case = format!("{what} at operation {at} of {operations} ({fault:?})");
            watchdog.begins(&case);
            let plan = Arc::new(FaultPlan::new());
            plan.at(at, fault);
            runs += 1;
            match attempt(|| run(&case, &lab, &plan, &lab.device())) {
                Ok((e, d)) => {
                    errors += u64::from(e > 0);
                    damaged += u64::from(d > 0);
                }
                Err(text) => failures.push(text),
            }
        }
        println!(
            "{what}: {} runs, {} with an error, {} with damage that was found",
            runs - before.0,
            errors - before.1,
            damaged - before.2
        );
    }
    assert!(failures.is_empty(), "{} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
    assert!(errors > 0 && damaged > 0, "no fault was ever noticed");
}

/// What a run yields, or what its failed assertion says: one test shows all that is wrong.
fn attempt<T>(run: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(_) => "a panic without words".into(),
    })
}

fn some_fault(rng: &mut SimRng) -> Fault {
    match rng.in_range(0..10) {
        0 | 1 => Fault::Errno(5),
        2 => Fault::Short(rng.in_range(0..3) * 4096),
        3 => Fault::FlipBit(rng.next_u64()),
        4 => Fault::Lost,
        5 => Fault::Misdirected(rng.in_range(0..LEN / 4096) * 4096),
        6 => Fault::Slow(Duration::from_millis(rng.in_range(1..40_000))),
        7 => Fault::Sleep(Duration::from_millis(rng.in_range(1..5))),
        8 => Fault::Hang,
        _ => Fault::Errno(28),
    }
}

#[test]
fn many_faults_at_random() {
    let watchdog = Watchdog::new();
    let lab = lab();
    let rounds = std::env::var("NVTIER_FAULT_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    let mut fired = 0;
    let mut failures = Vec::new();
    for seed in 1..=rounds {
        let case = format!("seed {seed}");
        watchdog.begins(&case);
        let plan = Arc::new(FaultPlan::new());
        let mut rng = SimRng::new(seed);
        let one_in = [3, 10, 30, 100][(seed % 4) as usize];
        plan.choose(move |_| (rng.in_range(0..one_in) == 0).then(|| some_fault(&mut rng)));
        if let Err(text) = attempt(|| run(&case, &lab, &plan, &lab.device())) {
            failures.push(text);
        }
        fired += plan.fired().len();
    }
    assert!(failures.is_empty(), "{} of {rounds} seeds failed:\n{}", failures.len(), failures.join("\n"));
    println!("seeds 1 to {rounds}: {fired} faults");
}
