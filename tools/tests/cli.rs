//! The command line itself: help, mistakes, exit codes, configuration, completions, man pages. No pool is needed.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use nvtier_tests::{Ran, nvtier, nvtier_path, run, scratch};

const COMMANDS: [&str; 16] = [
    "demo",
    "format",
    "info",
    "import",
    "export",
    "ls",
    "stat",
    "verify",
    "rm",
    "mount",
    "umount",
    "train",
    "bench",
    "version",
    "completions",
    "man",
];

/// A command that sees no configuration but what the test gives it.
fn clean() -> Command {
    let mut command = Command::new(nvtier_path());
    command.env_remove("NVTIER_POOL").env_remove("NVTIER_CONFIG").env("XDG_CONFIG_HOME", "/nonexistent");
    command
}

fn with<const N: usize>(args: [&str; N]) -> Ran {
    run(clean().args(args))
}

#[test]
fn every_command_explains_itself() {
    let help = with(["--help"]).ok();
    for command in COMMANDS {
        assert!(help.stdout.contains(command), "`nvtier --help` does not name {command}");
        let help = with([command, "--help"]).ok();
        assert!(help.stdout.len() > 100 && help.stderr.is_empty(), "{command}: {help:#?}");
    }
    for code in ["3    the pool", "4    busy", "5    corrupt", "6    no space", "7    not supported", "130"] {
        assert!(help.stdout.contains(code), "`nvtier --help` does not document exit code `{code}`");
    }
    assert_eq!(with(["--version"]).ok().stdout.trim(), format!("nvtier {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn mistakes_are_usage_errors() {
    let lines: [&[&str]; 14] = [
        &[],
        &["frobnicate"],
        &["ls", "--frobnicate"],
        &["format"],
        &["format", "x", "--size", "12 GB"],
        &["format", "x", "--size", "1.5GiB"],
        &["format", "x", "--size", "0"],
        &["format", "x", "--size", "99999999999TiB"],
        &["mount", "only-one"],
        &["mount", "a", "b", "--verify", "sometimes"],
        &["mount", "a", "b", "--threads", "0"],
        &["import", "a", "b", "--connections", "0"],
        &["import", "a", "b", "--part-size", "1"],
        &["rm"],
    ];
    for line in lines {
        run(clean().args(line)).refused(2, &[]);
    }
    let mut not_utf8 = clean();
    not_utf8.arg("ls").arg(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff"));
    run(&mut not_utf8).refused(2, &[]);
}

#[test]
fn without_a_pool_the_message_says_how_to_name_one() {
    for line in [["ls", "x"], ["stat", "x"], ["verify", "x"], ["rm", "x"]] {
        with(line).refused(2, &["--pool", "NVTIER_POOL", "configuration"]);
    }
}

#[test]
fn names_that_cannot_be_are_usage_errors() {
    let folder = scratch();
    let file = folder.path().join("f");
    fs::write(&file, b"x").unwrap();
    let long = "n".repeat(256);
    for name in ["..", "a/../b", "", "/", ".nvtier/x", ".tensors", ".nvtier-partial/x", &long] {
        with(["import", file.to_str().unwrap(), name, "--pool", "/nonexistent"]).refused(2, &[]);
    }
    with(["rm", "a/..", "--pool", "/nonexistent"]).refused(2, &["`a/..`"]);
}

#[test]
fn a_pool_that_is_not_there_is_not_found() {
    for command in ["ls", "info", "verify"] {
        with([command, "--pool", "/nonexistent/pool"]).refused(3, &["/nonexistent/pool"]);
    }
    with(["mount", "/nonexistent/pool", "/tmp"]).refused(3, &["/nonexistent/pool"]);
    let folder = scratch();
    let missing = folder.path().join("missing");
    with(["import", missing.to_str().unwrap(), "x", "--pool", "/nonexistent"]).refused(3, &["missing"]);
}

#[test]
fn a_directory_that_is_no_pool_is_said_to_be_none() {
    let folder = scratch();
    with(["ls", "--pool", folder.path().to_str().unwrap()]).refused_somehow(&["nvtier format"]);
}

#[test]
fn errors_are_json_when_asked_for() {
    let ran = with(["ls", "--json", "--pool", "/nonexistent/pool"]).refused(3, &[]);
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["code"], 3);
    assert_eq!(error["error"]["kind"], "NotFound");
    assert!(error["error"]["message"].as_str().unwrap().contains("/nonexistent/pool"));
    assert!(ran.stdout.is_empty());
    let ran = with(["ls", "--json", "--frobnicate"]).refused(2, &[]);
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "Usage");
}

#[test]
fn the_configuration_gives_defaults_and_its_mistakes_are_named() {
    let folder = scratch();
    let file = folder.path().join("config.toml");
    let with_config = |text: &str| {
        fs::write(&file, text).unwrap();
        run(clean().env("NVTIER_CONFIG", &file).args(["ls", "x"]))
    };
    with_config("pool = '/nonexistent/from-config'").refused(3, &["/nonexistent/from-config"]);
    with_config("pol = '/x'").refused(2, &["config.toml", "pol"]);
    with_config("pool = ").refused(2, &["config.toml"]);
    with_config("[mount]\nram = '8 gigabytes'").refused(2, &["8 gigabytes"]);
    // The environment wins over the file, the command line over both.
    fs::write(&file, "pool = '/nonexistent/from-config'").unwrap();
    let mut command = clean();
    command.env("NVTIER_CONFIG", &file).env("NVTIER_POOL", "/nonexistent/from-env");
    run(command.args(["ls", "x"])).refused(3, &["/nonexistent/from-env"]);
    run(command.args(["--pool", "/nonexistent/from-flag"])).refused(3, &["/nonexistent/from-flag"]);
    // A file that was named must be there; the usual one need not.
    run(clean().env("NVTIER_CONFIG", folder.path().join("gone")).args(["ls", "x"])).refused(3, &["gone"]);
    let home = folder.path().join("home");
    fs::create_dir_all(home.join("nvtier")).unwrap();
    fs::write(home.join("nvtier/config.toml"), "pool = '/nonexistent/from-home'").unwrap();
    run(clean().env("XDG_CONFIG_HOME", &home).args(["ls", "x"])).refused(3, &["/nonexistent/from-home"]);
}

#[test]
fn version_tells_what_build_and_kernel_can_do() {
    let text = with(["version"]).ok().stdout;
    assert!(
        text.contains(env!("CARGO_PKG_VERSION")) && text.contains("io_uring") && text.contains("fuse"),
        "{text}"
    );
    let json = with(["version", "--json"]).ok().json();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    assert!(
        json["io_uring"].is_boolean() && json["fuse"].is_boolean() && json["kernel"].is_string(),
        "{json}"
    );
}

#[test]
fn completions_name_commands_and_options() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = with(["completions", shell]).ok().stdout;
        for word in ["import", "stripe-unit", "iodepth"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    with(["completions", "tcsh"]).refused(2, &["bash"]);
    // bash itself takes the script.
    let mut bash = Command::new("bash");
    bash.arg("-c")
        .arg(format!("eval \"$('{}' completions bash)\" && complete -p nvtier", nvtier_path().display()));
    let ran = run(&mut bash).ok();
    assert!(ran.stdout.contains("nvtier"), "{ran:#?}");
}

#[test]
fn man_pages_are_written_for_every_command() {
    let folder = scratch();
    let dir = folder.path().join("man/man1");
    let listed = with(["man", dir.to_str().unwrap()]).ok().stdout;
    for name in COMMANDS.iter().map(|command| format!("nvtier-{command}.1")).chain(["nvtier.1".to_owned()]) {
        let page = fs::read_to_string(dir.join(&name)).unwrap();
        assert!(page.contains(".TH") && page.contains(".SH"), "{name}");
        assert!(listed.contains(&name), "{name} is not listed");
    }
    assert!(fs::read_to_string(dir.join("nvtier.1")).unwrap().contains("corrupt data"));
    with(["man", "/proc/nowhere"]).refused_somehow(&["/proc/nowhere"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = clean()
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start nvtier");
    // Closed at once: whatever it writes meets a broken pipe, or fits into the pipe before.
    drop(child.stdout.take());
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert!(child.wait().unwrap().success(), "{message}");
    assert_eq!(message, "");
}

#[test]
fn a_full_standard_output_is_an_error() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = clean().args(["completions", "bash"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("standard output"), "{output:?}");
}

#[test]
fn unmounting_what_is_no_mount_of_ours_is_refused() {
    let folder = scratch();
    with(["umount", folder.path().to_str().unwrap()]).refused(3, &["nothing is mounted"]);
    with(["umount", folder.path().join("missing").to_str().unwrap()]).refused(3, &["missing"]);
    with(["umount", "/proc"]).refused(1, &["/proc", "proc", "umount(8)"]);
}

#[test]
fn bench_keeps_its_own_language() {
    nvtier(["bench", "--frobnicate=1"]).refused_somehow(&["frobnicate"]);
}
