//! Drives that may be lost, and `nvtier disk` on them with everything else in a scratch folder.
//!
//! They are loop devices, or those that `NVTIER_DRIVES` names, with colons between: the emulated machine of the suite `guest` gives its
//! NVMe drives to the same tests, each 1 GiB or larger. What such a machine cannot do is a failure there, not a reason to skip.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Mounted, Ran, mounted_at, nvtier_path, run, scratch, skip};

/// Bytes.
pub const MIB: u64 = 1 << 20;

/// Says that a test cannot run here, unless the drives were given: whoever gave them has what the test needs.
///
/// # Panics
/// Where drives were given.
#[track_caller]
pub fn cannot(reason: &str) {
    assert!(env::var_os("NVTIER_DRIVES").is_none(), "{reason}");
    skip(reason);
}

/// A drive.
#[derive(Debug)]
pub struct Drive {
    /// Its node.
    pub path: PathBuf,
    /// A loop device over a file, detached at the end.
    attached: bool,
}

impl Drive {
    /// A loop device over that file; `None` (said aloud) where that cannot be.
    pub fn attach(file: &Path, flags: &[&str]) -> Option<Drive> {
        let out = Command::new("losetup").args(["--find", "--show"]).args(flags).arg(file).output();
        match out {
            Ok(out) if out.status.success() => {
                let path = String::from_utf8_lossy(&out.stdout).trim().into();
                Some(Drive { path, attached: true })
            }
            Ok(out) => {
                skip(&format!("no loop device: {}", String::from_utf8_lossy(&out.stderr).trim()));
                None
            }
            Err(error) => {
                skip(&format!("no loop device: losetup: {error}"));
                None
            }
        }
    }

    /// One that was given, with nothing on it.
    fn given(path: PathBuf) -> Drive {
        let drive = Drive { path, attached: false };
        let len =
            File::open(&drive.path).and_then(|mut file| file.seek(SeekFrom::End(0))).expect("its length");
        let zeros = vec![0; MIB as usize];
        put(&drive.path, 0, &zeros);
        put(&drive.path, len - MIB, &zeros);
        drive
    }

    /// Its node as text.
    pub fn node(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        if self.attached {
            let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
        }
    }
}

/// Unmounts what a failed test may have left, so that loop devices can be detached.
#[derive(Debug)]
pub struct Unmount(pub Vec<PathBuf>);

impl Drop for Unmount {
    fn drop(&mut self) {
        for point in self.0.iter().filter(|point| mounted_at(point)) {
            let _ = Command::new("umount").arg(point).status();
        }
    }
}

/// Drives, and folders for units, records and the mount. Fields are dropped in order: unmounted first, detached last.
#[derive(Debug)]
pub struct Machine {
    /// The pool's mount, once it is there.
    pub mounted: Mounted,
    /// Blank ones.
    pub drives: Vec<Drive>,
    /// Of loop devices: what they lie on.
    pub images: Vec<PathBuf>,
}

impl Machine {
    /// With so many blank drives; `None` (said aloud) where there are no loop devices.
    pub fn new(drives: usize) -> Option<Machine> {
        Machine::of(drives, 64 * MIB)
    }

    /// With so many blank drives of that size, or larger ones that were given.
    ///
    /// # Panics
    /// Where too few were given.
    pub fn of(count: usize, bytes: u64) -> Option<Machine> {
        let folder = scratch();
        fs::create_dir(folder.path().join("units")).expect("a folder for units");
        let mut images = Vec::new();
        let mut drives = Vec::new();
        if let Some(given) = env::var_os("NVTIER_DRIVES") {
            drives.extend(env::split_paths(&given).take(count).map(Drive::given));
            assert_eq!(drives.len(), count, "too few drives in NVTIER_DRIVES");
        } else {
            for index in 0..count {
                let image = folder.path().join(format!("image-{index}"));
                File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
                drives.push(Drive::attach(&image, &[])?);
                images.push(image);
            }
        }
        let point = folder.path().join("mnt");
        let pool = folder.path().join("state/test");
        Some(Machine { mounted: Mounted::over(pool, point, folder), drives, images })
    }

    /// The scratch folder.
    pub fn folder(&self) -> &Path {
        self.mounted.folder()
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// `nvtier disk WORD DRIVE... MORE...` with everything inside the scratch folder.
    pub fn command(&self, word: &str, more: &[&str]) -> Command {
        let mut command = Command::new(nvtier_path());
        command.args(["disk", word]);
        if word != "undo" {
            command.args(self.drives.iter().map(Drive::node));
            command.args(["--name", "test", "--mountpoint"]).arg(self.at("mnt"));
            command.arg("--unit-dir").arg(self.at("units"));
        } else {
            command.arg("test");
        }
        command.arg("--state-dir").arg(self.at("state")).args(more);
        command
    }

    /// Runs it.
    #[track_caller]
    pub fn disk(&self, word: &str, more: &[&str]) -> Ran {
        run(&mut self.command(word, more))
    }

    /// What `apply` wrote down.
    pub fn record(&self) -> Option<serde_json::Value> {
        serde_json::from_slice(&fs::read(self.at("state/test.json")).ok()?).ok()
    }

    /// No superblock on any drive, no unit, no record, no directories.
    ///
    /// # Panics
    /// Where something is.
    #[track_caller]
    pub fn is_as_before(&self) {
        for drive in &self.drives {
            assert!(!has_superblock(&drive.path), "{} still carries a superblock", drive.node());
        }
        for made in ["units/nvtier-test.service", "state/test.json", "state/test", "mnt"] {
            assert!(!self.at(made).exists(), "{made} was left");
        }
    }
}

/// Whether the first or the last 4096 bytes are a superblock of ours.
///
/// # Panics
/// Where it cannot be read.
pub fn has_superblock(path: &Path) -> bool {
    let mut file = File::open(path).expect("the drive");
    let len = file.seek(SeekFrom::End(0)).expect("its length");
    [0, len - 4096].into_iter().any(|at| {
        let mut magic = [0; 8];
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut magic)).expect("its bytes");
        magic == *b"NVTIERSB"
    })
}

/// Writes there, durably.
///
/// # Panics
/// Where that fails.
pub fn put(path: &Path, at: u64, bytes: &[u8]) {
    let write = || -> std::io::Result<()> {
        let mut file = File::options().write(true).open(path)?;
        file.seek(SeekFrom::Start(at))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Whether units can be judged here; said aloud where not.
pub fn has_systemd_analyze() -> bool {
    let probe = Command::new("systemd-analyze").arg("--version").output();
    let there = probe.is_ok_and(|out| out.status.success());
    if !there {
        skip("there is no systemd-analyze here");
    }
    there
}

/// Has systemd judge a unit.
///
/// # Panics
/// With what it says against it.
#[track_caller]
pub fn verify(unit: &Path) {
    let ran = run(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(unit));
    // It also tells what is wrong with this machine's other units. It writes names as they are, escapes and all.
    let name = unit.file_name().and_then(|name| name.to_str()).expect("a name");
    let about: Vec<&str> = ran.stderr.lines().filter(|line| line.contains(name)).collect();
    assert!(about.is_empty(), "{about:#?}\n{:?}", fs::read_to_string(unit));
}
