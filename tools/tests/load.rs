//! `nvtier load`: into host memory, which is the same lane; what it says and refuses.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nvtier_tests::{
    KINDS, Kind, format, nvtier, nvtier_for_anybody, nvtier_path, pattern, run, scratch, skip,
};

/// A checkpoint of two files in `folder`; returns its directory and the bytes of all tensors.
fn checkpoint(folder: &Path, bytes: usize) -> (PathBuf, u64) {
    let directory = folder.join("m");
    fs::create_dir(&directory).unwrap();
    for part in 0..2u64 {
        let lens = [bytes / 2, 77, 4096];
        let mut entries = Vec::new();
        let mut data = Vec::new();
        for (i, len) in lens.into_iter().enumerate() {
            let start = data.len();
            data.extend(pattern(part * 10 + i as u64, len));
            entries.push(format!(
                "\"model.layers.{part}.{i}.weight\":{{\"dtype\":\"U8\",\"shape\":[{len}],\"data_offsets\":[{start},{}]}}",
                data.len()
            ));
        }
        let header = format!("{{{}}}", entries.join(","));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        fs::write(directory.join(format!("model-{part}.safetensors")), file).unwrap();
    }
    fs::write(directory.join("config.json"), "{}").unwrap();
    (directory, 2 * (bytes / 2 + 77 + 4096) as u64)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_directory_is_loaded_as_one_compared_and_saved() {
    let folder = scratch();
    let (directory, bytes) = checkpoint(folder.path(), 9_000_001);
    let out = folder.path().join("out.safetensors");
    let options = ["--device", "cpu", "--check", "--ceilings", "--ring", "8MiB", "--chunk", "256KiB"];
    let ran =
        nvtier(["load", text(&directory), "--json", "--save", text(&out)].into_iter().chain(options)).ok();
    let json = ran.json();
    assert_eq!(json["load"]["bytes"], bytes);
    assert_eq!(json["checked_bytes"], bytes);
    assert_eq!(json["load"]["sources"], 2);
    assert_eq!(json["load"]["tensors"], 6);
    assert_eq!(json["load"]["path"], "bounce");
    assert_eq!(json["load"]["pinned_bytes"], 8 << 20);
    assert!(json["load"]["device_extra_bytes"].as_u64().unwrap() < 6 * 256);
    assert!(json["ceilings"]["copy_bytes_per_second"].as_f64().unwrap() > 0.0);
    // Files of this size say nothing of a drive; and it is said.
    assert!(json["ceilings"]["drive_measured"] != "now", "{json:#}");
    assert!(
        json["load"]["notes"].to_string().contains("the drive was not measured: no file has 64"),
        "{json:#}"
    );
    assert!(json["ceilings"]["binding"]["share"].as_f64().unwrap() > 0.0);
    assert_eq!(json["save"]["bytes"], fs::metadata(&out).unwrap().len());
    // What was saved is loaded again, for people this time.
    let again = nvtier(["load", text(&out), "--device", "cpu", "--check", "--progress", "none"]).ok();
    for words in ["6 tensors of 1 files", "bounce", "bound by", "equal those of a plain read"] {
        assert!(again.stdout.contains(words), "{again:#?}");
    }
    let one =
        nvtier(["load", text(&directory), "--device", "cpu", "--json", "--filter", "*.1.?.weight"]).ok();
    assert_eq!(one.json()["load"]["tensors"], 3);
}

#[test]
fn the_ceilings_are_those_of_now_and_the_lower_one_binds() {
    let folder = scratch();
    let (directory, _) = checkpoint(folder.path(), 140 << 20);
    let options = ["--device", "cpu", "--no-tune", "--ceilings", "--json"];
    let json = nvtier(["load", text(&directory)].into_iter().chain(options)).ok().json();
    let ceilings = &json["ceilings"];
    assert_eq!(ceilings["drive_measured"], "now", "{json:#}");
    let rate = |name: &str| ceilings[name].as_f64().unwrap();
    let (drive, copies) = (rate("drive_bytes_per_second"), rate("copy_bytes_per_second"));
    let binding = &ceilings["binding"];
    assert_eq!(binding["ceiling"], if drive < copies { "drive" } else { "copies" });
    assert_eq!(binding["bytes_per_second"].as_f64().unwrap(), drive.min(copies));
}

#[test]
fn a_pool_is_loaded_with_its_checksums_and_without() {
    for kind in KINDS {
        let folder = scratch();
        let (directory, bytes) = checkpoint(folder.path(), 5_000_000);
        let pool = format(kind, folder.path());
        nvtier(["import", text(&directory), "models/m", "--pool", text(&pool)]).ok();
        for (options, verified) in [(&["--check"][..], 2), (&["--no-verify"][..], 0)] {
            let words = ["load", "models/m", "--pool", text(&pool), "--device", "cpu", "--json"];
            let json = nvtier(words.into_iter().chain(options.iter().copied())).ok().json();
            assert_eq!(json["load"]["bytes"], bytes, "{kind:?}");
            assert_eq!(json["load"]["verified_sources"], verified, "{kind:?}");
        }
        let load = |name: &str| nvtier(["load", name, "--pool", text(&pool), "--device", "cpu"]);
        load("models/none").refused(3, &["models/none"]);
        load("models").refused(3, &["no .safetensors"]);
        load("models/m/config.json").refused(1, &["no tensor file"]);
    }
}

/// What `--warm` brings into memory first is loaded from there, where the pool has a RAM tier, and is said to be read where it has none.
#[test]
fn a_warm_load_comes_from_the_ram_tier() {
    for kind in KINDS {
        let folder = scratch();
        let (directory, bytes) = checkpoint(folder.path(), 5_000_000);
        let pool = format(kind, folder.path());
        nvtier(["import", text(&directory), "models/m", "--pool", text(&pool)]).ok();
        let load = |more: &[&str]| {
            let words = ["load", "models/m", "--pool", text(&pool), "--device", "cpu", "--check"];
            nvtier(words.into_iter().chain(more.iter().copied())).ok()
        };
        let cold = load(&["--json"]).json();
        assert!(cold["load"]["tier_bytes"].as_u64().unwrap() < 1 << 20, "{kind:?}");
        let warm = load(&["--json", "--warm", "64MiB"]).json();
        let has_tier = matches!(kind, Kind::Raw | Kind::Striped);
        let wanted = if has_tier { bytes } else { 0 };
        assert_eq!(warm["load"]["tier_bytes"], wanted, "{kind:?}");
        assert_eq!(warm["load"]["bytes"], bytes);
        assert_eq!(warm["load"]["reads"] == 0, has_tier);
        let said = load(&["--warm", "64MiB"]).stdout;
        assert!(said.contains(if has_tier { "from the RAM tier" } else { "there is no RAM tier" }), "{said}");
    }
    nvtier(["load", "x", "--warm", "64MiB", "--device", "cpu"]).refused(2, &["--pool"]);
}

#[test]
fn without_cuda_it_says_what_is_missing_and_what_works() {
    let folder = scratch();
    let (directory, _) = checkpoint(folder.path(), 1000);
    let ran = nvtier(["load", text(&directory)]);
    if ran.code == 0 {
        return skip("this machine has CUDA");
    }
    ran.refused(7, &["CUDA", "--device cpu"]);
    nvtier(["load", text(&directory), "--device", "tpu"]).refused(2, &["tpu", "cuda:N"]);
}

/// Flags win over what is measured, what is measured is remembered, and the report says which it was.
#[test]
fn settings_come_from_flags_from_a_measurement_or_from_memory() {
    let folder = scratch();
    let (directory, _) = checkpoint(folder.path(), 160_000_000);
    let file = directory.join("model-0.safetensors");
    let before = fs::read(&file).unwrap();
    let load = |options: &[&str]| {
        let words = ["load", text(&file), "--device", "cpu", "--json", "--cache", "buffered"];
        let mut command = Command::new(nvtier_path());
        command.args(words.into_iter().chain(options.iter().copied()));
        run(command.env("XDG_CACHE_HOME", folder.path().join("cache"))).ok().json()["load"]["settings"]
            .clone()
    };
    assert_eq!(load(&[])["origin"], "default");
    let measured = load(&["--tune"]);
    assert_eq!(measured["origin"], "measured");
    let remembered = load(&[]);
    assert_eq!(remembered["origin"], "remembered");
    for name in ["chunk", "depth", "threads"] {
        assert_eq!(measured[name], remembered[name], "{name}");
    }
    let given = load(&["--threads", "3", "--chunk", "256KiB"]);
    assert_eq!((&given["origin"], &given["threads"]), (&"given".into(), &3.into()));
    assert_eq!(given["chunk"], 256 << 10);
    // What is left open is measured around what was given, and not remembered for others.
    let around = load(&["--threads", "3", "--tune"]);
    assert_eq!((&around["origin"], &around["threads"]), (&"measured".into(), &3.into()));
    assert_eq!(load(&[])["threads"], remembered["threads"]);
    assert_eq!(load(&["--no-tune"])["origin"], "default");
    assert!(fs::read(&file).unwrap() == before, "the probed file was written to");
}

#[test]
fn the_ways_are_explained_and_cufile_is_refused_where_there_is_none() {
    let folder = scratch();
    let (directory, _) = checkpoint(folder.path(), 100_000);
    let explained = nvtier(["load", text(&directory), "--device", "cpu", "--explain"]).ok();
    assert!(explained.stdout.contains("bounce: taken"), "{explained:#?}");
    let json = nvtier(["load", text(&directory), "--device", "cpu", "--explain", "--json"]).ok().json();
    assert_eq!(json["paths"][0]["path"], "bounce");
    assert_eq!(json["paths"][0]["usable"], true);
    let load = |options: &[&str]| {
        nvtier(["load", text(&directory), "--device", "cpu"].into_iter().chain(options.iter().copied()))
    };
    load(&["--path", "cufile"]).refused(7, &["by cuFile", "no CUDA device"]);
    load(&["--path", "bounce", "--check"]).ok();
    load(&["--explain", "--check"]).refused(2, &["--explain"]);
    nvtier(["load", "none", "--device", "cpu", "--explain"]).refused(3, &["none"]);
}

#[test]
fn bad_input_is_refused_in_words() {
    let folder = scratch();
    let (directory, _) = checkpoint(folder.path(), 100_000);
    let load = |path: &Path, options: &[&str]| {
        nvtier(["load", text(path), "--device", "cpu"].into_iter().chain(options.iter().copied()))
    };
    load(&folder.path().join("none.safetensors"), &[]).refused(3, &["none.safetensors"]);
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    load(&empty, &[]).refused(3, &["no .safetensors"]);
    load(&directory, &["--filter", "nothing"]).refused(3, &["nothing"]);
    load(&directory, &["--chunk", "3MiB"]).refused(2, &["power of two"]);
    load(&directory, &["--ring", "1MiB"]).refused(2, &["four chunks"]);
    load(&directory, &["--no-verify"]).refused(2, &["--pool"]);
    let model = directory.join("model-0.safetensors");
    let whole = fs::read(&model).unwrap();
    for cut in [5, 100, whole.len() - 1] {
        fs::write(&model, &whole[..cut]).unwrap();
        load(&directory, &[]).refused(1, &["model-0.safetensors"]);
    }
    fs::write(&model, &whole).unwrap();
    let nowhere = folder.path().join("no/such/f.safetensors");
    load(&directory, &["--save", text(&nowhere)]).refused(3, &["f.safetensors"]);
    let there = directory.join("model-1.safetensors");
    load(&directory, &["--device", "cpu", "--json"]).refused(2, &["--device"]);
    nvtier(["load", text(&there), text(&there), "--device", "cpu"]).refused(2, &["is both in"]);
}

#[test]
fn two_load_the_same_at_once() {
    let folder = scratch();
    let (directory, bytes) = checkpoint(folder.path(), 40_000_000);
    let start = || {
        let mut command = Command::new(nvtier_path());
        command.args(["load", text(&directory), "--device", "cpu", "--json", "--check"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for child in [start(), start()] {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["checked_bytes"], bytes);
    }
}

/// A small RLIMIT_MEMLOCK costs speed, not the load, and the note says the command that raises it.
#[test]
fn a_small_memlock_limit_is_named_with_what_to_do() {
    let folder = scratch();
    let program = nvtier_for_anybody(folder.path());
    let (directory, bytes) = checkpoint(folder.path(), 3_000_000);
    let mut command = Command::new("sh");
    command.arg("-c").arg("ulimit -l 64; exec \"$0\" load \"$1\" --device cpu --json --cache direct");
    command.arg(&program).arg(&directory);
    if rustix::process::getuid().is_root() {
        // Root may lock what it likes.
        const NOBODY: u32 = 65_534;
        let reachable = Command::new(&program).arg("version").uid(NOBODY).gid(NOBODY).output();
        if !reachable.is_ok_and(|output| output.status.success()) {
            return skip("an ordinary user cannot run a command in a scratch folder");
        }
        command.uid(NOBODY).gid(NOBODY);
    }
    let ran = run(&mut command);
    if ran.code != 0 && ran.stderr.contains("O_DIRECT") {
        return skip("the scratch folder's file system does no direct I/O");
    }
    let json = ran.ok().json();
    assert_eq!(json["load"]["bytes"], bytes);
    if json["load"]["backend"] != "io_uring" {
        return skip("no io_uring here");
    }
    assert_eq!(json["load"]["fixed_buffers"], false, "{json:#}");
    let notes = json["load"]["notes"].to_string();
    assert!(notes.contains("RLIMIT_MEMLOCK is 65536 bytes") && notes.contains("ulimit -l"), "{notes}");
}

#[test]
fn a_load_through_a_mount_or_beside_it_gives_the_same() {
    if fs::File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return skip("/dev/fuse cannot be opened");
    }
    let mounted = nvtier_tests::Mounted::new(Kind::Directory, &[]);
    let (directory, bytes) = checkpoint(mounted.folder(), 3_000_000);
    nvtier(["import", text(&directory), "m", "--pool", text(&mounted.pool)]).ok();
    let through =
        nvtier(["load", text(&mounted.point.join("m")), "--device", "cpu", "--check", "--json"]).ok().json();
    let beside = nvtier(["load", "m", "--pool", text(&mounted.pool), "--device", "cpu", "--check", "--json"])
        .ok()
        .json();
    for json in [&through, &beside] {
        assert_eq!(json["checked_bytes"], bytes, "{json:#}");
    }
    assert_eq!(beside["load"]["verified_sources"], 2);
    mounted.finish();
}

/// Host memory reads no mapped files: what is asked for and cannot be is said, and the bytes are right either way.
#[test]
fn mapped_files_are_copied_where_the_device_reads_none_and_it_is_said() {
    let folder = scratch();
    let (directory, bytes) = checkpoint(folder.path(), 3_000_000);
    for (how, noted) in [("auto", false), ("copy", false), ("map", true)] {
        let options = ["--device", "cpu", "--check", "--json", "--cache", "buffered", "--cached", how];
        let json = nvtier(["load", text(&directory)].into_iter().chain(options)).ok().json();
        assert_eq!(json["checked_bytes"], bytes, "{how}");
        assert_eq!(json["load"]["mapped_bytes"], 0, "{how}");
        let notes = json["load"]["notes"].to_string();
        assert_eq!(notes.contains("copied by threads"), noted, "{how}: {notes}");
    }
    nvtier(["load", text(&directory), "--device", "cpu", "--cached", "other"])
        .refused(2, &["auto", "map", "copy"]);
}
