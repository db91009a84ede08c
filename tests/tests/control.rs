//! Other processes work on a pool while it is mounted, through its owner.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use nvtier_tests::{KINDS, Kind, Mounted, nvtier, nvtier_path, pattern, wait_for};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn commands_and_the_mount_see_the_same_pool_at_once() {
    for kind in KINDS {
        let mounted = Mounted::new(kind, &[]);
        let pool = text(&mounted.pool).to_owned();
        let bytes = pattern(20, 3_333_333);

        // Made in the mount, seen by commands, even before it is synced.
        fs::create_dir(mounted.point.join("d")).unwrap();
        fs::write(mounted.point.join("d/here"), &bytes).unwrap();
        let listing = nvtier(["ls", "-r", "--json", "--pool", &pool]).ok();
        assert!(listing.stdout.contains("here"), "{kind:?}: {listing:#?}");
        let out = mounted.folder().join("out");
        nvtier(["export", "d/here", text(&out), "--pool", &pool]).ok();
        assert!(fs::read(&out).unwrap() == bytes, "{kind:?}: an export gave other bytes");

        // Made by commands, seen in the mount, although the kernel had looked the name up before.
        assert!(!mounted.point.join("there").exists());
        nvtier(["import", text(&out), "there", "--pool", &pool]).ok();
        assert!(
            fs::read(mounted.point.join("there")).unwrap() == bytes,
            "{kind:?}: an import gave other bytes"
        );
        let changed = pattern(21, 1_000_000);
        fs::write(&out, &changed).unwrap();
        nvtier(["import", text(&out), "there", "--force", "--pool", &pool]).ok();
        // The kernel may keep names and attributes for a moment (docs/semantics.md, "Other processes"), never wrong bytes.
        let there = mounted.point.join("there");
        assert!(fs::read(&there).unwrap() == changed, "{kind:?}: stale bytes after a replacement");
        wait_for(|| (fs::metadata(&there).unwrap().len() == 1_000_000).then_some(()))
            .unwrap_or_else(|| panic!("{kind:?}: the old size stays"));
        nvtier(["rm", "there", "--pool", &pool]).ok();
        wait_for(|| (!there.exists()).then_some(()))
            .unwrap_or_else(|| panic!("{kind:?}: a removed region is still there"));
        nvtier(["verify", "--pool", &pool]).ok();
        mounted.finish();
    }
}

#[test]
fn several_imports_at_once_end_whole() {
    let mounted = Mounted::new(Kind::Raw, &[]);
    let sources: Vec<_> = (0..4)
        .map(|number| {
            let path = mounted.folder().join(format!("source-{number}"));
            fs::write(&path, pattern(30 + number, 8_000_000 + number as usize)).unwrap();
            path
        })
        .collect();
    let mut children: Vec<_> = sources
        .iter()
        .enumerate()
        .map(|(number, source)| {
            Command::new(nvtier_path())
                .args(["import", text(source), &format!("r{number}"), "--pool", text(&mounted.pool)])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in &mut children {
        let status = wait_for(|| child.try_wait().unwrap()).expect("an import hangs");
        assert!(status.success(), "{status}");
    }
    for (number, source) in sources.iter().enumerate() {
        assert!(fs::read(mounted.point.join(format!("r{number}"))).unwrap() == fs::read(source).unwrap());
    }
    mounted.finish();
}

#[test]
fn the_state_files_tell_the_truth() {
    let mounted = Mounted::new(Kind::Raw, &[]);
    let before = rustix::fs::statvfs(&mounted.point).unwrap();
    let mut file = File::create(mounted.point.join("f")).unwrap();
    std::io::Write::write_all(&mut file, &pattern(40, 64 << 20)).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let after = rustix::fs::statvfs(&mounted.point).unwrap();
    let taken = (before.f_bavail - after.f_bavail) * after.f_frsize;
    assert!((64 << 20..66 << 20).contains(&taken), "64 MiB took {taken} bytes by statvfs");
    assert!(after.f_blocks * after.f_frsize <= 1 << 30, "more space than the image file has");

    let stats = fs::read_to_string(mounted.point.join(".nvtier/stats.json")).unwrap();
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert!(stats.is_object(), "{stats}");
    let metrics = fs::read_to_string(mounted.point.join(".nvtier/metrics")).unwrap();
    // Prometheus text format: comments, or `name{labels} value`.
    for line in metrics.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
        assert!(name.starts_with("nvtier_"), "{line}");
        value.parse::<f64>().unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    assert!(metrics.lines().any(|line| line.starts_with("nvtier_")), "no samples in {metrics}");
    mounted.finish();
}
