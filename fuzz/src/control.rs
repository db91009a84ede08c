//! The control socket: frames, the owner's side against any client, the client's side against any owner.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use engine::control::protocol::{PAYLOAD_MAX, REQUEST_MAX, Reply, Request, VERSION};
use engine::control::{Client, location, serve};
use engine::kv::admin::{Order, Report, Select};
use engine::kv::{Get, Key, Put, Settings};
use engine::{
    Access, ErrorKind, FormatOptions, NewNode, NodeKind, OpenOptions, Pool, WriterOptions, fuzzing,
};
use nvme::Buffer;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::source::Source;
use crate::{digest, scratch};

/// Longer than any answer takes; a target that waits so long has found a hang.
const HANG: Duration = Duration::from_secs(20);

fn frame(message: &impl Serialize, payload: &[u8]) -> Vec<u8> {
    let json = serde_json::to_vec(message).expect("JSON");
    framed(&json, payload)
}

fn framed(json: &[u8], payload: &[u8]) -> Vec<u8> {
    let head = [(json.len() as u32).to_le_bytes(), (payload.len() as u32).to_le_bytes()].concat();
    [&head, json, payload].concat()
}

/// Bytes as they come over a socket, as requests and as replies; what is read is written and read again.
pub fn frames(input: &[u8]) -> u64 {
    let raw = (deliver(input, fuzzing::requests), deliver(input, fuzzing::replies));
    // And as JSON in a good frame, with the rest of the input after a NUL as payload.
    let (json, payload) = match input.iter().position(|byte| *byte == 0) {
        Some(at) => (&input[..at], &input[at + 1..]),
        None => (input, &[][..]),
    };
    let whole = framed(json, payload);
    let requests = deliver(&whole, fuzzing::requests);
    let replies = deliver(&whole, fuzzing::replies);
    for (request, len, file) in &requests.0 {
        assert!(*len == payload.len() && !file);
        again(request);
    }
    for (reply, ..) in &replies.0 {
        again(reply);
    }
    for error in
        [&raw.0.1, &raw.1.1, &requests.1, &replies.1].into_iter().filter_map(|result| result.as_ref().err())
    {
        assert!(matches!(error.kind(), ErrorKind::Protocol | ErrorKind::Stale), "{error:?}");
    }
    digest(&(raw.0.0, raw.1.0, requests.0, replies.0))
}

fn again<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T) {
    let json = serde_json::to_vec(message).expect("JSON");
    let read: T = serde_json::from_slice(&json).expect("what was written");
    assert_eq!(read, *message);
}

/// Puts bytes into one end of a socket, ends it, and reads the other end.
fn deliver<T>(bytes: &[u8], read: impl FnOnce(UnixStream) -> T) -> T {
    let (mut ours, theirs) = UnixStream::pair().expect("a socket");
    // Inputs fit a socket's buffer.
    ours.write_all(bytes).expect("a socket that takes bytes");
    drop(ours);
    read(theirs)
}

/// Paths that a client names: some exist, some cannot.
const PATHS: [&str; 12] = [
    "r",
    "d",
    "d/s.safetensors",
    "new",
    "d/new",
    "",
    "/",
    "..",
    "a/../r",
    ".nvtier-partial",
    "d/\0",
    "nowhere/x",
];

fn path(source: &mut Source<'_>) -> String {
    match source.u8() as usize {
        index if index < 200 => PATHS[index % PATHS.len()].to_owned(),
        255 => "x".repeat(source.u16() as usize % 5000),
        _ => {
            let len = source.u8() as usize % 32;
            String::from_utf8_lossy(source.take(len)).into_owned()
        }
    }
}

fn request(source: &mut Source<'_>) -> Request {
    // Numbers below 192 mean what they did before there were KV stores: the corpus keeps its sense.
    let kind = source.u8();
    if kind >= 192 {
        return kv_request(source);
    }
    match kind % 21 {
        0 => Request::Hello { version: source.u32() },
        1 => Request::Info,
        2 => Request::Stat,
        3 => Request::List { path: path(source), recursive: source.u8() & 1 == 0 },
        4 => Request::StatPath { path: path(source) },
        5 => Request::Mkdirs { path: path(source) },
        6 => Request::Remove { path: path(source), recursive: source.u8() & 1 == 0 },
        7 => Request::Rename { from: path(source), to: path(source) },
        8 => Request::Verify { path: path(source) },
        9 => Request::Sync,
        10 => Request::OpenReader { path: path(source) },
        11 | 12 => Request::Read { offset: source.number(), len: source.number() as u32 % (PAYLOAD_MAX / 4) },
        13 => Request::Sums { first: source.number(), count: source.number() as u32 },
        14 => Request::CloseReader,
        15 => {
            let options = WriterOptions {
                mode: u32::from(source.u16()),
                resume: source.u8() & 1 == 0,
                resume_key: path(source),
            };
            let size_hint = (source.u8() & 1 == 0).then(|| source.number() % (1 << 50));
            Request::OpenWriter { path: path(source), size_hint, options }
        }
        16 => Request::Write { offset: source.number() },
        17 => Request::Wrote { offset: source.number(), len: source.number() },
        18 => Request::Checkpoint,
        19 => Request::Commit,
        _ => Request::Abort,
    }
}

/// A store's name: one that may be there, one that is none, any.
fn store(source: &mut Source<'_>) -> String {
    match source.u8() % 4 {
        0 | 1 => "s".into(),
        2 => "../s".into(),
        _ => path(source),
    }
}

fn select(source: &mut Source<'_>) -> Select {
    let which = source.u8();
    Select {
        namespace: (which & 1 == 0).then(|| u16::from(which >> 4)),
        tenant: (which & 2 == 0).then(|| if which & 4 == 0 { String::new() } else { path(source) }),
    }
}

/// Requests to KV stores.
fn kv_request(source: &mut Source<'_>) -> Request {
    match source.u8() % 20 {
        which @ 0..=2 => {
            // Little memory and time: an input is to be through in milliseconds.
            let settings = Settings {
                name: store(source),
                budget_bytes: Some(source.number() % (24 << 20)),
                // Nothing that depends on how fast this machine is.
                ttl_secs: (source.u8() & 1 == 0).then(|| source.number().max(1000)),
                write_bytes_per_day: (source.u8() & 1 == 0).then(|| source.number()),
                second_offer: (source.u8() & 1 == 0).then(|| source.number() as usize),
                deadline_ms: source.number().max(5000),
                lasting: false,
                quotas: if which == 2 { vec![(path(source), source.number())] } else { Vec::new() },
                tenant_quota: if which == 1 { source.number() } else { 0 },
            };
            let block_bytes = match source.u8() % 4 {
                0 => [0, u32::MAX, (256 << 20) + 1, 1 << 20][usize::from(source.u8() % 4)],
                _ => 1 + u32::from(source.u16() % 20_000),
            };
            Request::KvOpen { settings, block_bytes, tenant: path(source) }
        }
        3 => Request::KvLookup,
        4 => Request::KvContains,
        5 | 6 => Request::KvGet,
        7 | 8 => Request::KvPut,
        9 => Request::KvPin { pinned: source.u8() & 1 == 0 },
        10 => Request::KvRemove,
        11 => Request::KvQuota { bytes: source.number() },
        12 => Request::KvFlush,
        13 => Request::KvStat,
        _ => {
            let order = match source.u8() % 11 {
                0 => Order::Names,
                1 => Order::Stat,
                2 => Order::List(select(source)),
                3 => Order::Verify,
                4 => Order::Pin { select: select(source), pinned: source.u8() & 1 == 0 },
                5 => Order::Remove(select(source)),
                6 => Order::Export(select(source)),
                7 => Order::Import { tenant: path(source) },
                8 => Order::Quota { tenant: path(source), bytes: source.number() },
                9 => Order::Watch,
                _ => Order::Drop,
            };
            Request::Kv { store: store(source), order }
        }
    }
}

/// What goes with it: keys, a fingerprint, or what is neither; and a file, an empty one or one of some length, where it takes one.
fn kv_load(request: &Request, source: &mut Source<'_>) -> (Vec<u8>, Option<OwnedFd>) {
    let wants_file = matches!(
        request,
        Request::KvOpen { .. } | Request::Kv { order: Order::Export(_) | Order::Import { .. }, .. }
    );
    let file = (wants_file && source.u8() & 7 != 0).then(|| {
        let fd = rustix::fs::memfd_create("nvtier-fuzz", rustix::fs::MemfdFlags::CLOEXEC);
        let file = fs::File::from(fd.expect("a memory file"));
        match source.u8() & 1 {
            0 => file.set_len(u64::from(source.u16()) * 64).expect("memory"),
            _ => file.write_all_at(source.bytes(), 0).expect("memory"),
        }
        OwnedFd::from(file)
    });
    let payload = match request {
        Request::KvOpen { .. } => source.bytes().to_vec(),
        _ if source.u8() & 15 == 15 => source.bytes().to_vec(),
        _ => {
            let key = |n: u8| {
                let mut bytes = [0; 33];
                (bytes[0], bytes[1]) = (16, n % 8);
                bytes
            };
            (0..source.u8() % 40).flat_map(|_| key(source.u8())).collect()
        }
    };
    (payload, file)
}

/// A real owner of a real pool, and a client that asks whatever the input says. Each request is answered, or the owner hangs up.
pub fn server(input: &[u8]) -> u64 {
    let scratch = scratch();
    let root = scratch.path().join("pool");
    let mut source = Source::new(input);
    let start = source.u8();
    // The bytes of one kind of pool pass the owner by, those of the other pass through it.
    let format = FormatOptions { size: Some(64 << 20), raw: start & 0x80 != 0, ..FormatOptions::default() };
    Pool::format(&root, &format).expect("a pool");
    let options = OpenOptions { ram_bytes: 0, commit_interval_ms: 0, ..OpenOptions::default() };
    let pool = Pool::open(&root, &options).expect("a pool");
    pool.create_dirs("d", 0, 0).expect("a folder");
    let content: Vec<u8> = (0..70_000u32).map(|i| (i % 251) as u8).collect();
    write(&pool, "", "r", &content);
    write(&pool, "d", "s.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    let server = serve(pool.clone()).expect("a server");

    let mut seen = Vec::new();
    let mut stream = UnixStream::connect(server.path()).expect("a connection");
    stream.set_read_timeout(Some(HANG)).expect("a deadline");
    if start & 0x7f != 0 {
        stream.write_all(&frame(&Request::Hello { version: VERSION }, &[])).expect("a hello");
        assert!(matches!(answer(&mut stream), Some((Reply::Hello { .. }, _))), "a hello is answered");
    }
    let mut asked = 0;
    while !source.is_empty() && asked < 24 {
        asked += 1;
        if source.u8() == 255 {
            // Anything but a frame: the owner says what is wrong with it, if it can, and hangs up.
            let _ = stream.write_all(source.bytes());
            let _ = stream.shutdown(Shutdown::Write);
            while answer(&mut stream).is_some() {}
            break;
        }
        let request = request(&mut source);
        let (payload, file) = match &request {
            Request::Write { .. } => (source.bytes().to_vec(), None),
            request if is_kv(request) => kv_load(request, &mut source),
            _ => (Vec::new(), None),
        };
        if send(&stream, &Lie { bytes: frame(&request, &payload), file }).is_err() {
            break;
        }
        let Some((reply, data)) = last_answer(&mut stream) else { break };
        check(&request, &reply, &data);
        seen.push(kind_of(&reply));
    }
    drop(stream);
    drop(server); // waits for the client's thread
    // Whatever was asked, the pool is whole.
    let report = pool.verify(None, &mut |_| {}).expect("a pool that can be verified");
    assert!(report.bad.is_empty(), "{report:?}");
    pool.close().expect("a pool that can be closed");
    Pool::open(&root, &OpenOptions { read_only: true, ..options }).expect("a pool that opens again");
    digest(&seen)
}

fn write(pool: &Pool, folder: &str, name: &str, bytes: &[u8]) {
    let folder = pool.resolve(folder).expect("a folder").node;
    let new = NewNode { kind: NodeKind::Region, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: None };
    let node = pool.create(folder, name.as_ref(), &new).expect("a node").node;
    let handle = pool.open_region(node, Access::ReadWrite, false).expect("a region");
    handle.write_at(0, bytes).expect("a write");
}

fn is_kv(request: &Request) -> bool {
    matches!(
        request,
        Request::KvOpen { .. }
            | Request::KvLookup
            | Request::KvContains
            | Request::KvGet
            | Request::KvPut
            | Request::KvPin { .. }
            | Request::KvRemove
            | Request::KvQuota { .. }
            | Request::KvFlush
            | Request::KvStat
            | Request::Kv { .. }
    )
}

fn check(request: &Request, reply: &Reply, data: &[u8]) {
    match (request, reply) {
        (_, Reply::Error { message, .. }) => assert!(!message.is_empty() && data.is_empty()),
        (Request::Read { len, .. }, Reply::Data) => assert!(data.len() <= *len as usize),
        (Request::Sums { count, .. }, Reply::Data) => assert!(data.len() as u64 <= 4 * u64::from(*count)),
        (Request::Info, Reply::Info(_))
        | (Request::Stat, Reply::Stat(_))
        | (Request::List { .. }, Reply::Entries { .. })
        | (Request::StatPath { .. } | Request::Commit, Reply::Entry(_))
        | (Request::Verify { .. }, Reply::Verified(_))
        | (Request::OpenReader { .. }, Reply::Reader { .. })
        | (Request::OpenWriter { .. }, Reply::Writer { .. })
        | (Request::KvOpen { .. }, Reply::KvOpen { .. })
        | (Request::KvStat, Reply::KvStat(_))
        | (Request::Kv { .. }, Reply::Kv(_))
        | (Request::KvFlush | Request::KvQuota { .. }, Reply::Done) => {}
        (Request::KvLookup | Request::KvPin { .. } | Request::KvRemove, Reply::Count(count)) => {
            assert!(*count <= 40 + u64::from(u16::MAX) / 33);
        }
        (Request::KvContains | Request::KvGet | Request::KvPut, Reply::Data) => {
            assert!(data.len() <= 40 + usize::from(u16::MAX) / 33);
        }
        (
            Request::Mkdirs { .. }
            | Request::Remove { .. }
            | Request::Rename { .. }
            | Request::Sync
            | Request::CloseReader
            | Request::Write { .. }
            | Request::Wrote { .. }
            | Request::Checkpoint
            | Request::Abort,
            Reply::Done,
        ) => {}
        _ => panic!("{request:?} is answered by {reply:?}"),
    }
}

/// What does not depend on clocks and free space.
fn kind_of(reply: &Reply) -> String {
    match reply {
        Reply::Error { kind, .. } => format!("{kind:?}"),
        Reply::Reader { size, direct, .. } => format!("reader {size} {direct}"),
        Reply::Entries { entries, .. } => format!("{} entries", entries.len()),
        other => format!("{other:?}").chars().take_while(|c| c.is_alphanumeric()).collect(),
    }
}

fn last_answer(stream: &mut UnixStream) -> Option<(Reply, Vec<u8>)> {
    loop {
        match answer(stream)? {
            (Reply::Working(_) | Reply::Entries { more: true, .. } | Reply::KvListed(_), _) => {}
            other => return Some(other),
        }
    }
}

/// The next frame; `None`: the other side hung up. A file that rides along is not taken.
fn answer(stream: &mut UnixStream) -> Option<(Reply, Vec<u8>)> {
    let mut head = [0; 8];
    let ended = |error: std::io::Error| {
        assert!(!matches!(error.kind(), std::io::ErrorKind::WouldBlock), "no answer in {} s", HANG.as_secs());
    };
    stream.read_exact(&mut head).map_err(ended).ok()?;
    let [json, payload] =
        [0, 4].map(|at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
    assert!(json <= 16 << 20 && payload <= PAYLOAD_MAX, "a frame of {json} + {payload} bytes");
    let (mut text, mut data) = (vec![0; json as usize], vec![0; payload as usize]);
    stream.read_exact(&mut text).map_err(ended).ok()?;
    stream.read_exact(&mut data).map_err(ended).ok()?;
    Some((serde_json::from_slice(&text).expect("a reply"), data))
}

/// One frame of a lying owner.
struct Lie {
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
}

fn reply(source: &mut Source<'_>) -> Lie {
    let kind = source.u8();
    let file = (kind & 0x80 != 0).then(|| {
        let fd =
            rustix::fs::memfd_create("nvtier-fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
        let file = fs::File::from(fd);
        file.write_all_at(&vec![3; source.u16() as usize], 0).expect("memory");
        OwnedFd::from(file)
    });
    let reply = match kind & 0x7f {
        0 => return Lie { bytes: source.bytes().to_vec(), file },
        1 => return Lie { bytes: framed(source.bytes(), source.bytes()), file },
        kind if kind >= 0x60 => match kind % 6 {
            0 => Reply::KvOpen { slot_bytes: 4096 },
            1 => Reply::KvOpen { slot_bytes: source.number() },
            2 => Reply::Count(source.number()),
            3 => Reply::KvStat(Box::default()),
            4 => Reply::KvListed(Vec::new()),
            _ => Reply::Kv(Box::new(Report::Names(vec!["s".into()]))),
        },
        kind => match kind % 9 {
            0 => Reply::Done,
            1 | 2 => Reply::Reader {
                size: source.number(),
                chunk_size: source.number() as u32,
                direct: source.u8() & 1 == 0,
            },
            3 => Reply::Writer { resume_offset: source.number(), direct: source.u8() & 1 == 0 },
            4 => Reply::Entries { entries: Vec::new(), more: source.u8() & 1 == 0 },
            5 => Reply::Working(None),
            6 => Reply::Error {
                kind: ErrorKind::NoSpace,
                message: String::from_utf8_lossy(source.bytes()).into_owned(),
            },
            _ => Reply::Data,
        },
    };
    let payload = if matches!(reply, Reply::Data) { source.bytes() } else { &[] };
    Lie { bytes: frame(&reply, payload), file }
}

/// One connection of the lying owner: a hello, and to the first that asks for more, the lies.
fn lie(mut stream: UnixStream, head: [u8; 8], lies: &Mutex<Option<Vec<Lie>>>) {
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]).min(REQUEST_MAX) as usize;
    let _ = stream.read_exact(&mut vec![0; len]);
    let _ = stream.write_all(&frame(&Reply::Hello { version: VERSION, pid: 1, pool: "fuzzed".into() }, &[]));
    let mut byte = [0];
    if !matches!(stream.read(&mut byte), Ok(1)) {
        return;
    }
    let lies = lies.lock().expect("no panic holds it").take();
    for lie in lies.into_iter().flatten() {
        if send(&stream, &lie).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    // Until the client goes, so that it is not cut off before it has read all of it.
    let mut rest = [0; 4096];
    while matches!(stream.read(&mut rest), Ok(1..)) {}
}

/// A client whose owner answers whatever the input says. Nothing but an error may come of it, nor may it hang.
pub fn client(input: &[u8]) -> u64 {
    let scratch = scratch();
    let listener = UnixListener::bind(scratch.path().join(location::SOCKET_NAME)).expect("a socket");
    let mut source = Source::new(input);
    let call = source.u8();
    let mut lies = Vec::new();
    while !source.is_empty() && lies.len() < 16 {
        lies.push(reply(&mut source));
    }
    let owner = thread::spawn(move || {
        let lies = Mutex::new(Some(lies));
        thread::scope(|scope| {
            while let Ok((mut stream, _)) = listener.accept() {
                stream.set_read_timeout(Some(HANG)).expect("a deadline");
                let mut first = [0; 8];
                if stream.read_exact(&mut first).is_err() {
                    break; // the target's way to say that it is done
                }
                let lies = &lies;
                scope.spawn(move || lie(stream, first, lies));
            }
        });
    });
    let outcome = ask(scratch.path(), call);
    // An empty connection ends the owner.
    drop(UnixStream::connect(scratch.path().join(location::SOCKET_NAME)));
    owner.join().expect("the lying owner itself");
    digest(&outcome)
}

fn ask(root: &std::path::Path, call: u8) -> String {
    let shown = |result: engine::Result<String>| result.unwrap_or_else(|error| format!("{:?}", error.kind()));
    let connected = Client::connect(root);
    let Ok(client) = connected else { return shown(connected.map(|_| String::new())) };
    if call >= 0xe0 {
        return ask_kv(&client, call);
    }
    match call % 6 {
        0 => shown(client.list("d", true).map(|entries| entries.len().to_string())),
        1 => shown(client.verify("", &mut |_| {}).map(|report| format!("{report:?}"))),
        2 => shown(client.remove("r", false).map(|()| "removed".into())),
        3 | 4 => {
            let reader = match client.reader("r") {
                Ok(reader) => reader,
                Err(error) => return format!("{:?}", error.kind()),
            };
            let mut sums = Vec::new();
            let mut buffer = [0; 3000];
            for offset in [0, 1, reader.len() / 2, reader.len().saturating_sub(1), u64::MAX] {
                if let Ok(n) = reader.read_at(offset, &mut buffer) {
                    assert!(n as u64 <= reader.len().saturating_sub(offset).min(3000));
                    sums.push(crc32fast::hash(&buffer[..n]));
                }
            }
            format!("{sums:?}")
        }
        _ => match client.writer("r", Some(9), &WriterOptions::default()) {
            Ok(writer) => {
                let wrote = writer.write_at(writer.resume_offset(), b"some bytes");
                let wrote = wrote.map(|()| String::new());
                format!("{} {}", shown(wrote), shown(writer.commit().map(|entry| entry.path)))
            }
            Err(error) => format!("{:?}", error.kind()),
        },
    }
}

/// The client's side of KV stores: whatever the owner says, each block is a miss or there, and each put is answered.
fn ask_kv(client: &Client, call: u8) -> String {
    let key = Key::new(&[7; 16]).expect("a key");
    if call & 1 == 0 {
        let listed = client.kv("s", &Order::List(Select::default()), &[key], None, &mut |_| {});
        return listed.map_or_else(|error| format!("{:?}", error.kind()), |report| format!("{report:?}"));
    }
    let blocks = match client.blocks(&Settings::default(), b"print", 3000, "") {
        Ok(blocks) => blocks,
        Err(error) => return format!("{:?}", error.kind()),
    };
    let buffer = || Buffer::heap(blocks.slot_bytes()).expect("memory");
    let by = Instant::now() + HANG;
    let puts = blocks.put(vec![Put { key, buffer: buffer(), start: 0 }], by);
    let gets = blocks.get(vec![Get { key, buffer: buffer(), start: 0 }], by);
    assert_eq!((puts.len(), gets.len()), (1, 1));
    let there = blocks.contains(&[key]);
    assert!(there.is_err() || there.is_ok_and(|there| there.len() == 1));
    format!("{:?} {}", puts[0].result, gets[0].result.is_ok())
}

fn send(stream: &UnixStream, lie: &Lie) -> rustix::io::Result<()> {
    let mut bytes = &lie.bytes[..];
    let mut file = lie.file.as_ref().map(|fd| fd.as_fd());
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = file.as_slice();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        bytes = &bytes[sent..];
        file = None;
    }
    Ok(())
}
