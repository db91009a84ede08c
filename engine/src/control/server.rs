//! The owner's side of the control socket.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown, sockopt};

use super::frame::{Connection, Frame};
use super::kv::{ServedKv, regular};
use super::location::{self, Location};
use super::protocol::{PAYLOAD_MAX, REQUEST_MAX, Reply, Request, VERSION};
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::kv::Key;
use crate::kv::admin::{self, Order, Report};
use crate::lease::Lease;
use crate::pool::Pool;
use crate::session::local::{self, Who};
use crate::session::partial::PartialWriter;
use crate::verify::VerifyProgress;

/// Clients at a time; each has a thread.
const CLIENTS_MAX: usize = 256;
/// A client says hello by then.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Between signs of life of a call that takes long.
const WORKING_EVERY: Duration = Duration::from_secs(2);
/// Between reports of a verification.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// How long the server's end waits for calls that are being served.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Entries in one reply.
const ENTRIES: usize = 1000;

/// Serves a pool to other processes until it is dropped.
#[derive(Debug)]
pub struct ControlServer {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    location: Location,
    accept: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    pool: Pool,
    user: u32,
    stopping: AtomicBool,
    registry: Arc<Registry>,
}

/// The clients that are connected. Holds no pool: a thread that has just given its place back keeps none open.
#[derive(Debug, Default)]
struct Registry {
    clients: Mutex<Clients>,
    /// Told when a client goes.
    gone: Condvar,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    streams: HashMap<u64, UnixStream>,
}

impl Registry {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens on the pool's control socket; the caller's process owns the pool. `Busy` when another read-only owner serves it already.
pub fn serve(pool: Pool) -> Result<ControlServer> {
    let mut last = None;
    for location in location::to_listen(&pool.info())? {
        match location.bind() {
            Ok(listener) => return ControlServer::start(pool, listener, location),
            Err(error) if error.kind() == ErrorKind::Busy => return Err(error),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "no place for the control socket")))
}

impl ControlServer {
    fn start(pool: Pool, listener: UnixListener, location: Location) -> Result<ControlServer> {
        let shared = Arc::new(Shared {
            pool,
            user: rustix::process::geteuid().as_raw(),
            stopping: AtomicBool::new(false),
            registry: Arc::default(),
        });
        let listener = Arc::new(listener);
        let accept = {
            let (shared, listener) = (shared.clone(), listener.clone());
            thread::Builder::new().name("nvtier-control".into()).spawn(move || accept(&shared, &listener))
        };
        let accept = accept.map_err(|e| {
            location.remove();
            Error::io("start the control thread", e)
        })?;
        Ok(ControlServer { shared, listener, location, accept: Some(accept) })
    }

    /// Where it listens.
    pub fn path(&self) -> PathBuf {
        self.location.path()
    }

    /// Clients that are connected.
    pub fn clients(&self) -> usize {
        self.shared.registry.clients().streams.len()
    }
}

impl Drop for ControlServer {
    /// Turns new clients away, cuts off those there are (what they did not commit is gone or parked), and waits for calls being served.
    fn drop(&mut self) {
        // First the name: whoever comes now finds no owner, and becomes it once the pool is closed.
        self.location.remove();
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes accept(2) with EINVAL.
        let _ = shutdown(self.listener.as_fd(), Shutdown::Both);
        if let Some(accept) = self.accept.take() {
            let _ = accept.join();
        }
        let mut clients = self.shared.registry.clients();
        for stream in clients.streams.values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let deadline = Instant::now() + STOP_DEADLINE;
        while !clients.streams.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(
                    "{} control clients are still being served; the pool closes after them",
                    clients.streams.len()
                );
                break;
            }
            clients = self
                .shared
                .registry
                .gone
                .wait_timeout(clients, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if shared.stopping.load(Ordering::SeqCst) => return,
            Err(error) => {
                // Out of descriptors or memory: a pause, so that others can give some back.
                tracing::warn!("accept a control client: {error}");
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = admit(shared, stream) {
            tracing::warn!("a control client was turned away: {}", error.chain());
        }
    }
}

/// Checks who comes, and gives him a thread.
fn admit(shared: &Arc<Shared>, stream: UnixStream) -> Result<()> {
    let peer = sockopt::socket_peercred(&stream)
        .map_err(|e| Error::io("credentials of a control client", e.into()))?;
    let (pid, uid) = (peer.pid.as_raw_nonzero(), peer.uid.as_raw());
    let connection = Connection::new(stream, REQUEST_MAX);
    let refusal = if uid != shared.user && uid != 0 {
        Some(Error::new(
            ErrorKind::PermissionDenied,
            format!("process {pid} of user {uid} may not use a pool that user {} owns", shared.user),
        ))
    } else if shared.registry.clients().streams.len() >= CLIENTS_MAX {
        Some(Error::new(ErrorKind::Busy, format!("the pool's owner serves {CLIENTS_MAX} clients already")))
    } else {
        None
    };
    if let Some(error) = refusal {
        let _ = connection.send(&Reply::error(&error), &[], None);
        return Err(error);
    }
    let stream = connection.stream().try_clone().map_err(|e| Error::io("a control client's socket", e))?;
    let registration = {
        let mut clients = shared.registry.clients();
        let id = clients.next;
        clients.next += 1;
        clients.streams.insert(id, stream);
        Registration { registry: shared.registry.clone(), id }
    };
    let who = Who { uid, gid: peer.gid.as_raw() };
    let pool = shared.pool.clone();
    let spawned = thread::Builder::new().name(format!("nvtier-client-{pid}")).spawn(move || {
        let mut client = Served { connection, pool, who, reader: None, writer: None, kv: None };
        if let Err(error) = client.serve() {
            tracing::debug!("control client {pid}: {}", error.chain());
        }
        // The registration after all that keeps the pool open: who waits for it to go can close the pool then.
        drop(client);
        drop(registration);
    });
    spawned.map(drop).map_err(|e| Error::io("start a thread for a control client", e))
}

/// A client's place in [`Clients`], given back on drop.
struct Registration {
    registry: Arc<Registry>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.clients().streams.remove(&self.id);
        self.registry.gone.notify_all();
    }
}

/// One client being served. Dropping it drops what it had open.
struct Served {
    connection: Connection,
    pool: Pool,
    who: Who,
    reader: Option<Reader>,
    writer: Option<PartialWriter>,
    kv: Option<ServedKv>,
}

/// A region that a client reads.
struct Reader {
    handle: Handle,
    /// Where the client may read the file itself.
    lease: Option<Lease>,
}

/// What answers a request: a reply, a payload, a file to hand over.
struct Answer {
    reply: Reply,
    payload: Vec<u8>,
    file: Option<File>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Answer {
        Answer { reply, payload: Vec::new(), file: None }
    }
}

impl Served {
    /// Until the client goes, or breaks the protocol.
    fn serve(&mut self) -> Result<()> {
        let Some(Frame { message, .. }) = self.connection.receive(Some(HELLO_DEADLINE))? else {
            return Ok(());
        };
        let hello = match message {
            Request::Hello { version } if version == VERSION => {
                Reply::Hello { version: VERSION, pid: std::process::id(), pool: self.pool.info().id }
            }
            Request::Hello { version } => Reply::error(&Error::new(
                ErrorKind::Protocol,
                format!(
                    "this program speaks version {version} of the control protocol, the pool's owner {VERSION}: use the same nvtier for both"
                ),
            )),
            _ => Reply::error(&Error::new(ErrorKind::Protocol, "the first request was no hello")),
        };
        let welcome = matches!(hello, Reply::Hello { .. });
        self.connection.send(&hello, &[], None)?;
        if !welcome {
            return Ok(());
        }
        loop {
            let frame = match self.connection.receive::<Request>(None) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // After a bad frame nobody knows where the next one starts: say why, and hang up.
                    let _ = self.connection.send(&Reply::error(&error), &[], None);
                    return Err(error);
                }
            };
            let answer = self.answer(frame.message, &frame.payload, frame.fd);
            let answer = answer.unwrap_or_else(|e| Reply::error(&e).into());
            self.connection.send(&answer.reply, &answer.payload, answer.file.as_ref().map(|f| f.as_fd()))?;
        }
    }

    fn answer(&mut self, request: Request, payload: &[u8], file: Option<OwnedFd>) -> Result<Answer> {
        let pool = self.pool.clone();
        let reply = match request {
            Request::Hello { .. } => return Err(Error::new(ErrorKind::Protocol, "hello was said already")),
            Request::Info => Reply::Info(pool.info()),
            Request::Stat => Reply::Stat(pool.stat()),
            Request::List { path, recursive } => return self.list(&path, recursive).map(Answer::from),
            Request::StatPath { path } => Reply::Entry(local::stat_path(&pool, &path)?),
            Request::Mkdirs { path } => {
                local::mkdirs(&pool, &path, self.who)?;
                Reply::Done
            }
            Request::Remove { path, recursive } => {
                self.long(move |_| local::remove(&pool, &path, recursive)).map(|()| Reply::Done)?
            }
            Request::Rename { from, to } => {
                self.long(move |_| local::rename(&pool, &from, &to)).map(|()| Reply::Done)?
            }
            Request::Verify { path } => {
                let verify = move |latest: &Latest| local::verify(&pool, &path, &mut |p| latest.set(p));
                Reply::Verified(self.long(verify)?)
            }
            Request::Repair { path } => {
                let repair = move |latest: &Latest| local::repair(&pool, &path, &mut |p| latest.set(p));
                Reply::Repaired(Box::new(self.long(repair)?))
            }
            Request::ReplaceChunk { node, chunk } => {
                Reply::Replaced(self.long(|_| pool.replace_chunk(node, chunk, payload))?)
            }
            Request::Sync => self.long(move |_| pool.sync()).map(|()| Reply::Done)?,
            Request::OpenReader { path } => return self.open_reader(&path),
            Request::Read { offset, len } => return self.read(offset, len),
            Request::Sums { first, count } => return self.sums(first, count),
            Request::CloseReader => {
                self.reader = None;
                Reply::Done
            }
            Request::OpenWriter { path, size_hint, options } => {
                if self.writer.is_some() {
                    return Err(Error::new(ErrorKind::Protocol, "this connection writes a region already"));
                }
                let who = self.who;
                let writer =
                    self.long(move |_| PartialWriter::open(&pool, &path, size_hint, &options, who))?;
                // The draft's own file: the client may write it, and nothing else.
                let file = writer.backing().map(|f| f.try_clone()).transpose();
                let file = file.map_err(|e| Error::io("the draft's file", e))?;
                let reply = Reply::Writer { resume_offset: writer.resume_offset(), direct: file.is_some() };
                self.writer = Some(writer);
                return Ok(Answer { reply, payload: Vec::new(), file });
            }
            Request::Write { offset } => {
                self.writer()?.write_at(offset, payload)?;
                Reply::Done
            }
            Request::Wrote { offset, len } => {
                let writer = self.take_writer()?;
                let result = self.long(|_| Ok((writer.claimed(offset, len), writer)));
                let (result, writer) = result?;
                self.writer = Some(writer);
                result?;
                Reply::Done
            }
            Request::Checkpoint => {
                let writer = self.take_writer()?;
                let (result, writer) = self.long(|_| Ok((writer.checkpoint(), writer)))?;
                self.writer = Some(writer);
                result?;
                Reply::Done
            }
            Request::Commit => {
                let writer = self.take_writer()?;
                Reply::Entry(self.long(move |_| writer.commit())?)
            }
            Request::Abort => {
                self.take_writer()?.abort()?;
                Reply::Done
            }
            Request::KvOpen { settings, block_bytes, tenant } => {
                let open = || ServedKv::open(&pool, &settings, payload, block_bytes, &tenant, file);
                let kv = self.long(move |_| open())?;
                let slot_bytes = kv.slot_bytes();
                self.kv = Some(kv);
                Reply::KvOpen { slot_bytes }
            }
            Request::KvFlush => {
                let store = self.kv()?.store().clone();
                self.long(move |_| store.flush()).map(|()| Reply::Done)?
            }
            Request::Kv { store, order } => return self.kv_order(&store, &order, payload, file),
            Request::KvLookup
            | Request::KvContains
            | Request::KvGet
            | Request::KvPut
            | Request::KvPin { .. }
            | Request::KvRemove
            | Request::KvQuota { .. }
            | Request::KvStat => {
                let (reply, payload) = self.kv()?.answer(&request, payload)?;
                return Ok(Answer { reply, payload, file: None });
            }
        };
        Ok(reply.into())
    }

    fn kv_order(&self, store: &str, order: &Order, payload: &[u8], file: Option<OwnedFd>) -> Result<Answer> {
        let keys =
            Key::decode(payload).ok_or_else(|| Error::new(ErrorKind::Protocol, "these are no keys"))?;
        let file = file.map(regular).transpose()?;
        let pool = &self.pool;
        let run = || admin::carry_out(pool, store, order, &keys, file.as_ref(), &mut |_| {});
        let mut report = self.long(move |_| run())?;
        if let Report::Listed(blocks) = &mut report {
            for part in std::mem::take(blocks).chunks(ENTRIES) {
                self.connection.send(&Reply::KvListed(part.to_vec()), &[], None)?;
            }
        }
        Ok(Reply::Kv(Box::new(report)).into())
    }

    fn kv(&mut self) -> Result<&mut ServedKv> {
        self.kv
            .as_mut()
            .ok_or_else(|| Error::new(ErrorKind::Protocol, "this connection has no KV store open"))
    }

    fn writer(&self) -> Result<&PartialWriter> {
        self.writer
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Protocol, "this connection writes no region"))
    }

    fn take_writer(&mut self) -> Result<PartialWriter> {
        self.writer.take().ok_or_else(|| Error::new(ErrorKind::Protocol, "this connection writes no region"))
    }

    fn list(&self, path: &str, recursive: bool) -> Result<Reply> {
        let mut entries = Vec::new();
        local::walk(&self.pool, path, recursive, &mut |entry| {
            entries.push(entry);
            if entries.len() == ENTRIES {
                let reply = Reply::Entries { entries: std::mem::take(&mut entries), more: true };
                self.connection.send(&reply, &[], None)?;
            }
            Ok(())
        })?;
        Ok(Reply::Entries { entries, more: false })
    }

    fn open_reader(&mut self, path: &str) -> Result<Answer> {
        let pool = self.pool.clone();
        let handle = local::open_read(&pool, path)?;
        // No lease of what is being written: then the bytes pass through here, as they do from raw and striped pools.
        let lease = pool.lease(handle.node(), 0, u64::MAX).ok().filter(|lease| lease.file().is_some());
        // Opened anew: the pool's own descriptor can write, and a client of it must not.
        let file = match lease.as_ref().and_then(Lease::file) {
            Some(file) => {
                let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
                Some(again.map_err(|e| Error::io(format!("open the file of {path:?} for a client"), e))?)
            }
            None => None,
        };
        let reply = Reply::Reader {
            size: lease.as_ref().map_or_else(|| handle.size(), Lease::size),
            chunk_size: lease.as_ref().map_or(0, Lease::chunk_size),
            direct: file.is_some(),
        };
        self.reader = Some(Reader { handle, lease });
        Ok(Answer { reply, payload: Vec::new(), file })
    }

    fn reader(&self) -> Result<&Reader> {
        self.reader.as_ref().ok_or_else(|| Error::new(ErrorKind::Protocol, "this connection reads no region"))
    }

    fn read(&self, offset: u64, len: u32) -> Result<Answer> {
        let Reader { handle, .. } = self.reader()?;
        let left = handle.size().saturating_sub(offset);
        let mut payload = vec![0; u64::from(len.min(PAYLOAD_MAX)).min(left) as usize];
        let mut done = 0;
        while done < payload.len() {
            match handle.read_at(offset.saturating_add(done as u64), &mut payload[done..])? {
                0 => break,
                n => done += n,
            }
        }
        payload.truncate(done);
        Ok(Answer { reply: Reply::Data, payload, file: None })
    }

    fn sums(&self, first: u64, count: u32) -> Result<Answer> {
        let Some(lease) = &self.reader()?.lease else {
            return Err(Error::new(ErrorKind::Protocol, "this connection leases no region"));
        };
        let chunks = lease.size().div_ceil(u64::from(lease.chunk_size()));
        let end = first.saturating_add(u64::from(count.min(PAYLOAD_MAX / 4))).min(chunks);
        let payload = (first..end).flat_map(|chunk| lease.sum(chunk).to_le_bytes()).collect();
        Ok(Answer { reply: Reply::Data, payload, file: None })
    }

    /// Runs what may take long on another thread, and meanwhile tells the client that somebody is at it.
    fn long<T: Send>(&self, call: impl FnOnce(&Latest) -> Result<T> + Send) -> Result<T> {
        let latest = Latest::default();
        let (ended, wait) = channel::<()>();
        thread::scope(|scope| {
            let latest = &latest;
            let thread = scope.spawn(move || {
                let _ended = ended; // dropped at the end, also of a panic
                call(latest)
            });
            let mut told = Instant::now();
            while let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(PROGRESS_EVERY) {
                let news = latest.take();
                if news.is_some() || told.elapsed() >= WORKING_EVERY {
                    told = Instant::now();
                    // A client that is gone is noticed at the answer; what was begun is finished.
                    let _ = self.connection.send(&Reply::Working(news), &[], None);
                }
            }
            thread.join().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Io, "the pool's owner failed in this call; its log says why"))
            })
        })
    }
}

/// The last progress that was not told yet.
#[derive(Default)]
struct Latest(Mutex<Option<VerifyProgress>>);

impl Latest {
    fn set(&self, progress: VerifyProgress) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }

    fn take(&self) -> Option<VerifyProgress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
