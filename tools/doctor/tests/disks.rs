//! What is told about drives, on machines that this one is not.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use doctor::System;
use doctor::disks::{Disk, disks};

/// A folder with a machine's `/sys`, `/proc`, `/etc` and `/dev`.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Machine {
        Machine(tempfile::tempdir().unwrap())
    }

    fn at(&self, path: &str) -> std::path::PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn file(&self, path: &str, text: &str) -> &Machine {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), text).unwrap();
        self
    }

    fn link(&self, path: &str, target: &str) -> &Machine {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        symlink(Path::new(target), self.at(path)).unwrap();
        self
    }

    fn disk(&self, name: &str, device: &str, sectors: u64) -> &Machine {
        let at = format!("/sys/block/{name}");
        self.file(&format!("{at}/dev"), &format!("{device}\n"))
            .file(&format!("{at}/size"), &format!("{sectors}\n"))
            .file(&format!("{at}/ro"), "0\n")
            .file(&format!("{at}/removable"), "0\n")
    }

    fn part(&self, disk: &str, name: &str, device: &str) -> &Machine {
        let at = format!("/sys/block/{disk}/{name}");
        self.file(&format!("{at}/dev"), device)
            .file(&format!("{at}/size"), "2048\n")
            .file(&format!("{at}/ro"), "0\n")
            .file(&format!("{at}/partition"), "1\n")
    }

    fn disks(&self) -> Vec<Disk> {
        disks(&System::below(self.0.path()))
    }

    fn uses(&self, name: &str) -> Vec<String> {
        let all = self.disks();
        all.iter().find(|disk| disk.name == name).unwrap_or_else(|| panic!("no {name} in {all:?}")).uses()
    }
}

#[test]
fn a_drive_that_nothing_uses_has_no_reasons() {
    let machine = Machine::new();
    machine.disk("nvme0n1", "259:0", 8_000_000).file("/sys/block/nvme0n1/device/model", "A drive  \n");
    let all = machine.disks();
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].node.as_str(), all[0].model.as_str()), ("/dev/nvme0n1", "A drive"));
    assert_eq!(all[0].bytes, 8_000_000 * 512);
    assert_eq!(all[0].uses(), Vec::<String>::new());
}

#[test]
fn what_is_no_drive_is_left_out() {
    let machine = Machine::new();
    machine
        .disk("ram0", "1:0", 100)
        .disk("zram0", "252:0", 100)
        .disk("sr0", "11:0", 100)
        .disk("loop3", "7:3", 0);
    machine.disk("nvme0c0n1", "259:9", 100).file("/sys/block/nvme0c0n1/hidden", "1\n");
    assert_eq!(machine.disks(), Vec::new());
    machine
        .disk("sda", "8:0", 100)
        .disk("loop4", "7:4", 100)
        .file("/sys/block/loop4/loop/backing_file", "/a file\n");
    let all = machine.disks();
    assert_eq!(all.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["loop4", "sda"]);
    assert_eq!(all[0].backing.as_deref(), Some("/a file"));
}

#[test]
fn mounts_are_found_by_number_and_by_name() {
    let machine = Machine::new();
    machine
        .disk("sda", "8:0", 100)
        .part("sda", "sda1", "8:1")
        .disk("sdb", "8:16", 100)
        .disk("sdc", "8:32", 100);
    machine.file(
        "/proc/self/mountinfo",
        "29 1 8:1 / /mnt/a\\040b rw - ext4 /dev/root rw\n30 1 0:40 / /data rw - btrfs /dev/sdb rw\n31 1 0:41 / /t rw - tmpfs sdc rw\n",
    );
    assert_eq!(machine.uses("sda1"), ["mounted on /mnt/a b"]);
    assert_eq!(machine.uses("sda"), ["has partitions: sda1"]);
    assert_eq!(machine.uses("sdb"), ["mounted on /data"]);
    assert_eq!(machine.uses("sdc"), Vec::<String>::new());
    let all = machine.disks();
    assert_eq!(all.iter().find(|disk| disk.name == "sda1").unwrap().part_of.as_deref(), Some("sda"));
}

#[test]
fn swap_holders_fstab_and_write_protection_are_reasons() {
    let machine = Machine::new();
    machine
        .disk("sda", "8:0", 100)
        .disk("sdb", "8:16", 100)
        .disk("sdc", "8:32", 100)
        .disk("sdd", "8:48", 100);
    machine.disk("dm-0", "253:0", 100).disk("md127", "9:127", 100).disk("sde", "8:64", 100);
    machine.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/sda partition 1 0 -2\n");
    machine.file("/sys/block/sdb/holders/dm-0/x", "");
    machine.file(
        "/etc/fstab",
        "# /dev/sde /no ext4\nUUID=12-34 /data  xfs nofail 0 0\n/dev/disk/by-id/x /y ext4 defaults\n",
    );
    machine.link("/dev/disk/by-uuid/12-34", "../../sdc").link("/dev/disk/by-id/x", "../../sdd");
    machine.file("/sys/block/sdd/ro", "1\n");
    assert_eq!(machine.uses("sda"), ["the kernel swaps to it"]);
    assert_eq!(machine.uses("sdb"), ["held by dm-0 (md or device mapper)"]);
    assert_eq!(machine.uses("sdc"), ["in /etc/fstab: UUID=12-34 /data xfs nofail 0 0"]);
    assert_eq!(machine.uses("sdd"), ["in /etc/fstab: /dev/disk/by-id/x /y ext4 defaults", "read-only"]);
    for name in ["dm-0", "md127"] {
        assert!(machine.uses(name)[0].contains("nvtier stripes itself"), "{name}");
    }
    assert_eq!(machine.uses("sde"), Vec::<String>::new());
}
