//! The passthrough interface of linux/nvme_ioctl.h. The only system calls of this module's tree.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nvme_sys::{
    NVME_IOCTL_ADMIN_CMD, NVME_IOCTL_ID, NVME_IOCTL_IO_CMD, nvme_passthru_cmd, nvme_uring_cmd, zeroed,
};

use super::Status;
use crate::error::{Error, ErrorKind};

/// How a command failed: the kernel refused it, or the drive did.
#[derive(Debug)]
pub(crate) enum Fault {
    Os(io::Error),
    Drive(Status),
}

impl Fault {
    /// The error of a command that was `context`.
    pub(crate) fn error(self, context: impl Into<String>) -> Error {
        match self {
            Fault::Os(error) => match error.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => {
                    let context = format!(
                        "{}: the kernel lets only root (CAP_SYS_ADMIN), or a user who may write to the node, send such commands",
                        context.into()
                    );
                    Error::os(error, context)
                }
                _ => Error::os(error, context),
            },
            Fault::Drive(status) => Error::new(status.kind(), context).with_source(status),
        }
    }

    /// Decodes what a command gave: negative is an errno, 0 success, positive the drive's status.
    pub(crate) fn check(result: i32) -> Result<(), Fault> {
        match result {
            0 => Ok(()),
            errno if errno < 0 => Err(Fault::Os(io::Error::from_raw_os_error(-errno))),
            status => Err(Fault::Drive(Status::from_raw(status as u16))),
        }
    }
}

/// The number of the namespace that a node stands for. ENOTTY: it is no NVMe namespace.
pub(crate) fn namespace_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: NVME_IOCTL_ID takes no argument; `fd` is open as long as it is borrowed.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), NVME_IOCTL_ID as libc::Ioctl) };
    match u32::try_from(rc) {
        Ok(0) => Err(io::Error::from_raw_os_error(libc::ENOTTY)),
        Ok(id) => Ok(id),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Who the addresses in a command belong to.
enum Door {
    Admin,
    Io,
}

fn execute(fd: BorrowedFd<'_>, door: Door, command: &nvme_uring_cmd) -> Result<(), Fault> {
    // The two structures are the same but for the last field, which the ioctl answers in.
    let mut request: nvme_passthru_cmd = zeroed();
    nvme_sys::as_bytes_mut(&mut request).copy_from_slice(nvme_sys::as_bytes(command));
    let number = match door {
        Door::Admin => NVME_IOCTL_ADMIN_CMD,
        Door::Io => NVME_IOCTL_IO_CMD,
    };
    loop {
        // SAFETY: the kernel reads and writes `request`, which is a whole nvme_passthru_cmd, and data_len bytes at addr: both
        // callers below take that memory as a borrowed slice and fill in its address and length.
        let rc = unsafe { libc::ioctl(fd.as_raw_fd(), number as libc::Ioctl, &raw mut request) };
        if rc == -1 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            return Err(Fault::Os(error));
        }
        return Fault::check(rc);
    }
}

/// An admin command whose answer fills `data`.
pub(crate) fn admin_read(
    fd: BorrowedFd<'_>,
    mut command: nvme_uring_cmd,
    data: &mut [u8],
) -> Result<(), Fault> {
    command.addr = data.as_mut_ptr() as u64;
    command.data_len = data_len(data.len())?;
    execute(fd, Door::Admin, &command)
}

/// An I/O command that fills `data`.
pub(crate) fn io_read(fd: BorrowedFd<'_>, mut command: nvme_uring_cmd, data: &mut [u8]) -> Result<(), Fault> {
    command.addr = data.as_mut_ptr() as u64;
    command.data_len = data_len(data.len())?;
    execute(fd, Door::Io, &command)
}

/// An I/O command that takes `data` (which may be empty) to the drive.
pub(crate) fn io_write(fd: BorrowedFd<'_>, mut command: nvme_uring_cmd, data: &[u8]) -> Result<(), Fault> {
    command.addr = if data.is_empty() { 0 } else { data.as_ptr() as u64 };
    command.data_len = data_len(data.len())?;
    execute(fd, Door::Io, &command)
}

fn data_len(len: usize) -> Result<u32, Fault> {
    u32::try_from(len).map_err(|_| Fault::Os(io::Error::from_raw_os_error(libc::EINVAL)))
}

/// Of an errno that an ioctl gave on a node which is none of NVMe's.
pub(crate) fn not_nvme(name: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{name} is not an NVMe device (one is /dev/nvme0, /dev/nvme0n1 or /dev/ng0n1)"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_no_namespace_has_no_number_and_takes_no_commands() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(namespace_id(file.as_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        let command: nvme_uring_cmd = zeroed();
        match admin_read(file.as_fd(), command, &mut [0; 64]) {
            Err(Fault::Os(error)) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn results_are_success_errnos_or_statuses() {
        assert!(Fault::check(0).is_ok());
        let gone = Fault::check(-libc::ENODEV).unwrap_err().error("read 512 bytes at 0 of /dev/ng0n1");
        assert_eq!((gone.kind(), gone.errno()), (ErrorKind::Gone, Some(libc::ENODEV)));
        let media = Fault::check(0x281).unwrap_err().error("read 512 bytes at 0 of /dev/ng0n1");
        assert_eq!(media.kind(), ErrorKind::Media);
        assert_eq!(media.nvme_status(), Some(Status::from_raw(0x281)));
        assert_eq!(media.to_string(), "read 512 bytes at 0 of /dev/ng0n1: data lost on the medium");
        let refused = Fault::check(-libc::EACCES).unwrap_err().error("identify the controller");
        assert!(refused.to_string().contains("CAP_SYS_ADMIN"), "{refused}");
    }
}
