//! Sessions and the control socket between real processes: this test program starts itself as the other one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use engine::control::{Client, ControlServer, location, serve};
use engine::{ErrorKind, FormatOptions, OpenOptions, Pool, Session, SessionOptions, WriterOptions};

/// Only so long is waited for anything; failures are told before.
const DEADLINE: Duration = Duration::from_secs(60);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Another process, in the role that `child` below plays.
struct Other {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Other {
    fn start(mut command: Command, role: &str, path: &Path) -> Other {
        let mut child = command
            .args(["--ignored", "--exact", "child", "--nocapture"])
            .env("NVTIER_TEST_ROLE", role)
            .env("NVTIER_TEST_PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start this test program");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Other { child, stdin, stdout }
    }

    fn role(role: &str, path: &Path) -> Other {
        Other::start(Command::new(std::env::current_exe().unwrap()), role, path)
    }

    /// What follows `@word:` on a line of its output.
    fn says(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.stdout.read_line(&mut line).unwrap();
            assert!(read > 0, "the other process ended before it said {word}");
            // The test harness writes without a line end before our first line.
            if let Some((_, rest)) = line.split_once(&format!("@{word}:")) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Lets it go on to its end, which must be a good one.
    fn finish(mut self) {
        drop(self.stdin.take());
        let _ = self.stdout.read_to_end(&mut Vec::new());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the other process: {status}");
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(word: &str, what: impl std::fmt::Display) {
    println!("@{word}:{what}");
    std::io::stdout().flush().unwrap();
}

fn wait_for_parent() {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn options() -> SessionOptions {
    SessionOptions { ram_bytes: 16 << 20, wait: DEADLINE, ..SessionOptions::default() }
}

/// The other process. Not a test: the tests start it.
#[test]
#[ignore = "started by the tests of this file"]
fn child() {
    let Ok(role) = std::env::var("NVTIER_TEST_ROLE") else { return };
    let path = PathBuf::from(std::env::var_os("NVTIER_TEST_PATH").unwrap());
    match role.as_str() {
        "owner" => {
            let session = Session::open(&path, SessionOptions { serve: true, ..options() }).unwrap();
            assert!(!session.is_remote());
            say("ready", std::process::id());
            wait_for_parent();
            session.close().unwrap();
        }
        "writer" | "resumable" => {
            let session = Session::open(&path, options()).unwrap();
            let resume = role == "resumable";
            let writer = WriterOptions { resume, resume_key: "k".into(), ..WriterOptions::default() };
            let mut writer = session.writer("models/half.bin", None, writer).unwrap();
            writer.write_all(&pattern(3 << 20)).unwrap();
            writer.checkpoint().unwrap();
            say("wrote", writer.len());
            wait_for_parent();
            unreachable!("the test kills this process");
        }
        "opener" => {
            for n in 0..5 {
                let session = Session::open(&path, options()).unwrap();
                session.mkdirs(&format!("by/{}/{n}", std::process::id())).unwrap();
                session.close().unwrap();
            }
            say("done", "");
        }
        "stranger" => {
            let mut socket = UnixStream::connect(&path).unwrap();
            let _ = socket.write_all(&frame(r#"{"op":"hello","version":1}"#));
            let mut answer = Vec::new();
            let _ = socket.read_to_end(&mut answer);
            say("answer", String::from_utf8_lossy(answer.get(8..).unwrap_or_default()));
        }
        "impostor" => {
            let listener = UnixListener::bind(&path).unwrap();
            say("listening", "");
            // Whatever is said to him is told.
            let mut heard = Vec::new();
            let _ = listener.accept().unwrap().0.read_to_end(&mut heard);
            say("heard", heard.len());
        }
        other => panic!("no role {other}"),
    }
}

fn frame(json: &str) -> Vec<u8> {
    [&(json.len() as u32).to_le_bytes()[..], &[0; 4], json.as_bytes()].concat()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// A pool of each kind: one directory, two striped ones, an image file.
fn pools() -> Vec<(&'static str, tempfile::TempDir, PathBuf)> {
    let make = |kind| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool");
        let mut format = FormatOptions::default();
        match kind {
            "striped" => format.members = vec![dir.path().join("m0"), dir.path().join("m1")],
            "image" => (format.size, format.raw) = (Some(96 << 20), true),
            _ => {}
        }
        Pool::format(&path, &format).unwrap_or_else(|e| panic!("{kind}: {}", e.chain()));
        (kind, dir, path)
    };
    ["directory", "striped", "image"].into_iter().map(make).collect()
}

fn directory_pool() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    (dir, path)
}

fn served() -> (tempfile::TempDir, PathBuf, Pool, ControlServer) {
    let (dir, path) = directory_pool();
    let pool = Pool::open(&path, &OpenOptions { ram_bytes: 16 << 20, ..OpenOptions::default() }).unwrap();
    let server = serve(pool.clone()).unwrap();
    (dir, path, pool, server)
}

fn paths(session: &Session, path: &str, recursive: bool) -> Vec<String> {
    session.list(path, recursive).unwrap().into_iter().map(|e| e.path).collect()
}

fn put(session: &Session, path: &str, bytes: &[u8]) {
    let mut writer = session.writer(path, None, WriterOptions::default()).unwrap();
    writer.write_all(bytes).unwrap();
    assert_eq!(writer.commit().unwrap().size, bytes.len() as u64);
}

fn get(session: &Session, path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.reader(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn safetensors() -> Vec<u8> {
    let json = r#"{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[1; 16]].concat()
}

/// Regions: whole or not at all, and the bytes that were written.
fn regions(session: &Session, what: &str) {
    let plain = WriterOptions::default;
    let bytes = pattern((9 << 20) + 12_345);
    let big = "models/a/big.bin";
    let mut writer = session.writer(big, Some(bytes.len() as u64), plain()).unwrap();
    assert_eq!(writer.resume_offset(), 0);
    for part in bytes.chunks(1 << 20) {
        writer.write_all(part).unwrap();
    }
    assert_eq!(
        session.stat_path(big).unwrap_err().kind(),
        ErrorKind::NotFound,
        "{what}: visible before commit"
    );
    assert_eq!(paths(session, "", true), ["models", "models/a"], "{what}");
    let entry = writer.commit().unwrap();
    assert_eq!((entry.path.as_str(), entry.size, entry.mode), (big, bytes.len() as u64, 0o644));

    let reader = session.reader("/models/a/big.bin").unwrap();
    assert_eq!(reader.len(), bytes.len() as u64);
    let mut back = vec![0; bytes.len()];
    reader.read_exact_at(0, &mut back).unwrap();
    assert!(back == bytes, "{what}: other bytes");
    let mut some = [0; 1000];
    reader.read_exact_at(4_999_999, &mut some).unwrap();
    assert!(some == bytes[4_999_999..5_000_999], "{what}: other bytes inside");
    assert_eq!(reader.read_at(bytes.len() as u64 - 10, &mut some).unwrap(), 10);
    assert_eq!(reader.read_at(bytes.len() as u64 + 10, &mut some).unwrap(), 0);
    assert_eq!(reader.read_exact_at(u64::MAX - 3, &mut some).unwrap_err().kind(), ErrorKind::OutOfRange);

    // A version that is dropped leaves the one there was; one that is committed replaces it; the old one can be read on.
    let mut writer = session.writer(big, None, WriterOptions { mode: 0o600, ..plain() }).unwrap();
    writer.write_all(b"second").unwrap();
    drop(writer);
    until("the dropped writer ends", || session.list(".nvtier-partial", false).is_err());
    assert_eq!(session.stat_path(big).unwrap().size, bytes.len() as u64);
    let writer = session.writer(big, None, plain()).unwrap();
    writer.write_at(3, b"ond").unwrap();
    writer.write_at(0, b"sec").unwrap();
    assert_eq!(writer.commit().unwrap().size, 6);
    assert_eq!(get(session, big), b"second");
    reader.read_exact_at(4_999_999, &mut some).unwrap();
    assert!(some == bytes[4_999_999..5_000_999], "{what}: the old version changed under its reader");
    drop(reader);
    session.writer(big, None, plain()).unwrap().abort().unwrap();
    // Empty, with a hole, and with space that was reserved and not used.
    put(session, "empty", b"");
    let writer = session.writer("hole", Some(8 << 20), plain()).unwrap();
    writer.write_at(100_000, b"end").unwrap();
    assert_eq!(writer.commit().unwrap().size, 100_003);
    let hole = get(session, "hole");
    assert!(hole.len() == 100_003 && hole[..100_000].iter().all(|&b| b == 0) && hole.ends_with(b"end"));
    for path in ["empty", "hole"] {
        session.remove(path, false).unwrap();
    }

    let writer = session.writer("edge", None, plain()).unwrap();
    assert_eq!(writer.write_at(u64::MAX - 1, b"abc").unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(writer.write_at(i64::MAX as u64, b"abc").unwrap_err().kind(), ErrorKind::TooLarge);
    writer.abort().unwrap();
}

/// Names, tensors, verification.
fn names(session: &Session, what: &str) {
    put(session, "t.safetensors", &safetensors());
    assert_eq!(session.tensors("t.safetensors").unwrap().unwrap().tensors[0].shape, [2, 2]);
    assert!(session.tensors("models/a/big.bin").unwrap().is_none());
    put(session, "liar.safetensors", b"\x08\0\0\0\0\0\0\0not json");
    assert_eq!(session.tensors("liar.safetensors").unwrap_err().kind(), ErrorKind::Malformed);
    session.remove("liar.safetensors", false).unwrap();

    session.mkdirs("x/y").unwrap();
    session.mkdirs("/x/y/").unwrap();
    session.rename("t.safetensors", "x/y/t.safetensors").unwrap();
    let all = ["models", "models/a", "models/a/big.bin", "x", "x/y", "x/y/t.safetensors"];
    assert_eq!(paths(session, "", true), all, "{what}");
    assert_eq!(paths(session, "x", false), ["x/y"]);
    assert_eq!(paths(session, "models/a/big.bin", false), ["models/a/big.bin"]);

    let report = session.verify("", &mut |_| ()).unwrap();
    assert!(report.is_clean() && report.regions == 2, "{what}: {report:?}");
    assert_eq!(session.verify("x", &mut |_| ()).unwrap().regions, 1);
    assert_eq!(session.verify("x/y/t.safetensors", &mut |_| ()).unwrap().regions, 1);

    assert_eq!(session.remove("x", false).unwrap_err().kind(), ErrorKind::NotEmpty);
    session.remove("x", true).unwrap();
    session.remove("models/a/big.bin", false).unwrap();
    assert_eq!(session.remove("models/a/big.bin", false).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(session.reader("models").unwrap_err().kind(), ErrorKind::IsDirectory);
    for directory in ["models", "/"] {
        let error = session.writer(directory, None, WriterOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::IsDirectory);
    }
    assert_eq!(session.remove("../etc", true).unwrap_err().kind(), ErrorKind::InvalidName);
    assert_eq!(session.remove("/", true).unwrap_err().kind(), ErrorKind::InvalidArgument);
    session.sync().unwrap();
    assert_eq!(paths(session, "", true), ["models", "models/a"]);
    let stat = session.stat().unwrap();
    assert!(stat.used_bytes < 1 << 20 && stat.regions == 0, "{what}: something is kept: {stat:?}");
    session.remove("models", true).unwrap();
    session.info().unwrap();
}

#[test]
fn the_same_calls_as_owner_and_as_client() {
    for (kind, _dir, path) in pools() {
        let session = Session::open(&path, options()).unwrap();
        assert!(!session.is_remote() && session.owner_pid() == std::process::id());
        regions(&session, &format!("{kind}, owner"));
        names(&session, &format!("{kind}, owner"));
        session.close().unwrap();

        let mut owner = Other::role("owner", &path);
        let pid = owner.says("ready");
        let session = Session::open(&path, options()).unwrap();
        assert!(session.is_remote(), "{kind}");
        assert_eq!(session.owner_pid().to_string(), pid);
        regions(&session, &format!("{kind}, client"));
        names(&session, &format!("{kind}, client"));
        drop(session);
        owner.finish();
    }
}

#[test]
fn a_list_longer_than_a_reply_comes_whole() {
    let (_dir, path, pool, _server) = served();
    let session = Session::open(&path, options()).unwrap();
    for n in 0..2500 {
        pool.create_dirs(&format!("many/{n:04}"), 0, 0).unwrap();
    }
    let names = paths(&session, "many", false);
    assert_eq!(names.len(), 2500);
    assert!(names.is_sorted() && names[2499] == "many/2499");
    session.remove("many", true).unwrap();
    assert!(paths(&session, "", true).is_empty());
}

#[test]
fn a_read_only_client_changes_nothing() {
    let (_dir, path, _pool, _server) = served();
    let session = Session::open(&path, SessionOptions { read_only: true, ..options() }).unwrap();
    assert!(session.is_remote());
    assert_eq!(session.mkdirs("a").unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(session.remove("a", true).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(session.rename("a", "b").unwrap_err().kind(), ErrorKind::ReadOnly);
    let error = session.writer("a", None, WriterOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(paths(&session, "", true).is_empty());
}

#[test]
fn a_client_killed_while_it_writes_leaves_nothing() {
    let (_dir, path, pool, server) = served();
    let used = pool.stat().used_bytes;
    let mut writer = Other::role("writer", &path);
    assert_eq!(writer.says("wrote"), (3 << 20).to_string());
    assert_eq!(pool.stat().open_regions, 1);
    writer.kill();
    until("the killed client's connections end", || server.clients() == 0);
    let session = Session::open(&path, options()).unwrap();
    assert_eq!(paths(&session, "", true), ["models"]);
    assert_eq!(pool.resolve(".nvtier-partial").unwrap_err().kind(), ErrorKind::NotFound);
    pool.sync().unwrap();
    assert_eq!(pool.stat().used_bytes, used);
    assert_eq!((pool.stat().open_regions, pool.stat().regions), (0, 0));
}

#[test]
fn a_killed_client_can_resume() {
    let (_dir, path, _pool, server) = served();
    let mut writer = Other::role("resumable", &path);
    writer.says("wrote");
    writer.kill();
    until("the killed client's connections end", || server.clients() == 0);
    let session = Session::open(&path, options()).unwrap();
    let resume = WriterOptions { resume: true, resume_key: "k".into(), ..WriterOptions::default() };
    let mut writer = session.writer("models/half.bin", None, resume.clone()).unwrap();
    assert_eq!(writer.resume_offset(), 3 << 20);
    let same = session.writer("models/half.bin", None, resume.clone());
    assert_eq!(same.unwrap_err().kind(), ErrorKind::Busy);
    writer.write_all(b"end").unwrap();
    assert_eq!(writer.commit().unwrap().size, (3 << 20) + 3);
    assert!(get(&session, "models/half.bin") == [&pattern(3 << 20)[..], b"end"].concat());
    assert!(session.verify("", &mut |_| ()).unwrap().is_clean());
    // Committed: nothing is left to resume.
    let writer = session.writer("models/half.bin", None, resume).unwrap();
    assert_eq!(writer.resume_offset(), 0);
    writer.abort().unwrap();
}

#[test]
fn resuming_outlives_the_owner_and_asks_for_the_key() {
    for (kind, _dir, path) in pools() {
        let open = || Session::open(&path, options()).unwrap();
        let key =
            |key: &str| WriterOptions { resume: true, resume_key: key.into(), ..WriterOptions::default() };
        let session = open();
        let mut writer = session.writer("r.bin", None, key("etag 1")).unwrap();
        writer.write_all(&pattern(1 << 20)).unwrap();
        writer.write_at(2 << 20, b"beyond a gap").unwrap();
        drop(writer);
        session.close().unwrap();

        let session = open();
        let writer = session.writer("r.bin", None, key("etag 1")).unwrap();
        assert_eq!((writer.resume_offset(), writer.len()), (1 << 20, 1 << 20), "{kind}");
        writer.write_at(1 << 20, b"!").unwrap();
        drop(writer);
        let writer = session.writer("r.bin", None, key("etag 1")).unwrap();
        assert_eq!(writer.resume_offset(), (1 << 20) + 1, "{kind}");
        writer.commit().unwrap();
        assert!(get(&session, "r.bin") == [&pattern(1 << 20)[..], b"!"].concat(), "{kind}");

        let mut writer = session.writer("s.bin", None, key("etag 1")).unwrap();
        writer.write_all(b"of another source").unwrap();
        drop(writer);
        let writer = session.writer("s.bin", None, key("etag 2")).unwrap();
        assert_eq!(writer.resume_offset(), 0, "{kind}");
        writer.abort().unwrap();
        assert_eq!(paths(&session, "", true), ["r.bin"]);
        session.close().unwrap();
    }
}

#[test]
fn an_owner_killed_leaves_the_pool_to_the_next() {
    let (_dir, path) = directory_pool();
    let mut owner = Other::role("owner", &path);
    owner.says("ready");
    let session = Session::open(&path, options()).unwrap();
    session.mkdirs("kept").unwrap();
    session.sync().unwrap();
    let mut writer = session.writer("lost", None, WriterOptions::default()).unwrap();
    writer.write_all(b"never committed").unwrap();
    owner.kill();
    let error = writer.write_all(b"x").and_then(|()| writer.commit()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stale, "{}", error.chain());
    assert_eq!(session.list("", true).unwrap_err().kind(), ErrorKind::Stale);
    let session = Session::open(&path, options()).unwrap();
    assert!(!session.is_remote());
    assert_eq!(paths(&session, "", true), ["kept"]);
}

#[test]
fn many_processes_that_come_and_go_all_get_their_turn() {
    let (_dir, path) = directory_pool();
    let mut others: Vec<_> = (0..4).map(|_| Other::role("opener", &path)).collect();
    for other in &mut others {
        other.says("done");
    }
    others.into_iter().for_each(Other::finish);
    let session = Session::open(&path, options()).unwrap();
    assert_eq!(session.list("by", true).unwrap().len(), 4 + 4 * 5);
}

#[test]
fn an_owner_that_does_not_serve_is_named() {
    let (_dir, path) = directory_pool();
    let _owner = Pool::open(&path, &OpenOptions::default()).unwrap();
    let wait = Duration::from_millis(20);
    let error = Session::open(&path, SessionOptions { wait, ..options() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
}

#[test]
fn the_socket_goes_with_the_server() {
    let (_dir, path, pool, server) = served();
    let socket = server.path();
    assert_eq!(socket, path.join("control.sock"));
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let session = Session::open(&path, options()).unwrap();
    assert_eq!(serve(pool.clone()).unwrap_err().kind(), ErrorKind::Busy);
    drop(server);
    assert!(!socket.exists());
    assert_eq!(session.stat().unwrap_err().kind(), ErrorKind::Stale);
    // And comes back with the next one; the same session goes on.
    let _server = serve(pool).unwrap();
    session.stat().unwrap();
}

/// Sends bytes, and returns what the owner says until it hangs up.
fn hostile(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        // Hanging up on bytes that were not read resets the connection.
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => String::from_utf8_lossy(&said).into_owned(),
    }
}

#[test]
fn hostile_clients_do_no_harm() {
    let (_dir, path, pool, server) = served();
    let socket = server.path();
    let hello = frame(r#"{"op":"hello","version":1}"#);
    let after_hello = |bytes: &[u8]| hostile(&socket, &[&hello[..], bytes].concat());
    let told = |json: &str, says: &str| {
        let said = after_hello(&frame(json));
        assert!(said.contains(says), "{json}: {said}");
    };

    hostile(&socket, b"");
    hostile(&socket, b"GET / HTTP/1.1\r\n\r\n");
    hostile(&socket, &[0xff; 100]);
    hostile(&socket, &[0; 100_000]);
    let old = hostile(&socket, &frame(r#"{"op":"hello","version":999}"#));
    assert!(old.contains("version 999") && old.contains("protocol"), "{old}");
    let rude = hostile(&socket, &frame(r#"{"op":"stat"}"#));
    assert!(rude.contains("no hello"), "{rude}");
    told(r#"{"op":"read","offset":0,"len":100}"#, "reads no region");
    told(r#"{"op":"write","offset":0}"#, "writes no region");
    told(r#"{"op":"wrote","offset":0,"len":9}"#, "writes no region");
    told(r#"{"op":"commit"}"#, "writes no region");
    told(r#"{"op":"hello","version":1}"#, "hello was said");
    told(r#"{"op":"format_disk"}"#, "no message");
    told(r#"{"op":"remove","path":"..","recursive":true}"#, "invalid_name");
    let said = after_hello(&[0xff; 64]);
    assert!(said.contains("are taken"), "{said}");

    let writer = |hint: &str| {
        let options = r#"{"mode":4294967295,"resume":false,"resume_key":""}"#;
        frame(&format!(r#"{{"op":"open_writer","path":"w","size_hint":{hint},"options":{options}}}"#))
    };
    let said = after_hello(&writer("18446744073709551615"));
    assert!(said.contains("error"), "{said}");
    let wrote = frame(r#"{"op":"wrote","offset":18446744073709551615,"len":18446744073709551615}"#);
    let said = after_hello(&[writer("null"), wrote].concat());
    assert!(said.contains("too_large"), "{said}");
    let wrote = frame(r#"{"op":"wrote","offset":0,"len":1099511627776}"#);
    let said = after_hello(&[writer("null"), wrote].concat());
    assert!(said.contains("out_of_range"), "{said}");
    let said = after_hello(&[writer("null"), writer("null")].concat());
    assert!(said.contains("writes a region already"), "{said}");

    until("all hostile clients are gone", || server.clients() == 0);
    assert_eq!(pool.resolve("w").unwrap_err().kind(), ErrorKind::NotFound);
    let session = Session::open(&path, options()).unwrap();
    assert!(paths(&session, "", true).is_empty());
    assert_eq!(session.stat().unwrap().regions, 0);
}

#[test]
fn a_client_gets_no_more_of_the_file_than_reading() {
    let (_dir, path, pool, _server) = served();
    let session = Session::open(&path, options()).unwrap();
    put(&session, "r", b"bytes");
    let reader = Client::connect(&path).unwrap().reader("r").unwrap();
    let file = reader.file().expect("a directory pool hands out the file");
    assert!(file.write_at(b"x", 0).is_err(), "the client can write to a region's file");
    assert!(file.set_len(0).is_err());
    assert!(pool.verify(None, &mut |_| ()).unwrap().is_clean());
}

#[test]
fn another_user_is_turned_away() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: another_user_is_turned_away needs root to become another user");
        return;
    }
    let (dir, path, _pool, server) = served();
    // Let him reach the socket: what is tested is that its owner looks at credentials, not at the file's mode.
    for open in [dir.path(), &path] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(server.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut stranger = Other::start(as_another_user(dir.path()), "stranger", &server.path());
    let answer = stranger.says("answer");
    assert!(answer.contains("permission_denied") && answer.contains("user 65534"), "{answer}");
    stranger.finish();
    until("he is gone", || server.clients() == 0);
}

/// This test program as user 65534, from a copy in `folder` that he can run. `cp` makes it: a process that another test starts meanwhile
/// would inherit our descriptor that writes, and nothing that is being written can be run.
fn as_another_user(folder: &Path) -> Command {
    let program = folder.join("test-program");
    let copied = Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&program).status().unwrap();
    assert!(copied.success());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    command
}

#[test]
fn a_client_speaks_to_no_strangers_socket() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a_client_speaks_to_no_strangers_socket needs root to become another user");
        return;
    }
    // A pool's directory that everybody can write, which is a mistake.
    let (dir, path) = directory_pool();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let mut impostor =
        Other::start(as_another_user(dir.path()), "impostor", &path.join(location::SOCKET_NAME));
    impostor.says("listening");
    let refused = Client::connect(&path).expect_err("a refusal");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
    assert!(refused.chain().to_string().contains("user 65534"), "{}", refused.chain());
    assert_eq!(impostor.says("heard"), "0");
    impostor.finish();
}

#[test]
fn the_socket_of_a_killed_owner_goes_with_the_next_one() {
    for (kind, dir, path) in pools() {
        let mut owner = Other::role("owner", &path);
        owner.says("ready");
        let pool = Pool::probe(&path).unwrap();
        let runtime = format!("{}.sock", pool.id);
        let sockets = || {
            let user = rustix::process::geteuid().as_raw();
            let mut found = vec![pool.members[0].path.join(location::SOCKET_NAME)];
            let runtime_directories = [
                std::env::var("XDG_RUNTIME_DIR").map_or("/run".into(), |dir| format!("{dir}/nvtier")),
                "/run/nvtier".into(),
                format!("/run/user/{user}/nvtier"),
                format!("/tmp/nvtier-{user}"),
            ];
            found.extend(runtime_directories.map(|dir| Path::new(&dir).join(&runtime)));
            found.retain(|path| path.symlink_metadata().is_ok());
            found
        };
        assert_eq!(sockets().len(), 1, "{kind}: {:?}", sockets());
        owner.child.kill().unwrap();
        owner.child.wait().unwrap();
        // It could not clean up. The next owner does, one that serves nobody; where the directory is shared, an owner of another pool may be first.
        Session::open(&path, options()).unwrap().close().unwrap();
        assert_eq!(sockets(), Vec::<PathBuf>::new(), "{kind}");
        drop(dir);
    }
}
