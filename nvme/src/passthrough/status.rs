//! What a drive answers to a command that it did not execute.

use std::fmt;

use crate::error::ErrorKind;

/// The status field of a completion (NVMe Base Specification 2.0, figure 90), as Linux gives it: without the phase bit.
///
/// ```text
/// 14   do not retry        10:8  status code type
/// 13   more in the log      7:0  status code
/// 12:11 retry delay
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u16);

/// Status code types (figure 92).
const GENERIC: u8 = 0;
const COMMAND_SPECIFIC: u8 = 1;
const MEDIA: u8 = 2;
const PATH: u8 = 3;
const VENDOR: u8 = 7;

impl Status {
    /// From the low 15 bits.
    pub fn from_raw(raw: u16) -> Status {
        Status(raw & 0x7fff)
    }

    /// The field itself.
    pub fn raw(self) -> u16 {
        self.0
    }

    /// Status code type.
    pub fn code_type(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Status code.
    pub fn code(self) -> u8 {
        self.0 as u8
    }

    /// The drive says that the same command would fail again.
    pub fn do_not_retry(self) -> bool {
        self.0 & 0x4000 != 0
    }

    /// The error log has more about it.
    pub fn more(self) -> bool {
        self.0 & 0x2000 != 0
    }

    /// The specification's name; None for reserved and vendor's own codes.
    pub fn name(self) -> Option<&'static str> {
        NAMES
            .iter()
            .find(|(code_type, code, _)| (*code_type, *code) == (self.code_type(), self.code()))
            .map(|(_, _, name)| *name)
    }

    /// What a program decides by.
    pub fn kind(self) -> ErrorKind {
        match (self.code_type(), self.code()) {
            (GENERIC, 0x01) => ErrorKind::Unsupported,
            (GENERIC, 0x02 | 0x0d..=0x13) => ErrorKind::Invalid,
            (GENERIC, 0x80) => ErrorKind::OutOfRange,
            (GENERIC, 0x81) => ErrorKind::NoSpace,
            (GENERIC, 0x15 | 0x20) | (COMMAND_SPECIFIC, 0x82) | (MEDIA, 0x86) => ErrorKind::PermissionDenied,
            (GENERIC, 0x82..=0x84) => ErrorKind::Busy,
            (GENERIC, 0x0b) => ErrorKind::Gone,
            (MEDIA, 0x80..=0x84 | 0x87) => ErrorKind::Media,
            _ => ErrorKind::Io,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = match self.code_type() {
            GENERIC => "generic command status",
            COMMAND_SPECIFIC => "command specific status",
            MEDIA => "media and data integrity error",
            PATH => "path related status",
            VENDOR => "vendor specific",
            _ => "reserved status code type",
        };
        match self.name() {
            Some(name) => write!(f, "{name}")?,
            None => write!(f, "unknown NVMe status")?,
        }
        write!(f, " (NVMe {group} {:x}h/{:02x}h", self.code_type(), self.code())?;
        if self.do_not_retry() {
            write!(f, ", do not retry")?;
        }
        write!(f, ")")
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({:#06x}, {self})", self.0)
    }
}

impl std::error::Error for Status {}

/// Names: NVMe Base Specification 2.0, figures 93 to 96, and NVM Command Set Specification 1.0, figures 13 to 15.
const NAMES: &[(u8, u8, &str)] = &[
    (GENERIC, 0x00, "Successful Completion"),
    (GENERIC, 0x01, "Invalid Command Opcode"),
    (GENERIC, 0x02, "Invalid Field in Command"),
    (GENERIC, 0x03, "Command ID Conflict"),
    (GENERIC, 0x04, "Data Transfer Error"),
    (GENERIC, 0x05, "Commands Aborted due to Power Loss Notification"),
    (GENERIC, 0x06, "Internal Error"),
    (GENERIC, 0x07, "Command Abort Requested"),
    (GENERIC, 0x08, "Command Aborted due to SQ Deletion"),
    (GENERIC, 0x09, "Command Aborted due to Failed Fused Command"),
    (GENERIC, 0x0a, "Command Aborted due to Missing Fused Command"),
    (GENERIC, 0x0b, "Invalid Namespace or Format"),
    (GENERIC, 0x0c, "Command Sequence Error"),
    (GENERIC, 0x0d, "Invalid SGL Segment Descriptor"),
    (GENERIC, 0x0e, "Invalid Number of SGL Descriptors"),
    (GENERIC, 0x0f, "Data SGL Length Invalid"),
    (GENERIC, 0x10, "Metadata SGL Length Invalid"),
    (GENERIC, 0x11, "SGL Descriptor Type Invalid"),
    (GENERIC, 0x12, "Invalid Use of Controller Memory Buffer"),
    (GENERIC, 0x13, "PRP Offset Invalid"),
    (GENERIC, 0x14, "Atomic Write Unit Exceeded"),
    (GENERIC, 0x15, "Operation Denied"),
    (GENERIC, 0x16, "SGL Offset Invalid"),
    (GENERIC, 0x18, "Host Identifier Inconsistent Format"),
    (GENERIC, 0x19, "Keep Alive Timer Expired"),
    (GENERIC, 0x1a, "Keep Alive Timeout Invalid"),
    (GENERIC, 0x1b, "Command Aborted due to Preempt and Abort"),
    (GENERIC, 0x1c, "Sanitize Failed"),
    (GENERIC, 0x1d, "Sanitize In Progress"),
    (GENERIC, 0x1e, "SGL Data Block Granularity Invalid"),
    (GENERIC, 0x1f, "Command Not Supported for Queue in CMB"),
    (GENERIC, 0x20, "Namespace is Write Protected"),
    (GENERIC, 0x21, "Command Interrupted"),
    (GENERIC, 0x22, "Transient Transport Error"),
    (GENERIC, 0x23, "Command Prohibited by Command and Feature Lockdown"),
    (GENERIC, 0x24, "Admin Command Media Not Ready"),
    (GENERIC, 0x80, "LBA Out of Range"),
    (GENERIC, 0x81, "Capacity Exceeded"),
    (GENERIC, 0x82, "Namespace Not Ready"),
    (GENERIC, 0x83, "Reservation Conflict"),
    (GENERIC, 0x84, "Format In Progress"),
    (COMMAND_SPECIFIC, 0x00, "Completion Queue Invalid"),
    (COMMAND_SPECIFIC, 0x01, "Invalid Queue Identifier"),
    (COMMAND_SPECIFIC, 0x02, "Invalid Queue Size"),
    (COMMAND_SPECIFIC, 0x03, "Abort Command Limit Exceeded"),
    (COMMAND_SPECIFIC, 0x05, "Asynchronous Event Request Limit Exceeded"),
    (COMMAND_SPECIFIC, 0x06, "Invalid Firmware Slot"),
    (COMMAND_SPECIFIC, 0x07, "Invalid Firmware Image"),
    (COMMAND_SPECIFIC, 0x08, "Invalid Interrupt Vector"),
    (COMMAND_SPECIFIC, 0x09, "Invalid Log Page"),
    (COMMAND_SPECIFIC, 0x0a, "Invalid Format"),
    (COMMAND_SPECIFIC, 0x0c, "Invalid Queue Deletion"),
    (COMMAND_SPECIFIC, 0x0d, "Feature Identifier Not Saveable"),
    (COMMAND_SPECIFIC, 0x0e, "Feature Not Changeable"),
    (COMMAND_SPECIFIC, 0x0f, "Feature Not Namespace Specific"),
    (COMMAND_SPECIFIC, 0x12, "Firmware Activation Requires Maximum Time Violation"),
    (COMMAND_SPECIFIC, 0x14, "Overlapping Range"),
    (COMMAND_SPECIFIC, 0x15, "Namespace Insufficient Capacity"),
    (COMMAND_SPECIFIC, 0x1d, "Device Self-test In Progress"),
    (COMMAND_SPECIFIC, 0x80, "Conflicting Attributes"),
    (COMMAND_SPECIFIC, 0x81, "Invalid Protection Information"),
    (COMMAND_SPECIFIC, 0x82, "Attempted Write to Read Only Range"),
    (COMMAND_SPECIFIC, 0x83, "Command Size Limit Exceeded"),
    (COMMAND_SPECIFIC, 0xb8, "Zoned Boundary Error"),
    (COMMAND_SPECIFIC, 0xb9, "Zone Is Full"),
    (COMMAND_SPECIFIC, 0xba, "Zone Is Read Only"),
    (COMMAND_SPECIFIC, 0xbb, "Zone Is Offline"),
    (COMMAND_SPECIFIC, 0xbc, "Zone Invalid Write"),
    (MEDIA, 0x80, "Write Fault"),
    (MEDIA, 0x81, "Unrecovered Read Error"),
    (MEDIA, 0x82, "End-to-end Guard Check Error"),
    (MEDIA, 0x83, "End-to-end Application Tag Check Error"),
    (MEDIA, 0x84, "End-to-end Reference Tag Check Error"),
    (MEDIA, 0x85, "Compare Failure"),
    (MEDIA, 0x86, "Access Denied"),
    (MEDIA, 0x87, "Deallocated or Unwritten Logical Block"),
    (MEDIA, 0x88, "End-to-End Storage Tag Check Error"),
    (PATH, 0x00, "Internal Path Error"),
    (PATH, 0x01, "Asymmetric Access Persistent Loss"),
    (PATH, 0x02, "Asymmetric Access Inaccessible"),
    (PATH, 0x03, "Asymmetric Access Transition"),
    (PATH, 0x60, "Controller Pathing Error"),
    (PATH, 0x70, "Host Pathing Error"),
    (PATH, 0x71, "Command Aborted By Host"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_has_the_specifications_name_its_codes_and_a_kind() {
        // Seen on an emulated drive, for a read past its end.
        let status = Status::from_raw(0x4080);
        assert_eq!((status.code_type(), status.code(), status.do_not_retry()), (0, 0x80, true));
        assert_eq!(status.to_string(), "LBA Out of Range (NVMe generic command status 0h/80h, do not retry)");
        assert_eq!(status.kind(), ErrorKind::OutOfRange);
        let status = Status::from_raw(0x281);
        assert_eq!(status.to_string(), "Unrecovered Read Error (NVMe media and data integrity error 2h/81h)");
        assert_eq!(status.kind(), ErrorKind::Media);
        let path = Status::from_raw(0x6371);
        assert_eq!(path.name(), Some("Command Aborted By Host"));
        assert!(path.more() && path.do_not_retry());
        let unknown = Status::from_raw(0x7c3);
        assert_eq!(unknown.to_string(), "unknown NVMe status (NVMe vendor specific 7h/c3h)");
        assert_eq!(unknown.kind(), ErrorKind::Io);
    }

    #[test]
    fn no_code_is_listed_twice() {
        let mut codes: Vec<_> = NAMES.iter().map(|(code_type, code, _)| (*code_type, *code)).collect();
        codes.sort_unstable();
        assert!(codes.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
