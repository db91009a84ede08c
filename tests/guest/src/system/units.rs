//! The units that `nvtier disk apply` writes, and nvtier@.service, under systemd.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nvtier_tests::{mounted_at, pattern, wait_for};
use serde_json::Value;

use super::{json, node, ran, told};
use crate::report::{Checked, Report, Skip, ensure, equal};

/// Where units of the administrator lie.
const UNITS: &str = "/etc/systemd/system";
/// The unit for pools that were made by hand, as the repository has it.
const BY_HAND: &str = include_str!("../../../../dist/systemd/nvtier@.service");

/// A drop-in that takes its powers away but for one.
const UNPRIVILEGED: &str = include_str!("../../../../dist/systemd/unprivileged.conf");

/// Its settings for one pool.
const MODELS: &str = "/etc/nvtier/models.env";

/// A pool that stays through a boot.
struct Pool {
    name: &'static str,
    layout: &'static str,
    drives: &'static [&'static str],
}

const POOLS: [Pool; 3] = [
    Pool { name: "r", layout: "raw", drives: &["r0", "r1"] },
    Pool { name: "x", layout: "xfs", drives: &["x0", "x1"] },
    Pool { name: "l", layout: "lvm", drives: &["l0", "l1"] },
];

const BY_HAND_FIRST: &str = "a_pool_made_by_hand_has_a_unit";
const BY_HAND_SECOND: &str = "a_boot_mounts_a_pool_made_by_hand";

/// Of all checks.
pub fn names() -> impl Iterator<Item = String> {
    let pools = POOLS.iter().flat_map(|pool| [pool.first_name(), pool.second_name()]);
    pools.chain([BY_HAND_FIRST, BY_HAND_SECOND].map(str::to_owned))
}

pub fn first(report: &mut Report) {
    for pool in &POOLS {
        report.check(&pool.first_name(), || pool.first().map_err(|error| pool.with_journal(error)));
    }
    report.check(BY_HAND_FIRST, by_hand);
}

pub fn second(report: &mut Report) {
    for pool in &POOLS {
        report.check(&pool.second_name(), || {
            made(&pool.record())?;
            pool.second().map_err(|error| pool.with_journal(error))
        });
    }
    report.check(BY_HAND_SECOND, || {
        made(Path::new(MODELS))?;
        by_hand_after_a_boot()
    });
}

/// The part before the boot may not have been asked for.
fn made(file: &Path) -> Checked {
    if file.exists() { Ok(()) } else { Err(Skip("nothing was made before the boot".into()).into()) }
}

impl Pool {
    fn first_name(&self) -> String {
        format!("units_of_layout_{}_start_and_stop_and_restart_after_a_kill", self.layout)
    }

    fn second_name(&self) -> String {
        format!("a_boot_mounts_layout_{}_and_undo_removes_its_units", self.layout)
    }

    fn unit(&self) -> String {
        format!("nvtier-{}.service", self.name)
    }

    fn point(&self) -> PathBuf {
        Path::new("/mnt").join(self.name)
    }

    fn nodes(&self) -> Checked<Vec<String>> {
        self.drives.iter().map(|serial| node(serial)).collect()
    }

    fn apply(&self) -> Checked<Value> {
        let nodes = self.nodes()?;
        let mut words = vec!["nvtier", "disk", "apply", "--yes", "--json"];
        words.extend(["--name", self.name, "--layout", self.layout, "--owner", "nobody"]);
        words.extend(nodes.iter().map(String::as_str));
        json(&words)
    }

    fn record(&self) -> PathBuf {
        Path::new("/var/lib/nvtier").join(format!("{}.json", self.name))
    }

    /// All its units, and where each one mounts.
    fn units(&self) -> Checked<Vec<(String, PathBuf)>> {
        let record: Value = serde_json::from_slice(&std::fs::read(self.record())?)?;
        let volumes = record["volumes"].as_array().ok_or("no volumes")?.iter();
        let path = |value: &Value| value.as_str().map(PathBuf::from).ok_or("no path");
        let mut units = Vec::new();
        for volume in volumes {
            let unit = path(&volume["unit"])?;
            let name = unit.file_name().ok_or("no name")?.to_string_lossy().into_owned();
            units.push((name, path(&volume["mountpoint"])?));
        }
        units.push((self.unit(), self.point()));
        Ok(units)
    }

    /// Every unit is enabled and active, everything is mounted.
    fn is_up(&self) -> Checked {
        for (unit, point) in self.units()? {
            equal(
                &format!("{unit} is enabled"),
                told(&["systemctl", "is-enabled", &unit])?,
                "enabled".into(),
            )?;
            equal(&format!("{unit} is active"), ran(&["systemctl", "is-active", &unit])?.1, "active".into())?;
            ensure(mounted_at(&point), || format!("{} is not mounted", point.display()))?;
            // A drive that is missing must not keep the machine from its boot.
            let awaited = property(&unit, "Before")?;
            ensure(!awaited.contains("local-fs.target"), || format!("{unit} is before {awaited}"))?;
        }
        Ok(())
    }

    fn first(&self) -> Checked {
        let applied = self.apply()?;
        equal("started", &applied["started"], &Value::Bool(true))?;
        self.is_up()?;
        equal("owner", std::fs::metadata(self.point())?.uid(), 65534)?;
        let file = self.point().join("folder/file");
        std::fs::create_dir(self.point().join("folder"))?;
        std::fs::write(&file, pattern(7, 5_000_001))?;
        let same = |when: &str| same_bytes(&file, &pattern(7, 5_000_001), when);

        let before = pid(&self.unit())?;
        told(&["systemctl", "restart", &self.unit()])?;
        ensure(pid(&self.unit())? != before, || "it was not restarted".into())?;
        self.is_up()?;
        same("after a restart")?;

        killed(&self.unit())?;
        self.is_up()?;
        same("after a kill")?;

        told(&["systemctl", "stop", &self.unit()])?;
        ensure(!mounted_at(&self.point()), || "it is mounted after the stop".into())?;
        equal("how it ended", property(&self.unit(), "Result")?, "success".into())?;
        equal("state", property(&self.unit(), "ActiveState")?, "inactive".into())?;
        told(&["nvtier", "verify", "--pool", &format!("/var/lib/nvtier/{}", self.name)])?;
        told(&["systemctl", "start", &self.unit()])?;
        same("after a stop and a start")?;

        // Whoever unmounts it by hand has it stay so.
        told(&["nvtier", "umount", &self.point().to_string_lossy()])?;
        ended(&self.unit())?;
        equal("how it ended", property(&self.unit(), "Result")?, "success".into())?;
        told(&["systemctl", "start", &self.unit()])?;

        // The same again changes nothing, and disturbs nobody.
        let before = pid(&self.unit())?;
        let again = self.apply()?;
        equal("pool", &again["record"]["pool_id"], &applied["record"]["pool_id"])?;
        equal("process", pid(&self.unit())?, before)?;
        self.is_up()?;
        // Nobody syncs it: the shutdown has to.
        std::fs::write(self.point().join("last"), pattern(8, 1_000_000))?;
        Ok(())
    }

    fn second(&self) -> Checked {
        self.is_up()?;
        same_bytes(&self.point().join("folder/file"), &pattern(7, 5_000_001), "after a boot")?;
        same_bytes(&self.point().join("last"), &pattern(8, 1_000_000), "after a boot")?;
        for (unit, _) in self.units()? {
            let journal = told(&["journalctl", "-b", "-1", "-o", "cat", "-u", &unit])?;
            let lines: Vec<&str> = journal.lines().collect();
            let begin = lines
                .iter()
                .rposition(|line| ["Stopping", "Unmounting"].iter().any(|word| line.starts_with(word)));
            let end = lines.get(begin.unwrap_or(lines.len())..).unwrap_or_default();
            // Not killed, not failed.
            let well = end.contains(&format!("{unit}: Deactivated successfully.").as_str());
            ensure(well, || format!("{unit} did not end well with the last boot: {journal}"))?;
        }
        let units = self.units()?;
        if self.layout == "xfs" {
            // What an `undo` leaves that was killed while it removed the units.
            told(&["systemctl", "stop", &self.unit()])?;
            let names = units.iter().map(|(unit, _)| unit.as_str());
            told(&["systemctl", "disable"].into_iter().chain(names).collect::<Vec<_>>())?;
            std::fs::remove_file(Path::new(UNITS).join(&units[0].0))?;
        }
        told(&["nvtier", "disk", "undo", "--yes", self.name])?;
        for (unit, point) in &units {
            ensure(!mounted_at(point), || format!("{} is still mounted", point.display()))?;
            let (active, said) = ran(&["systemctl", "is-active", unit])?;
            ensure(!active && said == "inactive", || format!("{unit}: {said}"))?;
            let left = links(Path::new(UNITS), unit)?;
            ensure(left.is_empty(), || format!("left of {unit}: {left:?}"))?;
        }
        ensure(!self.record().exists() && !self.point().exists(), || {
            "the record or the mount point was left".into()
        })?;
        let nodes = self.nodes()?;
        let mut words = vec!["nvtier", "disk", "plan", "--json", "--name", self.name];
        words.extend(nodes.iter().map(String::as_str));
        let plan = json(&words)?;
        for drive in plan["drives"].as_array().ok_or("no drives")? {
            ensure(drive["verdict"] == "safe", || format!("{drive:#}"))?;
        }
        Ok(())
    }

    /// An error with what systemd knows about the units.
    fn with_journal(&self, error: Box<dyn std::error::Error>) -> Box<dyn std::error::Error> {
        let journal = ran(&["journalctl", "-b", "--no-pager", "-n", "80", "-o", "short-monotonic"]);
        let status = ran(&["systemctl", "status", "--no-pager", "--full", &self.unit()]);
        let text = |what: Checked<(bool, String)>| what.map(|(_, said)| said).unwrap_or_default();
        format!("{}\n{}\n{}", crate::report::chain(&*error), text(status), text(journal)).into()
    }
}

/// Kills a unit's process and waits until systemd has it mounted again.
fn killed(unit: &str) -> Checked {
    let (before, restarts) = (pid(unit)?, property(unit, "NRestarts")?);
    told(&["kill", "-9", &before.to_string()])?;
    let up = || {
        let again = property(unit, "NRestarts").ok()? != restarts
            && property(unit, "ActiveState").ok()? == "active"
            && pid(unit).ok()? != before;
        again.then_some(())
    };
    wait_for(up).ok_or_else(|| format!("{unit} did not come back after a kill").into())
}

/// Waits until a unit is stopped, and not about to start again.
fn ended(unit: &str) -> Checked {
    let state =
        || property(unit, "ActiveState").ok().filter(|state| state != "active" && state != "deactivating");
    let state = wait_for(state).ok_or_else(|| format!("{unit} did not end"))?;
    equal(&format!("state of {unit}"), state, "inactive".into())
}

fn property(unit: &str, name: &str) -> Checked<String> {
    told(&["systemctl", "show", "--value", "-p", name, unit])
}

/// Its process.
fn pid(unit: &str) -> Checked<u32> {
    let pid = property(unit, "MainPID")?.parse()?;
    ensure(pid != 0, || format!("{unit} has no process"))?;
    Ok(pid)
}

fn same_bytes(file: &Path, wanted: &[u8], when: &str) -> Checked {
    let bytes = std::fs::read(file).map_err(|error| format!("{} {when}: {error}", file.display()))?;
    ensure(bytes == wanted, || format!("{} has other bytes {when}", file.display()))
}

/// What in this folder, or one below it, has a unit's name.
fn links(folder: &Path, unit: &str) -> Checked<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy() == unit {
            found.push(entry.path());
        } else if entry.file_type()?.is_dir() {
            found.extend(links(&entry.path(), unit)?);
        }
    }
    Ok(found)
}

/// A pool on a drive that is named as udev names it, for good.
fn by_hand() -> Checked {
    let target = node("h0")?;
    // What a boot found first may not be named yet.
    told(&["udevadm", "settle"])?;
    let by_id = did("list /dev/disk/by-id", std::fs::read_dir("/dev/disk/by-id"))?;
    let mut links = by_id.flatten().map(|entry| entry.path());
    let pool = links
        .find(|link| std::fs::canonicalize(link).is_ok_and(|found| found == Path::new(&target)))
        .ok_or("udev made no name for the drive")?;
    told(&["nvtier", "format", &pool.to_string_lossy()])?;
    std::fs::write(format!("{UNITS}/nvtier@.service"), BY_HAND)?;
    std::fs::create_dir_all("/etc/nvtier")?;
    std::fs::create_dir("/mnt/by hand")?;
    let settings = |options: &str| {
        std::fs::write(MODELS, format!("POOL={}\nMOUNTPOINT=\"/mnt/by hand\"\n{options}", pool.display()))
    };
    settings("OPTIONS=--allow-other --ram 64MiB --metrics 0\n")?;
    told(&["systemctl", "daemon-reload"])?;
    told(&["systemctl", "enable", "--now", "nvtier@models"])?;
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", pid("nvtier@models")?));
    let line = did("read the daemon's command line", line)?;
    ensure(line.contains("\0--ram\x0064MiB\0--metrics\x000\0--\0"), || format!("{line:?}"))?;
    let file = Path::new("/mnt/by hand/file");
    did("write a file", std::fs::write(file, pattern(9, 3_000_000)))?;
    did("make it durable", std::fs::File::open(file).and_then(|file| file.sync_all()))?;
    killed("nvtier@models")?;
    same_bytes(file, &pattern(9, 3_000_000), "after a kill")?;
    // And without options.
    settings("")?;
    told(&["systemctl", "restart", "nvtier@models"])?;
    same_bytes(file, &pattern(9, 3_000_000), "after a restart")?;
    // What root's own mount needs nothing for.
    settings("OPTIONS=--allow-other\n")?;
    unprivileged(&target, file)?;
    // A pool that is not there is a failure of the unit, and one that says what is missing.
    std::fs::write("/etc/nvtier/none.env", "POOL=/nonexistent\nMOUNTPOINT=/mnt\n")?;
    let (started, _) = ran(&["systemctl", "start", "nvtier@none"])?;
    let journal = told(&["journalctl", "-b", "-o", "cat", "-u", "nvtier@none"])?;
    ensure(!started && journal.contains("/nonexistent"), || journal.clone())?;
    told(&["systemctl", "stop", "nvtier@none"]).map(drop)
}

/// What was tried, where it failed.
fn did<T>(what: &str, result: std::io::Result<T>) -> Checked<T> {
    Ok(result.map_err(|error| format!("{what}: {error}"))?)
}

/// The same unit as a user whose the drive is, and back.
fn unprivileged(drive: &str, file: &Path) -> Checked {
    let user = UNPRIVILEGED.replace("User=nvtier", "User=nobody");
    ensure(user != UNPRIVILEGED, || "the drop-in names another user".into())?;
    let folder = Path::new(UNITS).join("nvtier@models.service.d");
    did("make the folder of drop-ins", std::fs::create_dir(&folder))?;
    did("write the drop-in", std::fs::write(folder.join("user.conf"), user))?;
    let owned = |uid| did("change the drive's owner", std::os::unix::fs::chown(drive, Some(uid), None));
    owned(65534)?;
    told(&["systemctl", "daemon-reload"])?;
    told(&["systemctl", "stop", "nvtier@models"])?;
    did("change the mount point's owner", std::os::unix::fs::chown("/mnt/by hand", Some(65534), None))?;
    told(&["systemctl", "start", "nvtier@models"])?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid("nvtier@models")?));
    let status = did("read the daemon's status", status)?;
    for line in ["Uid:\t65534\t", "CapEff:\t0000000000200000\n", "CapBnd:\t0000000000200000\n"] {
        ensure(status.contains(line), || format!("no {line:?} in {status}"))?;
    }
    same_bytes(file, &pattern(9, 3_000_000), "as a user of its own")?;
    killed("nvtier@models")?;
    same_bytes(file, &pattern(9, 3_000_000), "as a user of its own, after a kill")?;
    did("remove the drop-in", std::fs::remove_dir_all(&folder))?;
    owned(0)?;
    told(&["systemctl", "daemon-reload"])?;
    told(&["systemctl", "restart", "nvtier@models"])?;
    same_bytes(file, &pattern(9, 3_000_000), "as root again")
}

fn by_hand_after_a_boot() -> Checked {
    let file = Path::new("/mnt/by hand/file");
    // A drive that udev names late is there for the second attempt.
    ensure(wait_for(|| file.exists().then_some(())).is_some(), || {
        ran(&["journalctl", "-b", "-o", "cat", "-u", "nvtier@models"])
            .map(|(_, said)| said)
            .unwrap_or_default()
    })?;
    same_bytes(file, &pattern(9, 3_000_000), "after a boot")?;
    told(&["systemctl", "disable", "--now", "nvtier@models"])?;
    ensure(!file.exists(), || "it is mounted after the stop".into())
}
