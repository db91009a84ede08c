//! Several real threads on one pool, and a power cut among them.
//!
//! Each thread has a directory of its own, and remembers what a snapshot may have held of it since the last that is known to be durable, and from when
//! until when. After the cut every directory must show one of its moments, and there must be a time at which all of these held: the tree
//! is of one moment. A seed fixes what the threads do and where the power goes; how they interleave is theirs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use engine::{Access, ErrorKind, Handle, NodeKind, OpenOptions, Pool, Session, WriterOptions};
use nvme::{SimHook, SimRng};
use std::sync::Arc;

use crate::check;
use crate::config::{Config, Machine};
use crate::content::{Content, noise};
use crate::driver::violation_of;
use crate::kv::{self, Kv, Promise};
use crate::model::State;
use crate::world::{self, Done, Stop, new_node, violation};

/// How a seed ended.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Power cuts.
    pub cuts: u64,
    /// Acts that ended before one.
    pub acts: u64,
    /// Blocks of a KV store that had to outlive one.
    pub kv_blocks: u64,
    /// What is not as promised.
    pub violation: Option<String>,
}

const FILES: u64 = 6;

#[derive(Clone, Copy, Debug)]
enum Act {
    Put { file: u64, len: usize, fill: u64, fsync: bool },
    Write { file: u64, offset: usize, len: usize, fill: u64 },
    Import { file: u64, len: usize, fill: u64 },
    Rename { from: u64, to: u64 },
    Unlink { file: u64 },
    Read { file: u64 },
    Sync,
    KvPut { space: usize, first: u64, count: u64 },
    KvGet { space: usize, first: u64, count: u64 },
    KvRemove { space: usize, first: u64, count: u64 },
    KvStep,
    KvFlush { whole: bool },
}

impl Act {
    fn draw(rng: &mut SimRng, most: usize, kv: bool) -> Act {
        let mut below = |end: u64| rng.in_range(0..end);
        let (file, fill) = (below(FILES), below(1 << 16));
        let len = [1, 4096, most / 3, most][below(4) as usize].max(1) - below(2) as usize;
        match below(if kv { 21 } else { 14 }) {
            0..=3 => Act::Put { file, len, fill, fsync: below(3) == 0 },
            4 | 5 => Act::Write { file, offset: below(most as u64) as usize, len, fill },
            6 | 7 => Act::Import { file, len, fill },
            8 | 9 => Act::Rename { from: file, to: below(FILES) },
            10 => Act::Unlink { file },
            11 | 12 => Act::Read { file },
            13 => Act::Sync,
            14..=16 => Act::KvPut { space: below(2) as usize, first: below(30), count: below(8) + 1 },
            17 => Act::KvGet { space: below(2) as usize, first: below(30), count: 4 },
            20 => Act::KvStep,
            18 => Act::KvRemove { space: below(2) as usize, first: below(30), count: 2 },
            _ => Act::KvFlush { whole: below(2) == 0 },
        }
    }
}

type Files = BTreeMap<String, Content>;

/// What a snapshot may have held, and when.
#[derive(Clone, Debug)]
struct Moment {
    files: Files,
    from: u64,
    until: u64,
}

struct Worker<'a> {
    session: &'a Session,
    dir: &'a str,
    chunk: usize,
    machine: &'a Machine,
    /// Counts beginnings and ends of acts of all threads.
    clock: &'a AtomicU64,
    live: Files,
    moments: Vec<Moment>,
    kv: Option<Kv>,
    promise: Promise,
    acts: u64,
}

impl Worker<'_> {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    fn pool(&self) -> &Pool {
        self.session.pool().expect("this process owns it")
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// Something that may show these files from now on.
    fn may_show(&mut self, files: Files) {
        let from = self.tick();
        self.moments.push(Moment { files, from, until: u64::MAX });
    }

    /// An act is over: nothing shows what was before.
    fn settled(&mut self, files: Files) {
        let now = self.tick();
        for moment in &mut self.moments {
            if moment.files != files {
                moment.until = moment.until.min(now);
            }
        }
        self.live = files;
    }

    /// A snapshot that was begun at `since` or later is durable, and holds all that is here now.
    fn durable(&mut self, since: u64) {
        self.moments = vec![Moment { files: self.live.clone(), from: since, until: u64::MAX }];
    }

    fn failed<T>(&self, what: &str, error: engine::Error) -> Result<T, Stop> {
        match self.machine.power.is_off() {
            true => Err(Stop::Power),
            false => violation(format!("{}: {what} fails: {}", self.dir, error.chain())),
        }
    }

    fn run(&mut self, acts: &[Act]) -> Done {
        for act in acts {
            match self.act(act) {
                Ok(()) if self.machine.power.is_off() => return Ok(()),
                Ok(()) => self.acts += 1,
                Err(Stop::Power) => return Ok(()),
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    fn act(&mut self, act: &Act) -> Done {
        let name = |file: u64| format!("f{file}");
        match *act {
            Act::Put { file, len, fill, fsync } => self.put(name(file), len, fill, fsync),
            Act::Write { file, offset, len, fill } => self.write(name(file), offset, len, fill),
            Act::Import { file, len, fill } => self.import(name(file), len, fill),
            Act::Rename { from, to } => self.rename(name(from), name(to)),
            Act::Unlink { file } => self.unlink(&name(file)),
            Act::Read { file } => self.read(&name(file)),
            Act::Sync => {
                let since = self.tick();
                match self.session.sync() {
                    Ok(()) => self.durable(since),
                    Err(error) => return self.failed("sync", error),
                }
                Ok(())
            }
            Act::KvPut { space, first, count } => {
                self.with_kv(|kv, promise| kv.put(space, first, count, promise))
            }
            Act::KvGet { space, first, count } => self.with_kv(|kv, promise| {
                let numbers: Vec<u64> = (first..first + count).collect();
                kv.get(space, &numbers, promise).map(drop)
            }),
            Act::KvRemove { space, first, count } => self.with_kv(|kv, _| kv.remove(space, first, count)),
            Act::KvStep => self.with_kv(|kv, _| kv.step()),
            Act::KvFlush { whole } => self.with_kv(|kv, promise| kv.flush(whole, promise)),
        }
    }

    fn with_kv(&mut self, run: impl FnOnce(&mut Kv, &mut Promise) -> Done) -> Done {
        if self.kv.is_none() {
            let config = self.config();
            self.kv = self.or_power(|worker| Kv::open(worker.pool(), &config))?;
        }
        let Some(mut kv) = self.kv.take() else { return Ok(()) };
        let mut promise = std::mem::take(&mut self.promise);
        let done = self.or_power(|_| run(&mut kv, &mut promise));
        (self.kv, self.promise) = (Some(kv), promise);
        done
    }

    /// What goes wrong once the power is off is no violation.
    fn or_power<T>(&self, run: impl FnOnce(&Self) -> Result<T, Stop>) -> Result<T, Stop> {
        let done = run(self);
        if self.machine.power.is_off() { Err(Stop::Power) } else { done }
    }

    fn config(&self) -> Config {
        self.machine.config
    }

    fn open(&self, name: &str, truncate: bool) -> engine::Result<Handle> {
        let attr = self.pool().resolve(&self.path(name))?;
        self.pool().open_region(attr.node, Access::ReadWrite, truncate)
    }

    /// How many bytes went in: fewer where the pool is full.
    fn write_all(&self, handle: &Handle, offset: usize, data: &[u8]) -> Result<usize, Stop> {
        let mut done = 0;
        while done < data.len() {
            match handle.write_at((offset + done) as u64, &data[done..]) {
                Ok(0) => break,
                Ok(wrote) => done += wrote,
                Err(error) if error.kind() == ErrorKind::NoSpace && !self.machine.power.is_off() => break,
                Err(error) => return self.failed("write", error),
            }
        }
        Ok(done)
    }

    /// Writes into an open file, and closes it: nothing of it shows before, or all.
    fn fill(
        &mut self,
        name: String,
        handle: Handle,
        before: Content,
        offset: usize,
        data: &[u8],
        fsync: bool,
    ) -> Done {
        let mut whole = before.clone();
        whole.write(self.chunk, offset, data);
        let with = |worker: &Self, content: Content| {
            let mut files = worker.live.clone();
            files.insert(name.clone(), content);
            files
        };
        self.may_show(with(self, whole.clone()));
        let wrote = self.write_all(&handle, offset, data)?;
        if wrote < data.len() {
            whole = before;
            whole.write(self.chunk, offset, &data[..wrote]);
            whole.unsure = true;
            self.may_show(with(self, whole.clone()));
        }
        let files = with(self, whole);
        if fsync {
            let since = self.tick();
            match handle.sync() {
                Ok(()) => {
                    self.settled(files.clone());
                    self.durable(since);
                }
                Err(error) => return self.failed("fsync", error),
            }
        }
        if let Err(error) = handle.flush() {
            return self.failed("close", error);
        }
        drop(handle);
        if self.machine.power.is_off() {
            return Err(Stop::Power);
        }
        self.settled(files);
        Ok(())
    }

    fn put(&mut self, name: String, len: usize, fill: u64, fsync: bool) -> Done {
        if !self.live.contains_key(&name) {
            let mut files = self.live.clone();
            files.insert(name.clone(), Content::default());
            self.may_show(files.clone());
            let new = new_node(NodeKind::Region, None);
            let parent = self.pool().resolve(self.dir);
            if let Err(error) = parent.and_then(|dir| self.pool().create(dir.node, OsStr::new(&name), &new)) {
                return self.failed("create", error);
            }
            // It is not there again once it is written to, unless a snapshot held it: what was before stays possible.
            self.live = files;
        }
        match self.open(&name, true) {
            Ok(handle) => self.fill(name, handle, Content::default(), 0, &noise(fill, len), fsync),
            Err(error) => self.failed("open", error),
        }
    }

    fn write(&mut self, name: String, offset: usize, len: usize, fill: u64) -> Done {
        let Some(before) = self.live.get(&name).cloned() else { return Ok(()) };
        let offset = offset.min(before.bytes.len());
        match self.open(&name, false) {
            Ok(handle) => self.fill(name, handle, before, offset, &noise(fill, len), false),
            Err(error) => self.failed("open", error),
        }
    }

    fn import(&mut self, name: String, len: usize, fill: u64) -> Done {
        let data = noise(fill, len);
        let path = self.path(&name);
        let full = |error: &engine::Error| error.kind() == ErrorKind::NoSpace && !self.machine.power.is_off();
        let mut writer = match self.session.writer(&path, Some(len as u64), WriterOptions::default()) {
            Ok(writer) => writer,
            Err(error) if full(&error) => return Ok(()),
            Err(error) => return self.failed("import", error),
        };
        match writer.write_all(&data) {
            Ok(()) => {}
            Err(error) if full(&error) => return Ok(()),
            Err(error) => return self.failed("write an import", error),
        }
        let mut files = self.live.clone();
        let mut content = Content::default();
        content.write(self.chunk, 0, &data);
        files.insert(name, content);
        let since = self.tick();
        self.may_show(files.clone());
        match writer.commit() {
            Ok(_) => {
                self.settled(files);
                self.durable(since);
                Ok(())
            }
            Err(error) => self.failed("commit an import", error),
        }
    }

    fn rename(&mut self, from: String, to: String) -> Done {
        if from == to || !self.live.contains_key(&from) {
            return Ok(());
        }
        let mut files = self.live.clone();
        if let Some(content) = files.remove(&from) {
            files.insert(to.clone(), content);
        }
        self.may_show(files.clone());
        let dir = self.pool().resolve(self.dir);
        let done = dir.and_then(|dir| {
            let (from, to) = (OsStr::new(&from), OsStr::new(&to));
            self.pool().rename(dir.node, from, dir.node, to, engine::RenameFlags::default())
        });
        match done {
            Ok(()) => self.settled(files),
            Err(error) => return self.failed("rename", error),
        }
        Ok(())
    }

    fn unlink(&mut self, name: &str) -> Done {
        let mut files = self.live.clone();
        if files.remove(name).is_none() {
            return Ok(());
        }
        self.may_show(files.clone());
        let dir = self.pool().resolve(self.dir);
        match dir.and_then(|dir| self.pool().unlink(dir.node, OsStr::new(name))) {
            Ok(()) => self.settled(files),
            Err(error) => return self.failed("unlink", error),
        }
        Ok(())
    }

    fn read(&mut self, name: &str) -> Done {
        let real =
            self.pool().resolve(&self.path(name)).and_then(|attr| check::read_region(self.pool(), attr.node));
        match (real, self.live.get(name)) {
            (Ok(bytes), Some(content)) if bytes == *content.bytes => Ok(()),
            (Ok(bytes), Some(content)) => {
                violation(format!("{}/{name} reads {}", self.dir, check::difference(&bytes, &content.bytes)))
            }
            (Ok(_), None) => violation(format!("{}/{name} is there", self.dir)),
            (Err(error), None) if error.kind() == ErrorKind::NotFound => Ok(()),
            (Err(error), _) => self.failed("read", error),
        }
    }
}

/// What a pool shows of a directory.
fn shown<'a>(state: &'a State, dir: &str) -> BTreeMap<&'a str, &'a [u8]> {
    let prefix = format!("{dir}/");
    let file = |(path, seen): (&'a String, &'a crate::model::Seen)| {
        Some((
            path.strip_prefix(&prefix)?,
            seen.content.as_ref().map_or(&[][..], |content| &content.bytes[..]),
        ))
    };
    state.iter().filter_map(file).collect()
}

/// The moments that a directory shows: usually one.
fn fitting<'a>(state: &State, dir: &str, moments: &'a [Moment]) -> Result<Vec<&'a Moment>, Stop> {
    let found = shown(state, dir);
    let fits = |moment: &&Moment| {
        found.len() == moment.files.len()
            && moment
                .files
                .iter()
                .all(|(name, content)| found.get(name.as_str()) == Some(&&content.bytes[..]))
    };
    let fitting: Vec<&Moment> = moments.iter().filter(fits).collect();
    if !fitting.is_empty() {
        return Ok(fitting);
    }
    let sizes = |files: &mut dyn Iterator<Item = (&str, usize)>| {
        files.map(|(name, len)| format!("{name} of {len}")).collect::<Vec<_>>().join(", ")
    };
    let may: Vec<String> = moments
        .iter()
        .map(|moment| {
            sizes(&mut moment.files.iter().map(|(name, content)| (name.as_str(), content.bytes.len())))
        })
        .collect();
    let is = sizes(&mut found.iter().map(|(name, bytes)| (*name, bytes.len())));
    violation(format!("{dir} shows [{is}], which is of no moment that may be: [{}]", may.join("] [")))
}

/// Runs a seed with so many threads. A panic is a violation.
pub fn run(seed: u64, threads: usize, hook: Option<Arc<dyn SimHook>>) -> Outcome {
    let mut outcome = Outcome::default();
    outcome.violation = violation_of(|| rounds(seed, threads, hook, &mut outcome));
    outcome
}

fn rounds(seed: u64, threads: usize, hook: Option<Arc<dyn SimHook>>, outcome: &mut Outcome) -> Done {
    let mut rng = SimRng::new(seed ^ 0x7468_7265_6164);
    let config = Config::draw(&mut rng);
    // Every other pool takes snapshots by itself, too.
    let interval = [0, 2][rng.in_range(0..2) as usize];
    let options = OpenOptions { commit_interval_ms: interval, ..config.open_options() };
    let most = (config.capacity() as usize / threads / FILES as usize).min(200 << 10)
        * [1, 2][rng.in_range(0..2) as usize];
    let dirs: Vec<String> = (0..threads).map(|index| format!("t{index}")).collect();
    let mut moments: Vec<Vec<Moment>> =
        vec![vec![Moment { files: Files::new(), from: 0, until: u64::MAX }]; threads];
    let mut promise = Promise::default();
    let mut images = config.formatted();
    for round in 0..=rng.in_range(2..5) {
        let machine = Machine::new(&config, &images, hook.clone());
        let session = world::open(&machine, &options)?;
        let pool = session.pool().expect("this process owns it");
        let mut live = Vec::new();
        if round == 0 {
            for dir in &dirs {
                let new = new_node(NodeKind::Directory, None);
                let made = pool.resolve("").and_then(|root| pool.create(root.node, OsStr::new(dir), &new));
                made.and_then(|_| session.sync())
                    .or_else(|error| violation(format!("mkdir fails: {}", error.chain())))?;
                live.push(Files::new());
            }
        } else {
            live = look(&config, &session, &dirs, &moments)?;
            outcome.kv_blocks += check_kv(pool, &config, &mut promise)?;
        }
        let plans: Vec<Vec<Act>> = (0..threads)
            .map(|index| (0..rng.in_range(2..30)).map(|_| Act::draw(&mut rng, most, index == 0)).collect())
            .collect();
        let writes = plans.iter().map(|acts| acts.len() as u64).sum::<u64>() * 6;
        machine.power.cut_after(rng.in_range(0..writes));
        let clock = AtomicU64::new(1);
        let mut workers: Vec<Worker<'_>> = std::iter::zip(&dirs, live)
            .map(|(dir, live)| Worker {
                session: &session,
                dir,
                chunk: config.chunk as usize,
                machine: &machine,
                clock: &clock,
                moments: vec![Moment { files: live.clone(), from: 0, until: u64::MAX }],
                live,
                kv: None,
                promise: Promise::default(),
                acts: 0,
            })
            .collect();
        workers[0].promise = std::mem::take(&mut promise);
        let ends: Vec<Done> = std::thread::scope(|scope| {
            let begun: Vec<_> = std::iter::zip(&mut workers, &plans)
                .map(|(worker, acts)| scope.spawn(|| worker.run(acts)))
                .collect();
            let panicked = |_| violation("a panic in a thread");
            begun.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        });
        machine.power.cut();
        outcome.cuts += 1;
        moments.clear();
        for worker in workers {
            outcome.acts += worker.acts;
            moments.push(worker.moments);
            if worker.dir == dirs[0] {
                promise = worker.promise;
                if let Some(kv) = worker.kv {
                    kv.crash(&mut promise);
                }
            }
        }
        ends.into_iter().collect::<Done>()?;
        drop(session);
        images = machine.survivors(rng.next_u64());
    }
    let machine = Machine::new(&config, &images, hook);
    let session = world::open(&machine, &options)?;
    look(&config, &session, &dirs, &moments)?;
    outcome.kv_blocks += check_kv(session.pool().expect("this process owns it"), &config, &mut promise)?;
    session.close().or_else(|error| violation(format!("closing the pool fails: {}", error.chain())))
}

/// Everything after a power cut. Returns what each directory holds.
fn look(
    config: &Config,
    session: &Session,
    dirs: &[String],
    moments: &[Vec<Moment>],
) -> Result<Vec<Files>, Stop> {
    let state = check::examine(session, config)?;
    let mut all = Vec::new();
    for (dir, moments) in std::iter::zip(dirs, moments) {
        all.push(fitting(&state, dir, moments)?);
    }
    // A time at which each showed what it shows now: if there is one, it is where one of them began.
    let at_once = |time: u64| {
        all.iter().all(|dir| dir.iter().any(|moment| (moment.from..=moment.until).contains(&time)))
    };
    if !all.iter().flatten().any(|moment| at_once(moment.from)) {
        let times =
            all.iter().map(|dir| dir.iter().map(|moment| moment.from..moment.until).collect::<Vec<_>>());
        return violation(format!("the directories are of no one moment: {:?}", times.collect::<Vec<_>>()));
    }
    let files: Vec<Files> = all.iter().map(|dir| dir[0].files.clone()).collect();
    let contents = || files.iter().flat_map(|files| files.values());
    if !contents().any(|content| content.unsure) {
        let pool = session.pool().expect("this process owns it");
        let kv = kv::chunks(pool, config)
            .or_else(|error| violation(format!("looking at the KV store: {}", error.chain())))?;
        check::space(pool, config, contents().map(Content::chunks).sum::<u64>() + kv)?;
    }
    Ok(files)
}

fn check_kv(pool: &Pool, config: &Config, promise: &mut Promise) -> Result<u64, Stop> {
    if pool.resolve(kv::DIRECTORY).is_err() {
        return match promise.is_empty() {
            true => Ok(0),
            false => violation("the KV store is gone, and with it blocks that were durable"),
        };
    }
    let Some(mut kv) = Kv::open(pool, config)? else { return Ok(0) };
    let must = kv.check(promise)?;
    kv.close(promise)?;
    Ok(must)
}
