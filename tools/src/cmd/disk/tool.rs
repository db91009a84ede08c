//! Programs of others that make file systems and volumes.

use std::ffi::OsStr;
use std::process::Command;

use crate::failure::{Failure, Outcome};

/// A program and the package that brings it (Debian, Ubuntu, Fedora and Arch call them the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    pub name: &'static str,
    pub package: &'static str,
}

pub const MKFS_XFS: Tool = Tool { name: "mkfs.xfs", package: "xfsprogs" };
pub const MOUNT: Tool = Tool { name: "mount", package: "util-linux" };
pub const UMOUNT: Tool = Tool { name: "umount", package: "util-linux" };

/// One of LVM's.
pub const fn lvm(name: &'static str) -> Tool {
    Tool { name, package: "lvm2" }
}

impl Tool {
    /// Where programs are looked for: a user's PATH may lack the folders of the administrator's.
    fn path() -> std::ffi::OsString {
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        path
    }

    fn missing(self) -> Failure {
        Failure::unsupported(format!("there is no `{}` on this machine", self.name)).hint(format!(
            "install the package {}, or choose --layout raw, which needs no such program",
            self.package
        ))
    }

    /// Fails where it is not installed.
    pub fn check(self) -> Outcome {
        let found = std::env::split_paths(&Self::path()).any(|folder| folder.join(self.name).is_file());
        if found { Ok(()) } else { Err(self.missing()) }
    }

    /// Runs it and gives what it wrote.
    pub fn run<S: AsRef<OsStr>>(self, args: &[S]) -> Outcome<String> {
        let shown: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
        let tried = format!("{} {}", self.name, shown.join(" "));
        // Messages that somebody may have to look up are in one language.
        let output = Command::new(self.name).args(args).env("PATH", Self::path()).env("LC_ALL", "C").output();
        let output = match output {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(self.missing()),
            Err(error) => return Err(Failure::io(tried, &error)),
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Failure::failed(format!("{tried}: {} ({})", said.trim(), output.status)))
    }
}
