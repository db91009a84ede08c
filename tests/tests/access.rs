//! What other users may see and do: of a pool's files, through a mount, over the control socket. Two real users of no rights; needs root
//! to become them.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nvtier_tests::{KINDS, Kind, Mounted, Ran, nvtier_path, pattern, run, scratch, skip};

const ALICE: u32 = 64_001;
const BOB: u32 = 64_002;

/// Why the users cannot be had.
fn no_users() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root can become other users");
    }
    if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return Some("nothing can be mounted here");
    }
    let setpriv = Command::new("setpriv").arg("--version").stdout(Stdio::null()).status();
    setpriv.is_err().then_some("there is no setpriv (Debian package util-linux)")
}

/// A command line that becomes a user without groups or rights.
fn as_user(user: u32, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={user}")).arg(format!("--regid={user}"));
    command.args(["--clear-groups", "--inh-caps=-all"]).arg(program).current_dir("/");
    command
}

/// Programs are copied to where everybody can run them. By another process: one that another test starts meanwhile would inherit our
/// descriptor that writes, and nothing that is being written can be run.
fn for_everybody(program: &Path, folder: &Path) -> PathBuf {
    let copy = folder.join(program.file_name().unwrap());
    run(Command::new("cp").arg(program).arg(&copy)).ok();
    fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
    copy
}

/// Runs the role `act` of this program as a user; gives what it printed, line by line.
fn act(user: u32, folder: &Path, act: &str, path: &Path) -> Vec<String> {
    let program = for_everybody(&std::env::current_exe().unwrap(), folder);
    let mut command = as_user(user, &program);
    command.args(["--ignored", "--exact", "child", "--nocapture"]);
    let ran: Ran = run(command.env("NVTIER_TEST_ACT", act).env("NVTIER_TEST_PATH", path)).ok();
    let lines: Vec<_> =
        ran.stdout.lines().filter_map(|line| line.split_once('@').map(|(_, said)| said.to_owned())).collect();
    assert!(!lines.is_empty(), "{ran:#?}");
    lines
}

/// The other user. Not a test: the tests start it.
#[test]
#[ignore = "a role in other tests"]
fn child() {
    let Ok(act) = std::env::var("NVTIER_TEST_ACT") else { return };
    let path = PathBuf::from(std::env::var_os("NVTIER_TEST_PATH").unwrap());
    let said = |what: &str, result: std::io::Result<String>| match result {
        Ok(got) => println!("@{what}: got {got:?}"),
        Err(error) => println!("@{what}: refused with {}", error.raw_os_error().unwrap_or(0)),
    };
    let xattr = |path: &Path, name: &str| {
        let mut value = [0; 100];
        let len = rustix::fs::getxattr(path, name, &mut value[..])?;
        Ok(String::from_utf8_lossy(&value[..len]).into_owned())
    };
    let view = path.parent().unwrap().join("../.tensors/home").join(path.file_name().unwrap());
    match act.as_str() {
        "write" => {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path).unwrap();
            file.write_all(&tensors()).unwrap();
            file.sync_all().unwrap();
            drop(file);
            rustix::fs::setxattr(&path, "user.secret", b"hush", rustix::fs::XattrFlags::empty()).unwrap();
            println!("@wrote");
        }
        "look" => {
            let list = |path: &Path| {
                let names: Result<Vec<_>, _> =
                    fs::read_dir(path)?.map(|e| e.map(|e| e.file_name())).collect();
                names.map(|names| format!("{names:?}"))
            };
            said("read", fs::read(&path).map(|bytes| bytes.len().to_string()));
            let direct = File::options().read(true).custom_flags(0o40_000).open(&path);
            said("read around the cache", direct.map(|_| String::new()));
            said("write", File::options().write(true).open(&path).map(|_| String::new()));
            said("truncate", fs::write(&path, "").map(|()| String::new()));
            said("an attribute", xattr(&path, "user.secret"));
            said("our attribute", xattr(&path, "user.nvtier.tensors"));
            said("its tensors' names", list(&view));
            said("a tensor", fs::read(view.join("a.npy")).map(|bytes| bytes.len().to_string()));
            said("chmod", fs::set_permissions(&path, Permissions::from_mode(0o666)).map(|()| String::new()));
            said("chown", chown(&path, Some(BOB), None).map(|()| String::new()));
            said("remove", fs::remove_file(&path).map(|()| String::new()));
            said("rename", fs::rename(&path, path.with_extension("x")).map(|()| String::new()));
        }
        // Every offset is legal to ask for; what lies beyond the end is nothing, or an error.
        "beyond" => {
            use std::os::unix::fs::FileExt;
            let file = File::open(&path).unwrap();
            let len = file.metadata().unwrap().len();
            for offset in [len, len + 1, 1 << 40, (1 << 62) - 1, i64::MAX as u64 - 4096, i64::MAX as u64] {
                let mut buf = [0; 4096];
                match file.read_at(&mut buf, offset) {
                    Ok(0) => {}
                    Ok(n) => println!("@beyond: {n} bytes at {offset}"),
                    Err(error) => assert_eq!(error.raw_os_error(), Some(22), "at {offset}: {error}"),
                }
            }
            println!("@beyond: done");
        }
        other => panic!("no act {other}"),
    }
}

/// A safetensors file with one tensor.
fn tensors() -> Vec<u8> {
    let header = r#"{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}"#;
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &pattern(9, 4000)].concat()
}

#[test]
fn another_user_gets_nothing_of_a_private_file() {
    if let Some(reason) = no_users() {
        return skip(reason);
    }
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &["--allow-other"]);
        fs::set_permissions(&mounted.point, Permissions::from_mode(0o755)).unwrap();
        let home = mounted.point.join("home");
        fs::create_dir(&home).unwrap();
        chown(&home, Some(ALICE), Some(ALICE)).unwrap();
        let file = home.join("private.safetensors");
        act(ALICE, mounted.folder(), "write", &file);
        let found = fs::metadata(&file).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (ALICE, ALICE, 0o600), "{kind:?}");

        let seen = act(BOB, mounted.folder(), "look", &file);
        assert_eq!(seen.len(), 12, "{seen:#?}");
        for line in &seen {
            // EPERM and EACCES; ENOENT where what is closed is not shown at all.
            let refused = ["1", "13", "2"].iter().any(|code| line.ends_with(&format!("refused with {code}")));
            assert!(refused, "{kind:?}: user {BOB} and a file of user {ALICE}: {line}");
        }
        let own = act(ALICE, mounted.folder(), "look", &file);
        assert!(own[0].starts_with("read: got"), "the owner himself: {own:#?}");
        assert!(own[4].contains("hush"), "the owner himself: {own:#?}");

        fs::write(home.join("public"), pattern(1, 10_000)).unwrap();
        act(BOB, mounted.folder(), "beyond", &home.join("public"));
        mounted.finish();
    }
}

#[test]
fn another_user_gets_nothing_over_the_control_socket() {
    if let Some(reason) = no_users() {
        return skip(reason);
    }
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &["--allow-other"]);
        fs::write(mounted.point.join("secret"), pattern(1, 100_000)).unwrap();
        let program = for_everybody(&nvtier_path(), mounted.folder());
        let ask = |words: &[&str]| {
            let mut command = as_user(BOB, &program);
            command.args(words).arg("--pool").arg(&mounted.pool).env_remove("XDG_RUNTIME_DIR");
            let ran = run(&mut command).refused_somehow(&[]);
            assert!(!ran.stdout.contains("secret"), "{kind:?}: {ran:#?}");
            assert!(ran.stderr.to_lowercase().contains("permi"), "{kind:?}: {ran:#?}");
        };
        let all = |ask: &dyn Fn(&[&str])| {
            ask(&["ls"]);
            ask(&["stat", "secret"]);
            ask(&["export", "secret", "/dev/null", "--force"]);
            ask(&["rm", "secret"]);
            ask(&["verify"]);
        };
        all(&ask);
        // The modes are the first line only. Behind them the owner looks at who comes.
        if kind == Kind::Directory {
            fs::set_permissions(&mounted.pool, Permissions::from_mode(0o755)).unwrap();
            for name in ["superblock", "control.sock", "owner"] {
                fs::set_permissions(mounted.pool.join(name), Permissions::from_mode(0o666)).unwrap();
            }
            all(&ask);
        }
        assert_eq!(fs::read(mounted.point.join("secret")).unwrap(), pattern(1, 100_000));
        mounted.finish();
    }
}

/// Everything at and below a path, links not followed.
fn walk(path: &Path, seen: &mut dyn FnMut(&Path, &fs::Metadata)) {
    let found = fs::symlink_metadata(path).unwrap();
    seen(path, &found);
    if found.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            walk(&entry.unwrap().path(), seen);
        }
    }
}

#[test]
fn pools_are_closed_to_others_whatever_the_umask() {
    for kind in KINDS {
        let folder = scratch();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (pool, source) = (path("pool"), path("source"));
        fs::write(&source, pattern(1, 3_000_000)).unwrap();
        let careless = |words: &[&str]| {
            let mut command = Command::new("sh");
            command.args(["-c", r#"umask 0; exec "$@""#, "sh"]).arg(nvtier_path()).args(words);
            run(&mut command).ok();
        };
        match kind {
            Kind::Directory => careless(&["format", &pool]),
            Kind::Raw => careless(&["format", &pool, "--raw", "--size", "256MiB"]),
            Kind::Striped => {
                careless(&["format", &pool, "--member", &path("member-a"), "--member", &path("member-b")])
            }
        }
        for name in ["a", "b/c"] {
            careless(&["import", &source, name, "--pool", &pool]);
        }
        careless(&["import", &source, "a", "--force", "--pool", &pool]);
        careless(&["verify", "--pool", &pool]);
        let mut count = 0;
        for root in ["pool", "member-a", "member-b"] {
            let root = folder.path().join(root);
            if !root.exists() {
                continue;
            }
            walk(&root, &mut |path, found| {
                let wanted = if found.is_dir() { 0o700 } else { 0o600 };
                assert!(!found.file_type().is_socket(), "{kind:?}: {}", path.display());
                assert_eq!(found.mode() & 0o7777, wanted, "{kind:?}: {}", path.display());
                count += 1;
            });
        }
        assert!(count >= if kind == Kind::Raw { 1 } else { 6 }, "{kind:?}: {count} files");
    }
}

#[test]
fn no_command_prints_the_secret_of_a_url() {
    let folder = scratch();
    let pool = nvtier_tests::format(Kind::Directory, folder.path());
    for url in [
        "https://user:s3cret@127.0.0.1:1/x",
        "http://127.0.0.1:1/x?X-Amz-Signature=s3cret",
        "s3://user:s3cret@bucket/x",
        "https://user:s3cret/@127.0.0.1:no-port/x",
    ] {
        for words in
            [vec!["import", url, "name", "-v", "-v"], vec!["verify", "name", "--repair", "--from", url]]
        {
            for json in [false, true] {
                let mut command = Command::new(nvtier_path());
                command.args(&words).args(json.then_some("--json")).arg("--pool").arg(&pool);
                let ran = run(&mut command).refused_somehow(&[]);
                let all = format!("{}{}", ran.stdout, ran.stderr);
                assert!(!all.contains("s3cret"), "{words:?} printed it: {ran:#?}");
            }
        }
    }
}
