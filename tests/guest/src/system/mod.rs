//! What runs in a guest with systemd: layouts of `nvtier disk`, and its units through two boots.

mod units;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Child, Command};

use serde_json::Value;

use crate::report::{Checked, Report, ensure};

/// The drives of both boots, `--drive` of run.sh.
pub const DRIVES: [&str; 10] = [
    "serial=r0,size=192M",
    "serial=r1,size=192M,lba=4096",
    "serial=x0,size=1G",
    "serial=x1,size=1G",
    "serial=l0,size=1G",
    // Not as large as the other, as drives happen to be.
    "serial=l1,size=1064M",
    "serial=t0,size=1G",
    "serial=t1,size=1G",
    "serial=t2,size=1G",
    "serial=h0,size=96M",
];

/// Of tests/tests/disk_layouts.rs. What has to do with XFS alone runs on loop devices as well as here.
const LAYOUTS: [&str; 4] = [
    "a_file_system_on_each_drive_made_mounted_and_taken_back",
    "one_file_system_on_a_striped_volume_made_and_taken_back",
    "a_striped_volume_survives_kills_of_apply_and_undo",
    "a_volume_group_with_anything_else_in_it_is_kept",
];
const ROOT_DRIVE: &str = "a_drive_that_the_system_runs_from_is_refused";
const OTHER_BLOCKS: &str = "drives_with_other_blocks_are_no_volume_group";

/// Whether the two boots have a check whose name contains `filter`.
pub fn wants(filter: Option<&str>) -> bool {
    let names = LAYOUTS.iter().chain(&[ROOT_DRIVE, OTHER_BLOCKS]).map(|name| (*name).to_owned());
    names.chain(units::names()).any(|name| filter.is_none_or(|filter| name.contains(filter)))
}

/// Before the boot that is between them: `tests` is the program of tests/tests/disk_layouts.rs.
pub fn first(tests: &str, filter: Option<&str>) -> Checked<bool> {
    // On drives of their own, beside the others: an emulated machine is slow.
    let layouts = Layouts::start(tests, filter)?;
    let mut report = Report::new("guest: units", filter);
    report.check(ROOT_DRIVE, root_drive);
    report.check(OTHER_BLOCKS, other_blocks);
    units::first(&mut report);
    Ok(report.finish() & layouts.map_or(Ok(true), Layouts::finish)?)
}

/// After it.
pub fn second(filter: Option<&str>) -> Checked<bool> {
    let mut report = Report::new("guest: units after a boot", filter);
    units::second(&mut report);
    Ok(report.finish())
}

/// The tests of layouts that also run on loop devices, here on drives.
struct Layouts {
    tests: Child,
    names: Vec<&'static str>,
    output: File,
}

impl Layouts {
    /// None where none of them is wanted.
    fn start(tests: &str, filter: Option<&str>) -> Checked<Option<Layouts>> {
        let names = LAYOUTS.into_iter().filter(|name| filter.is_none_or(|filter| name.contains(filter)));
        let names: Vec<&str> = names.collect();
        if names.is_empty() {
            return Ok(None);
        }
        let drives: Vec<String> = ["t0", "t1", "t2"].into_iter().map(node).collect::<Checked<_>>()?;
        let output = tempfile::tempfile()?;
        let mut command = Command::new(tests);
        command
            .args(["--test-threads=1", "--show-output", "--exact"])
            .args(&names)
            .stdout(output.try_clone()?);
        command.env("NVTIER_BIN", "/usr/local/bin/nvtier").env("NVTIER_DRIVES", drives.join(":"));
        let tests = command.spawn().map_err(|error| format!("{tests}: {error}"))?;
        Ok(Some(Layouts { tests, names, output }))
    }

    /// Their lines become ours; false when one failed.
    fn finish(mut self) -> Checked<bool> {
        let status = self.tests.wait()?;
        let mut text = String::new();
        self.output.rewind()?;
        self.output.read_to_string(&mut text)?;
        println!("     Running guest: layouts of nvtier disk");
        print!("{text}");
        for name in self.names {
            ensure(text.contains(&format!("test {name} ...")), || format!("there is no test {name}"))?;
        }
        Ok(status.success())
    }
}

/// A drive's node by its serial number: `/dev/nvme0n1`, whatever the number is in this boot.
fn node(serial: &str) -> Checked<String> {
    let link = Path::new("/dev/drives").join(serial);
    let node = std::fs::canonicalize(&link).map_err(|error| format!("{}: {error}", link.display()))?;
    Ok(node.to_string_lossy().into_owned())
}

/// What a program said, and whether it was content.
fn ran(words: &[&str]) -> Checked<(bool, String)> {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.map_err(|error| format!("{}: {error}", words[0]))?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).trim().to_owned()))
}

/// The output of a program that must succeed.
fn told(words: &[&str]) -> Checked<String> {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.map_err(|error| format!("{}: {error}", words[0]))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure(output.status.success(), || {
        format!("{words:?}: {}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
    })?;
    Ok(text(&output.stdout))
}

fn json(words: &[&str]) -> Checked<Value> {
    Ok(serde_json::from_str(&told(words)?)?)
}

/// Fails unless `nvtier disk plan --force` refuses these drives with those words.
fn refused(serials: &[&str], more: &[&str], words: &[&str]) -> Checked {
    let nodes: Vec<String> = serials.iter().map(|serial| node(serial)).collect::<Checked<_>>()?;
    let mut command = vec!["nvtier", "disk", "plan", "--force"];
    command.extend(nodes.iter().map(String::as_str));
    command.extend(more);
    let (fine, said) = ran(&command)?;
    ensure(!fine && words.iter().all(|word| said.contains(word)), || format!("{command:?}: {said}"))
}

fn root_drive() -> Checked {
    refused(&["system"], &[], &["mounted on /"])
}

fn other_blocks() -> Checked {
    refused(&["x0", "r1"], &["--layout", "lvm"], &["blocks of 512 and of 4096 bytes"])
}
