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
use std::time::Duration;

use engine::control::protocol::{PAYLOAD_MAX, REQUEST_MAX, Reply, Request, VERSION};
use engine::control::{Client, location, serve};
use engine::{
    Access, ErrorKind, FormatOptions, NewNode, NodeKind, OpenOptions, Pool, WriterOptions, fuzzing,
};
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
    match source.u8() % 21 {
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
        let payload = if matches!(request, Request::Write { .. }) { source.bytes() } else { &[] };
        if stream.write_all(&frame(&request, payload)).is_err() {
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
        | (Request::OpenWriter { .. }, Reply::Writer { .. }) => {}
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
            (Reply::Working(_) | Reply::Entries { more: true, .. }, _) => {}
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
