//! Section 6: tensors, and the state of the mount.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use rustix::io::Errno;

use crate::both_ways;
use crate::common::{Mount, Way, errno, pattern, skip};

/// A safetensors file with one F32 matrix, one I64 vector and one BF16 vector. Returns it and the raw bytes of each.
fn safetensors(seed: u64) -> (Vec<u8>, BTreeMap<&'static str, Vec<u8>>) {
    let tensors = [("a/w", "F32", "[3,5]", 60), ("ids", "I64", "[4]", 32), ("half", "BF16", "[7]", 14)];
    let mut header = String::from("{");
    let mut data = Vec::new();
    let mut parts = BTreeMap::new();
    for (i, (name, dtype, shape, len)) in tensors.into_iter().enumerate() {
        let part = pattern(seed + i as u64, len);
        let (start, end) = (data.len(), data.len() + len);
        let comma = if i == 0 { "" } else { "," };
        header += &format!(
            "{comma}\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"
        );
        data.extend_from_slice(&part);
        parts.insert(name, part);
    }
    header.push('}');
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    (file, parts)
}

fn xattr(path: &Path, name: &str) -> Result<String, Errno> {
    let mut value = vec![0u8; 4096];
    let len = rustix::fs::getxattr(path, format!("user.nvtier.{name}"), value.as_mut_slice())?;
    Ok(String::from_utf8(value[..len].to_vec()).unwrap())
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Header and data of a .npy file (NumPy format 1.0).
fn npy(bytes: &[u8]) -> (String, &[u8]) {
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let len = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    assert_eq!((10 + len) % 64, 0, "data must be aligned");
    (String::from_utf8(bytes[10..10 + len].to_vec()).unwrap(), &bytes[10 + len..])
}

both_ways! {
    fn tensors_appear_when_the_writer_closes(mount: Mount) {
        fs::create_dir(mount.path("dir")).unwrap();
        fs::write(mount.path("dir/other.txt"), b"no tensors").unwrap();
        let views = mount.path(".tensors/dir/m.safetensors");
        for seed in [100, 200] {
            let (file, parts) = safetensors(seed);
            fs::write(mount.path("dir/m.safetensors"), &file).unwrap();
            // At once, without waiting for anything.
            assert_eq!(names(&views), ["a%2Fw.npy", "half.npy", "ids.npy"]);
            assert_eq!(names(&mount.path(".tensors/dir")), ["m.safetensors"]);
            assert_eq!(names(&mount.path(".tensors")), ["dir"]);
            let bytes = fs::read(views.join("a%2Fw.npy")).unwrap();
            let (header, data) = npy(&bytes);
            assert!(header.contains("'descr': '<f4'") && header.contains("(3, 5)"), "{header}");
            assert_eq!(data, parts["a/w"]);
            let bytes = fs::read(views.join("ids.npy")).unwrap();
            assert_eq!(npy(&bytes).1, parts["ids"]);
            assert_eq!(bytes.len() as u64, fs::metadata(views.join("ids.npy")).unwrap().len());
            // Reads at every kind of place: inside the header, across its end, inside the data, at the end.
            let view = File::open(views.join("ids.npy")).unwrap();
            for (offset, len) in [(0, 10), (bytes.len() - 40, 20), (bytes.len() - 5, 100), (bytes.len(), 10)] {
                let mut buffer = vec![0u8; len];
                let read = view.read_at(&mut buffer, offset as u64).unwrap();
                assert_eq!(buffer[..read], bytes[offset..(offset + len).min(bytes.len())]);
            }
        }
        assert_eq!(errno(fs::write(views.join("ids.npy"), b"")), Errno::ROFS);
        assert_eq!(errno(fs::remove_file(views.join("ids.npy"))), Errno::ROFS);
        assert_eq!(errno(fs::create_dir(mount.path(".tensors/new"))), Errno::ROFS);
        assert_eq!(errno(fs::read(views.join("none.npy"))), Errno::NOENT);
        // Ordinary files of the mirror are not there.
        assert_eq!(errno(fs::metadata(mount.path(".tensors/dir/other.txt"))), Errno::NOENT);
        // d_ino of the listing is st_ino of the file.
        use std::os::unix::fs::DirEntryExt;
        for entry in fs::read_dir(&views).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.ino(), fs::metadata(entry.path()).unwrap().ino());
        }
        fs::remove_file(mount.path("dir/m.safetensors")).unwrap();
        assert_eq!(names(&mount.path(".tensors/dir")), [] as [&str; 0]);
    }

    fn an_old_view_is_stale_after_a_replacement(mount: Mount) {
        let (file, parts) = safetensors(300);
        fs::write(mount.path("m.safetensors"), &file).unwrap();
        let path = mount.path(".tensors/m.safetensors/ids.npy");
        let view = File::open(&path).unwrap();
        let mut old = Vec::new();
        (&view).read_to_end(&mut old).unwrap();
        assert_eq!(npy(&old).1, parts["ids"]);
        let (file, parts) = safetensors(400);
        fs::write(mount.path("new"), &file).unwrap();
        fs::rename(mount.path("new"), mount.path("m.safetensors")).unwrap();
        // By name: the new bytes. The kernel may believe the old name for a second, and then learns better.
        let fresh = crate::common::wait_for(|| {
            let bytes = match fs::read(&path) {
                // Opened by the old name, and replaced: what the view that is open says, too.
                Err(error) if error.kind() == std::io::ErrorKind::StaleNetworkFileHandle => return None,
                read => read.unwrap(),
            };
            (npy(&bytes).1 == parts["ids"]).then_some(())
        });
        assert!(fresh.is_some(), "the view still shows the replaced file");
        drop(view);
    }

    fn numpy_maps_views(mount: Mount) {
        let (file, _) = safetensors(500);
        fs::write(mount.path("m.safetensors"), &file).unwrap();
        let script = r#"
import numpy, struct
v = numpy.load(".tensors/m.safetensors/a%2Fw.npy", mmap_mode="r")
raw = open("m.safetensors", "rb").read()
start = 8 + struct.unpack("<Q", raw[:8])[0]
assert v.shape == (3, 5) and v.tobytes() == raw[start:start + 60]
a = numpy.memmap("w.bin", dtype="float32", mode="w+", shape=(1000,)); a[:] = numpy.arange(1000); a.flush()
assert (numpy.fromfile("w.bin", dtype="float32") == a).all()
numpy.save("x.npy", numpy.arange(12).reshape(3, 4))
assert (numpy.load(".tensors/x.npy/" + __import__("os").listdir(".tensors/x.npy")[0]) == numpy.load("x.npy")).all()
"#;
        let output = Command::new("python3").arg("-c").arg(script).current_dir(mount.root()).output();
        match output {
            Ok(output) if String::from_utf8_lossy(&output.stderr).contains("No module named 'numpy'") => skip("no numpy"),
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => skip(&format!("python3: {error}")),
        }
    }

    fn a_broken_header_is_an_empty_directory(mount: Mount) {
        let mut bad = 99u64.to_le_bytes().to_vec();
        bad.extend_from_slice(b"{\"w\":{\"dtype\":\"F32\",\"shape\":[9],\"data_offsets\":[0,4]}}");
        fs::write(mount.path("bad.safetensors"), &bad).unwrap();
        let directory = mount.path(".tensors/bad.safetensors");
        assert_eq!(names(&directory), [] as [&str; 0]);
        for path in [&directory, &mount.path("bad.safetensors")] {
            assert!(!xattr(path, "error").unwrap().is_empty());
            assert_eq!(xattr(path, "tensors"), Err(Errno::NODATA));
        }
        assert_eq!(fs::read(mount.path("bad.safetensors")).unwrap(), bad);
        let (good, _) = safetensors(1);
        fs::write(mount.path("bad.safetensors"), good).unwrap();
        assert_eq!(xattr(&mount.path("bad.safetensors"), "error"), Err(Errno::NODATA));
        assert_eq!(names(&directory).len(), 3);
    }

    fn tensor_attributes(mount: Mount) {
        let (file, _) = safetensors(600);
        let path = mount.path("m.safetensors");
        fs::write(&path, &file).unwrap();
        assert_eq!(xattr(&path, "format").unwrap(), "safetensors");
        assert_eq!(xattr(&path, "tensors").unwrap(), "3");
        assert!(xattr(&path, "generation").unwrap().parse::<u64>().is_ok());
        assert_eq!(xattr(&path, "shape"), Err(Errno::NODATA), "three tensors have no one shape");
        let sealed = crate::common::wait_for(|| (xattr(&path, "sealed").unwrap() == "1").then_some(()));
        assert!(sealed.is_some(), "sealed some time after the last close");
        let writer = File::options().write(true).open(&path).unwrap();
        assert_eq!(xattr(&path, "sealed").unwrap(), "0");
        drop(writer);
        let view = mount.path(".tensors/m.safetensors/a%2Fw.npy");
        let start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(xattr(&view, "name").unwrap(), "a/w");
        assert_eq!(xattr(&view, "dtype").unwrap(), "F32");
        assert_eq!(xattr(&view, "shape").unwrap(), "[3,5]");
        assert_eq!(xattr(&view, "data_offsets").unwrap(), format!("[{start},{}]", start + 60));
        let mut list = vec![0u8; 4096];
        let len = rustix::fs::listxattr(&path, list.as_mut_slice()).unwrap();
        assert_eq!(len, 0, "not listed on files");
        let len = rustix::fs::listxattr(&view, list.as_mut_slice()).unwrap();
        assert!(String::from_utf8_lossy(&list[..len]).contains("user.nvtier.shape"));
        fs::write(mount.path("plain.txt"), b"x").unwrap();
        assert_eq!(xattr(&mount.path("plain.txt"), "format"), Err(Errno::NODATA));
    }

    fn state_of_the_mount(mount: Mount) {
        fs::write(mount.path("f"), pattern(1, 100_000)).unwrap();
        fs::read(mount.path("f")).unwrap();
        let stats = mount.stats();
        assert_eq!(stats["pid"], std::process::id());
        assert_eq!(stats["mountpoint"].as_str().unwrap(), mount.root().to_str().unwrap());
        assert_eq!(stats["stat"]["regions"], 1);
        assert!(stats["mount"]["requests"]["create"].as_u64().unwrap() >= 1);
        assert_eq!(
            fs::read_to_string(mount.path(".nvtier/version")).unwrap().trim(),
            env!("CARGO_PKG_VERSION")
        );
        // The file is served, so the daemon has written; a read that is passed through is not its own.
        let writes = &stats["mount"]["times"]["write"];
        assert_eq!(writes["count"], stats["mount"]["requests"]["write"], "{stats}");
        assert_eq!(writes["in_flight"], 0, "{stats}");
        check_metrics(&fs::read_to_string(mount.path(".nvtier/metrics")).unwrap());
        assert_eq!(names(&mount.path(".nvtier")), ["metrics", "stats.json", "version"]);
        assert_eq!(errno(fs::write(mount.path(".nvtier/version"), b"")), Errno::ROFS);
    }
}

/// Prometheus text format 0.0.4: every sample belongs to a family that was introduced by HELP and TYPE, once.
fn check_metrics(text: &str) {
    assert!(text.ends_with('\n'));
    let mut families = BTreeMap::new();
    let mut current = String::new();
    let mut samples = 0;
    let mut histogram = false;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty());
            assert!(families.insert(name.to_owned(), false).is_none(), "{name} twice");
            current = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, current);
            assert!(["counter", "gauge", "histogram"].contains(&kind));
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            histogram = kind == "histogram";
            families.insert(name.to_owned(), true);
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let parts = ["_bucket", "_sum", "_count"];
            let part = parts.iter().find_map(|part| name.strip_suffix(part)).filter(|_| histogram);
            assert_eq!(part.unwrap_or(name), current, "{line}");
            assert!(families[&current], "{line} before its TYPE");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{name}");
            value.parse::<f64>().unwrap();
            samples += 1;
        }
    }
    assert!(samples > 40, "{text}");
    assert!(
        families.contains_key("nvtier_fuse_opens_total") && families.contains_key("nvtier_pool_used_bytes")
    );
}
