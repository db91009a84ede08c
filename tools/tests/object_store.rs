//! Imports over the network: a web server with ranges, and a real S3-compatible server (moto, a Python package), both on
//! loopback. Interrupted in the middle, gone on, changed meanwhile, damaged.

mod loopback;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use loopback::{Relay, WebServer};
use nvtier_tests::{Kind, Ran, format, nvtier, nvtier_path, pattern, run, scratch, skip, wait_for};
use rustix::process::{Pid, Signal, kill_process};

const PART: u64 = 64 << 10;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An import that a test can tell what to do; small ranges, two at a time.
fn import(pool: &Path, source: &str, name: &str, more: &[&str]) -> Command {
    let mut command = Command::new(nvtier_path());
    command.args(["import", source, name, "--part-size", "64KiB", "--connections", "2", "--json", "--pool"]);
    command.arg(pool).args(more).env("AWS_ALLOW_HTTP", "true").env_remove("HF_TOKEN");
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    command
}

fn exported(pool: &Path, name: &str, folder: &Path) -> Vec<u8> {
    let out = folder.join("exported");
    nvtier(["export", name, text(&out), "--force", "--pool", text(pool)]).ok();
    fs::read(out).unwrap()
}

fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn end_by(mut child: Child, signal: Signal) -> (Option<i32>, String) {
    kill_process(Pid::from_child(&child), signal).unwrap();
    let status = wait_for(|| child.try_wait().unwrap()).expect("the end of the import");
    let mut message = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut message).unwrap();
    (status.code(), message)
}

#[test]
fn a_file_comes_by_ranges_and_is_the_same() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let server = WebServer::start();
    for (index, len) in [0, 1, PART, PART + 1, 10 * PART - 7].into_iter().enumerate() {
        let bytes = pattern(index as u64, len as usize);
        server.put("/d/file.bin", &bytes, &format!("\"{index}\""));
        let name = format!("f{len}");
        let said = run(&mut import(&pool, &server.url("/d/file.bin"), &name, &[])).ok().json();
        assert_eq!(said["bytes"], len);
        assert!(exported(&pool, &name, folder.path()) == bytes, "{len} bytes came differently");
        let mut ranges = server.take_ranges();
        ranges.sort_unstable();
        let expected: Vec<_> =
            (0..len.div_ceil(PART)).map(|i| (i * PART, ((i + 1) * PART).min(len) - 1)).collect();
        assert_eq!(ranges, expected);
    }
}

#[test]
fn an_interrupted_import_goes_on_where_it_stopped() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let server = WebServer::start();
    let bytes = pattern(40, (20 * PART) as usize + 99);
    server.put("/model.bin", &bytes, "\"v1\"");
    server.stall_at(12 * PART);
    let child = start(&mut import(&pool, &server.url("/model.bin"), "m/model.bin", &[]));
    server.wait_for_stall();
    let (code, message) = end_by(child, Signal::INT);
    assert_eq!(code, Some(130), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    // Nothing to be seen, and nothing wrong.
    let listed = nvtier(["ls", "-r", "--json", "--pool", text(&pool)]).ok().json();
    let visible =
        listed["entries"].as_array().unwrap().iter().filter(|entry| entry["kind"] == "region").count();
    assert_eq!(visible, 0, "{listed}");
    nvtier(["stat", "m/model.bin", "--pool", text(&pool)]).refused(3, &[]);
    nvtier(["verify", "--pool", text(&pool)]).ok();

    server.take_ranges();
    server.stall_at(u64::MAX);
    let said = run(&mut import(&pool, &server.url("/model.bin"), "m/model.bin", &[])).ok().json();
    let resumed = said["resumed_bytes"].as_u64().unwrap();
    assert!((PART..=12 * PART).contains(&resumed), "{resumed} bytes were kept");
    let first = server.take_ranges().iter().map(|range| range.0).min();
    assert_eq!(first, Some(resumed), "bytes were asked for twice");
    assert!(exported(&pool, "m/model.bin", folder.path()) == bytes);
    // And nothing hidden is left.
    nvtier(["ls", ".nvtier-partial", "--pool", text(&pool)]).refused(3, &[]);
}

#[test]
fn a_source_that_changed_is_imported_from_the_start() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let server = WebServer::start();
    let (old, new) = (pattern(41, (8 * PART) as usize), pattern(42, (8 * PART) as usize));
    for more in [&[][..], &["--no-resume"]] {
        server.put("/model.bin", &old, "\"old\"");
        server.stall_at(4 * PART);
        let child = start(&mut import(&pool, &server.url("/model.bin"), "model.bin", &[]));
        server.wait_for_stall();
        end_by(child, Signal::INT);
        if more.is_empty() {
            server.put("/model.bin", &new, "\"new\"");
        }
        server.stall_at(u64::MAX);
        let said = run(&mut import(&pool, &server.url("/model.bin"), "model.bin", more)).ok().json();
        assert_eq!(said["resumed_bytes"], 0);
        let expected = if more.is_empty() { &new } else { &old };
        assert!(exported(&pool, "model.bin", folder.path()) == *expected);
        nvtier(["rm", "model.bin", "--pool", text(&pool)]).ok();
    }
}

#[test]
fn a_source_that_changes_in_the_middle_is_noticed() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let server = WebServer::start();
    server.put("/model.bin", &pattern(43, (8 * PART) as usize), "\"old\"");
    server.stall_at(4 * PART);
    let mut child = start(&mut import(&pool, &server.url("/model.bin"), "model.bin", &[]));
    server.wait_for_stall();
    // The ranges that wait break off; asked for again, they are of another file.
    server.put("/model.bin", &pattern(44, (8 * PART) as usize), "\"new\"");
    server.break_stalled();
    let status = wait_for(|| child.try_wait().unwrap()).expect("the end of the import");
    assert_eq!(status.code(), Some(1));
    nvtier(["stat", "model.bin", "--pool", text(&pool)]).refused(3, &[]);
}

#[test]
fn a_server_without_ranges_will_do() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let server = WebServer::start();
    let header = br#"{"w":{"dtype":"U8","shape":[300000],"data_offsets":[0,300000]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &pattern(70, 300_000)].concat();
    server.put("/w.safetensors", &bytes, "\"w\"");
    server.put("/empty", b"", "\"e\"");
    server.ignore_ranges();
    run(&mut import(&pool, &server.url("/w.safetensors"), "w.safetensors", &[])).ok();
    assert!(exported(&pool, "w.safetensors", folder.path()) == bytes);
    run(&mut import(&pool, &server.url("/empty"), "empty", &[])).ok();
}

#[test]
fn what_cannot_be_fetched_is_explained() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let server = WebServer::start();
    run(&mut import(&pool, &server.url("/missing"), "x", &[])).refused(3, &["/missing"]);
    run(&mut import(&pool, "https://user:secret@example.org/x", "x", &[])).refused(2, &["passwords"]);
    run(&mut import(&pool, "ftp://example.org/x", "x", &[])).refused(2, &["ftp"]);
    let header = br#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    let lie = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat();
    let server = WebServer::start();
    server.put("/lie.safetensors", &lie, "\"l\"");
    run(&mut import(&pool, &server.url("/lie.safetensors"), "x", &[]))
        .refused(5, &["lie.safetensors", "--no-check"]);
    let local = folder.path().join("a b");
    fs::write(&local, b"local").unwrap();
    run(&mut import(&pool, &format!("file://{}", text(&local).replace(' ', "%20")), "y", &[])).ok();
    assert_eq!(exported(&pool, "y", folder.path()), b"local");
}

/// moto's server with a bucket of objects; ended on drop.
struct Moto {
    child: Child,
    address: SocketAddr,
}

const SCRIPT: &str = r#"
import os, pathlib, sys
from moto.server import ThreadedMotoServer
import boto3
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
s3.create_bucket(Bucket="bucket")
root = pathlib.Path(sys.argv[1])
for path in sorted(root.rglob("*")):
    if path.is_file():
        s3.upload_file(str(path), "bucket", str(path.relative_to(root)))
s3.put_object(Bucket="bucket", Key="models/marker/", Body=b"")
print(f"{host}:{port}", flush=True)
sys.stdin.read()
"#;

impl Moto {
    /// `None`, said aloud, where there is no Python with moto.
    fn start(objects: &Path) -> Option<Self> {
        let python = ["NVTIER_PYTHON", "NVTIER_TEST_PYTHON"].iter().find_map(std::env::var_os);
        let python = PathBuf::from(python.unwrap_or_else(|| "python3".into()));
        let has_moto =
            Command::new(&python).args(["-c", "import moto.server, boto3"]).stderr(Stdio::null()).status();
        if !has_moto.is_ok_and(|status| status.success()) {
            skip(&format!(
                "{} has no moto[server]: set NVTIER_PYTHON, as `cargo xtask test` does",
                python.display()
            ));
            return None;
        }
        let mut child = Command::new(&python)
            .args(["-c", SCRIPT, text(objects)])
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test")
            .env("NO_PROXY", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address =
            line.trim().parse().unwrap_or_else(|error| panic!("moto did not start: {line:?}: {error}"));
        Some(Self { child, address })
    }

    fn import(&self, endpoint: &str, pool: &Path, source: &str, name: &str, more: &[&str]) -> Command {
        let mut command = import(pool, source, name, more);
        command.env("AWS_ENDPOINT_URL", endpoint).env("AWS_REGION", "us-east-1");
        command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
        command
    }

    fn run(&self, pool: &Path, source: &str, name: &str, more: &[&str]) -> Ran {
        run(&mut self.import(&format!("http://{}", self.address), pool, source, name, more))
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn objects_come_from_an_s3_compatible_server() {
    let folder = scratch();
    let objects = folder.path().join("objects");
    fs::create_dir_all(objects.join("models/m/sub dir")).unwrap();
    let (large, small) = (pattern(50, 3_000_000), pattern(51, 1234));
    fs::write(objects.join("models/m/weights.bin"), &large).unwrap();
    fs::write(objects.join("models/m/sub dir/ünïcode+plus.txt"), &small).unwrap();
    fs::write(objects.join("models/other.bin"), b"other").unwrap();
    let Some(moto) = Moto::start(&objects) else { return };
    let pool = format(Kind::Directory, folder.path());

    let said = moto.run(&pool, "s3://bucket/models/m/weights.bin", "one", &[]).ok().json();
    assert_eq!(said["bytes"], 3_000_000);
    assert!(exported(&pool, "one", folder.path()) == large);

    let said = moto.run(&pool, "s3://bucket/models/m", "m", &["--recursive"]).ok().json();
    assert_eq!(said["regions"], 2, "{said}");
    assert!(exported(&pool, "m/weights.bin", folder.path()) == large);
    assert!(exported(&pool, "m/sub dir/ünïcode+plus.txt", folder.path()) == small);

    moto.run(&pool, "s3://bucket/models/m", "n", &[]).refused(3, &["--recursive"]);
    moto.run(&pool, "s3://bucket/none", "n", &["-r"]).refused(3, &["none"]);
    moto.run(&pool, "s3://bucket", "n", &[]).refused(2, &["--recursive"]);
    moto.run(&pool, "s3://no-such-bucket/x", "n", &[]).refused_somehow(&["no-such-bucket"]);
}

#[test]
fn an_import_from_s3_survives_its_end_in_the_middle() {
    let folder = scratch();
    let objects = folder.path().join("objects");
    fs::create_dir_all(objects.join("m")).unwrap();
    let (first, second) = (pattern(60, 700_000), pattern(61, 2_000_000));
    fs::write(objects.join("m/a.bin"), &first).unwrap();
    fs::write(objects.join("m/b.bin"), &second).unwrap();
    let Some(moto) = Moto::start(&objects) else { return };
    let pool = format(Kind::Directory, folder.path());
    for (signal, name) in [(Signal::INT, "by-int"), (Signal::KILL, "by-kill")] {
        // The first file and half of the second.
        let relay = Relay::start(moto.address, 1_700_000);
        let child = start(&mut moto.import(&relay.url(), &pool, "s3://bucket/m", name, &["-r"]));
        relay.wait_for_stall();
        let (code, message) = end_by(child, signal);
        assert_eq!(code, (signal == Signal::INT).then_some(130), "{message}");
        nvtier(["stat", name, "--pool", text(&pool)]).refused(3, &[]);
        nvtier(["verify", "--pool", text(&pool)]).ok();

        let said = moto.run(&pool, "s3://bucket/m", name, &["-r"]).ok().json();
        let resumed = said["resumed_bytes"].as_u64().unwrap();
        // The first file was complete; of the second, what SIGINT left time to keep.
        let least = if signal == Signal::INT { 700_001 } else { 700_000 };
        assert!((least..2_700_000).contains(&resumed), "{signal:?}: {resumed} bytes were kept");
        assert!(exported(&pool, &format!("{name}/a.bin"), folder.path()) == first);
        assert!(exported(&pool, &format!("{name}/b.bin"), folder.path()) == second);
    }
    nvtier(["ls", ".nvtier-partial", "--pool", text(&pool)]).refused(3, &[]);
}
