//! Our reports beside the real fio's: same keys, same fields, read by the same scripts. Without fio these are skipped, aloud.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--help").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// The same job by both tools; their reports.
fn both(directory: &Path, job: &[&str], format: &str) -> (String, String) {
    let file = format!("--filename={}", directory.join("data").display());
    let run = |tool: &str| directory.join(format!("{tool}.out"));
    let args = |out: &Path| {
        let mut args = vec![format!("--output={}", out.display()), format!("--output-format={format}")];
        args.push("--name=same".into());
        args.push(file.clone());
        args.extend(job.iter().map(ToString::to_string));
        args
    };
    let fio = Command::new("fio").args(args(&run("fio"))).output().unwrap();
    assert!(fio.status.success(), "{}", String::from_utf8_lossy(&fio.stderr));
    let mut ours: Vec<OsString> = args(&run("ours")).into_iter().map(Into::into).collect();
    ours.push("--ceiling=off".into());
    assert_eq!(bench::run_code(&ours), 0);
    (std::fs::read_to_string(run("fio")).unwrap(), std::fs::read_to_string(run("ours")).unwrap())
}

/// Every key path of a JSON document; bins are data, not keys.
fn keys(value: &Value) -> BTreeSet<String> {
    fn walk(prefix: &str, value: &Value, out: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    let path = format!("{prefix}/{key}");
                    if key != "bins" && key != "job options" {
                        walk(&path, value, out);
                    }
                    out.insert(path);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| walk(&format!("{prefix}[]"), item, out)),
            _ => {}
        }
    }
    let mut out = BTreeSet::new();
    walk("", value, &mut out);
    out
}

const JOBS: [&[&str]; 4] = [
    &["--rw=read", "--size=1m", "--ioengine=psync"],
    &["--rw=randrw", "--size=1m", "--bs=8k", "--ioengine=io_uring", "--iodepth=8"],
    &["--rw=write", "--size=1m", "--ioengine=psync", "--end_fsync=1", "--percentile_list=50:99"],
    &[
        "--rw=randread",
        "--size=1m",
        "--ioengine=io_uring",
        "--iodepth=4",
        "--lat_percentiles=1",
        "--slat_percentiles=1",
    ],
];

#[test]
fn json_has_fios_keys() {
    if !have("fio") {
        return;
    }
    for job in JOBS {
        for format in ["json", "json+"] {
            let directory = tempfile::tempdir().unwrap();
            let (fio, ours) = both(directory.path(), job, format);
            let fio: Value = serde_json::from_str(&fio).unwrap();
            let ours: Value = serde_json::from_str(&ours).unwrap();
            let (fio, ours) = (keys(&fio), keys(&ours));
            let missing: Vec<_> =
                fio.difference(&ours).filter(|key| !key.starts_with("/disk_util")).collect();
            let added: Vec<_> = ours
                .difference(&fio)
                .filter(|key| !key.starts_with("/nvtier") && !key.starts_with("/disk_util"))
                .collect();
            assert!(
                missing.is_empty() && added.is_empty(),
                "{job:?} {format}: missing {missing:?}, added {added:?}"
            );
        }
    }
}

#[test]
fn json_keys_come_in_fios_order() {
    if !have("fio") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (fio, ours) = both(directory.path(), JOBS[1], "json");
    let order = |text: &str| {
        let names = [
            "\"jobname\"",
            "\"read\"",
            "\"write\"",
            "\"trim\"",
            "\"sync\"",
            "\"usr_cpu\"",
            "\"iodepth_level\"",
        ];
        let mut at: Vec<_> = names.iter().map(|name| (text.find(name).unwrap(), *name)).collect();
        at.sort_unstable();
        at.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
    };
    assert_eq!(order(&fio), order(&ours));
}

#[test]
fn terse_has_fios_fields() {
    if !have("fio") {
        return;
    }
    for job in JOBS {
        let directory = tempfile::tempdir().unwrap();
        let (fio, ours) = both(directory.path(), job, "terse");
        let fields = |text: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with("3;")).unwrap_or_else(|| panic!("{text}"));
            line.split(';').map(str::to_owned).collect()
        };
        let (fio, ours) = (fields(&fio), fields(&ours));
        // Both end with the disks of the file: nine fields each where it lies on a disk.
        assert_eq!(fio.len(), ours.len(), "{job:?}\n{fio:?}\n{ours:?}");
        for (index, (fio, ours)) in fio.iter().zip(&ours).enumerate() {
            let shape = |field: &str| (field.contains('%'), field.contains('='), field.contains('.'));
            assert_eq!(shape(fio), shape(ours), "{job:?}: field {}: fio {fio}, ours {ours}", index + 1);
        }
        // Kilobytes moved, in fields 6 and 47 (HOWTO, terse output); a mix is drawn by each tool's own dice.
        let moved = |fields: &[String]| {
            [5, 46].map(|at: usize| fields[at].parse::<u64>().unwrap()).iter().sum::<u64>()
        };
        assert_eq!(moved(&fio), moved(&ours), "{job:?}");
    }
}

#[test]
fn fios_own_scripts_read_our_reports() {
    if !have("fio") || !have("fio_jsonplus_clat2csv") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (_, ours) = both(directory.path(), JOBS[3], "json+");
    let report = directory.path().join("plus.json");
    std::fs::write(&report, &ours).unwrap();
    for mode in [&[][..], &["--validate"]] {
        let out = Command::new("fio_jsonplus_clat2csv")
            .args(mode)
            .arg(&report)
            .arg(directory.path().join("out.csv"))
            .output()
            .unwrap();
        let text =
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if text.contains("No module named") {
            eprintln!("SKIPPED: fio_jsonplus_clat2csv lacks a Python module: {text}");
            return;
        }
        assert!(out.status.success(), "{text}");
        assert!(text.contains(if mode.is_empty() { "generated" } else { "validated" }), "{text}");
    }
    let csv = std::fs::read_to_string(directory.path().join("out_job0.csv")).unwrap();
    assert!(csv.lines().count() > 5, "{csv}");
}
