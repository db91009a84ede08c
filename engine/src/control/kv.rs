//! KV stores over the control socket: the owner's side of a connection, and the client's.
//!
//! Keys and answers are payloads of frames; blocks go through a file that the client made and handed over with its first request (a
//! memfd): a block is of any size then, and nothing is mapped, so that nobody can hurt the other side by changing the file's length.
//! A put or get is answered with a byte for each key, see [`encode_put`] and [`encode_get`].

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nvme::Buffer;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::client::{answer, ask_on, dial_within, hung_up, unexpected};
use super::frame::{Connection, Frame};
use super::protocol::{Reply, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::kv::{
    Get, GetDone, Key, Lane, Miss, Put, PutDone, Refusal, Settings, Store, StoreOptions, StoreStat, Stored,
    View, check_view,
};
use crate::pool::Pool;

/// Bytes of blocks that the owner works on at once for one client.
const BATCH: u64 = 16 << 20;
/// Bytes of the file that blocks are exchanged through, at least one block.
const EXCHANGE: u64 = 64 << 20;
/// Connections that are kept for the next call.
const IDLE: usize = 8;
/// How long a store that is being closed is waited for.
const OPEN_WAIT: Duration = Duration::from_secs(5);
/// How long an owner is given for what has no deadline of its own.
const PATIENCE: Duration = Duration::from_secs(30);
/// Beyond the deadline that was asked for: for what the owner does besides.
const GRACE: Duration = Duration::from_millis(500);

fn encode_put(result: &Stored) -> u8 {
    match result {
        Stored::New => 0,
        Stored::Present => 1,
        Stored::Refused(Refusal::Admission) => 2,
        Stored::Refused(Refusal::Budget) => 3,
        Stored::Refused(Refusal::Quota) => 4,
        Stored::Refused(Refusal::Space) => 5,
        Stored::Failed(_) => 6,
    }
}

fn decode_put(byte: u8) -> Stored {
    match byte {
        0 => Stored::New,
        1 => Stored::Present,
        2 => Stored::Refused(Refusal::Admission),
        3 => Stored::Refused(Refusal::Budget),
        4 => Stored::Refused(Refusal::Quota),
        5 => Stored::Refused(Refusal::Space),
        _ => Stored::Failed(Error::new(
            ErrorKind::Io,
            "the pool's owner could not store the block; its log says why",
        )),
    }
}

fn encode_get(result: &std::result::Result<(), Miss>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(Miss::Absent) => 1,
        Err(Miss::Corrupt) => 2,
        Err(Miss::Failed(_)) => 3,
    }
}

fn decode_get(byte: u8) -> std::result::Result<(), Miss> {
    match byte {
        0 => Ok(()),
        1 => Err(Miss::Absent),
        2 => Err(Miss::Corrupt),
        _ => Err(Miss::Failed(Error::new(
            ErrorKind::Io,
            "the pool's owner could not load the block; its log says why",
        ))),
    }
}

/// A file that a client handed over. Others than regular ones could keep the owner waiting for ever.
pub(super) fn regular(fd: OwnedFd) -> Result<File> {
    let file = File::from(fd);
    let kind = file.metadata().map_err(|e| Error::io("a file of a client", e))?;
    if !kind.is_file() {
        let context = "blocks go through a regular file only, and this is none; write to a file, or where no other process owns the pool";
        return Err(Error::new(ErrorKind::InvalidArgument, context));
    }
    Ok(file)
}

/// A namespace of a store that a client has open, in the owner.
pub(super) struct ServedKv {
    store: Store,
    view: View,
    lane: Lane,
    exchange: File,
    /// Buffers of one block each, for the next call.
    spare: Vec<Buffer>,
}

impl ServedKv {
    pub(super) fn open(
        pool: &Pool,
        settings: &Settings,
        fingerprint: &[u8],
        block_bytes: u32,
        tenant: &str,
        file: Option<OwnedFd>,
    ) -> Result<ServedKv> {
        let Some(file) = file else {
            return Err(Error::new(
                ErrorKind::Protocol,
                "a KV store is opened with a file to exchange blocks through",
            ));
        };
        let exchange = regular(file)?;
        let store = Store::share(pool, StoreOptions::from(settings), OPEN_WAIT)?;
        let view = store.view(fingerprint, block_bytes, tenant)?;
        let lane = store.lane(None)?;
        Ok(ServedKv { store, view, lane, exchange, spare: Vec::new() })
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn slot_bytes(&self) -> u64 {
        self.view.slot_bytes() as u64
    }

    /// Answers what is asked of an open namespace.
    pub(super) fn answer(&mut self, request: &Request, payload: &[u8]) -> Result<(Reply, Vec<u8>)> {
        let keys =
            Key::decode(payload).ok_or_else(|| Error::new(ErrorKind::Protocol, "these are no keys"))?;
        let count = |count: usize| (Reply::Count(count as u64), Vec::new());
        Ok(match request {
            Request::KvLookup => count(self.view.lookup(&keys)),
            Request::KvContains => {
                (Reply::Data, self.view.contains(&keys).into_iter().map(u8::from).collect())
            }
            Request::KvPin { pinned } => count(self.view.pin(&keys, *pinned)),
            Request::KvRemove => count(self.view.remove(&keys)),
            Request::KvQuota { bytes } => {
                self.store.set_quota(self.view.tenant(), *bytes)?;
                (Reply::Done, Vec::new())
            }
            Request::KvStat => (Reply::KvStat(Box::new(self.store.stat())), Vec::new()),
            Request::KvGet => (Reply::Data, self.get(&keys)?),
            Request::KvPut => (Reply::Data, self.put(&keys)?),
            _ => return Err(Error::new(ErrorKind::Protocol, "no request to a KV store")),
        })
    }

    fn batch(&self) -> usize {
        (BATCH / self.slot_bytes()).max(1) as usize
    }

    fn buffer(&mut self) -> Result<Buffer> {
        match self.spare.pop() {
            Some(buffer) => Ok(buffer),
            None => Ok(Buffer::heap(self.view.slot_bytes())?),
        }
    }

    fn place(&self, index: usize) -> Result<u64> {
        (index as u64)
            .checked_mul(self.slot_bytes())
            .ok_or_else(|| Error::new(ErrorKind::Protocol, "too many blocks in one request"))
    }

    fn get(&mut self, keys: &[Key]) -> Result<Vec<u8>> {
        let mut answers = Vec::with_capacity(keys.len());
        let bytes = self.view.block_bytes() as usize;
        for keys in keys.chunks(self.batch()) {
            let mut gets = Vec::with_capacity(keys.len());
            for key in keys {
                gets.push(Get { key: *key, buffer: self.buffer()?, start: 0 });
            }
            for done in self.lane.get(&self.view, gets)? {
                let mut code = encode_get(&done.result);
                if let (0, Some(buffer)) = (code, &done.buffer) {
                    let at = self.place(answers.len())?;
                    if let Err(error) = self.exchange.write_all_at(&buffer[..bytes], at) {
                        tracing::warn!("hand a KV block to a client: {error}");
                        code = 3;
                    }
                }
                answers.push(code);
                self.spare.extend(done.buffer);
            }
        }
        Ok(answers)
    }

    fn put(&mut self, keys: &[Key]) -> Result<Vec<u8>> {
        let mut answers = Vec::with_capacity(keys.len());
        let bytes = self.view.block_bytes() as usize;
        for keys in keys.chunks(self.batch()) {
            let first = answers.len();
            let mut puts = Vec::with_capacity(keys.len());
            for (index, key) in keys.iter().enumerate() {
                let mut buffer = self.buffer()?;
                let at = self.place(first + index)?;
                self.exchange
                    .read_exact_at(&mut buffer[..bytes], at)
                    .map_err(|e| Error::io(format!("take block {index} from a client"), e))?;
                buffer[bytes..].fill(0);
                puts.push(Put { key: *key, buffer, start: 0 });
            }
            for done in self.lane.put(&self.view, puts)? {
                if let Stored::Failed(error) = &done.result {
                    tracing::warn!("store a KV block of a client: {}", error.chain());
                }
                answers.push(encode_put(&done.result));
                self.spare.extend(done.buffer);
            }
        }
        Ok(answers)
    }
}

/// A connection with its file.
#[derive(Debug)]
struct Channel {
    connection: Connection,
    exchange: File,
    slots: usize,
}

/// A namespace of a store in the process that owns the pool. May be shared by threads; each call takes a connection of its own.
#[derive(Debug)]
pub struct RemoteBlocks {
    path: PathBuf,
    settings: Settings,
    fingerprint: Vec<u8>,
    block_bytes: u32,
    tenant: String,
    slot_bytes: usize,
    idle: Mutex<Vec<Channel>>,
}

impl RemoteBlocks {
    /// Opens it by the owner of the pool at `path`.
    pub(crate) fn open(
        path: PathBuf,
        settings: Settings,
        fingerprint: &[u8],
        block_bytes: u32,
        tenant: &str,
    ) -> Result<RemoteBlocks> {
        check_view(fingerprint, block_bytes, tenant)?;
        let mut blocks = RemoteBlocks {
            path,
            settings,
            fingerprint: fingerprint.to_vec(),
            block_bytes,
            tenant: tenant.to_owned(),
            slot_bytes: (block_bytes as usize).next_multiple_of(4096),
            idle: Mutex::default(),
        };
        let channel = blocks.channel(PATIENCE)?;
        blocks.idle.get_mut().unwrap_or_else(PoisonError::into_inner).push(channel);
        Ok(blocks)
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Bytes that a buffer needs for a block.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// A connection that nobody uses, or a new one by an owner that answers within a time.
    fn channel(&self, within: Duration) -> Result<Channel> {
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(channel) = kept.filter(|channel| !hung_up(&channel.connection)) {
            return Ok(channel);
        }
        let slots = (EXCHANGE / self.slot_bytes as u64).max(1);
        let exchange = memfd_create("nvtier-kv", MemfdFlags::CLOEXEC)
            .map_err(|e| Error::io("make a file to exchange KV blocks through", e.into()))?;
        ftruncate(exchange.as_fd(), slots * self.slot_bytes as u64)
            .map_err(|e| Error::io("size the file to exchange KV blocks through", e.into()))?;
        let connection = dial_within(&self.path, within)?.0;
        let request = Request::KvOpen {
            settings: self.settings.clone(),
            block_bytes: self.block_bytes,
            tenant: self.tenant.clone(),
        };
        connection.send(&request, &self.fingerprint, Some(exchange.as_fd()))?;
        let reply = self.last(&connection, within)?;
        match reply.message {
            // Both sides count places in the file by it.
            Reply::KvOpen { slot_bytes } if slot_bytes == self.slot_bytes as u64 => {}
            other => return Err(unexpected(&other)),
        }
        Ok(Channel { connection, exchange: File::from(exchange), slots: slots as usize })
    }

    /// The last frame of an answer, within a time.
    fn last(&self, connection: &Connection, within: Duration) -> Result<Frame<Reply>> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let Some(frame) = connection.receive::<Reply>(Some(left))? else {
                return Err(Error::new(
                    ErrorKind::Stale,
                    "the process that owned the pool has ended; try again",
                ));
            };
            match frame.message {
                Reply::Working(_) if Instant::now() < deadline => {}
                Reply::Working(_) => {
                    return Err(Error::new(ErrorKind::Timeout, "the pool's owner takes too long"));
                }
                _ => return answer(frame),
            }
        }
    }

    /// One request on a connection, which is kept if all went well.
    fn call<T>(&self, within: Duration, run: impl FnOnce(&Channel) -> Result<T>) -> Result<T> {
        let channel = self.channel(within)?;
        let value = run(&channel)?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE {
            idle.push(channel);
        }
        Ok(value)
    }

    fn ask(&self, request: &Request, payload: &[u8]) -> Result<Frame<Reply>> {
        self.call(PATIENCE, |channel| ask_on(&channel.connection, request, payload))
    }

    fn ask_in_time(
        &self,
        channel: &Channel,
        request: &Request,
        keys: &[Key],
        by: Instant,
    ) -> Result<Vec<u8>> {
        let left = by.saturating_duration_since(Instant::now());
        channel.connection.send(request, &Key::encode(keys), None)?;
        let frame = self.last(&channel.connection, left + GRACE)?;
        match frame.message {
            Reply::Data if frame.payload.len() == keys.len() => Ok(frame.payload),
            other => Err(unexpected(&other)),
        }
    }

    fn count(&self, request: &Request, keys: &[Key]) -> Result<usize> {
        match self.ask(request, &Key::encode(keys))?.message {
            Reply::Count(count) if count <= keys.len() as u64 => Ok(count as usize),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`View::lookup`].
    pub fn lookup(&self, chain: &[Key]) -> Result<usize> {
        self.count(&Request::KvLookup, chain)
    }

    /// See [`View::contains`].
    pub fn contains(&self, keys: &[Key]) -> Result<Vec<bool>> {
        let frame = self.ask(&Request::KvContains, &Key::encode(keys))?;
        match frame.message {
            Reply::Data if frame.payload.len() == keys.len() => {
                Ok(frame.payload.into_iter().map(|byte| byte == 1).collect())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// See [`View::pin`].
    pub fn pin(&self, keys: &[Key], pinned: bool) -> Result<usize> {
        self.count(&Request::KvPin { pinned }, keys)
    }

    /// See [`View::remove`].
    pub fn remove(&self, keys: &[Key]) -> Result<usize> {
        self.count(&Request::KvRemove, keys)
    }

    /// See [`Store::set_quota`], for this tenant.
    pub fn set_quota(&self, bytes: u64) -> Result<()> {
        match self.ask(&Request::KvQuota { bytes }, &[])?.message {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Store::flush`].
    pub fn flush(&self) -> Result<()> {
        match self.ask(&Request::KvFlush, &[])?.message {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Store::stat`].
    pub fn stat(&self) -> Result<StoreStat> {
        match self.ask(&Request::KvStat, &[])?.message {
            Reply::KvStat(stat) => Ok(*stat),
            other => Err(unexpected(&other)),
        }
    }

    /// See [`Lane::get`]. What the owner does not answer by then is a miss.
    pub fn get(&self, gets: Vec<Get>, by: Instant) -> Vec<GetDone> {
        let mut answers = Vec::with_capacity(gets.len());
        let mut gets = gets;
        let bytes = self.block_bytes as usize;
        let left = by.saturating_duration_since(Instant::now()) + GRACE;
        let done = self.call(left, |channel| {
            for batch in gets.chunks_mut(channel.slots) {
                let keys: Vec<Key> = batch.iter().map(|get| get.key).collect();
                let codes = self.ask_in_time(channel, &Request::KvGet, &keys, by)?;
                for (index, (get, code)) in batch.iter_mut().zip(codes).enumerate() {
                    let mut result = decode_get(code);
                    if result.is_ok() {
                        let room = &mut get.buffer[get.start..get.start + bytes];
                        let read = channel.exchange.read_exact_at(room, (index * self.slot_bytes) as u64);
                        result = read
                            .map_err(|e| Miss::Failed(Error::io("take a KV block from the pool's owner", e)));
                    }
                    answers.push(result);
                }
            }
            Ok(())
        });
        let why = done.err().map(|error| (error.kind(), error.chain()));
        let rest = || {
            let (kind, text) =
                why.clone().unwrap_or((ErrorKind::Io, "the pool's owner did not answer".into()));
            Err(Miss::Failed(Error::new(kind, text)))
        };
        let mut answers = answers.into_iter();
        let finish = |get: Get| {
            let result = answers.next().unwrap_or_else(rest);
            GetDone { key: get.key, result, buffer: Some(get.buffer) }
        };
        gets.into_iter().map(finish).collect()
    }

    /// See [`Lane::put`]. What the owner does not answer by then has failed; it may be there nevertheless.
    pub fn put(&self, puts: Vec<Put>, by: Instant) -> Vec<PutDone> {
        let mut answers = Vec::with_capacity(puts.len());
        let bytes = self.block_bytes as usize;
        let left = by.saturating_duration_since(Instant::now()) + GRACE;
        let done = self.call(left, |channel| {
            for batch in puts.chunks(channel.slots) {
                for (index, put) in batch.iter().enumerate() {
                    let at = (index * self.slot_bytes) as u64;
                    channel
                        .exchange
                        .write_all_at(&put.buffer[put.start..put.start + bytes], at)
                        .map_err(|e| Error::io("hand a KV block to the pool's owner", e))?;
                }
                let keys: Vec<Key> = batch.iter().map(|put| put.key).collect();
                let codes = self.ask_in_time(channel, &Request::KvPut, &keys, by)?;
                answers.extend(codes.into_iter().map(decode_put));
            }
            Ok(())
        });
        let why = done.err().map(|error| (error.kind(), error.chain()));
        let rest = || {
            let (kind, text) =
                why.clone().unwrap_or((ErrorKind::Io, "the pool's owner did not answer".into()));
            Stored::Failed(Error::new(kind, text))
        };
        let mut answers = answers.into_iter();
        let finish = |put: Put| {
            let result = answers.next().unwrap_or_else(rest);
            PutDone { key: put.key, result, buffer: Some(put.buffer) }
        };
        puts.into_iter().map(finish).collect()
    }
}
