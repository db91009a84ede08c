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
    let pool = format(drives)?;
    let folder = tempfile::tempdir()?;
    let files = [("one", 1), ("block", 4096), ("odd", 3_000_001), ("large", 40 << 20)];
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
    for (name, seed, len) in [("one", 1, 1), ("odd", 99, 5_000_000), ("large", 4, 40 << 20)] {
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
    if drives.len() > 1 {
        // Every one of them must hold a part of the 40 MiB.
        for drive in drives {
            let name = text(&node(drive)?).replace("/dev/", "");
            let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
            let sectors: u64 = stat.split_whitespace().nth(6).ok_or("no stat")?.parse()?;
            ensure(sectors * 512 > 20 << 20, || format!("{name} was written {sectors} sectors only"))?;
        }
    }
    Ok(())
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
