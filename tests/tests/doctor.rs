//! `nvtier doctor` on this machine, and in surroundings that lack things.

use std::path::Path;
use std::process::Command;

use nvtier_tests::{Ran, nvtier_for_anybody, nvtier_path, run, scratch, skip};
use serde_json::Value;

fn finding(ran: &Ran, area: &str, item: &str) -> Value {
    let json = ran.json();
    let findings = json["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["area"] == area && finding["item"] == item);
    found.unwrap_or_else(|| panic!("no {area}/{item} in {ran:#?}")).clone()
}

/// Each line says what is needed, and each that is not so what that changes and what to do.
fn every_line_is_whole(ran: &Ran) {
    for finding in ran.json()["findings"].as_array().unwrap() {
        let empty = |name: &str| finding[name].as_str().unwrap().is_empty();
        let bad = ["degraded", "cannot_run"].contains(&finding["status"].as_str().unwrap());
        assert!(!empty("found") && !empty("needed"), "{finding:#}");
        assert!(!bad || !empty("effect") && !empty("remedy"), "{finding:#}");
    }
}

fn doctor(path: &Path) -> Command {
    let mut command = Command::new(nvtier_path());
    command.arg("doctor").arg("--json").arg(path);
    command
}

#[test]
fn it_sees_this_machine_and_its_exit_code_is_its_verdict() {
    let folder = scratch();
    let ran = run(&mut doctor(folder.path()));
    let json = ran.json();
    let code = match json["verdict"].as_str().unwrap() {
        "ok" => 0,
        "degraded" => 8,
        other => panic!("{other}: {ran:#?}"),
    };
    assert_eq!(ran.code, code);
    every_line_is_whole(&ran);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(finding(&ran, "platform", "kernel")["found"], release.trim());
    let works = finding(&ran, "io", "io_uring")["status"] == "ok";
    assert_eq!(works, nvme::Queue::builder().depth(2).backend(nvme::Backend::IoUring).build().is_ok());
    assert_eq!(finding(&ran, "file system", "O_DIRECT")["status"], "ok", "the tests' own files need it");
    // It left nothing behind, and text says the same.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let text = run(Command::new(nvtier_path()).arg("doctor").arg(folder.path()).arg("--fix-hints"));
    assert_eq!(text.code, code);
    assert!(text.stdout.contains(release.trim()) && text.stdout.contains("nvtier runs here"), "{text:#?}");
}

#[test]
fn a_path_that_cannot_be_written_cannot_hold_a_pool() {
    let ran = run(&mut doctor(Path::new("/proc")));
    assert_eq!((ran.code, ran.json()["verdict"].as_str()), (7, Some("cannot_run")), "{ran:#?}");
    // One that does not exist yet is judged by what it would lie in.
    let folder = scratch();
    let ran = run(&mut doctor(&folder.path().join("not/yet/there")));
    assert_eq!(finding(&ran, "file system", "O_DIRECT")["status"], "ok");
}

/// Without io_uring (seccomp), /dev/fuse and locked memory, as in many containers.
#[test]
fn surroundings_without_io_uring_fuse_and_locked_memory_are_told() {
    let python = std::env::var_os("NVTIER_PYTHON").unwrap_or_else(|| "python3".into());
    if !rustix::process::geteuid().is_root() {
        skip("root is needed to hide /dev/fuse");
        return;
    }
    // io_uring_setup(2), number 425 on all architectures, fails with EPERM; then an ordinary user with 64 KiB of memlock.
    let script = r#"
import ctypes, os, resource, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def must(ok, what):
    if not ok: print("refused:", what, ctypes.get_errno()); sys.exit(77)
must(libc.unshare(0x20000) == 0, "unshare")
must(libc.mount(b"none", b"/", None, 0x44000, None) == 0, "private mounts")
must(libc.mount(b"/dev/null", b"/dev/fuse", None, 0x1000, None) == 0, "hide /dev/fuse")
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
program = b"".join(struct.pack("HBBI", *step) for step in [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
must(libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0, "seccomp")
os.execv(sys.argv[1], sys.argv[1:])
"#;
    let folder = scratch();
    let mut command = Command::new(python);
    command
        .args(["-c", script])
        .arg(nvtier_for_anybody(folder.path()))
        .args(["doctor", "--json"])
        .arg(folder.path());
    let Ok(ran) = nvtier_tests::try_run(&mut command) else {
        skip("python3 is needed");
        return;
    };
    if ran.code == 77 || ran.stderr.contains("Permission denied") {
        skip(&format!("a restricted environment cannot be made: {} {}", ran.stdout, ran.stderr));
        return;
    }
    // An ordinary user cannot write to root's scratch folder.
    assert_eq!(ran.code, 7, "{ran:#?}");
    assert_eq!(finding(&ran, "file system", "writing")["status"], "cannot_run");
    every_line_is_whole(&ran);
    assert_eq!(ran.json()["root"], false);
    let told = |area, item, words: [&str; 2]| {
        let finding = finding(&ran, area, item);
        assert_eq!(finding["status"], "degraded", "{finding:#?}");
        for word in words {
            assert!(finding.to_string().contains(word), "{word:?} is not in {finding:#?}");
        }
    };
    told("io", "io_uring", ["refused", "seccomp"]);
    told("fuse", "/dev/fuse", ["another device", "cannot be mounted"]);
    told("fuse", "passthrough", ["ordinary user", "root"]);
    told("memory", "locked memory (memlock)", ["64.0 KiB", "ulimit -l"]);
    // What root would see or do in addition is said where it is so.
    for (area, item) in [("fuse", "passthrough"), ("file system", "writing")] {
        assert_ne!(finding(&ran, area, item)["root_adds"], "", "{area}/{item}");
    }
    let drives = ran.json()["findings"].as_array().unwrap().clone();
    for health in drives.iter().filter(|found| found["item"].as_str().unwrap().ends_with(" health")) {
        assert!(health["status"] == "unknown" && health["root_adds"] != "", "{health:#}");
    }
}
