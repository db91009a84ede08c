//! `nvtier top`: once, and on a real terminal.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

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
    for word in ["throughput", "mount write", "P99", "RAM tier", "models"] {
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

#[test]
fn on_a_terminal_it_draws_and_ends() {
    if Command::new("tmux").arg("-V").output().is_err() {
        return skip("there is no tmux here");
    }
    let mounted = Mounted::new(Kind::Raw, &[]);
    fs::write(mounted.point.join("weights"), pattern(62, 1 << 20)).unwrap();
    let socket = mounted.folder().join("tmux");
    let tmux = |words: &[&OsStr]| {
        // No configuration of whoever runs this.
        run(Command::new("tmux").args(["-f", "/dev/null", "-S"]).arg(&socket).args(words).env_remove("TMUX"))
    };
    let words = |words: &[&str]| tmux(&words.iter().map(OsStr::new).collect::<Vec<_>>());
    let screen = || words(&["capture-pane", "-p", "-t", "top"]).stdout;
    tmux(&[
        "new-session".as_ref(),
        "-d".as_ref(),
        "-s".as_ref(),
        "top".as_ref(),
        "-x".as_ref(),
        "100".as_ref(),
        "-y".as_ref(),
        "45".as_ref(),
        "sh".as_ref(),
    ])
    .ok();
    let command = std::format!(
        "{} top --interval 50 --pool {}; echo ended $?",
        nvtier_path().display(),
        mounted.pool.display()
    );
    words(&["send-keys", "-t", "top", &command, "Enter"]).ok();
    // A screen that is looked at while it is drawn is not whole yet.
    let parts = ["what it holds", "weights", "throughput", "queues and times", "RAM tier", "q: quit"];
    let drawn = wait_for(|| Some(screen()).filter(|text| parts.iter().all(|part| text.contains(part))));
    assert!(drawn.is_some(), "not all of {parts:?} came to be drawn:\n{}", screen());
    words(&["resize-window", "-t", "top", "-x", "40", "-y", "12"]).ok();
    words(&["resize-window", "-t", "top", "-x", "100", "-y", "45"]).ok();
    words(&["send-keys", "-t", "top", "q"]).ok();
    let ended = wait_for(|| Some(screen()).filter(|text| text.contains("ended 0")));
    let last = screen();
    words(&["kill-server"]);
    assert!(ended.is_some(), "it did not end well:\n{last}");
    mounted.finish();
}
