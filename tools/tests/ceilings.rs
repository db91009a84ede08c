//! What `nvtier doctor --measure` saved, as `load` and `bench` use it.

use std::fs;
use std::path::Path;
use std::process::Command;

use doctor::ceilings::{Ceilings, Store};
use nvtier_tests::{Kind, Mounted, Ran, format, nvtier_path, pattern, run, scratch};

/// A state folder in which somebody has measured the drive below a path.
fn measured(folder: &Path, below: &Path) -> std::path::PathBuf {
    let state = folder.join("state");
    // Far above, and for the mount far below, what anything here reaches, so that no run can be slow or fast enough to change what binds.
    let ceilings = Ceilings {
        measured_unix: 1,
        path: below.to_owned(),
        drive_read: Some(1e15),
        drive_write: Some(1.0),
        pool_read: Some(1e14),
        mount_read: Some(1.0),
        memory_copy: Some(1e15),
        memory_fresh: Some(1e13),
        ..Ceilings::default()
    };
    assert!(Store::at(state.join("nvtier/ceilings.json")).put(below, &ceilings));
    state
}

fn nvtier(state: &Path, words: &[&str]) -> Ran {
    run(Command::new(nvtier_path()).args(words).env("XDG_STATE_HOME", state)).ok()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_bench_run_that_cannot_measure_its_ceiling_takes_the_saved_one() {
    let folder = scratch();
    let file = folder.path().join("file");
    fs::write(&file, pattern(70, 4 << 20)).unwrap();
    let state = measured(folder.path(), folder.path());
    let name = std::format!("--filename={}", text(&file));
    let mixed = ["bench", "--name=x", &name, "--rw=rw", "--bs=64k", "--size=4m", "--ioengine=pread"];
    let ceiling = |more: &[&str]| {
        let words = [&mixed[..], more, &["--output-format=json"]].concat();
        nvtier(&state, &words).json()["nvtier"]["groups"][0]["drive_ceiling_bytes_per_second"].as_f64()
    };
    // Half of the bytes are written, at a byte a second.
    let saved = ceiling(&[]);
    assert!(saved.is_some_and(|rate| rate > 0.5 && rate < 10.0), "{saved:?}");
    // Turned off it is off, and a figure that is given counts.
    assert_eq!(ceiling(&["--ceiling=off"]), None);
    assert_eq!(ceiling(&["--ceiling=3g"]), Some(3.0 * f64::from(1 << 30)));
    let elsewhere = scratch();
    let words = [&mixed[..], &["--output-format=json"]].concat();
    let none = nvtier(elsewhere.path(), &words).json();
    assert!(none["nvtier"]["groups"][0]["drive_ceiling_bytes_per_second"].is_null(), "{none:#}");
}

/// A path in a mount means the drive below its pool.
#[test]
fn a_mount_is_bound_by_what_was_saved_for_the_drive_below_its_pool() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let state = measured(folder.path(), &pool);
    let mounted = Mounted::over(pool, point, folder);
    mounted.mount(&[]).ok();
    let file = mounted.point.join("f");
    fs::write(&file, pattern(71, 8 << 20)).unwrap();
    let name = std::format!("--filename={}", text(&file));
    let words = ["bench", "--name=x", &name, "--rw=read", "--bs=1m", "--size=8m", "--ioengine=mount"];
    let json = nvtier(&state, &[&words[..], &["--output-format=json"]].concat()).json();
    let ceiling = json["nvtier"]["groups"][0]["drive_ceiling_bytes_per_second"].as_f64();
    assert!(ceiling.is_some_and(|rate| (rate / 1e15 - 1.0).abs() < 1e-6), "{json:#}");
    mounted.finish();
}

#[test]
fn a_load_tells_what_was_saved_and_the_lowest_binds() {
    let folder = scratch();
    let source = folder.path().join("source");
    fs::create_dir(&source).unwrap();
    let pool = format(Kind::Directory, folder.path());
    // One tensor: a header of JSON and its bytes.
    let header = br#"{"t":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &pattern(72, 4096)].concat();
    fs::write(source.join("m.safetensors"), bytes).unwrap();
    let state = measured(folder.path(), &pool);
    nvtier(&state, &["import", text(&source.join("m.safetensors")), "m.safetensors", "--pool", text(&pool)]);
    let words = ["load", "m.safetensors", "--pool", text(&pool), "--device", "cpu", "--no-tune"];
    let ceilings = nvtier(&state, &[&words[..], &["--json"]].concat()).json()["ceilings"].clone();
    for (name, rate) in [("copy", 1e13), ("drive", 1e15), ("pool", 1e14)] {
        assert_eq!(ceilings[std::format!("{name}_bytes_per_second")], rate, "{ceilings:#}");
    }
    assert_eq!(
        (&ceilings["copy_measured"], &ceilings["drive_measured"]),
        (&"earlier".into(), &"earlier".into())
    );
    assert_eq!(ceilings["binding"]["ceiling"], "copies", "{ceilings:#}");
    let words = nvtier(&state, &words).stdout;
    assert!(
        words.contains("copies to the device, measured earlier") && words.contains("binding     copies"),
        "{words}"
    );
}
