//! Section 2: names.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use crate::both_ways;
use crate::common::{Mount, Way, errno};

both_ways! {
    fn names_behave_as_on_ext4(mount: Mount) {
        let path = |name: &str| mount.path(name);
        fs::create_dir(path("d")).unwrap();
        fs::write(path("d/f"), b"x").unwrap();
        for bytes in [&b"new\nline"[..], b"\xff\xfe", &[b'n'; 255], b"..."] {
            let odd = mount.root().join(OsStr::from_bytes(bytes));
            fs::write(&odd, bytes).unwrap();
            assert_eq!(fs::read(&odd).unwrap(), bytes);
            fs::remove_file(&odd).unwrap();
        }
        assert_eq!(errno(fs::write(path(&"n".repeat(256)), b"")), Errno::NAMETOOLONG);
        assert_eq!(errno(fs::remove_dir(path("d"))), Errno::NOTEMPTY);
        assert_eq!(errno(fs::create_dir(path("d"))), Errno::EXIST);
        assert_eq!(errno(fs::read(path("none"))), Errno::NOENT);
        assert_eq!(errno(fs::read(path("d/f/g"))), Errno::NOTDIR);
        assert_eq!(errno(fs::read(path("d"))), Errno::ISDIR);
        assert_eq!(errno(fs::write(path("d"), b"")), Errno::ISDIR);
        assert_eq!(errno(fs::remove_file(path("d"))), Errno::ISDIR);
        assert_eq!(errno(fs::remove_dir(path("d/f"))), Errno::NOTDIR);
        assert_eq!(errno(fs::rename(path("d"), path("d/inside"))), Errno::INVAL);
        assert_eq!(errno(fs::rename(path("d/f"), mount.folder().join("elsewhere"))), Errno::XDEV);
        assert_eq!(errno(fs::hard_link(path("d/f"), mount.folder().join("elsewhere"))), Errno::XDEV);
        symlink("loop", path("loop")).unwrap();
        assert_eq!(errno(fs::read(path("loop"))), Errno::LOOP);
        assert_eq!(fs::read_link(path("loop")).unwrap(), OsStr::new("loop"));
        symlink("d/f", path("link")).unwrap();
        assert_eq!(fs::read(path("link")).unwrap(), b"x");

        fs::hard_link(path("d/f"), path("g")).unwrap();
        assert_eq!(fs::metadata(path("g")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(path("g")).unwrap().ino(), fs::metadata(path("d/f")).unwrap().ino());
        fs::remove_file(path("d/f")).unwrap();
        assert_eq!(fs::metadata(path("g")).unwrap().nlink(), 1);
        assert_eq!(fs::read(path("g")).unwrap(), b"x");

        for (name, kind) in [("fifo", FileType::Fifo), ("null", FileType::CharacterDevice), ("sock", FileType::Socket)] {
            let device = if name == "null" { rustix::fs::makedev(1, 3) } else { 0 };
            rustix::fs::mknodat(CWD, path(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
        }
        assert!(fs::metadata(path("fifo")).unwrap().file_type().is_fifo());
        assert!(fs::metadata(path("sock")).unwrap().file_type().is_socket());
        let null = fs::metadata(path("null")).unwrap();
        assert!(null.file_type().is_char_device());
        assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
        fs::create_dir_all(path("deep/er/still")).unwrap();
        assert_eq!(fs::metadata(path("deep")).unwrap().nlink(), 3);
        fs::remove_dir_all(path("deep")).unwrap();
    }

    fn rename_is_atomic(mount: Mount) {
        let (a, b) = (mount.path("a"), mount.path("b"));
        fs::write(&a, b"new").unwrap();
        fs::write(&b, b"old").unwrap();
        let old = File::open(&b).unwrap();
        let renamed = |from: &str, to: &str, flags| {
            rustix::fs::renameat_with(CWD, mount.path(from), CWD, mount.path(to), flags)
        };
        assert_eq!(renamed("a", "b", RenameFlags::NOREPLACE), Err(Errno::EXIST));
        renamed("a", "b", RenameFlags::EXCHANGE).unwrap();
        assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (b"old".to_vec(), b"new".to_vec()));
        assert_eq!(renamed("a", "c", RenameFlags::WHITEOUT), Err(Errno::INVAL));
        renamed("b", "a", RenameFlags::empty()).unwrap();
        assert_eq!(fs::read(&a).unwrap(), b"new");
        assert_eq!(errno(fs::metadata(&b)), Errno::NOENT);
        // The replaced file lives on behind its descriptor, without a name.
        assert_eq!(old.metadata().unwrap().nlink(), 0);
        assert_eq!(std::io::read_to_string(&old).unwrap(), "old");

        // A writer keeps its file while that is renamed over another.
        use std::io::Write;
        let mut writer = File::create(mount.path("tmp")).unwrap();
        writer.write_all(b"first ").unwrap();
        fs::rename(mount.path("tmp"), &a).unwrap();
        writer.write_all(b"second").unwrap();
        assert_eq!(fs::read(&a).unwrap(), b"first second");
        drop(writer);
        assert_eq!(fs::read(&a).unwrap(), b"first second");
    }

    fn an_open_file_outlives_its_name(mount: Mount) {
        use std::io::{Read, Seek, Write};
        let path = mount.path("gone");
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.write_all(b"before").unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(errno(fs::metadata(&path)), Errno::NOENT);
        file.write_all(b" and after").unwrap();
        file.sync_all().unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.nlink(), metadata.len()), (0, 16));
        file.set_len(12).unwrap();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before and a");
        // The name can be used again meanwhile.
        fs::write(&path, b"another").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12);
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"another");

        // A directory that somebody still stands in.
        fs::create_dir(mount.path("dir")).unwrap();
        let dir = File::open(mount.path("dir")).unwrap();
        fs::remove_dir(mount.path("dir")).unwrap();
        assert_eq!(dir.metadata().unwrap().nlink(), 0);
    }

    fn a_listing_sees_what_stays(mount: Mount) {
        let dir = mount.path("many");
        fs::create_dir(&dir).unwrap();
        // Enough for several batches of readdir.
        for i in 0..2000 {
            File::create(dir.join(format!("stays-{i}"))).unwrap();
        }
        let mut seen = Vec::new();
        for (count, entry) in fs::read_dir(&dir).unwrap().enumerate() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if count % 7 == 0 {
                File::create(dir.join(format!("comes-{count}"))).unwrap();
                let _ = fs::remove_file(dir.join(format!("comes-{}", count.saturating_sub(70))));
            }
            if name.starts_with("stays-") {
                seen.push(name);
            }
        }
        assert_eq!(seen.len(), 2000, "an entry was listed twice or left out");
        assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 2000);
        let root: Vec<_> = fs::read_dir(mount.root()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(root, ["many"], "the virtual trees are not listed");
        assert!(fs::metadata(mount.path(".tensors")).unwrap().is_dir());
        assert!(fs::metadata(mount.path(".nvtier")).unwrap().is_dir());
        assert_eq!(errno(fs::create_dir(mount.path(".nvtier"))), Errno::EXIST);
    }

    fn permissions_are_the_kernels(mount: Mount) {
        const NOBODY: u32 = 65534;
        let as_nobody = |script: &str| {
            Command::new("sh").arg("-c").arg(script).current_dir(mount.root()).uid(NOBODY).gid(NOBODY).output().unwrap()
        };
        let set_mode = |name: &str, mode| {
            fs::set_permissions(mount.path(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        let mode = |name: &str| fs::metadata(mount.path(name)).unwrap().mode() & 0o7777;
        fs::write(mount.path("secret"), b"s").unwrap();
        set_mode("secret", 0o600);
        assert!(!as_nobody("cat secret").status.success());
        set_mode("secret", 0o604);
        assert!(as_nobody("cat secret").status.success());
        assert!(!as_nobody("echo x > secret").status.success());

        // Set-group-id is handed on, sticky protects.
        fs::create_dir(mount.path("shared")).unwrap();
        std::os::unix::fs::chown(mount.path("shared"), Some(0), Some(12)).unwrap();
        set_mode("shared", 0o3777);
        assert!(as_nobody("mkdir shared/sub && echo x > shared/file").status.success());
        assert_eq!(fs::metadata(mount.path("shared/file")).unwrap().gid(), 12);
        assert_eq!(mode("shared/sub") & 0o2000, 0o2000);
        assert_eq!(fs::metadata(mount.path("shared/sub")).unwrap().gid(), 12);
        fs::write(mount.path("shared/roots"), b"").unwrap();
        assert!(!as_nobody("rm -f shared/roots").status.success());
        assert!(as_nobody("rm -f shared/file").status.success());

        // Privileges fall when somebody else writes, truncates or owns the file.
        for (script, expected) in [
            ("echo more >> tool", 0o777),
            ("truncate -s 3 tool", 0o777),
            (": > tool", 0o777),
        ] {
            fs::write(mount.path("tool"), b"#!/bin/sh\n").unwrap();
            set_mode("tool", 0o6777);
            let output = as_nobody(script);
            assert!(output.status.success(), "{script}: {output:?}");
            assert_eq!(mode("tool"), expected, "after {script}");
        }
        set_mode("tool", 0o6777);
        std::os::unix::fs::chown(mount.path("tool"), Some(1), Some(1)).unwrap();
        assert_eq!(mode("tool"), 0o777, "after chown");
        set_mode("tool", 0o4755);
        fs::write(mount.path("tool"), b"root may").unwrap();
        assert_eq!(mode("tool"), 0o4755, "root keeps them");
        let mut small = [0u8; 64];
        let acl = rustix::fs::getxattr(mount.path("tool"), "system.posix_acl_access", &mut small);
        assert_eq!(acl, Err(Errno::OPNOTSUPP));
    }

    fn extended_attributes(mount: Mount) {
        let path = mount.path("x");
        fs::write(&path, b"").unwrap();
        let get = |name: &str, room: usize| {
            let mut value = vec![0u8; room];
            rustix::fs::getxattr(&path, name, value.as_mut_slice()).map(|len| value[..len.min(room)].to_vec())
        };
        let set = |name: &str, value: &[u8], flags| rustix::fs::setxattr(&path, name, value, flags);
        assert_eq!(get("user.a", 10), Err(Errno::NODATA));
        assert_eq!(set("user.a", b"12345", XattrFlags::REPLACE), Err(Errno::NODATA));
        set("user.a", b"12345", XattrFlags::CREATE).unwrap();
        assert_eq!(set("user.a", b"6", XattrFlags::CREATE), Err(Errno::EXIST));
        assert_eq!(get("user.a", 10).unwrap(), b"12345");
        assert_eq!(get("user.a", 4), Err(Errno::RANGE));
        set("user.a", b"", XattrFlags::empty()).unwrap();
        assert_eq!(get("user.a", 10).unwrap(), b"");
        let big = vec![7u8; 64 << 10];
        set("user.big", &big, XattrFlags::empty()).unwrap();
        assert_eq!(get("user.big", 70_000).unwrap(), big);
        set("trusted.t", b"1", XattrFlags::empty()).unwrap();
        let mut list = vec![0u8; 1000];
        let len = rustix::fs::listxattr(&path, list.as_mut_slice()).unwrap();
        let names: BTreeSet<_> = list[..len].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
        assert_eq!(names, BTreeSet::from([&b"user.a"[..], b"user.big", b"trusted.t"]));
        assert_eq!(rustix::fs::listxattr(&path, &mut [0u8; 4][..]), Err(Errno::RANGE));
        rustix::fs::removexattr(&path, "user.a").unwrap();
        assert_eq!(rustix::fs::removexattr(&path, "user.a"), Err(Errno::NODATA));
        assert_eq!(set("user.nvtier.dtype", b"F32", XattrFlags::empty()), Err(Errno::PERM));
        // They survive a remount.
        mount.unmount();
        mount.mount();
        let mut value = vec![0u8; 70_000];
        let len = rustix::fs::getxattr(mount.path("x"), "user.big", value.as_mut_slice()).unwrap();
        assert_eq!(&value[..len], &big);
    }

    fn times(mount: Mount) {
        const NOW: i64 = 0x3fff_ffff; // UTIME_NOW and UTIME_OMIT of linux/stat.h
        const OMIT: i64 = 0x3fff_fffe;
        let path = mount.path("t");
        fs::write(&path, b"x").unwrap();
        let set = |access: (i64, i64), modify: (i64, i64)| {
            let stamp = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
            let times = Timestamps { last_access: stamp(access), last_modification: stamp(modify) };
            rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
            fs::metadata(&path).unwrap()
        };
        let metadata = set((1000, 111_111_111), (2000, 222_222_222));
        assert_eq!((metadata.atime(), metadata.atime_nsec()), (1000, 111_111_111));
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (2000, 222_222_222));
        let metadata = set((0, OMIT), (-5, 5));
        assert_eq!((metadata.atime(), metadata.mtime(), metadata.mtime_nsec()), (1000, -5, 5));
        let metadata = set((7, 0), (0, NOW));
        assert_eq!(metadata.atime(), 7);
        assert!(metadata.mtime() > 1_600_000_000);
        fs::read(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().atime(), 7, "reading leaves the access time");

        // Times set while the file is open for writing hold after close and remount (tar, cp -p).
        use std::io::Write;
        let mut file = File::create(mount.path("kept")).unwrap();
        file.write_all(b"content").unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(12345, 678)).unwrap();
        drop(file);
        let kept = |mount: &Mount| {
            let metadata = fs::metadata(mount.path("kept")).unwrap();
            (metadata.mtime(), metadata.mtime_nsec())
        };
        assert_eq!(kept(&mount), (12345, 678));
        mount.unmount();
        mount.mount();
        assert_eq!(kept(&mount), (12345, 678));
    }
}
