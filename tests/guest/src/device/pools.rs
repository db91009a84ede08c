//! Pools on namespaces, through the command.

use std::path::Path;
use std::process::{Command, Output};

use nvtier_tests::pattern;
use serde_json::Value;

use super::{node, output};
use crate::report::{Checked, Report, ensure, equal};

pub fn run(report: &mut Report) {
    report.check("a_raw_pool_on_512_byte_blocks", || round_trip(&["a"]));
    report.check("a_raw_pool_on_4096_byte_blocks", || round_trip(&["b"]));
    report.check("a_pool_striped_over_512_and_4096_byte_blocks", || round_trip(&["a", "b"]));
    report.check("a_raw_pool_by_passthrough_on_512_byte_blocks", || round_trip(&["a-ng"]));
    report.check("a_raw_pool_by_passthrough_on_4096_byte_blocks", || round_trip(&["b-ng"]));
    report.check("a_pool_striped_over_both_by_passthrough", || round_trip(&["a-ng", "b-ng"]));
    report.check("what_passthrough_wrote_opens_by_the_block_device_and_the_other_way_round", both_ways);
    report.check("a_namespace_in_use_by_one_node_is_busy_by_the_other", busy);
    report.check("drives_are_planned_applied_and_undone_also_after_they_were_renumbered", disk);
    report.check("a_bad_block_of_the_drive_is_named_by_verify_and_fails_only_its_region", bad_block);
}

fn nvtier(args: &[&str]) -> Checked<String> {
    output("nvtier", args)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Formats a pool over these drives; its path.
fn format(drives: &[&str]) -> Checked<String> {
    let nodes: Vec<String> = drives.iter().map(|drive| Ok(text(&node(drive)?))).collect::<Checked<_>>()?;
    if let [one] = &nodes[..] {
        nvtier(&["format", one, "--force"])?;
        return Ok(one.clone());
    }
    let pool = format!("/tmp/pool-{}", drives.concat());
    let mut args = vec!["format", &pool, "--force"];
    for node in &nodes {
        args.extend(["--member", node]);
    }
    nvtier(&args)?;
    Ok(pool)
}

fn round_trip(drives: &[&str]) -> Checked {
    let before = drives.iter().map(|drive| written(drive)).collect::<Checked<Vec<_>>>()?;
    let pool = format(drives)?;
    let folder = tempfile::tempdir()?;
    let files = [("one", 1), ("block", 4096), ("odd", 3_000_001), ("large", 16 << 20)];
    for (seed, (name, len)) in files.into_iter().enumerate() {
        let file = folder.path().join(name);
        std::fs::write(&file, pattern(seed as u64 + 1, len))?;
        nvtier(&["import", &text(&file), &format!("dir/{name}"), "--pool", &pool])?;
    }
    // Replaced and removed.
    let again = folder.path().join("again");
    std::fs::write(&again, pattern(99, 5_000_000))?;
    nvtier(&["import", &text(&again), "dir/odd", "--force", "--pool", &pool])?;
    nvtier(&["rm", "dir/block", "--pool", &pool])?;
    nvtier(&["verify", "--pool", &pool])?;
    for (name, seed, len) in [("one", 1, 1), ("odd", 99, 5_000_000), ("large", 4, 16 << 20)] {
        let back = folder.path().join("back");
        nvtier(&["export", &format!("dir/{name}"), &text(&back), "--force", "--pool", &pool])?;
        ensure(std::fs::read(&back)? == pattern(seed, len), || format!("{name} came back with other bytes"))?;
    }
    let info: Value = serde_json::from_str(&nvtier(&["info", "--json", "--pool", &pool])?)?;
    let members = info["info"]["members"].as_array().ok_or("no members in info")?;
    equal("members", members.len(), drives.len())?;
    for (member, drive) in members.iter().zip(drives) {
        equal("member", member["path"].as_str(), Some(text(&node(drive)?).as_str()))?;
    }
    // Every one of them must hold its part of the 16 MiB.
    for (drive, before) in drives.iter().zip(before) {
        let bytes = written(drive)? - before;
        ensure(bytes > (16 << 20) / drives.len() as u128, || {
            format!("{drive} was written {bytes} bytes only")
        })?;
    }
    Ok(())
}

/// Bytes that a drive was ever written, as it says.
fn written(name: &str) -> Checked<u128> {
    Ok(nvme::passthrough::Drive::open(node(name)?)?.smart()?.written_bytes())
}

fn both_ways() -> Checked {
    for (first, second) in [("a-ng", "a"), ("b", "b-ng")] {
        let pool = format(&[first])?;
        let folder = tempfile::tempdir()?;
        let (file, back) = (folder.path().join("file"), folder.path().join("back"));
        std::fs::write(&file, pattern(5, 3_000_001))?;
        nvtier(&["import", &text(&file), "x", "--pool", &pool])?;
        let other = text(&node(second)?);
        nvtier(&["verify", "--pool", &other])?;
        nvtier(&["export", "x", &text(&back), "--pool", &other])?;
        ensure(std::fs::read(&back)? == pattern(5, 3_000_001), || format!("{second}: other bytes"))?;
    }
    Ok(())
}

fn busy() -> Checked {
    format(&["a-ng"])?;
    for (first, second) in [("a-ng", "a"), ("a", "a-ng"), ("a-ng", "a-ng")] {
        let open = |name: &str| {
            Ok::<_, Box<dyn std::error::Error>>(engine::Pool::open(&node(name)?, &Default::default()))
        };
        let _held = open(first)??;
        let error = open(second)?.err().ok_or_else(|| format!("{second} opened beside {first}"))?;
        ensure(error.kind() == engine::ErrorKind::Busy, || {
            format!("{second} beside {first}: {}", error.chain())
        })?;
        let format = Command::new("nvtier").args(["format", &text(&node(second)?), "--force"]).output()?;
        // And it has touched nothing on the way: see the end.
        ensure(!format.status.success(), || format!("{second} was formatted beside {first}"))?;
    }
    nvtier(&["verify", "--pool", &text(&node("a")?)]).map(drop)
}

/// `nvtier disk` on drives that have serial numbers, and whose numbers are others after a boot.
fn disk() -> Checked {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| text(&folder.path().join(name));
    let drives = [text(&node("a")?), text(&node("b")?)];
    let places = ["--state-dir".to_owned(), at("state")];
    let disk = |word: &str, more: &[&str]| -> Checked<String> {
        let mut args = vec!["disk", word];
        if word != "undo" {
            args.extend(drives.iter().map(String::as_str));
        }
        args.extend(places.iter().map(String::as_str));
        args.extend(more);
        nvtier(&args)
    };
    let (units, point) = (at("units"), at("mnt"));
    std::fs::create_dir(&units)?;
    let target = ["--unit-dir", &units, "--mountpoint", &point, "--force", "--json"];
    // Pools of earlier checks may be on them.
    let plan: Value = serde_json::from_str(&disk("plan", &target)?)?;
    for drive in plan["drives"].as_array().ok_or("no drives in the plan")? {
        ensure(drive["serial"].as_str().is_some_and(|serial| !serial.is_empty()), || {
            format!("no serial: {drive}")
        })?;
        ensure(drive["model"].as_str().is_some_and(|model| !model.is_empty()), || {
            format!("no model: {drive}")
        })?;
    }
    equal("would apply", plan["would_apply"].as_bool(), Some(true))?;
    disk("apply", &[&target[..], &["--yes"]].concat())?;
    nvtier(&["verify", "--pool", &at("state/nvtier")])?;

    // As after a boot that gave each the other's number.
    let record = std::path::PathBuf::from(at("state/nvtier.json"));
    let mut renumbered: Value = serde_json::from_slice(&std::fs::read(&record)?)?;
    for (index, node) in drives.iter().rev().enumerate() {
        renumbered["drives"][index]["node"] = node.as_str().into();
    }
    std::fs::write(&record, renumbered.to_string())?;
    disk("undo", &["--yes"])?;
    for drive in &drives {
        let error = engine::Pool::probe(Path::new(drive)).err().ok_or("a superblock was left")?;
        ensure(error.kind() == engine::ErrorKind::NotAPool, || format!("{drive}: {}", error.chain()))?;
    }
    ensure(!record.exists(), || "the record was left".to_owned())?;

    // Another drive under the number, and no pool that says where the right one is: nothing is done.
    let target = ["--unit-dir", &units, "--mountpoint", &point, "--yes"];
    disk("apply", &target)?;
    let mut other: Value = serde_json::from_slice(&std::fs::read(&record)?)?;
    other["drives"][0]["serial"] = "another".into();
    std::fs::write(&record, other.to_string())?;
    let refused = Command::new("nvtier").args(["disk", "undo", "--yes"]).args(&places).output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure(!refused.status.success() && said.contains("another drive"), || said.clone())?;
    nvtier(&["verify", "--pool", &at("state/nvtier")]).map(drop)
}

fn bad_block() -> Checked {
    let pool = format(&["e"])?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("part");
    // Six times 12 MiB: the bad block, at 32 MiB, is in one of them.
    for part in 0..6 {
        std::fs::write(&file, pattern(part, 12 << 20))?;
        nvtier(&["import", &text(&file), &format!("part-{part}"), "--pool", &pool])?;
    }
    let run = |args: &[&str]| -> Checked<Output> { Ok(Command::new("nvtier").args(args).output()?) };
    let verify = run(&["verify", "--json", "--pool", &pool])?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&verify.stdout), String::from_utf8_lossy(&verify.stderr));
    ensure(!verify.status.success(), || format!("verify did not notice: {said}"))?;
    let json: Value = serde_json::from_slice(&verify.stdout).map_err(|error| format!("{error}: {said}"))?;
    let json = &json["report"];
    let bad = json["bad"].as_array().cloned().unwrap_or_default();
    ensure(bad.len() == 1 && json["bad_chunks"] == 1, || format!("one bad chunk expected: {said}"))?;
    let victim = bad[0]["path"].as_str().ok_or("no path")?.trim_start_matches('/').to_owned();
    ensure(bad[0]["reason"].as_str().is_some_and(|why| why.contains("medium")), || said.clone())?;
    for part in 0..6 {
        let (name, back) = (format!("part-{part}"), folder.path().join("back"));
        let export = run(&["export", &name, &text(&back), "--force", "--pool", &pool])?;
        equal(&name, export.status.success(), name != victim)?;
        if name != victim {
            ensure(std::fs::read(&back)? == pattern(part, 12 << 20), || format!("{name}: other bytes"))?;
        }
    }
    Ok(())
}
