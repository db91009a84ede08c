//! `nvtier disk --layout xfs` and `lvm`: what is made, what it is, that it is taken back, also by whoever comes after a kill.
//!
//! On loop devices, or on the drives that `NVTIER_DRIVES` names (suite `guest`).

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nvtier_tests::drives::{MIB, Machine, Unmount, cannot, has_systemd_analyze, put, verify};
use nvtier_tests::{mounted_at, pattern, run};
use serde_json::Value;

/// One of them, on a machine that can make it.
struct Layout {
    word: &'static str,
    machine: Machine,
    /// Where its file systems are mounted.
    points: Vec<PathBuf>,
    _unmount: Unmount,
    _group: Group,
}

/// Removes a volume group that a failed test left, so that the next one finds its drives free.
struct Group(Vec<PathBuf>);

impl Drop for Group {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.0.is_empty() {
            let _ = Command::new("vgremove").args(["--yes", "--force", "nvtier-test"]).status();
            let _ = Command::new("pvremove").args(["--yes", "-ff"]).args(&self.0).status();
        }
    }
}

fn has(name: &str) -> bool {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|at| Path::new(at).join(name).is_file())
}

/// XFS on each of so many drives; `None` (said aloud) where it cannot be.
fn xfs(drives: usize) -> Option<Layout> {
    let machine = for_xfs(drives)?;
    let points: Vec<PathBuf> = (0..drives).map(|n| machine.at(&format!("state/test.fs/{n}"))).collect();
    Some(Layout {
        word: "xfs",
        machine,
        _unmount: Unmount(points.clone()),
        points,
        _group: Group(Vec::new()),
    })
}

/// One logical volume over so many drives; `None` (said aloud) where it cannot be.
fn lvm(drives: usize) -> Option<Layout> {
    let misc = fs::read_to_string("/proc/misc").unwrap_or_default();
    if !misc.contains("device-mapper") {
        cannot("the kernel has no device mapper, so that no logical volume can be made");
        return None;
    }
    if !has("lvcreate") {
        cannot("there is no lvcreate here: install lvm2");
        return None;
    }
    let machine = for_xfs(drives)?;
    let points = vec![machine.at("state/test.fs/0")];
    let nodes = machine.drives.iter().map(|drive| drive.path.clone()).collect();
    Some(Layout { word: "lvm", machine, _unmount: Unmount(points.clone()), points, _group: Group(nodes) })
}

/// A machine that XFS can be made on.
fn for_xfs(drives: usize) -> Option<Machine> {
    if !has("mkfs.xfs") {
        cannot("there is no mkfs.xfs here: install xfsprogs");
        return None;
    }
    let machine = Machine::of(drives, 1024 * MIB)?;
    // Only trying tells whether this kernel mounts it.
    let probe = machine.at("probe");
    fs::create_dir(&probe).unwrap();
    let drive = &machine.drives[0].path;
    run(Command::new("mkfs.xfs").arg("-q").arg(drive)).ok();
    let mounted = run(Command::new("mount").args(["-t", "xfs"]).arg(drive).arg(&probe));
    if mounted.code != 0 {
        cannot(&format!("XFS cannot be mounted here: {}", mounted.stderr.trim()));
        return None;
    }
    run(Command::new("umount").arg(&probe)).ok();
    fs::remove_dir(&probe).unwrap();
    put(drive, 0, &vec![0; MIB as usize]);
    Some(machine)
}

fn xfs_uuid(node: &Path) -> Option<Vec<u8>> {
    let mut head = [0; 48];
    File::open(node).ok()?.read_exact(&mut head).ok()?;
    head.starts_with(b"XFSB").then(|| head[32..].to_vec())
}

/// The output of a program, without blanks around it.
fn told(words: &[&str]) -> String {
    run(Command::new(words[0]).args(&words[1..])).ok().stdout.trim().to_owned()
}

impl Layout {
    /// `nvtier disk apply`, JSON.
    #[track_caller]
    fn apply(&self) -> Value {
        self.machine.disk("apply", &["--layout", self.word, "--yes", "--json"]).ok().json()
    }

    /// Of the record: a text of each file system.
    fn volumes(&self, what: &str) -> Vec<PathBuf> {
        let record = self.machine.record().unwrap();
        record["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|volume| volume[what].as_str().unwrap().into())
            .collect()
    }

    fn uuids(&self) -> Vec<Option<Vec<u8>>> {
        self.volumes("node").iter().map(|node| xfs_uuid(node)).collect()
    }

    /// Mounts the pool and gives the file in it to `look`.
    fn in_mount(&self, look: impl FnOnce(&Path)) {
        self.machine.mounted.mount(&[]).ok();
        look(&self.machine.at("mnt/f"));
        self.machine.mounted.umount().ok();
    }

    /// As after a boot in which no unit ran.
    fn unmounted(&self) {
        for point in self.points.iter().filter(|point| mounted_at(point)) {
            run(Command::new("umount").arg(point)).ok();
        }
        // No group: `undo` has removed it.
        if self.word == "lvm" {
            run(Command::new("vgchange").args(["-an", "nvtier-test"]));
        }
    }

    /// Nothing is left, and the drives are as free as they were.
    #[track_caller]
    fn is_as_before(&self) {
        self.machine.is_as_before();
        assert!(!self.machine.at("state/test.fs").exists());
        let left: Vec<_> = fs::read_dir(self.machine.at("units")).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        let plan = self.machine.disk("plan", &["--json"]).ok().json();
        for drive in plan["drives"].as_array().unwrap() {
            assert_eq!(drive["verdict"], "safe", "{drive:#}");
        }
    }

    #[track_caller]
    fn undo(&self) {
        self.machine.disk("undo", &["--yes"]).ok();
        self.is_as_before();
    }

    /// Runs `nvtier disk WORD`, which is killed once the `nth` call of a program by it has ended.
    #[track_caller]
    fn killed_after(&self, word: &str, program: &str, nth: u32) {
        let folder = self.machine.at("killers");
        let script = folder.join(program);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let text = format!(
            "#!/bin/sh\nPATH=${{PATH#*:}}\n\"${{0##*/}}\" \"$@\" || exit\necho >> \"$0.calls\"\n\
             [ \"$(wc -l < \"$0.calls\")\" -ne {nth} ] || kill -9 $PPID\n"
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = match word {
            "apply" => self.machine.command(word, &["--layout", self.word, "--yes"]),
            _ => self.machine.command(word, &["--yes"]),
        };
        let path = std::env::var("PATH").unwrap_or_default();
        let ran = run(command.env("PATH", format!("{}:{path}", folder.display())));
        assert_eq!(ran.code, 128 + 9, "{word} was not killed after call {nth} of {program}: {ran:#?}");
        assert!(self.machine.record().is_some(), "{word} left no record");
    }

    /// Everything in a row, with what speaks against it on the way. `steps`: what the plan has to name.
    fn made_mounted_and_taken_back(&self, steps: &[&str], stripe: (u32, u32)) {
        let machine = &self.machine;
        let plan = machine.disk("plan", &["--layout", self.word, "--json"]).ok().json();
        let planned = plan["steps"].to_string();
        let last = machine.drives.last().unwrap().node();
        for word in steps.iter().chain(&[last, ".mount"]) {
            assert!(planned.contains(word), "{word} is not in {planned}");
        }
        self.is_as_before();
        for drive in &machine.drives {
            assert!(xfs_uuid(&drive.path).is_none(), "the plan made a file system");
        }

        let applied = self.apply();
        assert_eq!(self.volumes("mountpoint"), self.points, "{applied:#}");
        let units = self.volumes("unit");
        let pool_unit = fs::read_to_string(machine.at("units/nvtier-test.service")).unwrap();
        for (unit, point) in units.iter().zip(&self.points) {
            assert!(mounted_at(point), "{} is not mounted", point.display());
            assert!(fs::read_to_string(unit).unwrap().contains(&format!("Where={}\n", point.display())));
            assert!(pool_unit.contains(&format!(" {}", point.display())), "{pool_unit}");
            assert!(point.join("pool").is_dir());
            // In blocks of 4 KiB.
            let info = told(&["xfs_spaceman", "-c", "info", point.to_str().unwrap()]);
            let (unit, width) = stripe;
            let wanted = format!("sunit={unit:<6} swidth={width} blks");
            assert!(info.contains(&wanted), "no {wanted:?} in {info}");
        }
        if has_systemd_analyze() {
            units.iter().for_each(|unit| verify(unit));
            verify(&machine.at("units/nvtier-test.service"));
            // A mount unit has to be named after its path.
            let point = self.points[0].to_str().unwrap();
            let escaped = told(&["systemd-escape", "--path", "--suffix=mount", point]);
            assert_eq!(units[0].file_name().unwrap().to_str().unwrap(), escaped);
        }
        if self.word == "lvm" {
            self.is_striped(3);
        }
        let bytes = pattern(4, 9_000_000);
        self.in_mount(|file| {
            fs::write(file, &bytes).unwrap();
            machine.disk("undo", &["--yes"]).refused(4, &["in use by process"]);
        });

        // Another layout under that name is refused; the same again changes nothing, also after a boot that mounted nothing.
        machine.disk("apply", &["--yes"]).refused(1, &["another layout"]);
        let uuids = self.uuids();
        assert!(uuids.iter().all(Option::is_some), "{uuids:?}");
        for boot in [false, true] {
            if boot {
                self.unmounted();
            }
            let again = self.apply();
            assert_eq!(again["record"]["pool_id"], applied["record"]["pool_id"]);
            assert_eq!(self.uuids(), uuids);
        }
        self.in_mount(|file| assert_eq!(fs::read(file).unwrap(), bytes));

        // What somebody keeps beside the pool is not lost, whether it can be seen or not.
        let point = self.points.last().unwrap();
        fs::write(point.join("precious"), "precious").unwrap();
        machine.disk("undo", &["--yes"]).refused(1, &["precious"]);
        self.unmounted();
        machine.disk("undo", &["--yes"]).refused(1, &["precious"]);
        assert!(machine.record().is_some() && units[0].exists());
        assert_eq!(fs::read_to_string(point.join("precious")).unwrap(), "precious");
        fs::remove_file(point.join("precious")).unwrap();
        self.unmounted();
        self.renumbered();
        self.undo();
        for drive in &machine.drives {
            assert!(xfs_uuid(&drive.path).is_none(), "a file system was left");
        }
    }

    /// What the guide says of the logical volume: all of so many drives, in units of 128 KiB.
    #[track_caller]
    fn is_striped(&self, drives: u64) {
        let lvs = ["lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "stripes,stripe_size,lv_size"];
        let told = told(&[&lvs[..], &["nvtier-test/pool"]].concat());
        let numbers: Vec<u64> = told.split_whitespace().map(|word| word.parse().unwrap()).collect();
        assert_eq!(numbers[..2], [drives, 131_072]);
        // Extents of 4 MiB; the first MiB of each drive is LVM's.
        assert!(numbers[2] >= drives * (1024 - 8) * MIB, "{told}");
    }

    /// Killed after each program that makes or removes something; the next run goes on or takes it back.
    fn survives_kills(&self, made: &[&str], taken_back: &[(&str, u32)], removed: &[&str]) {
        for (program, nth) in taken_back {
            self.killed_after("apply", program, *nth);
            assert_eq!(self.machine.record().unwrap()["state"], "formatting");
            self.undo();
        }
        // One step a run: what is there is not made again, or the program would be called once more and the kill come too early.
        for program in made {
            self.killed_after("apply", program, 1);
        }
        self.apply();
        self.in_mount(|file| fs::write(file, pattern(5, 1_000_000)).unwrap());

        // A file system that mkfs.xfs was killed in: the superblock is there, and says that it is not done.
        let half_made = || {
            self.unmounted();
            if self.word == "lvm" {
                run(Command::new("vgchange").args(["-ay", "nvtier-test"])).ok();
            }
            put(&self.volumes("node")[0], 126, &[1]);
            let mut record = self.machine.record().unwrap();
            record["state"] = "formatting".into();
            fs::write(self.machine.at("state/test.json"), record.to_string()).unwrap();
            fs::remove_dir_all(self.machine.at("state/test")).unwrap();
        };
        half_made();
        if self.word == "xfs" {
            self.undo();
            self.apply();
            half_made();
        }
        self.apply();
        self.in_mount(|file| fs::write(file, "f").unwrap());

        for program in removed {
            self.killed_after("undo", program, 1);
            self.machine
                .disk("apply", &["--layout", self.word, "--yes"])
                .refused(4, &["`undo` of it was begun"]);
        }
        // And in the middle of wiping the first drive.
        self.unmounted();
        let drive = &self.machine.drives[0].path;
        if self.word == "xfs" {
            put(drive, 126, &[1]);
        }
        put(drive, 4096, &vec![0; MIB as usize - 4096]);
        self.undo();
    }

    /// As after a boot that gave each drive the number of the next one.
    fn renumbered(&self) {
        let mut record = self.machine.record().unwrap();
        let nodes: Vec<&str> = self.machine.drives.iter().map(|drive| drive.node()).collect();
        for (index, drive) in record["drives"].as_array_mut().unwrap().iter_mut().enumerate() {
            drive["node"] = nodes[(index + 1) % nodes.len()].into();
        }
        if self.word == "xfs" {
            for (index, volume) in record["volumes"].as_array_mut().unwrap().iter_mut().enumerate() {
                volume["node"] = nodes[(index + 1) % nodes.len()].into();
            }
        }
        fs::write(self.machine.at("state/test.json"), record.to_string()).unwrap();
    }
}

#[test]
fn a_file_system_on_each_drive_made_mounted_and_taken_back() {
    let Some(layout) = xfs(2) else { return };
    // 1 MiB, the pool's unit.
    layout.made_mounted_and_taken_back(&["mkfs.xfs -d su=", "state/test.fs/1", "striped over 2"], (256, 256));
}

#[test]
fn one_file_system_on_a_striped_volume_made_and_taken_back() {
    let Some(layout) = lvm(3) else { return };
    // 128 KiB, times 3.
    layout.made_mounted_and_taken_back(
        &["volume group nvtier-test", "striped over 3 in units of 128", "mkfs.xfs -d su=131072,sw=3"],
        (32, 96),
    );
}

#[test]
fn a_volume_group_with_anything_else_in_it_is_kept() {
    let Some(mut layout) = lvm(3) else { return };
    let third = layout.machine.drives.pop().unwrap();
    layout.apply();
    told(&["vgextend", "--yes", "nvtier-test", third.node()]);
    told(&["lvcreate", "--yes", "-n", "other", "-l", "1", "nvtier-test"]);
    layout.machine.disk("undo", &["--yes"]).refused(1, &["nvtier-test", "other logical volumes: other"]);
    told(&["lvremove", "--yes", "nvtier-test/other"]);
    told(&["vgreduce", "nvtier-test", third.node()]);
    // Somebody made the group his own.
    layout.unmounted();
    told(&["vgrename", "nvtier-test", "theirs"]);
    layout.machine.disk("undo", &["--yes"]).refused(1, &["volume group theirs"]);
    told(&["vgrename", "theirs", "nvtier-test"]);
    layout.undo();
}

#[test]
fn file_systems_survive_kills_of_apply_and_undo() {
    let Some(layout) = xfs(2) else { return };
    let taken_back = [("mkfs.xfs", 1), ("mount", 1), ("mkfs.xfs", 2), ("mount", 2)];
    layout.survives_kills(&["mkfs.xfs", "mount", "mkfs.xfs", "mount"], &taken_back, &["umount"]);
}

#[test]
fn a_striped_volume_survives_kills_of_apply_and_undo() {
    let Some(layout) = lvm(2) else { return };
    let made = ["pvcreate", "pvcreate", "vgcreate", "lvcreate", "mkfs.xfs", "mount"];
    let taken_back = [("pvcreate", 1), ("vgcreate", 1), ("mkfs.xfs", 1)];
    layout.survives_kills(&made, &taken_back, &["umount", "vgremove"]);
}

#[test]
fn a_drive_that_was_given_something_else_is_left_alone() {
    let Some(layout) = xfs(2) else { return };
    layout.apply();
    layout.unmounted();
    let drive = &layout.machine.drives[1].path;
    let mut head = vec![0; 4096];
    File::open(drive).unwrap().read_exact(&mut head).unwrap();
    put(drive, 0, &[0; 4096]);
    put(drive, 4086, b"SWAPSPACE2");
    layout.machine.disk("undo", &["--yes"]).refused(1, &["swap space", "no longer"]);
    layout.machine.disk("apply", &["--layout", "xfs", "--yes"]).refused(1, &["swap space", "no longer"]);
    put(drive, 0, &head);
    layout.undo();
}
