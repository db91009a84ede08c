//! `--metrics`: Prometheus text over HTTP, and the dashboard that reads it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use engine::kv::{Get, Key, Put, Settings};
use engine::{Blocks, Session, SessionOptions};
use nvtier_tests::{Kind, LIMIT, Mounted, format, nvtier_path, pattern, run, scratch};

/// Sends these bytes and returns all that comes back.
fn ask(address: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}

fn get(address: &str, path: &str) -> String {
    ask(address, std::format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
}

/// A mount with metrics on a port that the kernel chose, and its address.
fn with_metrics(kind: Kind) -> (Mounted, String) {
    let folder = scratch();
    let pool = format(kind, folder.path());
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    let json = mounted.mount(&["--metrics", "0", "--json"]).ok().json();
    let address = json["metrics"].as_str().unwrap().to_owned();
    assert!(address.starts_with("127.0.0.1:") && !address.ends_with(":0"), "{address}");
    (mounted, address)
}

/// A namespace of a store that the mount has open for as long as this lives, with four blocks of which one was found, and one not.
fn with_store(mounted: &Mounted, name: &str, tenant: &str) -> (Session, Blocks) {
    let session = Session::open(&mounted.pool, SessionOptions::default()).unwrap();
    let settings = Settings { name: name.into(), ..Settings::default() };
    let blocks = session.blocks(&settings, b"print", 10_000, tenant, None).unwrap();
    let key = |n: u8| Key::new(&[n; 16]).unwrap();
    let buffer = || nvme::Buffer::heap(blocks.slot_bytes()).unwrap();
    let puts = (0..4).map(|n| Put { key: key(n), buffer: buffer(), start: 0 });
    let by = Instant::now() + LIMIT;
    assert_eq!(blocks.put(puts.collect(), by).len(), 4);
    let gets = [1, 9].map(|n| Get { key: key(n), buffer: buffer(), start: 0 });
    let found = blocks.get(gets.into(), by);
    assert_eq!(found.iter().map(|done| done.result.is_ok()).collect::<Vec<_>>(), [true, false]);
    (session, blocks)
}

#[test]
fn kv_stores_are_seen_while_somebody_has_them_open() {
    let (mounted, address) = with_metrics(Kind::Directory);
    let body = || get(&address, "/metrics").split_once("\r\n\r\n").unwrap().1.to_owned();
    assert!(!body().contains("nvtier_kv_blocks{"));
    let (session, blocks) = with_store(&mounted, "chat", "an \"Alice\"");
    let text = body();
    for line in [
        "nvtier_kv_blocks{store=\"chat\"} 4",
        "nvtier_kv_puts_total{store=\"chat\"} 4",
        "nvtier_kv_hits_total{store=\"chat\"} 1",
        "nvtier_kv_misses_total{store=\"chat\"} 1",
        "nvtier_kv_refused_puts_total{store=\"chat\",reason=\"quota\"} 0",
        "nvtier_kv_failed{store=\"chat\"} 0",
        // Slots are whole pages.
        "nvtier_kv_tenant_used_bytes{store=\"chat\",tenant=\"an \\\"Alice\\\"\"} 49152",
    ] {
        assert!(text.lines().any(|there| there == line), "{line} is not in {text}");
    }
    drop((blocks, session));
    mounted.finish();
}

/// Names of the samples, those of histograms with their suffixes.
fn names(text: &str) -> BTreeSet<String> {
    let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    samples.map(|line| line.split(['{', ' ']).next().unwrap().to_owned()).collect()
}

#[test]
fn a_scrape_is_the_file_in_the_mount() {
    let (mounted, address) = with_metrics(Kind::Raw);
    fs::write(mounted.point.join("f"), pattern(50, 3 << 20)).unwrap();
    assert!(fs::read(mounted.point.join("f")).unwrap() == pattern(50, 3 << 20));
    let answer = get(&address, "/metrics");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&std::format!("Content-Length: {}\r\n", body.len())), "{head}");
    let file = fs::read_to_string(mounted.point.join(".nvtier/metrics")).unwrap();
    assert_eq!(names(body), names(&file));
    let value = |name: &str| -> f64 {
        let line = body
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("{name} is not in {body}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("nvtier_fuse_served_bytes_total{direction=\"write\"}") >= f64::from(3 << 20));
    assert_eq!(value("nvtier_pool_regions "), 1.0);
    let writes = value("nvtier_fuse_request_duration_seconds_count{op=\"write\"}");
    assert!(writes >= 3.0, "{writes}");
    assert_eq!(value("nvtier_fuse_request_duration_seconds_bucket{op=\"write\",le=\"+Inf\"}"), writes);

    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n", "200"),
        (b"\r\n\r\n", "405"),
    ] {
        let answer = ask(&address, request);
        assert!(answer.starts_with(&std::format!("HTTP/1.1 {status} ")), "{answer}");
    }
    // Neither what is too long, nor what never ends, nor what leaves again takes anything away from others.
    assert!(ask(&address, &[b'x'; 9 << 10]).starts_with("HTTP/1.1 400 "));
    let silent: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(&address).unwrap()).collect();
    TcpStream::connect(&address).unwrap().shutdown(Shutdown::Both).unwrap();
    assert!(get(&address, "/metrics").contains("nvtier_build_info"));
    drop(silent);
    mounted.umount().ok();
    assert!(TcpStream::connect(&address).is_err(), "the port is still open");
}

#[test]
fn an_address_that_cannot_be_had_is_told_before_anything_is_mounted() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    mounted.mount(&["--metrics", "here"]).refused(2, &["--metrics", "9299"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = listener.local_addr().unwrap().to_string();
    mounted.mount(&["--metrics", &busy]).refused(4, &[&busy, "taken", "another port"]);
    // 192.0.2.0/24 is for documentation (RFC 5737): no machine has it.
    mounted.mount(&["--metrics", "192.0.2.1:9299"]).refused(2, &["192.0.2.1", "no such address"]);
    assert!(!mounted.is_mounted());
    // What was refused holds nothing: the next one works.
    let json = mounted.mount(&["--metrics", "0", "--json"]).ok().json();
    assert!(get(json["metrics"].as_str().unwrap(), "/metrics").contains("nvtier_build_info"));
    mounted.finish();
}

#[test]
fn the_dashboard_asks_for_what_is_exported() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/grafana/nvtier.json");
    let text = fs::read_to_string(&path).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut asked = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let before = asked.len();
            asked.extend(words.filter(|word| word.starts_with("nvtier_")).map(str::to_owned));
            assert!(
                asked.len() > before || expression.contains("nvtier_"),
                "{expression} asks for nothing of ours"
            );
        }
    }
    asked.insert("nvtier_build_info".into());
    let (mounted, address) = with_metrics(Kind::Directory);
    let _store = with_store(&mounted, "chat", "");
    let exported = names(get(&address, "/metrics").split_once("\r\n\r\n").unwrap().1);
    let missing: Vec<_> = asked.difference(&exported).collect();
    assert!(missing.is_empty() && asked.len() > 12, "{missing:?} of {asked:?} are not exported");
    mounted.finish();
}

#[test]
fn a_command_that_owns_the_pool_serves_them_and_one_that_does_not_says_who_does() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let verify = |options: &[&str]| {
        run(Command::new(nvtier_path()).args(["verify", "--pool"]).arg(&pool).args(options))
    };
    let ran = verify(&["--metrics", "0"]).ok();
    assert!(ran.stderr.contains("metrics are at http://127.0.0.1:"), "{ran:?}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    verify(&["--metrics", &listener.local_addr().unwrap().to_string()]).refused(4, &["taken"]);
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool.clone(), point, folder);
    mounted.mount(&[]).ok();
    let owner = mounted.daemon().as_raw_nonzero().to_string();
    verify(&["--metrics", "0"]).refused(4, &["process", &owner, "nvtier mount --metrics"]);
    mounted.finish();
}

/// Starts a command with metrics and waits for their address.
fn started(words: &[&str], pool: &Path) -> (Child, BufReader<std::process::ChildStderr>, String) {
    let mut command = Command::new(nvtier_path());
    command.args(words).args(["--metrics", "0", "--progress", "none", "--pool"]).arg(pool);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
    (child, lines, address)
}

#[test]
fn an_import_can_be_scraped_while_it_runs() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let bytes = pattern(51, 3 << 20);
    // A server that gives half of what is asked for, and the rest when it is told to: so long the import runs.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = std::format!("http://{}/weights.bin", server.local_addr().unwrap());
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let content = bytes.clone();
    let serving = std::thread::spawn(move || {
        let mut held = false;
        while let Ok((mut stream, _)) = server.accept() {
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut head = Vec::new();
            while let Some(Ok(line)) = lines.next() {
                if line.is_empty() {
                    break;
                }
                head.push(line.to_lowercase());
            }
            let Some(first) = head.first() else { return };
            if first.starts_with("quit") {
                return;
            }
            let range = head.iter().find_map(|line| line.strip_prefix("range: bytes="));
            let bounds = range.and_then(|range| range.split_once('-'));
            let (from, to) = bounds.map_or((0, content.len()), |(from, to)| {
                let to = to.parse::<usize>().map_or(content.len(), |last| (last + 1).min(content.len()));
                (from.parse().unwrap(), to)
            });
            let part = &content[from..to];
            let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
            let answer = std::format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\nAccept-Ranges: bytes\r\nETag: \"x\"\r\nConnection: close\r\n\r\n",
                part.len(),
                to.saturating_sub(1),
                content.len()
            );
            let _ = stream.write_all(answer.as_bytes());
            if first.starts_with("head") {
                continue;
            }
            let half = part.len() / 2;
            let _ = stream.write_all(&part[..half]);
            if !held && part.len() > 1 {
                held = true;
                let _ = wait.recv_timeout(LIMIT);
            }
            let _ = stream.write_all(&part[half..]);
        }
    });
    let (mut child, mut rest, address) = started(&["import", &url, "weights.bin"], &pool);
    let answer = get(&address, "/metrics");
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("nvtier_pool_used_bytes"), "{answer}");
    assert!(child.try_wait().unwrap().is_none(), "the import ended before its source did");
    go.send(()).unwrap();
    let status = child.wait().unwrap();
    let mut text = String::new();
    rest.read_to_string(&mut text).unwrap();
    assert!(status.success(), "{text}");
    assert!(TcpStream::connect(&address).is_err(), "the port is still open");
    let _ = TcpStream::connect(url.trim_start_matches("http://").split('/').next().unwrap())
        .and_then(|mut stream| stream.write_all(b"QUIT\r\n\r\n"));
    serving.join().unwrap();
    let out = folder.path().join("out");
    run(Command::new(nvtier_path()).args(["export", "weights.bin"]).arg(&out).arg("--pool").arg(&pool)).ok();
    assert!(fs::read(&out).unwrap() == bytes);
}

#[test]
fn a_verification_can_be_scraped_while_it_runs() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let source = folder.path().join("source");
    fs::write(&source, pattern(52, 64 << 20)).unwrap();
    run(Command::new(nvtier_path()).arg("import").arg(&source).args(["f", "--pool"]).arg(&pool)).ok();
    // It may have ended before anybody asks: then once more.
    let scraped = (0..50).any(|_| {
        let (mut child, _rest, address) = started(&["verify"], &pool);
        let answer = TcpStream::connect(&address).and_then(|mut stream| {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        });
        assert!(child.wait().unwrap().success());
        answer.is_ok_and(|text| text.starts_with("HTTP/1.1 200 ") && text.contains("nvtier_pool_regions 1"))
    });
    assert!(scraped, "nobody answered in fifty runs");
}
