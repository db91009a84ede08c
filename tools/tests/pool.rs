//! A pool from the command line: format, import, ls, stat, verify, export, rm; their JSON; what they refuse.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nvtier_tests::{KINDS, Kind, Ran, format, nvtier, nvtier_path, pattern, run, scratch};
use serde_json::Value;

struct Pool {
    path: PathBuf,
    folder: tempfile::TempDir,
}

impl Pool {
    fn new(kind: Kind) -> Self {
        let folder = scratch();
        Self { path: format(kind, folder.path()), folder }
    }

    /// Runs a command on the pool.
    fn run(&self, args: &[&str]) -> Ran {
        run(Command::new(nvtier_path()).args(args).arg("--pool").arg(&self.path))
    }

    fn json(&self, args: &[&str]) -> Value {
        run(Command::new(nvtier_path()).args(args).arg("--json").arg("--pool").arg(&self.path)).ok().json()
    }

    /// Writes a local file and returns its path.
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn local(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn names(&self) -> Vec<String> {
        let listed = self.json(&["ls", "-r"]);
        listed["entries"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["path"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// A safetensors file with this header and data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

fn one_tensor() -> Vec<u8> {
    safetensors(
        r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#,
        &pattern(1, 24),
    )
}

#[test]
fn bytes_go_in_and_come_out_the_same() {
    for kind in KINDS {
        let pool = Pool::new(kind);
        for (index, len) in [0, 1, 4095, 4096, 1 << 20, (3 << 20) + 12_345].into_iter().enumerate() {
            let bytes = pattern(index as u64, len);
            let source = pool.file("source", &bytes);
            let name = format!("d/r{len}");
            let imported = pool.json(&["import", &source, &name]);
            assert_eq!(imported["bytes"], len);
            assert_eq!(imported["resumed_bytes"], 0);
            let out = pool.local(&format!("out{len}"));
            let exported = pool.json(&["export", &name, &out]);
            assert_eq!(exported["bytes"], len);
            assert!(fs::read(&out).unwrap() == bytes, "{kind:?}: {len} bytes came back differently");
        }
        let report = pool.json(&["verify"]);
        assert_eq!(report["clean"], true);
        assert_eq!(report["report"]["regions"], 6);
        // Nothing is left of the transfers, in the pool or beside the files.
        assert!(pool.names().iter().all(|name| name == "d" || name.starts_with("d/r")), "{:?}", pool.names());
        assert!(
            !fs::read_dir(pool.folder.path()).unwrap().any(|e| e
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .starts_with('.'))
        );
    }
}

#[test]
fn a_snapshot_keeps_its_tree_and_its_links_are_followed() {
    let pool = Pool::new(Kind::Directory);
    let shard = one_tensor();
    pool.file("hub/blobs/aa", &shard);
    pool.file("hub/blobs/bb", b"{\"model_type\":\"llama\"}");
    let snapshot = pool.folder.path().join("hub/snapshots/rev");
    fs::create_dir_all(snapshot.join("empty")).unwrap();
    fs::create_dir_all(snapshot.join("deep/er")).unwrap();
    symlink("../../blobs/aa", snapshot.join("model-00001-of-00001.safetensors")).unwrap();
    symlink("../../blobs/bb", snapshot.join("config.json")).unwrap();
    fs::write(snapshot.join("deep/er/notes.txt"), b"hello").unwrap();
    let index = r#"{"metadata":{},"weight_map":{"w":"model-00001-of-00001.safetensors"}}"#;
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();

    let imported = pool.json(&["import", snapshot.to_str().unwrap(), "models/m"]);
    assert_eq!(imported["regions"], 4);
    let expected = [
        "models",
        "models/m",
        "models/m/config.json",
        "models/m/deep",
        "models/m/deep/er",
        "models/m/deep/er/notes.txt",
        "models/m/empty",
        "models/m/model-00001-of-00001.safetensors",
        "models/m/model.safetensors.index.json",
    ];
    let mut names = pool.names();
    names.sort();
    assert_eq!(names, expected);

    let out = pool.local("out");
    pool.run(&["export", "models/m", &out]).ok();
    assert!(fs::read(Path::new(&out).join("model-00001-of-00001.safetensors")).unwrap() == shard);
    assert_eq!(fs::read(Path::new(&out).join("deep/er/notes.txt")).unwrap(), b"hello");
    assert!(Path::new(&out).join("empty").is_dir());
    pool.run(&["export", "models/m", &out]).refused(1, &["not empty", "--force"]);
    pool.run(&["export", "models/m", &out, "--force"]).ok();

    // A shard that the index names is gone: nothing is imported.
    fs::remove_file(snapshot.join("model-00001-of-00001.safetensors")).unwrap();
    let ran = pool.run(&["import", snapshot.to_str().unwrap(), "models/n"]);
    ran.refused(5, &["model-00001-of-00001.safetensors", "--no-check"]);
    pool.run(&["stat", "models/n"]).refused(3, &["models/n"]);
    pool.run(&["import", snapshot.to_str().unwrap(), "models/n", "--no-check"]).ok();
}

#[test]
fn stat_and_ls_have_the_promised_json() {
    let pool = Pool::new(Kind::Directory);
    let source = pool.file("w.safetensors", &one_tensor());
    pool.run(&["import", &source, "m/w.safetensors"]).ok();
    let stat = pool.json(&["stat", "m/w.safetensors"]);
    assert_eq!(stat["entry"]["path"], "m/w.safetensors");
    assert_eq!(stat["entry"]["kind"], "region");
    let tensors = &stat["tensors"];
    assert_eq!(tensors["format"], "safetensors");
    assert_eq!(tensors["metadata"]["format"], "pt");
    let tensor = &tensors["tensors"][0];
    assert_eq!(tensor["name"], "w");
    assert_eq!(tensor["dtype"], "F32");
    assert_eq!(tensor["shape"], serde_json::json!([2, 3]));
    let len = one_tensor().len();
    assert_eq!(tensor["data_offsets"], serde_json::json!([len - 24, len]));
    let text = pool.run(&["stat", "m/w.safetensors"]).ok().stdout;
    assert!(
        text.contains("F32") && text.contains("[2, 3]") && text.contains(&(len - 24).to_string()),
        "{text}"
    );

    let listed = pool.json(&["ls", "m"]);
    let entry = &listed["entries"][0];
    assert_eq!((entry["path"].as_str(), entry["size"].as_u64()), (Some("m/w.safetensors"), Some(len as u64)));
    for key in ["allocated", "mode", "uid", "gid", "modified", "generation"] {
        assert!(entry[key].is_u64(), "{key}: {entry}");
    }
    let text = pool.run(&["ls"]).ok().stdout;
    assert!(text.contains("drwx") && text.contains("m/"), "{text}");
    assert_eq!(pool.json(&["stat", "m"])["entry"]["kind"], "directory");

    let info = pool.json(&["info"]);
    assert_eq!(info["info"]["members"][0]["kind"], "directory");
    assert!(info["stat"]["free_bytes"].as_u64().unwrap() > 0);
    assert!(info["owner_pid"].is_null());
    let text = pool.run(&["info"]).ok().stdout;
    assert!(text.contains("regions      1"), "{text}");
}

#[test]
fn what_exists_is_replaced_only_when_asked() {
    let pool = Pool::new(Kind::Directory);
    let (first, second) = (pool.file("a", b"first"), pool.file("b", b"second"));
    pool.run(&["import", &first, "r"]).ok();
    pool.run(&["import", &second, "r"]).refused(1, &["`r`", "--force"]);
    pool.run(&["import", &second, "r", "--force"]).ok();
    let out = pool.local("out");
    pool.run(&["export", "r", &out]).ok();
    assert_eq!(fs::read(&out).unwrap(), b"second");
    pool.run(&["export", "r", &out]).refused(1, &["exists", "--force"]);
    pool.run(&["export", "r", &out, "-f"]).ok();

    let tree = pool.folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("x"), b"x").unwrap();
    pool.run(&["import", tree.to_str().unwrap(), "t"]).ok();
    fs::rename(tree.join("x"), tree.join("y")).unwrap();
    pool.run(&["import", tree.to_str().unwrap(), "t"]).refused(1, &["`t`", "--force"]);
    pool.run(&["import", tree.to_str().unwrap(), "t", "--force"]).ok();
    assert_eq!(pool.names(), ["r", "t", "t/y"]);
    pool.run(&["import", &first, "t"]).refused(1, &["directory", "t/FILE"]);
    pool.run(&["import", &first, "r/below"]).refused_somehow(&["r"]);
}

#[test]
fn rm_removes_what_it_is_told_to() {
    let pool = Pool::new(Kind::Directory);
    let source = pool.file("a", b"x");
    for name in ["d/e/a", "d/b", "line\nbreak", &"n".repeat(255)] {
        pool.run(&["import", &source, name]).ok();
    }
    pool.run(&["rm", "d"]).refused(1, &["not empty", "-r"]);
    pool.run(&["rm", "line\nbreak", "gone"]).refused(3, &["gone"]);
    assert!(pool.names().contains(&"line\nbreak".to_owned()), "a refused rm removed something");
    pool.run(&["rm", "-f", "line\nbreak", "gone"]).ok();
    let removed = pool.json(&["rm", "-r", "d"]);
    assert_eq!(removed["removed"], serde_json::json!(["d"]));
    assert_eq!(pool.names(), ["n".repeat(255)]);
    pool.run(&["rm", ""]).refused(2, &["empty"]);
}

#[test]
fn listings_cannot_drive_the_terminal() {
    let pool = Pool::new(Kind::Directory);
    let source = pool.file("a", b"x");
    pool.run(&["import", &source, "evil\n\u{1b}[2J"]).ok();
    let text = pool.run(&["ls"]).ok().stdout;
    assert!(!text.contains('\u{1b}') && text.contains("evil\\n\\u{1b}[2J"), "{text:?}");
}

#[test]
fn files_that_lie_are_refused_with_the_reason() {
    let pool = Pool::new(Kind::Directory);
    let tensor =
        |offsets: &str| format!("{{\"w\":{{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":{offsets}}}}}");
    let twice = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#;
    let overlap = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}"#;
    let lies: [(&str, Vec<u8>); 9] = [
        ("beyond.safetensors", safetensors(&tensor("[0,16]"), &[0; 8])),
        ("huge.safetensors", safetensors(&tensor("[0,9223372036854775808]"), &[0; 16])),
        ("twice.safetensors", safetensors(twice, &[0; 16])),
        ("overlap.safetensors", safetensors(overlap, &[0; 12])),
        (
            "dtype.safetensors",
            safetensors(r#"{"a":{"dtype":"F33","shape":[8],"data_offsets":[0,8]}}"#, &[0; 8]),
        ),
        ("header.safetensors", [&(1_u64 << 63).to_le_bytes()[..], &[b'{'; 64]].concat()),
        ("cut.safetensors", one_tensor()[..40].to_vec()),
        (
            "count.gguf",
            [b"GGUF\x03\0\0\0", &u64::MAX.to_le_bytes()[..], &[1, 0, 0, 0, 0, 0, 0, 0], &[0; 64]].concat(),
        ),
        ("magic.gguf", b"GGML\x03\0\0\0".to_vec()),
    ];
    for (name, bytes) in &lies {
        let source = pool.file(name, bytes);
        pool.run(&["import", &source, name]).refused(5, &[name, "--no-check"]);
        assert!(pool.names().is_empty(), "{name} left {:?}", pool.names());
    }
    let (name, bytes) = &lies[0];
    pool.run(&["import", &pool.local(name), name, "--no-check"]).ok();
    let stat = pool.json(&["stat", name]);
    assert!(stat["tensors"].is_null() && stat["malformed"].is_string(), "{stat}");
    let out = pool.local("out");
    pool.run(&["export", name, &out]).ok();
    assert!(fs::read(&out).unwrap() == *bytes);
}

/// Flips a bit in every file below a directory that holds `needle`; returns how many it flipped.
fn corrupt(directory: &Path, needle: &[u8]) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            count += corrupt(&path, needle);
            continue;
        }
        let bytes = fs::read(&path).unwrap_or_default();
        if let Some(at) = bytes.windows(needle.len()).position(|window| window == needle) {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[bytes[at + 100] ^ 4], at as u64 + 100).unwrap();
            file.sync_all().unwrap();
            count += 1;
        }
    }
    count
}

#[test]
fn corrupt_bytes_are_found_and_never_handed_out() {
    for kind in [Kind::Directory, Kind::Striped] {
        let pool = Pool::new(kind);
        let bytes = pattern(5, 300_000);
        pool.run(&["import", &pool.file("good", &pattern(6, 100_000)), "good"]).ok();
        pool.run(&["import", &pool.file("bad", &bytes), "bad"]).ok();
        for name in ["good", "bad"] {
            fs::remove_file(pool.folder.path().join(name)).unwrap();
        }
        assert_eq!(corrupt(pool.folder.path(), &bytes[200_000..200_512]), 1);
        pool.run(&["verify", "good"]).ok();
        let ran = pool.run(&["verify"]).refused(5, &["corrupt"]);
        assert!(ran.stdout.contains("bad"), "{ran:#?}");
        let ran = pool.run(&["verify", "--json"]);
        let report = ran.refused(5, &[]).json();
        assert_eq!(report["clean"], false);
        assert_eq!(report["report"]["bad"][0]["path"], "bad");
        assert_eq!(report["report"]["bad"][0]["chunk"], 200_100 / 16_384);
        let out = pool.local("out");
        pool.run(&["export", "bad", &out]).refused(5, &["bad"]);
        assert!(!Path::new(&out).exists(), "an export of corrupt bytes left a file");
        assert!(
            !fs::read_dir(pool.folder.path()).unwrap().any(|e| e
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .starts_with('.'))
        );
    }
}

#[test]
fn a_quota_is_kept_and_what_does_not_fit_leaves_nothing() {
    let folder = scratch();
    let path = folder.path().join("pool");
    nvtier(["format", path.to_str().unwrap(), "--size", "64MiB"]).ok();
    let pool = Pool { path, folder };
    pool.run(&["import", &pool.file("old", &pattern(8, 10 << 20)), "old"]).ok();
    let free = pool.json(&["info"])["stat"]["free_bytes"].as_u64().unwrap();
    pool.run(&["import", &pool.file("large", &pattern(9, 80 << 20)), "large"])
        .refused(6, &["large", "nvtier rm"]);
    for index in 0..4 {
        pool.file(&format!("tree/{index}"), &pattern(index, 20 << 20));
    }
    pool.run(&["import", &pool.local("tree"), "tree"]).refused(6, &["tree"]);
    assert_eq!(pool.names(), ["old"]);
    let free_after = pool.json(&["info"])["stat"]["free_bytes"].as_u64().unwrap();
    assert!(free_after + (1 << 20) >= free, "{free_after} bytes of {free} are free again");
    pool.run(&["verify"]).ok();
    pool.run(&["import", &pool.file("fits", &pattern(10, 30 << 20)), "fits"]).ok();
}

#[test]
fn a_full_disk_stops_an_export_without_a_trace() {
    let pool = Pool::new(Kind::Directory);
    pool.run(&["import", &pool.file("a", &pattern(3, 100_000)), "a"]).ok();
    pool.run(&["export", "a", "/proc/out"]).refused_somehow(&["/proc"]);
    pool.run(&["export", "missing", &pool.local("out")]).refused(3, &["missing"]);
}

#[test]
fn a_place_with_other_data_is_refused_and_named() {
    let folder = scratch();
    let place = folder.path().join("papers");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("thesis.txt"), b"important").unwrap();
    let place = place.to_str().unwrap();
    nvtier(["format", place]).refused(1, &["papers", "--force"]);
    assert_eq!(fs::read(folder.path().join("papers/thesis.txt")).unwrap(), b"important");
    let pool = folder.path().join("pool");
    let made = nvtier(["format", pool.to_str().unwrap(), "--json"]).ok().json();
    assert!(made["id"].is_string() && made["members"].is_array(), "{made}");
    nvtier(["format", pool.to_str().unwrap()]).refused(1, &["--force"]);
    for options in [["--chunk-size", "5000"], ["--chunk-size", "8MiB"], ["--stripe-unit", "4097"]] {
        let other = folder.path().join("other");
        nvtier([&["format", other.to_str().unwrap()], &options[..]].concat()).refused_somehow(&[]);
        assert!(
            !other.exists() || fs::read_dir(&other).unwrap().next().is_none(),
            "{options:?} left something"
        );
    }
}

#[test]
fn progress_is_plain_lines_where_there_is_no_terminal() {
    let pool = Pool::new(Kind::Directory);
    let source = pool.file("a", &pattern(3, 1 << 20));
    let ran = pool.run(&["import", &source, "a", "--progress", "plain"]).ok();
    assert!(ran.stderr.contains("import a: 1.0 MiB/1.0 MiB"), "{ran:#?}");
    let ran = pool.run(&["import", &source, "b", "--progress", "none"]).ok();
    assert_eq!(ran.stderr, "");
    let ran = pool.run(&["verify", "--json"]).ok();
    assert_eq!(ran.stderr, "");
}
