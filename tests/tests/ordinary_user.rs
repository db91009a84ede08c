//! Nothing needs root but what the kernel reserves for it. The runner starts this program as `nobody`, too.

use std::fs::{self, File};

use nvtier_tests::{Kind, Mounted, format, nvtier, pattern, scratch, skip};

#[test]
fn a_pool_is_made_filled_and_checked() {
    for kind in [Kind::Directory, Kind::Raw, Kind::Striped] {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let pool = pool.to_str().unwrap();
        let source = folder.path().join("snapshot");
        fs::create_dir_all(source.join("nested")).unwrap();
        let bytes = pattern(7, 5_000_000);
        fs::write(source.join("nested/data.bin"), &bytes).unwrap();
        fs::write(source.join("empty"), b"").unwrap();
        nvtier(["import", source.to_str().unwrap(), "s", "--pool", pool]).ok();
        let listing = nvtier(["ls", "-r", "--json", "--pool", pool]).ok();
        assert!(listing.stdout.contains("data.bin"), "{listing:#?}");
        let out = folder.path().join("out");
        nvtier(["export", "s", out.to_str().unwrap(), "--pool", pool]).ok();
        assert_eq!(fs::read(out.join("nested/data.bin")).unwrap(), bytes, "{kind:?}");
        assert_eq!(fs::read(out.join("empty")).unwrap(), b"", "{kind:?}");
        nvtier(["verify", "--pool", pool]).ok();
        nvtier(["rm", "-r", "s", "--pool", pool]).ok();
        nvtier(["stat", "s", "--pool", pool]).refused(3, &["s"]);
    }
}

#[test]
fn a_pool_is_mounted() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
        return skip(&format!("/dev/fuse cannot be opened: {error}"));
    }
    let fusermount = ["/bin/fusermount3", "/usr/bin/fusermount3", "/usr/local/bin/fusermount3"];
    if !rustix::process::getuid().is_root()
        && !fusermount.iter().any(|path| fs::exists(path).unwrap_or(false))
    {
        return skip("an ordinary user needs fusermount3 to mount, and there is none (Debian package fuse3)");
    }
    let me = rustix::process::getuid().as_raw();
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &[]);
        let bytes = pattern(8, 3_000_000);
        fs::create_dir(mounted.point.join("d")).unwrap();
        fs::write(mounted.point.join("d/f"), &bytes).unwrap();
        fs::rename(mounted.point.join("d/f"), mounted.point.join("g")).unwrap();
        assert_eq!(fs::read(mounted.point.join("g")).unwrap(), bytes, "{kind:?}");
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(mounted.point.join("g")).unwrap());
        assert_eq!(owner, me, "{kind:?}: a new file belongs to someone else");
        nvtier(["ls", "--pool", mounted.pool.to_str().unwrap()]).ok();
        mounted.umount().ok();
        mounted.mount(&[]).ok();
        assert_eq!(fs::read(mounted.point.join("g")).unwrap(), bytes, "{kind:?}");
        mounted.finish();
    }
}
