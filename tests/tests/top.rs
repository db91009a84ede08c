//! `nvtier top`: once, and on a real terminal.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use engine::kv::{Get, Key, Put, Settings, Stored};
use engine::{Blocks, Session, SessionOptions};
use nvtier_tests::{Kind, Mounted, Ran, format, nvtier_path, pattern, run, scratch, skip, wait_for};

fn top(pool: &Path, options: &[&str]) -> Ran {
    let mut command = Command::new(nvtier_path());
    run(command.args(["top", "--interval", "50", "--pool"]).arg(pool).args(options))
}

#[test]
fn once_it_tells_what_the_owner_does() {
    let mounted = Mounted::new(Kind::Raw, &[]);
    fs::create_dir(mounted.point.join("models")).unwrap();
    fs::write(mounted.point.join("models/a"), pattern(60, 2 << 20)).unwrap();
    fs::write(mounted.point.join("b"), pattern(61, 100)).unwrap();
    let json = top(&mounted.pool, &["--once", "--json"]).ok().json();
    assert_eq!(json["mountpoint"], mounted.point.to_str().unwrap());
    assert_eq!(json["owner_pid"], mounted.daemon().as_raw_nonzero().get());
    assert_eq!(json["holdings"][0]["name"], "models", "{json}");
    assert!(json["holdings"][0]["bytes"].as_u64().unwrap() >= 2 << 20);
    assert!(json["used_bytes"].as_u64().unwrap() >= 2 << 20);
    assert_eq!(json["ram"]["budget_bytes"], 128 << 20);
    let tiers: Vec<&str> =
        json["throughput"].as_array().unwrap().iter().map(|flow| flow["tier"].as_str().unwrap()).collect();
    for tier in ["mount", "RAM", "pool"] {
        assert!(tiers.contains(&tier), "{tier} is not in {json}");
    }
    let text = top(&mounted.pool, &["--once"]).ok().stdout;
    for word in ["throughput", "mount write", "P99", "RAM tier", "limits and wear", "models"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    mounted.finish();
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let folder = scratch();
    top(&folder.path().join("none"), &["--once"]).refused_somehow(&["watch the pool"]);
    let pool = format(Kind::Directory, folder.path());
    top(&pool, &["--once"]).refused_somehow(&["nvtier mount"]);
    let mounted = Mounted::new(Kind::Directory, &[]);
    top(&mounted.pool, &[]).refused(2, &["no terminal", "--once"]);
    mounted.finish();
}

/// Runs a command in a terminal, waits until all of `parts` are to be seen, makes the terminal small and large again, and ends the command
/// by `q`.
fn on_a_terminal(folder: &Path, command: &str, parts: &[&str]) {
    let socket = folder.join("tmux");
    let tmux = |words: &[&OsStr]| {
        // No configuration of whoever runs this.
        run(Command::new("tmux").args(["-f", "/dev/null", "-S"]).arg(&socket).args(words).env_remove("TMUX"))
    };
    let words = |words: &[&str]| tmux(&words.iter().map(OsStr::new).collect::<Vec<_>>());
    let screen = || words(&["capture-pane", "-p", "-t", "top"]).stdout;
    words(&["new-session", "-d", "-s", "top", "-x", "110", "-y", "50", "sh"]).ok();
    words(&["send-keys", "-t", "top", &std::format!("{command}; echo ended $?"), "Enter"]).ok();
    // A screen that is looked at while it is drawn is not whole yet.
    let drawn = wait_for(|| Some(screen()).filter(|text| parts.iter().all(|part| text.contains(part))));
    let seen = screen();
    if drawn.is_some() {
        words(&["resize-window", "-t", "top", "-x", "40", "-y", "12"]).ok();
        words(&["resize-window", "-t", "top", "-x", "110", "-y", "50"]).ok();
        words(&["send-keys", "-t", "top", "q"]).ok();
    }
    let ended =
        drawn.is_some() && wait_for(|| Some(screen()).filter(|text| text.contains("ended 0"))).is_some();
    let last = screen();
    words(&["kill-server"]);
    assert!(drawn.is_some(), "not all of {parts:?} came to be drawn:\n{seen}");
    assert!(ended, "it did not end well:\n{last}");
}

#[test]
fn on_a_terminal_it_draws_and_ends() {
    if Command::new("tmux").arg("-V").output().is_err() {
        return skip("there is no tmux here");
    }
    let mounted = Mounted::new(Kind::Raw, &[]);
    fs::write(mounted.point.join("weights"), pattern(62, 1 << 20)).unwrap();
    let command =
        std::format!("{} top --interval 50 --pool {}", nvtier_path().display(), mounted.pool.display());
    let parts = [
        "what it holds",
        "weights",
        "throughput",
        "queues and times",
        "RAM tier",
        "limits and wear",
        "q: quit",
    ];
    on_a_terminal(mounted.folder(), &command, &parts);
    mounted.finish();
}

/// A namespace of a store that the mount has open for as long as this lives.
fn store(mounted: &Mounted, name: &str, write_bytes_per_day: Option<u64>) -> (Session, Blocks) {
    let session = Session::open(&mounted.pool, SessionOptions::default()).unwrap();
    let settings = Settings { name: name.into(), write_bytes_per_day, ..Settings::default() };
    let blocks = session.blocks(&settings, b"print", 10_000, "alice", None).unwrap();
    (session, blocks)
}

fn put(blocks: &Blocks, numbers: std::ops::Range<u8>) -> usize {
    let puts = numbers.map(|n| {
        let mut buffer = nvme::Buffer::heap(blocks.slot_bytes()).unwrap();
        buffer[..10_000].copy_from_slice(&pattern(n.into(), 10_000));
        Put { key: Key::new(&[n; 16]).unwrap(), buffer, start: 0 }
    });
    let done = blocks.put(puts.collect(), Instant::now() + Duration::from_secs(30));
    done.iter().filter(|done| matches!(done.result, Stored::New)).count()
}

fn kv_top(pool: &Path, options: &[&str]) -> Ran {
    let mut command = Command::new(nvtier_path());
    run(command.args(["kv", "top", "--interval", "50", "--pool"]).arg(pool).args(options))
}

#[test]
fn stores_are_watched_where_their_owner_has_them_open() {
    let mounted = Mounted::new(Kind::Directory, &[]);
    let empty = kv_top(&mounted.pool, &["--once", "--json"]).ok().json();
    assert_eq!(empty["stores"].as_array().unwrap().len(), 0);
    // Slots are whole pages: 12 KiB, of which ten fit into the budget of the day.
    let (session, blocks) = store(&mounted, "chat", Some(10 * 12_288));
    assert_eq!(put(&blocks, 0..8), 8);
    let get = |n: u8| {
        let buffer = nvme::Buffer::heap(blocks.slot_bytes()).unwrap();
        Get { key: Key::new(&[n; 16]).unwrap(), buffer, start: 0 }
    };
    let got = blocks.get(vec![get(1), get(2), get(99)], Instant::now() + Duration::from_secs(30));
    assert_eq!(got.iter().filter(|done| done.result.is_ok()).count(), 2);
    let seen = kv_top(&mounted.pool, &["--once", "--json"]).ok().json();
    let open = &seen["stores"][0]["open"];
    assert_eq!(
        (seen["stores"][0]["name"].as_str(), open["stat"]["blocks"].as_u64()),
        (Some("chat"), Some(8))
    );
    assert_eq!((open["stat"]["hits"].as_u64(), open["stat"]["misses"].as_u64()), (Some(2), Some(1)));
    assert_eq!(open["write_left_bytes"], 2 * 12_288);
    assert_eq!(open["tenants"][1]["name"], "alice");
    assert_eq!(open["tenants"][1]["used_bytes"], 8 * 12_288);
    assert_eq!(open["hits_per_second"], 0.0, "nothing was asked for between the looks");
    // What goes beyond the budget is refused, and that is told.
    assert_eq!(put(&blocks, 8..12), 2);
    let seen = kv_top(&mounted.pool, &["--once", "--json", "--store", "chat"]).ok().json();
    let open = &seen["stores"][0]["open"];
    assert_eq!((open["write_left_bytes"].as_u64(), open["refused"].as_u64()), (Some(0), Some(2)));
    let text = kv_top(&mounted.pool, &["--once"]).ok().stdout;
    for word in
        ["chat", "hits/s", "evictions/s", "10 blocks", "2 puts refused", "left today", "alice", "67 %"]
    {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    kv_top(&mounted.pool, &["--once", "--store", "other"]).refused(3, &["no KV store", "other"]);
    kv_top(&mounted.pool, &[]).refused(2, &["no terminal", "--once"]);
    // `top` shows the same budget.
    let json = top(&mounted.pool, &["--once", "--json"]).ok().json();
    assert_eq!(json["write_budgets"][0]["left_bytes"], 0, "{json}");
    if Command::new("tmux").arg("-V").output().is_ok() {
        let command = std::format!(
            "{} kv top --interval 50 --pool {}",
            nvtier_path().display(),
            mounted.pool.display()
        );
        on_a_terminal(mounted.folder(), &command, &["chat", "10 blocks", "left today", "q: quit"]);
    } else {
        skip("there is no tmux here");
    }
    // Nobody opens a store to watch it.
    drop(blocks);
    session.close().unwrap();
    let closed = wait_for(|| {
        let seen = kv_top(&mounted.pool, &["--once", "--json"]).ok().json();
        Some(()).filter(|()| seen["stores"][0]["open"].is_null())
    });
    assert!(closed.is_some(), "the store stays open");
    mounted.finish();
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    kv_top(&pool, &["--once"]).refused_somehow(&["kv stat"]);
}

#[test]
fn ceilings_and_ratings_are_told_where_they_are_known() {
    let mounted = Mounted::new(Kind::Raw, &[]);
    let state = scratch();
    let looked = |options: &[&str]| {
        let mut command = Command::new(nvtier_path());
        command.args(["top", "--once", "--json", "--interval", "50", "--pool"]).arg(&mounted.pool);
        run(command.args(options).env("XDG_STATE_HOME", state.path())).ok().json()
    };
    let before = looked(&[]);
    assert_eq!(before["limits"].as_array().unwrap().len(), 0, "{before}");
    if before["wear"].as_array().unwrap().is_empty() {
        mounted.finish();
        return skip("the kernel names no drive below the scratch folder");
    }
    let text = {
        let mut command = Command::new(nvtier_path());
        command.args(["top", "--once", "--interval", "50", "--pool"]).arg(&mounted.pool);
        run(command.env("XDG_STATE_HOME", state.path())).ok().stdout
    };
    assert!(text.contains("no ceilings measured"), "{text}");
    let given = looked(&["--tbw", "600TB"]);
    assert_eq!(given["wear"][0]["rated"], serde_json::json!([600_000_000_000_000u64, "given"]), "{given}");
    // Measured where the pool lies, with a small file.
    let mut measure = Command::new(nvtier_path());
    measure.args(["doctor", "--measure", "--measure-bytes", "64MiB"]).arg(mounted.folder());
    run(measure.env("XDG_STATE_HOME", state.path())).ok();
    let after = looked(&[]);
    let limits = after["limits"].as_array().unwrap();
    let of = |what: &str| limits.iter().any(|limit| limit["what"].as_str().unwrap().ends_with(what));
    assert!(of(", reads") && of(", writes") && of("copies in memory"), "{after}");
    assert!(limits.iter().all(|limit| limit["ceiling_bytes_per_second"].as_f64().unwrap() > 1e6), "{after}");
    mounted.finish();
}
