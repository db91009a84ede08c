//! What is logged of a request, and by what it is switched on.

use std::fs;
use std::process::Command;

use nvtier_tests::{Kind, Mounted, Ran, format, nvtier_path, pattern, run, scratch, wait_for};

fn with(variable: &str, value: &str, args: &[&str]) -> Ran {
    let mut command = Command::new(nvtier_path());
    command.env_remove("NVTIER_LOG").env_remove("RUST_LOG").env(variable, value).args(args);
    run(&mut command)
}

#[test]
fn a_served_read_is_a_span_with_the_regions_read_inside() {
    let folder = scratch();
    let pool = format(Kind::Raw, folder.path());
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    let paths = [mounted.pool.to_str().unwrap(), mounted.point.to_str().unwrap()];
    let mount = |directives: &str| {
        let ran =
            with("NVTIER_LOG", directives, &["mount", paths[0], paths[1], "--ram", "64MiB", "--json"]).ok();
        ran.json()["log"].as_str().unwrap().to_owned()
    };
    let file = mounted.point.join("f");
    let bytes = pattern(1, 100_000);
    let log = mount("info");
    fs::write(&file, &bytes).unwrap();
    assert_eq!(fs::read(&file).unwrap(), bytes);
    let quiet = fs::read_to_string(&log).unwrap();
    assert!(!quiet.contains("fuse_"), "nobody asked for that: {quiet}");
    mounted.umount().ok();

    let log = mount("fuse_fs=trace,engine::region_read=trace,info");
    assert_eq!(fs::read(&file).unwrap(), bytes);
    fs::write(mounted.point.join("g"), &bytes).unwrap();
    let text = wait_for(|| {
        let text = fs::read_to_string(&log).unwrap();
        (text.contains("fuse_read{") && text.contains("fuse_write{")).then_some(text)
    });
    let text = text.unwrap_or_else(|| panic!("{}", fs::read_to_string(&log).unwrap()));
    let line = |start: &str| {
        text.lines().find(|line| line.contains(start)).unwrap_or_else(|| panic!("no {start}: {text}"))
    };
    let read = line("}:region_read{").to_owned() + line("fuse_read{fh=");
    for word in ["fuse_read{fh=", "offset=0", "size=", "node=", "len=", "time.busy="] {
        assert!(read.contains(word), "{word} is not in {read}");
    }
    assert!(line("fuse_write{").contains("time.busy="), "{text}");
    mounted.finish();
}

#[test]
fn a_load_is_a_span_that_says_what_it_waited_for() {
    let folder = scratch();
    let file = folder.path().join("m.safetensors");
    let header = r#"{"a":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(pattern(2, 1_000_000));
    fs::write(&file, bytes).unwrap();
    let load =
        |variable, value| with(variable, value, &["load", file.to_str().unwrap(), "--device", "cpu"]).ok();
    for variable in ["RUST_LOG", "NVTIER_LOG"] {
        let ran = load(variable, "gpudirect=debug");
        let line =
            ran.stderr.lines().find(|line| line.contains("lane_read{")).unwrap_or_else(|| panic!("{ran:#?}"));
        for word in ["bytes=1000000", "reads=", "copies=", "io_wait_us=", "verify_us=", "time.busy="] {
            assert!(line.contains(word), "{word} is not in {line}");
        }
    }
    assert!(!load("RUST_LOG", "warn").stderr.contains("lane_read"));
}

#[test]
fn wrong_directives_are_told() {
    with("NVTIER_LOG", "fuse_fs=loud", &["version"]).refused(2, &["NVTIER_LOG", "fuse_fs=loud", "trace"]);
    let ran = with("RUST_LOG", "fuse_fs=loud", &["version"]).ok();
    assert!(ran.stderr.contains("RUST_LOG"), "{ran:#?}");
    assert_eq!(with("NVTIER_LOG", "", &["version"]).ok().stderr, "");
}
