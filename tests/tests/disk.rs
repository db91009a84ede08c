//! `nvtier disk` on loop devices, layout raw (the others: disk_layouts.rs): what is refused, what is made, and that it is taken back, also half-way.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nvtier_tests::drives::{Drive, MIB, Machine, has_superblock, has_systemd_analyze, put, verify};
use nvtier_tests::{LIMIT, Mounted, nvtier, nvtier_path, pattern, run, scratch, skip, wait_for};
use rustix::process::{Pid, Signal, kill_process};

/// Makes an ext4 file system; false (said aloud) where that cannot be.
fn ext4(drive: &Drive) -> bool {
    match Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&drive.path).status() {
        Ok(status) if status.success() => true,
        other => {
            skip(&format!("no ext4 to be made: {other:?}"));
            false
        }
    }
}

#[test]
fn the_list_has_this_machines_drives_and_refuses_the_one_it_runs_from() {
    let list = nvtier(["disk", "plan", "--json", "--state-dir", "/nonexistent"]).ok().json();
    let drives = list["drives"].as_array().unwrap();
    for drive in drives {
        assert!(drive["node"].as_str().unwrap().starts_with("/dev/"), "{drive}");
        assert!(drive["bytes"].as_u64().unwrap() > 0, "{drive}");
        let verdict = drive["verdict"].as_str().unwrap();
        assert!(["safe", "needs_force", "unknown", "refused"].contains(&verdict), "{drive}");
        assert_eq!(verdict == "safe", drive["reasons"].as_array().unwrap().is_empty(), "{drive}");
    }
    nvtier(["disk", "plan", "--state-dir", "/nonexistent"]).ok();
    let device = fs::metadata("/").unwrap().dev();
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    match drives.iter().find(|drive| drive["device"] == device.as_str()) {
        Some(root) => {
            assert!(root["mounts"].as_array().unwrap().iter().any(|point| point == "/"), "{root}");
            assert_eq!(root["verdict"], "refused", "{root}");
        }
        None => skip(&format!("the root file system's device {device} is no drive in /sys/block")),
    }
}

#[test]
fn a_plan_says_what_apply_would_do_and_does_nothing() {
    let Some(machine) = Machine::new(2) else { return };
    let plan = machine.disk("plan", &["--json"]).ok().json();
    assert_eq!(plan["would_apply"], true, "{plan:#}");
    assert_eq!(plan["drives"][0]["verdict"], "safe");
    let steps = plan["steps"].to_string();
    for word in
        [machine.drives[0].node(), machine.drives[1].node(), "striped over 2", "nvtier-test.service", "mnt"]
    {
        assert!(steps.contains(word), "{word} is not in {steps}");
    }
    let text = machine.disk("plan", &[]).ok().stdout;
    assert!(text.contains("ExecStart=") && text.contains("gone with the next boot"), "{text}");
    machine.is_as_before();
    assert!(!machine.at("state").exists());
    for image in &machine.images {
        assert!(
            fs::read(image).unwrap().iter().all(|byte| *byte == 0),
            "the plan wrote to {}",
            image.display()
        );
    }
}

#[test]
fn applied_mounted_and_taken_back() {
    let Some(machine) = Machine::new(2) else { return };
    let applied = machine.disk("apply", &["--yes", "--json"]).ok().json();
    assert_eq!(applied["record"]["state"], "done", "{applied:#}");
    assert_eq!(applied["started"], false, "nothing is started from a folder of the test's");
    let unit = fs::read_to_string(machine.at("units/nvtier-test.service")).unwrap();
    assert!(unit.contains("mount --foreground --"), "{unit}");
    for drive in &machine.drives {
        assert!(has_superblock(&drive.path));
    }
    // Once more: nothing is left to do, and nothing is formatted again.
    let again = machine.disk("apply", &["--yes", "--json"]).ok().json();
    assert_eq!(again["record"]["pool_id"], applied["record"]["pool_id"]);

    machine.mounted.mount(&[]).ok();
    let bytes = pattern(3, 5_000_000);
    fs::write(machine.at("mnt/f"), &bytes).unwrap();
    machine.disk("undo", &["--yes"]).refused(4, &["in use by process", "umount"]);
    machine.mounted.umount().ok();
    let third = machine.disk("apply", &["--yes", "--json"]).ok().json();
    assert_eq!(third["record"]["pool_id"], applied["record"]["pool_id"]);
    machine.mounted.mount(&[]).ok();
    assert_eq!(fs::read(machine.at("mnt/f")).unwrap(), bytes);
    machine.mounted.umount().ok();

    machine.disk("undo", &[]).refused(2, &["--yes"]);
    assert!(machine.record().is_some());
    machine.disk("undo", &["--yes"]).ok();
    machine.is_as_before();
    machine.disk("undo", &["--yes"]).refused(3, &["no record"]);
    // The drives are as free as they were.
    assert_eq!(machine.disk("plan", &["--json"]).ok().json()["drives"][1]["verdict"], "safe");
}

#[test]
fn the_pool_belongs_to_its_owner() {
    let Some(machine) = Machine::new(1) else { return };
    machine.disk("plan", &["--owner", "no-such-user"]).refused(2, &["no-such-user"]);
    machine.disk("apply", &["--yes", "--owner", "nobody"]).ok();
    let unit = fs::read_to_string(machine.at("units/nvtier-test.service")).unwrap();
    assert!(unit.contains("mount --foreground --allow-other --"), "{unit}");
    machine.mounted.mount(&[]).ok();
    let nobody = Command::new("id").args(["-u", "nobody"]).output().unwrap().stdout;
    let uid = fs::metadata(machine.at("mnt")).unwrap().uid();
    assert_eq!(uid.to_string(), String::from_utf8_lossy(&nobody).trim());
    machine.mounted.umount().ok();
    machine.disk("undo", &["--yes"]).ok();
    machine.is_as_before();
}

#[test]
fn a_mounted_drive_is_refused_whatever_is_said() {
    let Some(machine) = Machine::new(1) else { return };
    if !ext4(&machine.drives[0]) {
        return;
    }
    let point = machine.at("other");
    fs::create_dir(&point).unwrap();
    let mounted = run(Command::new("mount").arg(&machine.drives[0].path).arg(&point));
    if mounted.code != 0 {
        return skip(&format!("ext4 cannot be mounted here: {}", mounted.stderr.trim()));
    }
    fs::write(point.join("precious"), "precious").unwrap();
    let refused = machine.disk("apply", &["--yes", "--force"]);
    let planned = machine.disk("plan", &["--force", "--json"]);
    run(Command::new("umount").arg(&point)).ok();
    refused.refused(4, &[machine.drives[0].node(), "mounted on"]);
    assert_eq!(planned.json()["would_apply"], false);
    assert_eq!(planned.code, 4);
    assert!(machine.record().is_none());
    run(Command::new("mount").arg(&machine.drives[0].path).arg(&point)).ok();
    let kept = fs::read_to_string(point.join("precious"));
    run(Command::new("umount").arg(&point)).ok();
    assert_eq!(kept.unwrap(), "precious");
}

#[test]
fn what_a_drive_holds_is_named_and_kept_without_force() {
    let Some(machine) = Machine::new(2) else { return };
    put(&machine.drives[1].path, 4086, b"SWAPSPACE2");
    machine.disk("apply", &["--yes"]).refused(1, &[machine.drives[1].node(), "swap space", "--force"]);
    machine.disk("plan", &[]).refused(1, &["swap space"]);
    assert!(
        machine.record().is_none() && !has_superblock(&machine.drives[0].path),
        "the other drive was touched"
    );
    let plan = machine.disk("plan", &["--force", "--json"]).ok().json();
    assert!(plan["steps"].to_string().contains("LOST: swap space"), "{plan:#}");
    machine.disk("apply", &["--yes", "--force"]).ok();
    machine.disk("undo", &["--yes"]).ok();
    machine.is_as_before();
}

#[test]
fn other_uses_are_refused_and_a_small_drive_too() {
    let Some(machine) = Machine::new(1) else { return };
    let image = machine.at("small");
    File::create(&image).unwrap().set_len(MIB).unwrap();
    let Some(small) = Drive::attach(&image, &[]) else { return };
    let base = ["disk", "plan", "--state-dir", "/nonexistent"];
    let plan = |drives: &[&str]| nvtier(base.iter().chain(drives));
    plan(&[small.node()]).refused(4, &["too small"]);
    let image = machine.at("read-only");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let Some(read_only) = Drive::attach(&image, &["--read-only"]) else { return };
    plan(&[read_only.node()]).refused(4, &["read-only"]);
    // Somebody has it open for himself, as a mount in another mount namespace has.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
    let claimed = rustix::fs::open(&machine.drives[0].path, flags, rustix::fs::Mode::empty()).unwrap();
    machine.disk("apply", &["--yes", "--force"]).refused(4, &["open for itself"]);
    drop(claimed);
    // A process that another test is starting has a copy of the descriptor until it runs its program.
    assert!(wait_for(|| (machine.disk("plan", &[]).code == 0).then_some(())).is_some());
}

#[test]
fn wrong_input_is_told() {
    nvtier(["disk", "apply", "--yes"]).refused(2, &["no drive was named"]);
    nvtier(["disk", "plan", "/dev/null"]).refused(2, &["/dev/null", "not a block device"]);
    nvtier(["disk", "plan", "/dev/no-such-drive"]).refused(3, &["/dev/no-such-drive"]);
    nvtier(["disk", "plan", "--name", "../x"]).refused(2, &["letters, digits"]);
    nvtier(["disk", "undo", "nobody-made-it", "--state-dir", "/nonexistent"])
        .refused(3, &["nobody-made-it", "none"]);
    let Some(machine) = Machine::new(1) else { return };
    let node = machine.drives[0].node();
    nvtier(["disk", "plan", node, node]).refused(2, &["the same drive"]);
    machine.disk("apply", &[]).refused(2, &["--yes"]);
    machine.disk("apply", &["--json"]).refused(2, &["--yes"]);
    machine.disk("plan", &["--unit-dir", "/no/such/folder"]).refused_somehow(&[]);
    fs::create_dir(machine.at("mnt")).unwrap();
    fs::write(machine.at("mnt/file"), "").unwrap();
    machine.disk("apply", &["--yes"]).refused(1, &["not empty"]);
    fs::remove_dir_all(machine.at("mnt")).unwrap();
    fs::write(machine.at("units/nvtier-test.service"), "[Unit]\n").unwrap();
    machine.disk("apply", &["--yes"]).refused(1, &["nvtier-test.service", "there already"]);
    fs::remove_file(machine.at("units/nvtier-test.service")).unwrap();
    fs::create_dir_all(machine.at("state")).unwrap();
    fs::write(machine.at("state/test.json"), "{").unwrap();
    machine.disk("apply", &["--yes"]).refused(5, &["test.json"]);
    fs::remove_file(machine.at("state/test.json")).unwrap();
    machine.is_as_before();
    // Another machine's name for the same thing, and a name that is taken.
    machine.disk("apply", &["--yes"]).ok();
    machine.disk("apply", &["--yes", "--owner", "nobody"]).refused(1, &["another owner", "undo"]);
    machine.disk("undo", &["--yes"]).ok();
}

#[test]
fn nothing_is_wiped_that_apply_did_not_make() {
    let Some(machine) = Machine::new(2) else { return };
    machine.disk("apply", &["--yes"]).ok();
    let unit = machine.at("units/nvtier-test.service");
    let text = fs::read_to_string(&unit).unwrap();
    fs::write(&unit, format!("{text}# mine\n")).unwrap();
    machine.disk("undo", &["--yes"]).refused(1, &["nvtier-test.service", "changed"]);
    fs::write(&unit, &text).unwrap();

    // Another pool took the second drive.
    let other = machine.drives[1].node();
    nvtier(["format", other, "--force"]).ok();
    machine
        .disk("undo", &["--yes"])
        .refused(1, &[other, "no longer what `apply` left", "member of the pool"]);
    machine.disk("apply", &["--yes"]).refused(1, &[other, "no longer"]);
    assert!(
        has_superblock(&machine.drives[0].path) && has_superblock(&machine.drives[1].path),
        "one was wiped"
    );
    assert!(unit.exists());
    nvtier(["verify", "--pool", other]).ok();

    // And something else.
    run(Command::new("wipefs").args(["-q", "-a", other]));
    put(&machine.drives[1].path, 0, &[0; 4096]);
    put(&machine.drives[1].path, 64 * MIB - 4096, &[0; 4096]);
    put(&machine.drives[1].path, 0x438, &[0x53, 0xef]);
    machine.disk("undo", &["--yes"]).refused(1, &[other, "ext4"]);
    assert!(has_superblock(&machine.drives[0].path), "the first drive was wiped");

    // The same drive by the kernel's number, and another one by its own.
    let record = fs::read_to_string(machine.at("state/test.json")).unwrap();
    put(&machine.drives[1].path, 0x438, &[0, 0]);
    fs::write(machine.at("state/test.json"), record.replace("\"serial\": \"\"", "\"serial\": \"S1\""))
        .unwrap();
    machine.disk("undo", &["--yes"]).refused(1, &["another drive", "S1"]);
    fs::write(machine.at("state/test.json"), record).unwrap();

    // What was wiped by hand is no reason to keep the rest.
    machine.disk("undo", &["--yes"]).ok();
    machine.is_as_before();
}

/// Starts `apply` or `undo` and kills it as soon as its record says `state`, or when it has ended before that was seen.
fn kill_at(machine: &Machine, word: &str, state: &str) {
    let mut command = machine.command(word, &["--yes"]);
    let mut child: Child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let seen = wait_for(|| {
        let found = machine.record().is_some_and(|record| record["state"] == state);
        (found || child.try_wait().unwrap().is_some()).then_some(())
    });
    assert!(seen.is_some(), "`{word}` did not end within {LIMIT:?}");
    let _ = kill_process(Pid::from_child(&child), Signal::KILL);
    let status = child.wait().unwrap();
    let left = machine.record().map(|record| record["state"].to_string());
    println!("{word} killed at {state}: {status}, the record says {left:?}");
}

/// `undo` that is killed once it has begun, and the next one.
#[test]
fn an_undo_that_was_killed_is_finished_by_the_next() {
    let Some(machine) = Machine::new(2) else { return };
    machine.disk("apply", &["--yes"]).ok();
    kill_at(&machine, "undo", "undoing");
    if machine.record().is_some() {
        machine.disk("apply", &["--yes"]).refused(4, &["`undo` of it was begun", "nvtier disk undo test"]);
        machine.disk("undo", &["--yes"]).ok();
    }
    machine.is_as_before();
    // What a kill between two drives leaves, made by hand so that it is met.
    machine.disk("apply", &["--yes"]).ok();
    let mut record = machine.record().unwrap();
    record["state"] = "undoing".into();
    fs::write(machine.at("state/test.json"), record.to_string()).unwrap();
    fs::remove_file(machine.at("units/nvtier-test.service")).unwrap();
    put(&machine.drives[0].path, 0, &[0; 4096]);
    put(&machine.drives[0].path, 64 * MIB - 4096, &[0; 4096]);
    machine.disk("apply", &["--yes"]).refused(4, &["`undo` of it was begun"]);
    machine.disk("undo", &["--yes"]).ok();
    machine.is_as_before();
}

#[test]
fn killed_half_way_it_goes_on_or_is_taken_back() {
    for state in ["formatting", "formatted", "done"] {
        for undo in [false, true] {
            let Some(machine) = Machine::new(2) else { return };
            kill_at(&machine, "apply", state);
            if undo && machine.record().is_some() {
                machine.disk("undo", &["--yes"]).ok();
                machine.is_as_before();
            }
            machine.disk("apply", &["--yes"]).ok();
            assert_eq!(machine.record().unwrap()["state"], "done");
            machine.mounted.mount(&[]).ok();
            fs::write(machine.at("mnt/f"), "f").unwrap();
            machine.mounted.umount().ok();
            nvtier(["verify".as_ref(), "--pool".as_ref(), machine.at("state/test").as_os_str()]).ok();
            machine.disk("undo", &["--yes"]).ok();
            machine.is_as_before();
        }
    }
}

/// What a kill in the middle of formatting can leave, one after the other, made by hand so that each is met.
#[test]
fn every_half_made_pool_is_finished_or_taken_back() {
    for left in ["untouched", "wiped", "one superblock", "no pointer"] {
        for undo in [false, true] {
            let Some(machine) = Machine::new(2) else { return };
            machine.disk("apply", &["--yes"]).ok();
            let mut record = machine.record().unwrap();
            record["state"] = "formatting".into();
            fs::write(machine.at("state/test.json"), record.to_string()).unwrap();
            fs::remove_file(machine.at("units/nvtier-test.service")).unwrap();
            fs::remove_dir(machine.at("mnt")).unwrap();
            fs::remove_dir_all(machine.at("state/test")).unwrap();
            let wiped: &[usize] = match left {
                "no pointer" => &[],
                "one superblock" => &[1],
                _ => &[0, 1],
            };
            for index in wiped {
                put(&machine.drives[*index].path, 0, &[0; 4096]);
                put(&machine.drives[*index].path, 64 * MIB - 4096, &[0; 4096]);
            }
            if left == "untouched" {
                put(&machine.drives[1].path, 4086, b"SWAPSPACE2");
                machine.disk("apply", &["--yes"]).refused(1, &["swap space"]);
            }
            if undo {
                machine.disk("undo", &["--yes"]).ok();
                machine.is_as_before();
            } else {
                machine.disk("apply", &["--yes", "--force"]).ok();
                assert_eq!(machine.record().unwrap()["pool_id"], record["pool_id"], "{left}");
                nvtier(["verify".as_ref(), "--pool".as_ref(), machine.at("state/test").as_os_str()]).ok();
                machine.disk("undo", &["--yes"]).ok();
                machine.is_as_before();
            }
        }
    }
}

#[test]
fn a_terminal_is_asked() {
    let Some(machine) = Machine::new(1) else { return };
    let probe = Command::new("script").arg("--version").output();
    if !probe.is_ok_and(|out| out.status.success()) {
        return skip("there is no script(1) to give the command a terminal");
    }
    let command = machine.command("apply", &[]);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    for (answer, made) in [("yes\n", false), ("format\n", true)] {
        let mut child = Command::new("script")
            .args(["-qec", &words.join(" "), "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(answer.as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains("ExecStart=") && text.contains("Type `format`"), "{text}");
        assert_eq!(out.status.success(), made, "{text}");
        assert_eq!(machine.record().is_some(), made, "{text}");
    }
    machine.disk("undo", &["--yes"]).ok();
    machine.is_as_before();
}

#[test]
fn the_units_are_what_systemd_takes() {
    if !has_systemd_analyze() {
        return;
    }
    let folder = scratch();
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/systemd/nvtier@.service"))
            .unwrap();
    let unit = folder.path().join("nvtier@x.service");
    fs::write(&unit, text.replace("/usr/local/bin/nvtier", nvtier_path().to_str().unwrap())).unwrap();
    verify(&unit);
    let Some(machine) = Machine::new(1) else { return };
    machine.disk("apply", &["--yes", "--owner", "nobody"]).ok();
    verify(&machine.at("units/nvtier-test.service"));
    machine.disk("undo", &["--yes"]).ok();
}

#[test]
fn a_service_manager_is_told_when_it_is_mounted() {
    let folder = scratch();
    let pool = nvtier_tests::format(nvtier_tests::Kind::Directory, folder.path());
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    let mut child = Command::new(nvtier_path())
        .args(["mount", "--foreground", "--ram", "64MiB"])
        .arg(&mounted.pool)
        .arg(&mounted.point)
        .env("NOTIFY_SOCKET", &path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = [0; 64];
    let len = socket.recv(&mut said);
    let there = mounted.is_mounted();
    let _ = kill_process(Pid::from_child(&child), Signal::TERM);
    let status = child.wait().unwrap();
    assert_eq!(&said[..len.expect("nothing was said")], b"READY=1");
    assert!(there, "it said so before it was mounted");
    assert!(status.success(), "{status}");
}

#[test]
fn layouts_that_cannot_be_made_are_refused_before_anything_is_done() {
    let Some(machine) = Machine::new(1) else { return };
    // Nowhere is a PATH, but for the folders of the administrator's programs, which are always looked into.
    if ["/usr/sbin/mkfs.xfs", "/sbin/mkfs.xfs"].iter().any(|path| Path::new(path).exists()) {
        machine.disk("apply", &["--layout", "xfs", "--yes"]).refused(2, &["1.0 GiB", "--layout raw"]);
    } else {
        machine.disk("apply", &["--layout", "xfs", "--yes"]).refused(7, &["mkfs.xfs", "xfsprogs"]);
    }
    machine.is_as_before();
    assert!(machine.record().is_none());
    let Some(large) = Machine::of(1, 1024 * MIB) else { return };
    let misc = fs::read_to_string("/proc/misc").unwrap_or_default();
    let plan = large.disk("plan", &["--layout", "lvm"]);
    if !Path::new("/usr/sbin/lvcreate").exists() && !Path::new("/sbin/lvcreate").exists() {
        plan.refused(7, &["install the package"]);
    } else if !misc.contains("device-mapper") {
        plan.refused(7, &["device mapper", "dm_mod"]);
    } else {
        plan.ok();
    }
    assert!(large.record().is_none());
}
