//! Nothing needs root but what the kernel reserves for it. The runner starts this program as `nobody`, too.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Command;

use nvtier_tests::{Kind, Mounted, format, nvtier, nvtier_for_anybody, pattern, run, scratch, skip};

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

/// /dev/fuse is everybody's where udev made it (mode 0666). Where it is not, the test below runs in a mount namespace that has one of its own.
fn with_fuse_for_everybody() {
    let folder = scratch();
    let script = r#"mknod -m 666 "$0" c 10 229 && mount --bind "$0" /dev/fuse || exit 77
exec "$1" --exact --nocapture a_daemon_with_one_capability_mounts_for_others_as_root_does"#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(folder.path().join("fuse"));
    command.arg(std::env::current_exe().unwrap()).env("NVTIER_OPEN_FUSE", "1");
    match nvtier_tests::try_run(&mut command) {
        Ok(ran) if ran.code != 77 => {
            assert!(ran.code == 0, "{ran:#?}");
            // What it left out, if so.
            print!("{}", ran.stdout);
        }
        Ok(ran) => {
            skip(&std::format!("/dev/fuse is root's alone, and cannot be opened to others: {}", ran.stderr))
        }
        Err(why) => skip(&std::format!(
            "/dev/fuse is root's alone, and unshare (package util-linux) cannot be had: {why}"
        )),
    }
}

/// As dist/systemd/unprivileged.conf has it: a user with the one capability that mounts and passthrough take.
#[test]
fn a_daemon_with_one_capability_mounts_for_others_as_root_does() {
    const NOBODY: u32 = 65534;
    if !rustix::process::getuid().is_root() {
        return skip("root is needed to give another user a capability");
    }
    if fs::metadata("/dev/fuse").is_ok_and(|fuse| fuse.mode() & 0o006 != 0o006)
        && std::env::var_os("NVTIER_OPEN_FUSE").is_none()
    {
        return with_fuse_for_everybody();
    }
    let Some(setpriv) =
        ["/usr/bin/setpriv", "/bin/setpriv"].into_iter().find(|path| fs::exists(path).unwrap_or(false))
    else {
        return skip("setpriv (package util-linux) is needed to give another user a capability");
    };
    let folder = scratch();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let program = nvtier_for_anybody(folder.path());
    let [home, point] = ["home", "mnt"].map(|name| folder.path().join(name));
    for directory in [&home, &point] {
        fs::create_dir(directory).unwrap();
        chown(directory, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let capable = |words: &[&str]| {
        // No fusermount3 that could help.
        let mut command = Command::new(setpriv);
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]);
        command.args([
            "--inh-caps=-all,+sys_admin",
            "--ambient-caps=-all,+sys_admin",
            "--bounding-set=-all,+sys_admin",
        ]);
        command.arg(&program).args(words).env("PATH", "/nonexistent");
        // The harness may have a folder for temporary files that is its own alone.
        command.env("HOME", &home).env("TMPDIR", &home).env_remove("XDG_RUNTIME_DIR");
        run(&mut command)
    };
    let pool = home.join("pool");
    let (pool_text, point_text) = (pool.to_str().unwrap(), point.to_str().unwrap());
    let made = capable(&["format", pool_text]);
    if made.stderr.contains("setpriv: ") {
        return skip(&made.stderr);
    }
    made.ok();
    capable(&["mount", pool_text, point_text, "--allow-other"]).ok();
    let mounted = Mounted::over(pool.clone(), point.clone(), folder);
    // This process is another user.
    let bytes = pattern(9, 3_000_000);
    fs::create_dir(point.join("open")).unwrap();
    fs::write(point.join("open/f"), &bytes).unwrap();
    assert!(fs::read(point.join("open/f")).unwrap() == bytes);
    let status =
        fs::read_to_string(std::format!("/proc/{}/status", mounted.daemon().as_raw_nonzero())).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert!(
        field("Uid:").starts_with("65534") && u64::from_str_radix(&field("CapEff:"), 16) == Ok(1 << 21),
        "{status}"
    );
    // Passed through where root's mounts are.
    let passthrough = || {
        let stats = fs::read(point.join(".nvtier/stats.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&stats).unwrap()["mount"]["passthrough"].clone()
    };
    let of_user = passthrough();
    capable(&["umount", point_text]).ok();
    assert!(!mounted.is_mounted());
    mounted.mount(&["--allow-other"]).ok();
    assert!(fs::read(point.join("open/f")).unwrap() == bytes);
    assert_eq!(of_user, passthrough());
    mounted.finish();
}
