//! The demo as a program that is interrupted, and that may not mount.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nvtier_tests::{nvtier_path, run, scratch, wait_for};
use rustix::process::{Pid, Signal, kill_process};

fn entries(directory: &Path) -> Vec<std::path::PathBuf> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn an_interrupted_demo_unmounts_and_removes_its_things() {
    // At three places: while the checkpoint is written, in the pool, and (where it may) on the mount.
    for stage in ["checkpoint", "pool", "mnt"] {
        let folder = scratch();
        let mut child = Command::new(nvtier_path())
            .args(["demo", "--size", "40MiB", "--dir"])
            .arg(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let reached = wait_for(|| {
            let there = entries(folder.path()).iter().any(|demo| demo.join(stage).exists());
            (there || child.try_wait().unwrap().is_some()).then_some(())
        });
        reached.unwrap_or_else(|| panic!("the demo never got to {stage}"));
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let status = wait_for(|| child.try_wait().unwrap()).expect("the end of the demo");
        assert_eq!(status.code(), Some(130), "{stage}");
        assert_eq!(entries(folder.path()), Vec::<std::path::PathBuf>::new(), "{stage}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(folder.path().to_str().unwrap()), "the demo left a mount");
    }
}

#[test]
fn without_a_mount_the_demo_says_so_and_measures_the_rest() {
    let folder = scratch();
    let mut command = Command::new(nvtier_path());
    command.args(["demo", "--size", "40MiB", "--no-mount", "--json", "--keep", "--dir"]).arg(folder.path());
    let report = run(&mut command).ok().json();
    assert_eq!(report["mounted"], false);
    assert!(report["mount_refused"].as_str().unwrap().contains("--no-mount"));
    let rows: Vec<_> =
        report["rows"].as_array().unwrap().iter().map(|row| row["row"].as_str().unwrap()).collect();
    assert_eq!(rows, ["drive", "pool"]);
    for row in report["rows"].as_array().unwrap() {
        assert!(row["bytes_per_second"].as_f64().unwrap() > 0.0, "{row}");
    }
    let kept = Path::new(report["directory"].as_str().unwrap());
    assert!(kept.join("pool").exists() && kept.join("checkpoint/config.json").exists());
    // The same seed makes the same checkpoint.
    let shard = "checkpoint/model-00001-of-00003.safetensors";
    let first = fs::read(kept.join(shard)).unwrap();
    let again = run(&mut command).ok().json();
    let again = fs::read(Path::new(again["directory"].as_str().unwrap()).join(shard)).unwrap();
    assert!(first == again);
}

#[test]
fn a_place_that_will_not_do_is_refused() {
    run(Command::new(nvtier_path()).args(["demo", "--dir", "/nonexistent"])).refused(3, &["/nonexistent"]);
    let folder = scratch();
    let mut command = Command::new(nvtier_path());
    command.args(["demo", "--size", "1000TiB", "--dir"]).arg(folder.path());
    run(&mut command).refused(6, &["--dir", "--size"]);
    assert!(entries(folder.path()).is_empty());
}
