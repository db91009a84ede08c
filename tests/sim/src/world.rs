//! A pool and its model side by side: acts happen to both, and every difference is a violation.

use std::ffi::OsStr;

use engine::{
    Access, Allocate, Attr, ErrorKind, Handle, NewNode, NodeKind, OpenOptions, Pool, RenameFlags, Session,
    SessionOptions, SetAttr, WriterOptions, XattrSet,
};
use nvme::SimHook;
use std::sync::Arc;

use crate::act::{Act, SLOTS};
use crate::check;
use crate::config::{Config, Machine};
use crate::content::{Content, noise};
use crate::kv::{self, Kv, Promise};
use crate::model::{Body, Id, Model, Refused, State, split};

/// Why a workload does not go on.
#[derive(Debug)]
pub enum Stop {
    /// The power is off.
    Power,
    /// Something is not as promised.
    Violation(String),
}

/// Results of acts.
pub type Done = Result<(), Stop>;

pub(crate) fn violation<T>(text: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Violation(text.into()))
}

/// A handle that stays open over several acts.
struct Open {
    handle: Handle,
    id: Id,
}

/// An open pool on simulated devices, and what it should hold.
pub struct World {
    /// Its devices.
    pub machine: Machine,
    config: Config,
    // Before the pool.
    kv: Option<Kv>,
    promise: Promise,
    session: Option<Session>,
    model: Model,
    slots: [Option<Open>; SLOTS],
    /// What a power cut now may leave: the last snapshot that is known to be durable, then those that were begun since.
    pub candidates: Vec<State>,
}

/// Why a pool that should open does not: to be told apart from an end of power.
pub fn open(machine: &Machine, options: &OpenOptions) -> Result<Session, Stop> {
    let failed = |what: &str, error: engine::Error| match machine.power.is_off() {
        true => Stop::Power,
        false => Stop::Violation(format!("{what}: {}", error.chain())),
    };
    let pool = Pool::open_devices(&machine.as_devices(), options)
        .map_err(|error| failed("the pool does not open", error))?;
    // Clears imports away that a crash ended.
    let session = Session::over(pool, &SessionOptions::default());
    session.sync().map_err(|error| failed("the first sync of the pool", error))?;
    if machine.power.is_off() { Err(Stop::Power) } else { Ok(session) }
}

fn attr_of(pool: &Pool, path: &str) -> engine::Result<Attr> {
    pool.resolve(path)
}

fn parent_of<'a>(pool: &Pool, path: &'a str) -> engine::Result<(u64, &'a OsStr)> {
    let (above, name) = split(path);
    Ok((pool.resolve(above)?.node, OsStr::new(name)))
}

pub(crate) fn new_node(kind: NodeKind, target: Option<&str>) -> NewNode {
    NewNode {
        kind,
        mode: if kind == NodeKind::Directory { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        rdev: 0,
        target: target.map(Into::into),
    }
}

impl World {
    /// A pool that was opened just now, in this state.
    /// `promise`: what its KV store must have.
    pub fn new(config: &Config, machine: Machine, session: Session, state: State, promise: Promise) -> World {
        World {
            machine,
            config: *config,
            kv: None,
            promise,
            session: Some(session),
            model: Model::from_state(&state, config.chunk as usize),
            slots: Default::default(),
            candidates: vec![state],
        }
    }

    /// A new pool.
    pub fn fresh(config: &Config, hook: Option<Arc<dyn SimHook>>) -> Result<World, Stop> {
        let machine = Machine::new(config, &config.formatted(), hook);
        let session = open(&machine, &config.open_options())?;
        Ok(World::new(config, machine, session, State::new(), Promise::default()))
    }

    fn session(&self) -> &Session {
        self.session.as_ref().expect("the pool is open between acts")
    }

    fn pool(&self) -> Pool {
        self.session().pool().expect("this process owns it").clone()
    }

    fn power_is_off(&self) -> bool {
        self.machine.power.is_off()
    }

    /// Whether pool and model agree that a call fails.
    fn agree(&self, what: &str, real: engine::Result<()>, model: Result<(), Refused>) -> Done {
        match (real, model) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(_), _) if self.power_is_off() => Err(Stop::Power),
            (Err(_), Err(Refused)) => Ok(()),
            (Err(error), Ok(())) => violation(format!("{what} fails: {}", error.chain())),
            (Ok(()), Err(Refused)) => violation(format!("{what} works, and should be refused")),
        }
    }

    /// From here on the pool may take a snapshot of its own.
    fn may_snapshot(&mut self) {
        let now = self.model.visible();
        if self.candidates.last() != Some(&now) {
            self.candidates.push(now);
        }
        self.model.snapshot();
    }

    fn commits(&self) -> u64 {
        self.pool().stat().commits
    }

    /// A snapshot that holds all of now is durable.
    fn durable(&mut self) {
        self.candidates = vec![self.model.visible()];
    }

    /// A call that may lack space, and may then take a snapshot to get some. `before`: what that would hold.
    fn with_space<T>(
        &mut self,
        what: &str,
        run: impl FnOnce(&World) -> engine::Result<T>,
    ) -> Result<Option<T>, Stop> {
        let before = self.commits();
        let done = run(self);
        let full = matches!(&done, Err(error) if error.kind() == ErrorKind::NoSpace);
        if done.is_err() || self.commits() != before || self.power_is_off() {
            self.may_snapshot();
        }
        match done {
            Ok(done) => Ok(Some(done)),
            Err(_) if self.power_is_off() => Err(Stop::Power),
            Err(_) if full => Ok(None),
            Err(error) => violation(format!("{what} fails: {}", error.chain())),
        }
    }

    /// One act. `Ok`: pool and model agree.
    pub fn act(&mut self, act: &Act) -> Done {
        self.perform(act)?;
        if self.power_is_off() { Err(Stop::Power) } else { Ok(()) }
    }

    fn perform(&mut self, act: &Act) -> Done {
        if *act == Act::Reopen {
            return self.reopen(); // before the pool is held below: who holds it keeps it open
        }
        let pool = self.pool();
        let chunk = self.config.chunk as usize;
        match act {
            Act::Create { path } => {
                let real = parent_of(&pool, path)
                    .and_then(|(parent, name)| pool.create(parent, name, &new_node(NodeKind::Region, None)));
                let model = self.model.create(path, 0o644, Model::empty_region());
                self.agree("create", real.map(drop), model.map(drop))
            }
            Act::Mkdir { path } => {
                let real = parent_of(&pool, path).and_then(|(parent, name)| {
                    pool.create(parent, name, &new_node(NodeKind::Directory, None))
                });
                let model = self.model.create(path, 0o755, Body::Directory(Default::default()));
                self.agree("mkdir", real.map(drop), model.map(drop))
            }
            Act::Symlink { path, target } => {
                let new = new_node(NodeKind::Symlink, Some(target));
                let real = parent_of(&pool, path).and_then(|(parent, name)| pool.create(parent, name, &new));
                let model = self.model.create(path, 0o644, Body::Symlink(target.clone()));
                self.agree("symlink", real.map(drop), model.map(drop))
            }
            Act::Rmdir { path } => {
                let real = parent_of(&pool, path).and_then(|(parent, name)| pool.rmdir(parent, name));
                let model = self.model.rmdir(path);
                self.agree("rmdir", real, model)
            }
            Act::Unlink { path } => {
                let real = parent_of(&pool, path).and_then(|(parent, name)| pool.unlink(parent, name));
                let model = self.model.unlink(path);
                self.agree("unlink", real, model)
            }
            Act::Link { from, to } => {
                let real = attr_of(&pool, from).and_then(|attr| {
                    let (parent, name) = parent_of(&pool, to)?;
                    pool.link(attr.node, parent, name)
                });
                let model = self.model.link(from, to);
                self.agree("link", real.map(drop), model)
            }
            Act::Rename { from, to, exchange } => {
                let flags = RenameFlags { exchange: *exchange, no_replace: false };
                let real = parent_of(&pool, from).and_then(|(parent, name)| {
                    let (new_parent, new_name) = parent_of(&pool, to)?;
                    pool.rename(parent, name, new_parent, new_name, flags)
                });
                let model = self.model.rename(from, to, *exchange);
                self.agree("rename", real, model)
            }
            Act::Chmod { path, mode } => {
                let set = SetAttr { mode: Some(*mode), ..SetAttr::default() };
                let real = attr_of(&pool, path).and_then(|attr| pool.setattr(attr.node, &set));
                let model = self.model.chmod(path, *mode);
                self.agree("chmod", real.map(drop), model)
            }
            Act::SetXattr { path, name, len, fill } => {
                let value = noise(*fill, *len);
                let real = attr_of(&pool, path)
                    .and_then(|attr| pool.setxattr(attr.node, OsStr::new(name), &value, XattrSet::Any));
                let model = self.model.xattr(path, name, Some(value));
                self.agree("setxattr", real, model)
            }
            Act::RemoveXattr { path, name } => {
                let real =
                    attr_of(&pool, path).and_then(|attr| pool.removexattr(attr.node, OsStr::new(name)));
                let model = self.model.xattr(path, name, None);
                self.agree("removexattr", real, model)
            }
            Act::Put { path, len, fill } => {
                if self.model.resolve(path).is_err() {
                    self.perform(&Act::Create { path: path.clone() })?;
                }
                self.write_whole(path, 0, &noise(*fill, *len), true)
            }
            Act::Write { path, offset, len, fill } => {
                self.write_whole(path, *offset, &noise(*fill, *len), false)
            }
            Act::Truncate { path, len } => {
                let set = SetAttr { size: Some(*len as u64), ..SetAttr::default() };
                let found = attr_of(&pool, path);
                let real = self.with_space("truncate", |_| match found {
                    Ok(attr) if attr.kind == NodeKind::Region => pool.setattr(attr.node, &set).map(|_| true),
                    _ => Ok(false),
                })?;
                if real.is_none() {
                    return violation("truncate lacks space");
                }
                let model = self.model.truncate(path, *len);
                if real != Some(model.is_ok()) {
                    return violation(format!("truncate: done {real:?}, in the model {model:?}"));
                }
                Ok(())
            }
            Act::Import { path, len, fill, reserve, commit } => {
                self.import(path, &noise(*fill, *len), *reserve, *commit)
            }
            Act::Open { slot, path, truncate } => {
                if self.slots[*slot].is_some() {
                    return Ok(());
                }
                let Some(open) = self.open_region(path, *truncate)? else { return Ok(()) };
                self.slots[*slot] = Some(open);
                Ok(())
            }
            Act::WriteAt { slot, offset, len, fill } => {
                let Some(open) = self.slots[*slot].take() else { return Ok(()) };
                let done = self.write(&open, *offset, &noise(*fill, *len)).map(drop);
                self.slots[*slot] = Some(open);
                done
            }
            Act::SetLen { slot, len } => {
                let Some(open) = &self.slots[*slot] else { return Ok(()) };
                let (handle, id) = (open.handle.clone(), open.id);
                match self.with_space("set the size", |_| handle.set_len(*len as u64))? {
                    Some(()) => self.model.region_mut(id).map(|region| region.live.set_len(chunk, *len)).ok(),
                    None => return self.adopt(&handle, id, |content| content.set_len(chunk, *len)),
                };
                Ok(())
            }
            Act::Punch { slot, offset, len } => {
                let Some(open) = &self.slots[*slot] else { return Ok(()) };
                let (handle, id) = (open.handle.clone(), open.id);
                let punch = |_: &World| handle.allocate(*offset as u64, *len as u64, Allocate::PunchHole);
                let clear = |content: &mut Content| content.clear(chunk, *offset, *offset + *len);
                match self.with_space("punch a hole", punch)? {
                    Some(()) => self.model.region_mut(id).map(|region| clear(&mut region.live)).ok(),
                    None => return self.adopt(&handle, id, clear),
                };
                Ok(())
            }
            Act::Reserve { slot, offset, len } => {
                let Some(open) = &self.slots[*slot] else { return Ok(()) };
                let handle = open.handle.clone();
                let mode = Allocate::Reserve { keep_size: true };
                self.with_space("reserve", |_| handle.allocate(*offset as u64, *len as u64, mode)).map(drop)
            }
            Act::Fsync { slot } => {
                let Some(open) = &self.slots[*slot] else { return Ok(()) };
                let (handle, id) = (open.handle.clone(), open.id);
                let named = self.model.is_named(id);
                if named {
                    let _ = self.model.commit(id);
                    self.may_snapshot();
                }
                match handle.sync() {
                    Ok(()) if named => self.durable(),
                    Ok(()) => {}
                    Err(_) if self.power_is_off() => return Err(Stop::Power),
                    Err(error) => return violation(format!("fsync fails: {}", error.chain())),
                }
                Ok(())
            }
            Act::Close { slot } => match self.slots[*slot].take() {
                Some(open) => self.close(open),
                None => Ok(()),
            },
            Act::Sync => self.sync(),
            Act::Read { path } => self.read(path),
            Act::Keep { path, count } => {
                let real = attr_of(&pool, path).and_then(|attr| pool.keep_generations(attr.node, *count));
                let model = self.model.keep(path, *count);
                self.agree("keep generations", real, model)
            }
            Act::RollBack { path, which } => self.roll_back(path, *which),
            Act::KvPut { space, first, count } => {
                self.with_kv(|kv, promise| kv.put(*space, *first, *count, promise))
            }
            Act::KvGet { space, first, count } => self.with_kv(|kv, promise| {
                let numbers: Vec<u64> = (*first..*first + *count).collect();
                kv.get(*space, &numbers, promise).map(drop)
            }),
            Act::KvRemove { space, first, count } => self.with_kv(|kv, _| kv.remove(*space, *first, *count)),
            Act::KvStep => self.with_kv(|kv, _| kv.step()),
            Act::KvFlush { whole } => self.with_kv(|kv, promise| kv.flush(*whole, promise)),
            Act::Reopen => unreachable!("handled above"),
            Act::Count => {
                self.close_all()?;
                self.sync()?;
                self.count()
            }
        }
    }

    fn roll_back(&mut self, path: &str, which: usize) -> Done {
        let pool = self.pool();
        let real = attr_of(&pool, path).and_then(|attr| pool.generations(attr.node));
        let model = self.model.generations(path);
        let (real, count) = match (real, model) {
            (Ok(real), Ok(count)) => (real, count),
            (real, model) => return self.agree("list generations", real.map(drop), model.map(drop)),
        };
        if real.len() != count {
            return violation(format!("{path} has {} generations, not {count}", real.len()));
        }
        let Some(which) = which.checked_rem(count) else { return Ok(()) };
        let done = parent_of(&pool, path)
            .and_then(|(parent, name)| pool.roll_back(parent, name, real[which].generation));
        let model = self.model.roll_back(path, which);
        self.agree("roll back", done.map(drop), model)
    }

    /// Does something to the KV store, which takes snapshots of the pool when it gets and gives back space. What the tree shows is the same
    /// before and after.
    fn with_kv(&mut self, run: impl FnOnce(&mut Kv, &mut Promise) -> Done) -> Done {
        let pool = self.pool();
        let before = self.commits();
        let config = self.config;
        let done = match &mut self.kv {
            Some(_) => Ok(()),
            None => Kv::open(&pool, &config).map(|kv| self.kv = kv),
        };
        let done = done.and_then(|()| match &mut self.kv {
            Some(kv) => run(kv, &mut self.promise),
            None => Ok(()),
        });
        if done.is_err() || self.commits() != before || self.power_is_off() {
            self.may_snapshot();
        }
        if self.power_is_off() { Err(Stop::Power) } else { done }
    }

    /// After a power cut: the KV store has what it must, and nothing wrong. Returns how many blocks had to be there.
    pub fn check_kv(&mut self) -> Result<u64, Stop> {
        let mut must = 0;
        if self.pool().resolve(kv::DIRECTORY).is_ok() {
            self.with_kv(|kv, promise| {
                must = kv.check(promise)?;
                Ok(())
            })?;
        } else if !self.promise.is_empty() {
            return violation("the KV store is gone, and with it blocks that were durable");
        }
        Ok(must)
    }

    /// After a call that lacked space halfway: each byte is the old one or the new one. Takes over which.
    fn adopt(&mut self, handle: &Handle, id: Id, change: impl FnOnce(&mut Content)) -> Done {
        let chunk = self.config.chunk as usize;
        let Ok(old) = self.model.region(id).map(|region| region.live.clone()) else { return Ok(()) };
        let mut new = old.clone();
        change(&mut new);
        let mut bytes = vec![0; handle.size() as usize];
        let read = handle.read_at(0, &mut bytes);
        if let Err(error) = read {
            return if self.power_is_off() {
                Err(Stop::Power)
            } else {
                violation(format!("read: {}", error.chain()))
            };
        }
        let fits = (bytes.len() == old.bytes.len() || bytes.len() == new.bytes.len())
            && bytes.iter().enumerate().all(|(at, byte)| {
                let of = |content: &Content| content.bytes.get(at).copied().unwrap_or(0);
                *byte == of(&old) || *byte == of(&new)
            });
        if !fits {
            return violation("a call that lacked space left bytes that are neither old nor new");
        }
        if let Ok(region) = self.model.region_mut(id) {
            region.live.set_len(chunk, bytes.len());
            region.live.bytes = Arc::new(bytes);
            // Which chunks went is not known any more: the space cannot be counted until the region is gone.
            region.live.unsure = true;
        }
        Ok(())
    }

    fn open_region(&mut self, path: &str, truncate: bool) -> Result<Option<Open>, Stop> {
        let pool = self.pool();
        let real =
            attr_of(&pool, path).and_then(|attr| pool.open_region(attr.node, Access::ReadWrite, truncate));
        let model = self.model.resolve(path).and_then(|id| self.model.open(id, truncate).map(|()| id));
        match (real, model) {
            (Ok(handle), Ok(id)) => Ok(Some(Open { handle, id })),
            (real, model) => {
                self.agree("open", real.map(drop), model.map(drop))?;
                Ok(None)
            }
        }
    }

    /// How many bytes went in: fewer where the pool is full.
    fn write(&mut self, open: &Open, offset: usize, data: &[u8]) -> Result<usize, Stop> {
        let chunk = self.config.chunk as usize;
        let mut done = 0;
        while done < data.len() {
            let part = &data[done..];
            let at = offset + done;
            let wrote = self.with_space("write", |_| open.handle.write_at(at as u64, part))?;
            let Some(wrote) = wrote.filter(|wrote| *wrote > 0) else { break };
            if let Ok(region) = self.model.region_mut(open.id) {
                region.live.write(chunk, at, &part[..wrote]);
            }
            done += wrote;
        }
        Ok(done)
    }

    fn close(&mut self, open: Open) -> Done {
        let flushed = open.handle.flush();
        drop(open.handle);
        if self.power_is_off() {
            return Err(Stop::Power);
        }
        if let Err(error) = flushed {
            return violation(format!("flush at close fails: {}", error.chain()));
        }
        let _ = self.model.close(open.id);
        Ok(())
    }

    fn close_all(&mut self) -> Done {
        for slot in 0..SLOTS {
            if let Some(open) = self.slots[slot].take() {
                self.close(open)?;
            }
        }
        Ok(())
    }

    fn write_whole(&mut self, path: &str, offset: usize, data: &[u8], truncate: bool) -> Done {
        let Some(open) = self.open_region(path, truncate)? else { return Ok(()) };
        self.write(&open, offset, data)?;
        self.close(open)
    }

    fn import(&mut self, path: &str, data: &[u8], reserve: bool, commit: bool) -> Done {
        let chunk = self.config.chunk as usize;
        let model = match self.model.resolve(path) {
            Ok(id) if matches!(self.model.node(id).body, Body::Directory(_)) => Err(Refused),
            _ => self.model.create_dirs(split(path).0).map(drop),
        };
        let hint = reserve.then_some(data.len() as u64);
        if model.is_err() {
            let real = self.session().writer(path, hint, WriterOptions::default()).map(drop);
            return self.agree("import", real, model);
        }
        let opened =
            self.with_space("import", |world| world.session().writer(path, hint, WriterOptions::default()))?;
        let Some(mut writer) = opened else { return Ok(()) };
        if self.with_space("write an import", |_| writer.write_all(data))?.is_none() {
            drop(writer);
            return Ok(());
        }
        if !commit {
            return match writer.abort() {
                Ok(()) => Ok(()),
                Err(_) if self.power_is_off() => Err(Stop::Power),
                Err(error) => violation(format!("giving an import up fails: {}", error.chain())),
            };
        }
        // One snapshot with the hidden name, one with the right one.
        self.may_snapshot();
        let mut content = Content::default();
        content.write(chunk, 0, data);
        let model = self.model.import(path, content);
        self.may_snapshot();
        self.agree("commit an import", writer.commit().map(drop), model)?;
        self.durable();
        Ok(())
    }

    fn sync(&mut self) -> Done {
        self.may_snapshot();
        match self.session().sync() {
            Ok(()) => self.durable(),
            Err(_) if self.power_is_off() => return Err(Stop::Power),
            Err(error) => return violation(format!("sync fails: {}", error.chain())),
        }
        Ok(())
    }

    fn read(&mut self, path: &str) -> Done {
        let pool = self.pool();
        let model = self.model.resolve(path).and_then(|id| Ok(self.model.region(id)?.live.clone()));
        let real = attr_of(&pool, path).and_then(|attr| check::read_region(&pool, attr.node));
        match (real, model) {
            (Ok(bytes), Ok(content)) if bytes == *content.bytes => Ok(()),
            (Ok(bytes), Ok(content)) => {
                violation(format!("{path} reads {}", check::difference(&bytes, &content.bytes)))
            }
            (real, model) => self.agree("read", real.map(drop), model.map(drop)),
        }
    }

    fn close_kv(&mut self) -> Done {
        let Some(kv) = self.kv.take() else { return Ok(()) };
        let before = self.commits();
        let mut promise = self.promise.clone();
        // What made room may be forgotten durably before the power goes.
        let mut after_cut = self.promise.clone();
        kv.crash(&mut after_cut);
        let closed = kv.close(&mut promise);
        if self.power_is_off() {
            self.promise = after_cut;
            self.may_snapshot();
            return Err(Stop::Power);
        }
        if self.commits() != before {
            self.may_snapshot();
        }
        self.promise = promise;
        closed
    }

    fn reopen(&mut self) -> Done {
        self.close_all()?;
        self.close_kv()?;
        self.may_snapshot();
        let session = self.session.take().expect("the pool is open between acts");
        let closed = session.close();
        if self.power_is_off() {
            return Err(Stop::Power);
        }
        if let Err(error) = closed {
            return violation(format!("closing the pool fails: {}", error.chain()));
        }
        self.durable();
        self.session = Some(open(&self.machine, &self.config.open_options())?);
        self.check()?;
        self.check_kv()?;
        self.count()
    }

    /// Space in use is that of the regions that are there. Nothing may be open, and a snapshot must have been taken.
    pub fn count(&self) -> Done {
        let Some(chunks) = self.model.chunks() else { return Ok(()) };
        let pool = self.pool();
        let kv = kv::chunks(&pool, &self.config)
            .or_else(|error| violation(format!("looking at the KV store: {}", error.chain())))?;
        check::space(&pool, &self.config, chunks + kv)
    }

    /// Everything of a pool that was opened just now, without drafts: content, sums, owners of extents, space.
    pub fn check(&self) -> Done {
        let found = check::examine(self.session(), &self.config)?;
        let wanted = self.model.visible();
        if let Some(difference) = check::compare(&found, &wanted) {
            return violation(difference);
        }
        self.count()
    }

    /// The pool goes as it is: its power is off, or is cut now.
    pub fn crash(mut self) -> (Machine, Vec<State>, Promise) {
        self.machine.power.cut();
        if let Some(kv) = self.kv.take() {
            kv.crash(&mut self.promise);
        }
        self.slots = Default::default();
        drop(self.session.take());
        (self.machine, self.candidates, self.promise)
    }

    /// Closes the pool properly.
    pub fn finish(mut self) -> Result<Machine, Stop> {
        self.close_all()?;
        self.close_kv()?;
        let session = self.session.take().expect("the pool is open between acts");
        match session.close() {
            Ok(()) => Ok(self.machine),
            Err(_) if self.machine.power.is_off() => Err(Stop::Power),
            Err(error) => violation(format!("closing the pool fails: {}", error.chain())),
        }
    }
}
