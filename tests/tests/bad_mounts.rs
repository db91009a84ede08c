//! Mount points, names, full pools and files that lie, through a real mount.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nvtier_tests::{Kind, Mounted, format, nvtier, pattern, scratch};
use rustix::io::Errno;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn fails_with<T>(result: std::io::Result<T>, errno: Errno) {
    let error = result.err().expect("an error was expected");
    assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "{error}");
}

#[test]
fn mount_points_that_will_not_do_are_refused() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let missing = folder.path().join("missing");
    nvtier(["mount", text(&pool), text(&missing)]).refused_somehow(&["missing"]);
    let file = folder.path().join("file");
    fs::write(&file, b"x").unwrap();
    nvtier(["mount", text(&pool), text(&file)]).refused_somehow(&["file"]);
    let full = folder.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("hidden"), b"would be covered").unwrap();
    nvtier(["mount", text(&pool), text(&full)]).refused_somehow(&["full"]);
    assert_eq!(fs::read(full.join("hidden")).unwrap(), b"would be covered");
    nvtier(["umount", text(&full)]).refused_somehow(&["full"]);
    // The pool is not left owned by any of these.
    nvtier(["ls", "--pool", text(&pool)]).ok();
}

#[test]
fn a_busy_mount_point_is_refused_and_keeps_working() {
    let mounted = Mounted::new(Kind::Directory, &[]);
    fs::write(mounted.point.join("f"), b"x").unwrap();
    let second = mounted.folder().join("second");
    nvtier(["format", text(&second)]).ok();
    nvtier(["mount", text(&second), text(&mounted.point)]).refused_somehow(&["mnt"]);
    assert_eq!(fs::read(mounted.point.join("f")).unwrap(), b"x");
    mounted.finish();
}

#[test]
fn an_owned_pool_names_its_owner() {
    let mounted = Mounted::new(Kind::Directory, &[]);
    let pid = mounted.daemon().as_raw_nonzero().to_string();
    let other = mounted.folder().join("other");
    fs::create_dir(&other).unwrap();
    nvtier(["mount", text(&mounted.pool), text(&other)]).refused(4, &[&pid]);
    nvtier(["format", text(&mounted.pool), "--force"]).refused(4, &[&pid]);
    fs::write(mounted.point.join("alive"), b"yes").unwrap();
    mounted.finish();
}

#[test]
fn an_unmount_of_a_mount_in_use_says_so() {
    let mounted = Mounted::new(Kind::Directory, &[]);
    fs::write(mounted.point.join("f"), b"abc").unwrap();
    let open = File::open(mounted.point.join("f")).unwrap();
    let ran = mounted.umount();
    if ran.code == 0 {
        // Detached: then the open file still reads, or says that it is gone; nothing hangs.
        let mut byte = [0];
        let _ = std::os::unix::fs::FileExt::read_at(&open, &mut byte, 0);
        drop(open);
    } else {
        ran.refused(4, &["mnt"]);
        drop(open);
        mounted.umount().ok();
    }
    assert!(!mounted.is_mounted());
}

#[test]
fn names_are_kept_byte_for_byte_or_refused() {
    let mounted = Mounted::new(Kind::Directory, &[]);
    let names: [&[u8]; 7] = [
        b"new\nline",
        b"tab\tand space ",
        b"...",
        b"\xff\xfe not UTF-8",
        "größe-模型-🦀".as_bytes(),
        b"-rf",
        &[b'n'; 255],
    ];
    for name in names {
        fs::write(mounted.point.join(OsStr::from_bytes(name)), name).unwrap();
    }
    fails_with(File::create(mounted.point.join("n".repeat(256))), Errno::NAMETOOLONG);
    fails_with(fs::create_dir(mounted.point.join("x/../..").join("n".repeat(256))), Errno::NOENT);
    nvtier(["ls", "--pool", text(&mounted.pool)]).ok();
    nvtier(["ls", "-r", "--json", "--pool", text(&mounted.pool)]).ok().json();
    mounted.umount().ok();
    mounted.mount(&[]).ok();
    let mut seen: Vec<Vec<u8>> = fs::read_dir(&mounted.point)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
        .filter(|name| name != b".nvtier" && name != b".tensors")
        .collect();
    seen.sort();
    let mut expected: Vec<Vec<u8>> = names.iter().map(|name| name.to_vec()).collect();
    expected.sort();
    assert_eq!(seen, expected);
    for name in names {
        assert_eq!(fs::read(mounted.point.join(OsStr::from_bytes(name))).unwrap(), name);
    }
    mounted.finish();
}

#[test]
fn names_on_the_command_line_cannot_leave_the_pool() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let source = folder.path().join("source");
    fs::write(&source, b"x").unwrap();
    let long = "n".repeat(256);
    for name in ["../outside", "a/../../outside", "a/..", "..", "", long.as_str()] {
        nvtier(["import", text(&source), name, "--pool", text(&pool)]).refused_somehow(&[]);
    }
    for name in ["line\nbreak", "n".repeat(255).as_str()] {
        nvtier(["import", text(&source), name, "--pool", text(&pool)]).ok();
        nvtier(["stat", name, "--pool", text(&pool)]).ok();
        nvtier(["rm", name, "--pool", text(&pool)]).ok();
    }
    assert!(!folder.path().join("outside").exists());
}

fn free_bytes(mounted: &Mounted) -> u64 {
    let stat = rustix::fs::statvfs(&mounted.point).unwrap();
    stat.f_bfree * stat.f_frsize
}

#[test]
fn a_full_pool_keeps_old_data_and_gives_the_space_back() {
    let folder = scratch();
    let pool = folder.path().join("small");
    nvtier(["format", text(&pool), "--raw", "--size", "96MiB"]).ok();
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    mounted.mount(&[]).ok();
    let old = pattern(15, 20 << 20);
    fs::write(mounted.point.join("old"), &old).unwrap();
    File::open(mounted.point.join("old")).unwrap().sync_all().unwrap();
    let free = free_bytes(&mounted);

    // cp: the error comes at write, flush or close; what arrived goes when it is removed.
    let large = mounted.folder().join("large");
    fs::write(&large, pattern(16, 120 << 20)).unwrap();
    for _ in 0..2 {
        let error = fs::copy(&large, mounted.point.join("copy")).and_then(|_| {
            let file = File::options().write(true).open(mounted.point.join("copy"))?;
            file.sync_all()
        });
        fails_with(error, Errno::NOSPC);
        fs::remove_file(mounted.point.join("copy")).unwrap();
        File::open(&mounted.point).unwrap().sync_all().unwrap();
        assert_eq!(fs::read(mounted.point.join("old")).unwrap(), old);
        assert!(
            free_bytes(&mounted) + (1 << 20) >= free,
            "{} of {free} bytes came back",
            free_bytes(&mounted)
        );
    }
    // Overwriting a region that does not fit twice: the old generation stays until the new one is whole.
    let result = fs::write(mounted.point.join("old.tmp"), pattern(17, 100 << 20));
    fails_with(result.and_then(|()| File::open(mounted.point.join("old.tmp"))?.sync_all()), Errno::NOSPC);
    let _ = fs::remove_file(mounted.point.join("old.tmp"));
    assert_eq!(fs::read(mounted.point.join("old")).unwrap(), old);

    // import, through the daemon and alone
    nvtier(["import", text(&large), "imported", "--pool", text(&mounted.pool)]).refused(6, &["imported"]);
    assert!(!mounted.point.join("imported").exists());
    mounted.umount().ok();
    nvtier(["import", text(&large), "imported", "--pool", text(&mounted.pool)]).refused(6, &["imported"]);
    mounted.mount(&[]).ok();
    assert_eq!(fs::read(mounted.point.join("old")).unwrap(), old);
    // The space is really there again.
    fs::write(mounted.point.join("fits"), pattern(18, 40 << 20)).unwrap();
    File::open(mounted.point.join("fits")).unwrap().sync_all().unwrap();
    mounted.finish();
}

/// A safetensors file with this header and `data` zero bytes.
fn safetensors(header: &[u8], data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + data, 0);
    file
}

#[test]
fn headers_that_lie_make_plain_files_without_tensors() {
    let huge = format!("{{\"__metadata__\":{{\"k\":\"{}\"}}}}", "x".repeat(100 << 20));
    let tensor = |offsets: &str| {
        format!("{{\"w\":{{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":{offsets}}}}}").into_bytes()
    };
    let gguf = |tensors: u64, keys: u64, rest: &[u8]| {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend_from_slice(&tensors.to_le_bytes());
        file.extend_from_slice(&keys.to_le_bytes());
        file.extend_from_slice(rest);
        file
    };
    let lies: Vec<(&str, Vec<u8>)> = vec![
        ("beyond.safetensors", safetensors(&tensor("[0,16]"), 8)),
        ("backwards.safetensors", safetensors(&tensor("[16,0]"), 16)),
        ("short.safetensors", safetensors(&tensor("[0,12]"), 16)),
        ("enormous.safetensors", safetensors(&tensor("[0,9223372036854775808]"), 16)),
        (
            "overlap.safetensors",
            safetensors(
                br#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}"#,
                12,
            ),
        ),
        (
            "twice.safetensors",
            safetensors(
                br#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#,
                16,
            ),
        ),
        (
            "dtype.safetensors",
            safetensors(br#"{"a":{"dtype":"F33","shape":[8],"data_offsets":[0,8]}}"#, 8),
        ),
        ("length.safetensors", [&(1_u64 << 63).to_le_bytes()[..], &[b'{'; 64]].concat()),
        ("large-header.safetensors", safetensors(huge.as_bytes(), 0)),
        ("empty.safetensors", Vec::new()),
        ("count.gguf", gguf(u64::MAX, 1, &[0; 64])),
        ("keys.gguf", gguf(1, u64::MAX, &[0xff; 64])),
        ("string.gguf", gguf(0, 1, &u64::MAX.to_le_bytes())),
        ("cut.gguf", gguf(3, 0, b"")),
        ("magic.gguf", b"GGML\x03\0\0\0".to_vec()),
        ("shape.npy", b"\x93NUMPY\x01\0\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616,), }\n".to_vec()),
    ];
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &[]);
        let good = safetensors(&tensor("[0,16]"), 16);
        fs::write(mounted.point.join("good.safetensors"), &good).unwrap();
        for (name, bytes) in &lies {
            let path = mounted.point.join(name);
            let mut file = File::create(&path).unwrap();
            file.write_all(bytes).unwrap();
            file.sync_all().unwrap();
            drop(file);
            assert!(fs::read(&path).unwrap() == *bytes, "{kind:?}: {name} reads differently");
            let views = fs::read_dir(mounted.point.join(".tensors").join(name));
            match views {
                Ok(entries) => assert_eq!(entries.count(), 0, "{kind:?}: {name} got tensors"),
                Err(error) => assert!(
                    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
                    "{kind:?}: {name}: {error}"
                ),
            }
            nvtier(["stat", name, "--pool", text(&mounted.pool)]).ok();
        }
        let view = fs::read(mounted.point.join(".tensors/good.safetensors/w.npy")).unwrap();
        assert_eq!(&view[..6], b"\x93NUMPY");
        assert_eq!(&view[view.len() - 16..], &[0; 16]);
        mounted.finish();
    }
}

#[test]
fn a_read_only_mount_changes_nothing() {
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &[]);
        fs::write(mounted.point.join("f"), b"abc").unwrap();
        fs::create_dir(mounted.point.join("d")).unwrap();
        mounted.umount().ok();
        mounted.mount(&["--read-only"]).ok();
        assert_eq!(fs::read(mounted.point.join("f")).unwrap(), b"abc");
        fails_with(File::create(mounted.point.join("new")), Errno::ROFS);
        fails_with(File::options().write(true).open(mounted.point.join("f")), Errno::ROFS);
        fails_with(fs::remove_file(mounted.point.join("f")), Errno::ROFS);
        fails_with(fs::rename(mounted.point.join("f"), mounted.point.join("g")), Errno::ROFS);
        fails_with(fs::create_dir(mounted.point.join("e")), Errno::ROFS);
        fails_with(fs::remove_dir(mounted.point.join("d")), Errno::ROFS);
        fails_with(std::os::unix::fs::symlink("f", mounted.point.join("s")), Errno::ROFS);
        fails_with(fs::hard_link(mounted.point.join("f"), mounted.point.join("h")), Errno::ROFS);
        nvtier(["rm", "f", "--pool", text(&mounted.pool)]).refused_somehow(&["read-only"]);
        mounted.finish();
    }
}
