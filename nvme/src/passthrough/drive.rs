//! A drive, for its admin commands.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nvme_sys::{
    NVME_IDENTIFY_CNS_CTRL, NVME_IDENTIFY_CNS_NS, NVME_IDENTIFY_CNS_NS_ACTIVE_LIST, NVME_LOG_LID_ERROR,
    NVME_LOG_LID_SMART, Plain, from_bytes, nvme_admin_get_log_page, nvme_admin_identify,
    nvme_cmd_get_log_lid, nvme_error_log_page, nvme_id_ctrl, nvme_id_ns, nvme_identify_cns, nvme_ns_list,
    nvme_smart_log, nvme_uring_cmd, zeroed,
};

use super::{Controller, ErrorLogEntry, Namespace, SmartLog, ioctl, sysfs};
use crate::error::{Error, ErrorKind, Result};

/// Which kind of node leads to a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// `/dev/nvmeX`.
    Controller,
    /// `/dev/nvmeXnY`, or a partition of it.
    Block,
    /// `/dev/ngXnY`.
    Generic,
}

/// An NVMe drive, opened through any of its nodes for its admin commands. Reads only: it changes nothing.
#[derive(Debug)]
pub struct Drive {
    file: File,
    name: String,
    kind: NodeKind,
    namespace: Option<u32>,
}

/// "All namespaces", for log pages of the whole drive.
const ALL: u32 = u32::MAX;
/// Error log entries asked for at most.
const ERROR_LOG_MAX: u16 = 64;

impl Drive {
    /// Opens a controller's or a namespace's node. [`ErrorKind::Unsupported`]: it is none of NVMe's.
    pub fn open(path: impl AsRef<Path>) -> Result<Drive> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let node =
            std::fs::metadata(path).map_err(|error| Error::os(error, format!("open {name}")))?.file_type();
        // Before opening: an open of some other device (a tape, a terminal) is not without effects.
        let kind = if node.is_block_device() {
            NodeKind::Block
        } else if sysfs::is_nvme_char(path) {
            NodeKind::Generic
        } else if sysfs::is_controller(path) {
            NodeKind::Controller
        } else {
            return Err(ioctl::not_nvme(&name));
        };
        let file = File::open(path).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied => ": only root, or the group that owns the node, may",
                _ => "",
            };
            Error::os(error, format!("open {name}{hint}"))
        })?;
        let namespace = match kind {
            NodeKind::Controller => None,
            _ => Some(ioctl::namespace_id(file.as_fd()).map_err(|error| match error.raw_os_error() {
                Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP) => ioctl::not_nvme(&name),
                _ => Error::os(error, format!("ask for the namespace of {name}")),
            })?),
        };
        Ok(Drive { file, name, kind, namespace })
    }

    pub(crate) fn of(file: &File, name: &str) -> Result<Drive> {
        let file = file.try_clone().map_err(|error| Error::os(error, format!("duplicate {name}")))?;
        let namespace = ioctl::namespace_id(file.as_fd())
            .map_err(|error| Error::os(error, format!("ask for the namespace of {name}")))?;
        Ok(Drive { file, name: name.to_owned(), kind: NodeKind::Generic, namespace: Some(namespace) })
    }

    /// Path that it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which kind of node that is.
    pub fn kind(&self) -> NodeKind {
        self.kind
    }

    /// The namespace that the node stands for; None for a controller's.
    pub fn namespace(&self) -> Option<u32> {
        self.namespace
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn identify<T: Plain>(&self, what: nvme_identify_cns, namespace: u32, doing: &str) -> Result<T> {
        let mut command: nvme_uring_cmd = zeroed();
        command.opcode = nvme_admin_identify as u8;
        command.nsid = namespace;
        command.cdw10 = what;
        let mut page = vec![0; 4096];
        self.admin(command, &mut page, doing)?;
        self.decode(&page, doing)
    }

    /// The first `len` bytes of a log page; `len` is a multiple of 4.
    fn log_page(&self, what: nvme_cmd_get_log_lid, len: usize, doing: &str) -> Result<Vec<u8>> {
        let mut command: nvme_uring_cmd = zeroed();
        command.opcode = nvme_admin_get_log_page as u8;
        command.nsid = ALL;
        // Number of dwords, 0's based: low half in bits 31:16, high half in the next dword.
        let dwords = (len / 4 - 1) as u32;
        command.cdw10 = what | (dwords & 0xffff) << 16;
        command.cdw11 = dwords >> 16;
        let mut page = vec![0; len];
        self.admin(command, &mut page, doing)?;
        Ok(page)
    }

    fn admin(&self, command: nvme_uring_cmd, page: &mut [u8], doing: &str) -> Result<()> {
        ioctl::admin_read(self.fd(), command, page)
            .map_err(|fault| fault.error(format!("{doing} of {}", self.name)))
    }

    fn decode<T: Plain>(&self, page: &[u8], doing: &str) -> Result<T> {
        from_bytes(page)
            .ok_or_else(|| Error::new(ErrorKind::Io, format!("{doing} of {}: too few bytes", self.name)))
    }

    /// Identify Controller.
    pub fn controller(&self) -> Result<Controller> {
        let raw: nvme_id_ctrl = self.identify(NVME_IDENTIFY_CNS_CTRL, 0, "identify the controller")?;
        Ok(Controller::decode(&raw))
    }

    /// Numbers of the active namespaces (the first 1024 of them).
    pub fn namespaces(&self) -> Result<Vec<u32>> {
        let list: nvme_ns_list = self.identify(NVME_IDENTIFY_CNS_NS_ACTIVE_LIST, 0, "list the namespaces")?;
        Ok(list.ns.iter().map(|id| u32::from_le(*id)).take_while(|id| *id != 0).collect())
    }

    /// Identify Namespace.
    pub fn identify_namespace(&self, id: u32) -> Result<Namespace> {
        let doing = format!("identify namespace {id}");
        let raw: nvme_id_ns = self.identify(NVME_IDENTIFY_CNS_NS, id, &doing)?;
        Ok(Namespace::decode(id, &raw))
    }

    /// SMART / health.
    pub fn smart(&self) -> Result<SmartLog> {
        let doing = "read the SMART / health log";
        let page = self.log_page(NVME_LOG_LID_SMART, size_of::<nvme_smart_log>(), doing)?;
        Ok(SmartLog::decode(&self.decode(&page, doing)?))
    }

    /// The error log, newest first, of a drive that keeps `entries` ([`Controller::error_log_entries`]; 64 are read at most).
    pub fn error_log(&self, entries: u16) -> Result<Vec<ErrorLogEntry>> {
        let doing = "read the error log";
        let each = size_of::<nvme_error_log_page>();
        let count = usize::from(entries.clamp(1, ERROR_LOG_MAX));
        let page = self.log_page(NVME_LOG_LID_ERROR, each * count, doing)?;
        let entries = page.chunks_exact(each).filter_map(from_bytes::<nvme_error_log_page>);
        Ok(entries.filter_map(|raw| ErrorLogEntry::decode(&raw)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_nvme_device_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        for path in [Path::new("/dev/null"), Path::new("/"), &file] {
            let error = Drive::open(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(
                error.to_string().contains(&format!("{} is not an NVMe device", path.display())),
                "{error}"
            );
        }
        assert_eq!(Drive::open("/dev/nvme999").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
