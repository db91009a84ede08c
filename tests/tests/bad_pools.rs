//! Pools that are not what they should be: each is refused by name, and nothing is destroyed. Needs no mount.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use nvtier_tests::{KINDS, Kind, format, nvtier, pattern, run, scratch, skip};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_place_that_holds_other_data_is_refused_without_force() {
    let folder = scratch();
    let directory = folder.path().join("documents");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("thesis.txt"), b"years of work").unwrap();
    nvtier(["format", text(&directory)]).refused_somehow(&["documents"]);
    assert_eq!(fs::read(directory.join("thesis.txt")).unwrap(), b"years of work");

    let image = folder.path().join("image");
    let bytes = pattern(9, 64 << 20);
    fs::write(&image, &bytes).unwrap();
    nvtier(["format", text(&image), "--raw"]).refused_somehow(&["image"]);
    assert!(fs::read(&image).unwrap() == bytes, "a refused format changed the image");
    nvtier(["format", text(&image), "--raw", "--force"]).ok();
    nvtier(["info", "--pool", text(&image)]).ok();
}

#[test]
fn a_file_system_is_named() {
    let folder = scratch();
    let image = folder.path().join("disk.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).output();
    if !made.is_ok_and(|output| output.status.success()) {
        return skip("no mkfs.ext4 on this machine");
    }
    let before = fs::read(&image).unwrap();
    nvtier(["format", text(&image), "--raw"]).refused_somehow(&["disk.img", "ext4"]);
    assert!(fs::read(&image).unwrap() == before, "a refused format changed the file system");
}

#[test]
fn another_pool_is_not_overwritten() {
    for kind in [Kind::Directory, Kind::Raw] {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let source = folder.path().join("source");
        fs::write(&source, pattern(10, 100_000)).unwrap();
        nvtier(["import", text(&source), "kept", "--pool", text(&pool)]).ok();
        let mut words = vec!["format", text(&pool)];
        if kind == Kind::Raw {
            words.push("--raw");
        }
        nvtier(words).refused_somehow(&["pool"]);
        nvtier(["verify", "kept", "--pool", text(&pool)]).ok();
    }
}

#[test]
fn a_place_that_is_too_small_or_makes_no_sense_is_refused() {
    let folder = scratch();
    let image = folder.path().join("tiny");
    nvtier(["format", text(&image), "--raw", "--size", "64KiB"]).refused_somehow(&["tiny"]);
    nvtier(["format", "/proc/self/nothing"]).refused_somehow(&["/proc/self/nothing"]);
    nvtier(["format", "/dev/null"]).refused_somehow(&["/dev/null"]);
    nvtier(["format", text(&image), "--raw", "--size", "64MiB", "--chunk-size", "5000"])
        .refused_somehow(&["5000"]);
    nvtier(["info", "--pool", text(&folder.path().join("nowhere"))]).refused(3, &["nowhere"]);
    for size in ["-1", "0", "12XB", "99999999999999999999GiB"] {
        nvtier(["format", text(&image), "--raw", "--size", size]).refused(2, &[]);
    }
}

#[test]
fn a_missing_or_foreign_member_is_named() {
    let folder = scratch();
    let pool = format(Kind::Striped, folder.path());
    let source = folder.path().join("source");
    fs::write(&source, pattern(11, 9_000_000)).unwrap();
    nvtier(["import", text(&source), "r", "--pool", text(&pool)]).ok();
    let (a, b) = (folder.path().join("member-a"), folder.path().join("member-b"));
    let aside = folder.path().join("aside");

    fs::rename(&a, &aside).unwrap();
    nvtier(["ls", "--pool", text(&pool)]).refused_somehow(&["member-a"]);
    // Swapped.
    fs::rename(&b, &a).unwrap();
    fs::rename(&aside, &b).unwrap();
    nvtier(["ls", "--pool", text(&pool)]).refused_somehow(&["member"]);
    fs::rename(&b, &aside).unwrap();
    fs::rename(&a, &b).unwrap();
    // A member of another pool in its place.
    let other = folder.path().join("another");
    fs::create_dir(&other).unwrap();
    format(Kind::Striped, &other);
    fs::rename(other.join("member-a"), &a).unwrap();
    nvtier(["ls", "--pool", text(&pool)]).refused_somehow(&["member-a"]);
    // All in order again.
    fs::rename(&a, other.join("member-a")).unwrap();
    fs::rename(&aside, &a).unwrap();
    nvtier(["verify", "--pool", text(&pool)]).ok();
}

/// Files of a pool by size and name, without its sockets and locks.
fn files_of(pool: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![pool.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && entry.metadata().unwrap().len() > 0 {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

type Damage = Box<dyn Fn(&File)>;

#[test]
fn no_damage_to_any_file_of_a_pool_makes_it_panic_hang_or_lie() {
    // Every file of a directory pool in turn: cut to nothing, cut in half, a bit flipped in every 64th of it. The
    // command may work (the other copy is used) or refuse; the region's bytes are right or an error.
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let source = folder.path().join("source");
    let bytes = pattern(12, 700_000);
    fs::write(&source, &bytes).unwrap();
    nvtier(["import", text(&source), "r", "--pool", text(&pool)]).ok();
    let copy = folder.path().join("copy");
    let mut refusals = 0;
    for victim in files_of(&pool) {
        let name = victim.strip_prefix(&pool).unwrap().to_path_buf();
        let len = victim.metadata().unwrap().len();
        let mut damages: Vec<Damage> = vec![
            Box::new(|file| file.set_len(0).unwrap()),
            Box::new(move |file| file.set_len(len / 2).unwrap()),
        ];
        for part in [0, 1, 7, 31, 63] {
            let at = len * part / 64;
            damages.push(Box::new(move |file| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            }));
        }
        for (index, damage) in damages.iter().enumerate() {
            let _ = fs::remove_dir_all(&copy);
            run(Command::new("cp").args(["-a", "--sparse=always"]).arg(&pool).arg(&copy)).ok();
            damage(&File::options().read(true).write(true).open(copy.join(&name)).unwrap());
            let out = folder.path().join("out");
            let _ = fs::remove_file(&out);
            let ran = nvtier(["export", "r", text(&out), "--pool", text(&copy)]);
            if ran.code == 0 {
                assert!(
                    fs::read(&out).unwrap() == bytes,
                    "damage {index} to {}: wrong bytes were handed out as right",
                    name.display()
                );
            } else {
                refusals += 1;
                ran.refused_somehow(&[]);
            }
        }
    }
    assert!(refusals > 0, "no damage was ever noticed");
}

#[test]
fn damage_all_over_a_raw_pool_never_yields_wrong_bytes() {
    let folder = scratch();
    let pool = folder.path().join("pool");
    nvtier(["format", text(&pool), "--raw", "--size", "64MiB"]).ok();
    let source = folder.path().join("source");
    let bytes = pattern(13, 300_000);
    fs::write(&source, &bytes).unwrap();
    nvtier(["import", text(&source), "r", "--pool", text(&pool)]).ok();
    let image = File::options().read(true).write(true).open(&pool).unwrap();
    let mut whole = vec![0; 64 << 20];
    image.read_exact_at(&mut whole, 0).unwrap();
    // Only blocks that hold something: the start of each of them in turn, at most 120 of them, evenly spread.
    let used: Vec<usize> = (0..whole.len() / 4096)
        .filter(|block| whole[block * 4096..(block + 1) * 4096].iter().any(|byte| *byte != 0))
        .collect();
    let step = used.len().div_ceil(120);
    let mut refusals = 0;
    for block in used.iter().step_by(step) {
        let at = (block * 4096 + 100) as u64;
        let good = whole[block * 4096 + 100..block * 4096 + 108].to_vec();
        image.write_all_at(&good.iter().map(|byte| byte ^ 0x5a).collect::<Vec<_>>(), at).unwrap();
        let out = folder.path().join("out");
        let _ = fs::remove_file(&out);
        let ran = nvtier(["export", "r", text(&out), "--pool", text(&pool)]);
        if ran.code == 0 {
            assert!(
                fs::read(&out).unwrap() == bytes,
                "damage in block {block}: wrong bytes were handed out as right"
            );
        } else {
            refusals += 1;
            ran.refused_somehow(&[]);
        }
        // Restore everything, as an export may write to the catalog.
        image.write_all_at(&whole, 0).unwrap();
    }
    assert!(refusals > 0, "no damage was ever noticed");
}

#[test]
fn commands_on_a_damaged_region_say_which_chunk() {
    for kind in KINDS {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let source = folder.path().join("source");
        let mut bytes = pattern(14, 2_000_000);
        // A mark to find the data by, wherever the pool put it.
        bytes[1_000_000..1_000_016].copy_from_slice(b"--here I am!!!--");
        fs::write(&source, &bytes).unwrap();
        nvtier(["import", text(&source), "marked", "--pool", text(&pool)]).ok();
        let places = if kind == Kind::Raw { vec![pool.clone()] } else { files_of(folder.path()) };
        let mut damaged = 0;
        for path in places.iter().filter(|path| **path != source) {
            let content = fs::read(path).unwrap();
            if let Some(at) = content.windows(16).position(|window| window == b"--here I am!!!--") {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(b"X", at as u64 + 3).unwrap();
                damaged += 1;
            }
        }
        assert_eq!(damaged, 1, "{kind:?}: the data was not found where it should be");
        // 1_000_000 lies in chunk 61 of 16 KiB.
        nvtier(["verify", "--pool", text(&pool)]).refused(5, &["marked", "61"]);
        let out = folder.path().join("out");
        nvtier(["export", "marked", text(&out), "--pool", text(&pool)]).refused(5, &["marked"]);
        assert!(!out.exists(), "{kind:?}: a damaged region was exported");
    }
}
