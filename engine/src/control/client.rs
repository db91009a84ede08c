//! The side of a process that does not own the pool.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::frame::{Connection, Frame};
use super::kv::RemoteBlocks;
use super::location;
use super::protocol::{PAYLOAD_MAX, REPLY_MAX, Reply, Request, VERSION};
use super::remote_reader::RemoteReader;
use crate::error::{Error, ErrorKind, Result};
use crate::kv::admin::{Order, Report};
use crate::kv::{Key, Settings};
use crate::pool::{MAX_CHUNK_SIZE, MIN_CHUNK_SIZE, Pool, PoolInfo, PoolStat};
use crate::repair::RepairReport;
use crate::session::{Entry, WriterOptions};
use crate::verify::{VerifyProgress, VerifyReport};

/// An owner that says nothing for so long is given up; while it works it says so every 2 s.
const SILENCE: Duration = Duration::from_secs(60);

/// A connection to the process that owns a pool.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    owner_pid: u32,
    /// `None` after a failure, until the next call connects anew.
    connection: Mutex<Option<Connection>>,
}

impl Client {
    /// Connects to the owner of the pool at `path`. `Stale`: nobody listens there (yet, or any more).
    pub fn connect(path: &Path) -> Result<Client> {
        let (connection, owner_pid) = dial(path)?;
        Ok(Client { path: path.to_owned(), owner_pid, connection: Mutex::new(Some(connection)) })
    }

    /// The owner's process, when it was connected to.
    pub fn owner_pid(&self) -> u32 {
        self.owner_pid
    }

    fn ask(&self, request: Request) -> Result<Reply> {
        self.ask_and_watch(request, &[], &mut |_| Ok(()))
    }

    /// Sends a request; `watch` sees the frames before the last.
    fn ask_and_watch(
        &self,
        request: Request,
        payload: &[u8],
        watch: &mut dyn FnMut(Reply) -> Result<()>,
    ) -> Result<Reply> {
        self.ask_with_file(request, payload, None, watch)
    }

    fn ask_with_file(
        &self,
        request: Request,
        payload: &[u8],
        file: Option<BorrowedFd<'_>>,
        watch: &mut dyn FnMut(Reply) -> Result<()>,
    ) -> Result<Reply> {
        let mut slot = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = match slot.take() {
            Some(connection) if !hung_up(&connection) => connection,
            _ => dial(&self.path)?.0,
        };
        match call(&connection, &request, payload, file, watch) {
            // The owner's answer, be it an error: the connection goes on.
            Ok(frame) => {
                *slot = Some(connection);
                answer(frame).map(|f| f.message)
            }
            Err(error) => Err(error),
        }
    }

    fn done(&self, request: Request) -> Result<()> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::info`](crate::Session::info).
    pub fn info(&self) -> Result<PoolInfo> {
        match self.ask(Request::Info)? {
            Reply::Info(info) => Ok(info),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::stat`](crate::Session::stat).
    pub fn stat(&self) -> Result<PoolStat> {
        match self.ask(Request::Stat)? {
            Reply::Stat(stat) => Ok(stat),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::list`](crate::Session::list).
    pub fn list(&self, path: &str, recursive: bool) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        let request = Request::List { path: path.to_owned(), recursive };
        let last = self.ask_and_watch(request, &[], &mut |reply| match reply {
            Reply::Entries { entries, .. } => {
                all.extend(entries);
                Ok(())
            }
            Reply::Working(_) => Ok(()),
            other => Err(unexpected(&other)),
        })?;
        match last {
            Reply::Entries { entries, .. } => all.extend(entries),
            other => return Err(unexpected(&other)),
        }
        Ok(all)
    }

    /// See [`Session::stat_path`](crate::Session::stat_path).
    pub fn stat_path(&self, path: &str) -> Result<Entry> {
        match self.ask(Request::StatPath { path: path.to_owned() })? {
            Reply::Entry(entry) => Ok(entry),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::mkdirs`](crate::Session::mkdirs).
    pub fn mkdirs(&self, path: &str) -> Result<()> {
        self.done(Request::Mkdirs { path: path.to_owned() })
    }

    /// See [`Session::remove`](crate::Session::remove).
    pub fn remove(&self, path: &str, recursive: bool) -> Result<()> {
        self.done(Request::Remove { path: path.to_owned(), recursive })
    }

    /// See [`Session::rename`](crate::Session::rename).
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.done(Request::Rename { from: from.to_owned(), to: to.to_owned() })
    }

    /// See [`Session::verify`](crate::Session::verify).
    pub fn verify(&self, path: &str, progress: &mut dyn FnMut(VerifyProgress)) -> Result<VerifyReport> {
        let request = Request::Verify { path: path.to_owned() };
        let last = self.ask_and_watch(request, &[], &mut |reply| match reply {
            Reply::Working(news) => {
                news.into_iter().for_each(&mut *progress);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        match last {
            Reply::Verified(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::repair`](crate::Session::repair).
    pub fn repair(&self, path: &str, progress: &mut dyn FnMut(VerifyProgress)) -> Result<RepairReport> {
        let request = Request::Repair { path: path.to_owned() };
        let last = self.ask_and_watch(request, &[], &mut |reply| match reply {
            Reply::Working(news) => {
                news.into_iter().for_each(&mut *progress);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        match last {
            Reply::Repaired(report) => Ok(*report),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::replace_chunk`](crate::Session::replace_chunk).
    pub fn replace_chunk(&self, node: u64, chunk: u64, bytes: &[u8]) -> Result<bool> {
        match self.ask_and_watch(Request::ReplaceChunk { node, chunk }, bytes, &mut |_| Ok(()))? {
            Reply::Replaced(done) => Ok(done),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::kv`](crate::Session::kv).
    pub fn kv(
        &self,
        store: &str,
        order: &Order,
        keys: &[Key],
        file: Option<&File>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Report> {
        let request = Request::Kv { store: store.to_owned(), order: order.clone() };
        let mut listed = Vec::new();
        let file = file.map(AsFd::as_fd);
        let last = self.ask_with_file(request, &Key::encode(keys), file, &mut |reply| match reply {
            Reply::Working(_) => {
                progress(0);
                Ok(())
            }
            Reply::KvListed(blocks) => {
                listed.extend(blocks);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        match last {
            Reply::Kv(report) => Ok(match *report {
                Report::Listed(last) => {
                    listed.extend(last);
                    Report::Listed(listed)
                }
                report => report,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Session::blocks`](crate::Session::blocks).
    pub fn blocks(
        &self,
        settings: &Settings,
        fingerprint: &[u8],
        block_bytes: u32,
        tenant: &str,
    ) -> Result<RemoteBlocks> {
        RemoteBlocks::open(self.path.clone(), settings.clone(), fingerprint, block_bytes, tenant)
    }

    /// See [`Session::sync`](crate::Session::sync).
    pub fn sync(&self) -> Result<()> {
        self.done(Request::Sync)
    }

    /// Opens a region for reading, on a connection of its own.
    pub fn reader(&self, path: &str) -> Result<RemoteReader> {
        let connection = dial(&self.path)?.0;
        let frame = ask_on(&connection, &Request::OpenReader { path: path.to_owned() }, &[])?;
        match frame.message {
            Reply::Reader { size, chunk_size, direct } => {
                let file = file_of(frame.fd, direct)?;
                // Both are used in arithmetic here, and memory is taken by them.
                let sane = chunk_size.is_power_of_two()
                    && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&chunk_size)
                    || file.is_none();
                if !sane || size > i64::MAX as u64 {
                    let context = format!(
                        "the pool's owner leased a region of {size} bytes in chunks of {chunk_size}, which cannot be"
                    );
                    return Err(Error::new(ErrorKind::Protocol, context));
                }
                Ok(RemoteReader::new(size, chunk_size, file, connection))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Opens a region for writing, on a connection of its own.
    pub fn writer(
        &self,
        path: &str,
        size_hint: Option<u64>,
        options: &WriterOptions,
    ) -> Result<RemoteWriter> {
        let connection = dial(&self.path)?.0;
        let request = Request::OpenWriter { path: path.to_owned(), size_hint, options: options.clone() };
        let frame = ask_on(&connection, &request, &[])?;
        match frame.message {
            Reply::Writer { resume_offset, direct } => Ok(RemoteWriter {
                resume_offset,
                end: AtomicU64::new(resume_offset),
                file: file_of(frame.fd, direct)?,
                connection: Mutex::new(connection),
            }),
            other => Err(unexpected(&other)),
        }
    }
}

/// Connects and says hello.
pub(super) fn dial(path: &Path) -> Result<(Connection, u32)> {
    dial_within(path, SILENCE)
}

/// As [`dial`], by an owner that answers within a time.
pub(super) fn dial_within(path: &Path, silence: Duration) -> Result<(Connection, u32)> {
    let info = Pool::probe(path).ok();
    let trusted = location::trusted(path);
    let mut refused = None;
    for location in location::to_connect(path, info.as_ref()) {
        let stream = match location.connect(&trusted) {
            Ok(stream) => stream,
            Err(error) => {
                use io::ErrorKind as Os;
                // Not there, or there without a listener: whoever owns the pool may be elsewhere, or not there yet.
                if !matches!(error.kind(), Os::NotFound | Os::ConnectionRefused | Os::NotADirectory) {
                    refused = refused
                        .or(Some(Error::io(format!("connect to {}", location.path().display()), error)));
                }
                continue;
            }
        };
        match hello(stream, info.as_ref(), silence) {
            Err(error) if error.kind() == ErrorKind::Stale => continue,
            other => return other,
        }
    }
    Err(refused.unwrap_or_else(|| {
        Error::new(ErrorKind::Stale, format!("no process listens for the pool {}", path.display()))
    }))
}

fn hello(stream: UnixStream, info: Option<&PoolInfo>, silence: Duration) -> Result<(Connection, u32)> {
    let connection = Connection::new(stream, REPLY_MAX);
    let sent = connection.send(&Request::Hello { version: VERSION }, &[], None);
    // A refusal may stand there although the other side took nothing.
    let frame = match connection.receive::<Reply>(Some(silence)) {
        Ok(Some(frame)) => answer(frame)?,
        Ok(None) => return Err(Error::new(ErrorKind::Stale, "the pool's owner hung up")),
        Err(error) => return Err(sent.err().unwrap_or(error)),
    };
    match frame.message {
        Reply::Hello { pool, .. } if info.is_some_and(|i| i.id != pool) => Err(Error::new(
            ErrorKind::Stale,
            format!("the process that listens there owns another pool, {pool}"),
        )),
        Reply::Hello { pid, .. } => Ok((connection, pid)),
        other => Err(unexpected(&other)),
    }
}

/// Whether the other side closed an idle connection. Between calls nothing is on its way, so anything readable is the end.
pub(super) fn hung_up(connection: &Connection) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(connection.stream(), PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(poll(&mut fds, Some(&now)), Ok(0))
}

/// Sends a request and receives until its last frame, errors of the owner included.
fn call(
    connection: &Connection,
    request: &Request,
    payload: &[u8],
    file: Option<BorrowedFd<'_>>,
    watch: &mut dyn FnMut(Reply) -> Result<()>,
) -> Result<Frame<Reply>> {
    let gone = |e: Error| e.context("the process that owns the pool");
    connection.send(request, payload, file).map_err(gone)?;
    loop {
        let Some(frame) = connection.receive::<Reply>(Some(SILENCE)).map_err(gone)? else {
            return Err(Error::new(ErrorKind::Stale, "the process that owned the pool has ended; try again"));
        };
        match frame.message {
            Reply::Working(_) | Reply::Entries { more: true, .. } | Reply::KvListed(_) => {
                watch(frame.message)?
            }
            _ => return Ok(frame),
        }
    }
}

/// Turns the owner's error into ours.
pub(super) fn answer(frame: Frame<Reply>) -> Result<Frame<Reply>> {
    match frame.message {
        Reply::Error { kind, message } => Err(Error::new(kind, message)),
        _ => Ok(frame),
    }
}

pub(super) fn ask_on(connection: &Connection, request: &Request, payload: &[u8]) -> Result<Frame<Reply>> {
    answer(call(connection, request, payload, None, &mut |_| Ok(()))?)
}

pub(super) fn unexpected(reply: &Reply) -> Error {
    let text: String = format!("{reply:?}").chars().take(100).collect();
    Error::new(ErrorKind::Protocol, format!("the pool's owner answered with something else: {text}"))
}

fn file_of(fd: Option<std::os::fd::OwnedFd>, direct: bool) -> Result<Option<File>> {
    if direct && fd.is_none() {
        let context = "the pool's owner sent no file with its answer (out of file descriptors?)";
        return Err(Error::new(ErrorKind::Protocol, context));
    }
    Ok(fd.map(File::from))
}

pub(super) fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A region being written through the owner.
#[derive(Debug)]
pub struct RemoteWriter {
    resume_offset: u64,
    end: AtomicU64,
    /// The draft itself, where it is one file.
    file: Option<File>,
    connection: Mutex<Connection>,
}

impl RemoteWriter {
    /// See [`RegionWriter::resume_offset`](crate::RegionWriter::resume_offset).
    pub fn resume_offset(&self) -> u64 {
        self.resume_offset
    }

    /// See [`RegionWriter::len`](crate::RegionWriter::len).
    pub fn len(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn done(&self, request: &Request, payload: &[u8]) -> Result<()> {
        match ask_on(&lock(&self.connection), request, payload)?.message {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`RegionWriter::write_at`](crate::RegionWriter::write_at).
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let Some(end) = offset.checked_add(data.len() as u64).filter(|&end| end <= i64::MAX as u64) else {
            let context = format!("{} bytes at {offset} end beyond 2^63", data.len());
            return Err(Error::new(ErrorKind::TooLarge, context));
        };
        if let Some(file) = &self.file {
            file.write_all_at(data, offset)
                .map_err(|e| Error::io(format!("write {} bytes at {offset}", data.len()), e))?;
            self.done(&Request::Wrote { offset, len: data.len() as u64 }, &[])?;
        } else {
            let mut at = offset;
            for part in data.chunks(PAYLOAD_MAX as usize) {
                self.done(&Request::Write { offset: at }, part)?;
                at += part.len() as u64;
            }
        }
        self.end.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// See [`RegionWriter::checkpoint`](crate::RegionWriter::checkpoint).
    pub fn checkpoint(&self) -> Result<()> {
        self.done(&Request::Checkpoint, &[])
    }

    /// See [`RegionWriter::commit`](crate::RegionWriter::commit).
    pub fn commit(self) -> Result<Entry> {
        match ask_on(&lock(&self.connection), &Request::Commit, &[])?.message {
            Reply::Entry(entry) => Ok(entry),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`RegionWriter::abort`](crate::RegionWriter::abort).
    pub fn abort(self) -> Result<()> {
        self.done(&Request::Abort, &[])
    }
}
