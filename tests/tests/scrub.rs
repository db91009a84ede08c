//! `nvtier mount --scrub`, from the command line on.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use nvtier_tests::{Kind, Mounted, Ran, format, nvtier_path, pattern, run, scratch, wait_for};
use serde_json::Value;

const LEN: usize = (3 << 20) + 77;

fn on(pool: &Path, args: &[&str]) -> Ran {
    run(Command::new(nvtier_path()).args(args).arg("--pool").arg(pool))
}

/// The file below `folder` that holds `mark`, and where in it.
fn find(folder: &Path, mark: &[u8]) -> Option<(std::path::PathBuf, u64)> {
    if folder.is_dir() {
        return fs::read_dir(folder).unwrap().find_map(|entry| find(&entry.unwrap().path(), mark));
    }
    let bytes = fs::read(folder).unwrap();
    let at = bytes.windows(mark.len()).position(|part| part == mark)?;
    Some((folder.to_path_buf(), at as u64))
}

/// Of a mount, a bit that turned over at rest is found, told in statistics, metrics and by `verify`, and the rest of the pool is served.
#[test]
fn a_mount_scrubs_and_tells_what_it_finds() {
    for kind in [Kind::Directory, Kind::Raw] {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let bytes = pattern(40, LEN);
        for (name, bytes) in [("good", &pattern(41, LEN)), ("bad", &bytes)] {
            let source = folder.path().join(format!("source-{name}"));
            fs::write(&source, bytes).unwrap();
            on(&pool, &["import", source.to_str().unwrap(), name]).ok();
        }
        let (file, at) = find(&pool, &bytes[LEN / 2..LEN / 2 + 32]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        file.sync_all().unwrap();
        let point = folder.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let mounted = Mounted::over(pool.clone(), point, folder);
        mounted.mount(&["--scrub", "1GiB/s"]).ok();
        let scrub = || -> Value {
            let text = fs::read(mounted.point.join(".nvtier/stats.json")).unwrap();
            serde_json::from_slice::<Value>(&text).unwrap()["stat"]["scrub"].clone()
        };
        let done = wait_for(|| Some(scrub()).filter(|scrub| scrub["passes"] == 1));
        let done = done.unwrap_or_else(|| panic!("{kind:?}: no pass was finished: {}", scrub()));
        assert_eq!((&done["last_bad_chunks"], &done["rate"]), (&1.into(), &(1u64 << 30).into()), "{done}");
        assert!(done["findings"][0].as_str().unwrap().contains("bad"), "{done}");
        let metrics = fs::read_to_string(mounted.point.join(".nvtier/metrics")).unwrap();
        assert!(metrics.lines().any(|line| line.contains("scrub") && line.ends_with(" 1")), "{metrics}");
        assert!(fs::read(mounted.point.join("good")).unwrap() == pattern(41, LEN));
        mounted.umount().ok();
        // What it found is kept: the next to look is told, by whatever command.
        let ran = on(&pool, &["verify"]).refused(5, &["bad"]);
        assert!(ran.stdout.contains("last scrub: ended") && ran.stdout.contains("1 bad chunks"), "{ran:?}");
    }
}

#[test]
fn a_rate_that_is_none_is_refused() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    for rate in ["0", "fast", "-1"] {
        let mut command = Command::new(nvtier_path());
        command.arg("mount").arg(&pool).arg(&point).arg(format!("--scrub={rate}"));
        run(&mut command).refused_somehow(&["scrub"]);
    }
}
