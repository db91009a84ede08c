//! Commands beside a running mount, and the mount daemon as a process.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nvtier_tests::{Kind, Mounted, format, nvtier, nvtier_path, pattern, run, scratch, skip, wait_for};
use rustix::process::{Pid, Signal, kill_process};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn can_mount() -> bool {
    let can = fs::File::options().read(true).write(true).open("/dev/fuse").is_ok();
    if !can {
        skip("/dev/fuse cannot be opened");
    }
    can
}

#[test]
fn commands_work_beside_a_mount() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(Kind::Directory, &[]);
    let pool = text(&mounted.pool);
    let info = nvtier(["info", "--json", "--pool", pool]).ok().json();
    assert_eq!(info["owner_pid"].as_i64(), Some(mounted.daemon().as_raw_nonzero().get().into()));
    let source = mounted.folder().join("source");
    let bytes = pattern(30, 2_500_000);
    fs::write(&source, &bytes).unwrap();
    nvtier(["import", text(&source), "d/a", "--pool", pool]).ok();
    assert!(fs::read(mounted.point.join("d/a")).unwrap() == bytes);
    nvtier(["verify", "--pool", pool]).ok();
    nvtier(["rm", "-r", "d", "--pool", pool]).ok();
    // docs/semantics.md: seen in the mount at the latest one second later.
    wait_for(|| (!mounted.point.join("d").exists()).then_some(()))
        .expect("the end of the directory in the mount");
    mounted.finish();
}

#[test]
fn mount_returns_once_it_is_ready_and_says_what_it_did() {
    if !can_mount() {
        return;
    }
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let point = folder.path().join("m n");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    let said = mounted.mount(&["--json"]).ok().json();
    assert!(fs::read_dir(mounted.point.join(".nvtier")).is_ok());
    assert_eq!(said["pid"].as_i64(), Some(mounted.daemon().as_raw_nonzero().get().into()));
    assert!(Path::new(said["log"].as_str().unwrap()).exists(), "{said}");
    let said = nvtier(["umount", "--json", text(&mounted.point)]).ok().json();
    assert_eq!(said["mountpoint"].as_str(), Some(text(&mounted.point.canonicalize().unwrap())));
    nvtier(["umount", text(&mounted.point)]).refused(3, &["nothing is mounted"]);
}

#[test]
fn a_foreground_mount_ends_cleanly_by_a_signal() {
    if !can_mount() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let folder = scratch();
        let pool = format(Kind::Directory, folder.path());
        let point = folder.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let mut child = Command::new(nvtier_path())
            .args(["mount", "--foreground", "--ram", "64MiB"])
            .arg(&pool)
            .arg(&point)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mounted = Mounted::over(pool, point, folder);
        wait_for(|| mounted.is_mounted().then_some(())).expect("the mount");
        wait_for(|| fs::write(mounted.point.join("f"), b"written").ok()).expect("a write");
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = wait_for(|| child.try_wait().unwrap()).expect("the end of the daemon");
        assert_eq!(status.code(), Some(0), "{signal:?}");
        assert!(!mounted.is_mounted());
        let listed = nvtier(["ls", "--json", "--pool", text(&mounted.pool)]).ok().json();
        assert_eq!(listed["entries"][0]["size"], 7);
    }
}

#[test]
fn failures_of_the_daemon_are_the_command_s() {
    let folder = scratch();
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let no_pool = folder.path().join("empty");
    fs::create_dir(&no_pool).unwrap();
    nvtier(["mount", text(&no_pool), text(&point)]).refused_somehow(&["empty", "log"]);
    let pool = format(Kind::Directory, folder.path());
    let ran =
        run(Command::new(nvtier_path()).args(["mount", text(&pool), text(&folder.path().join("gone"))]));
    ran.refused(3, &["gone", "make the directory"]);
    nvtier(["mount", text(&pool), "/proc"]).refused(4, &["/proc"]);
    nvtier(["mount", text(&pool), text(&point), "--ram", "4096TiB"]).refused(2, &["--ram", "this machine"]);
}
