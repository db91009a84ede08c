//! The Error Information log page (NVMe Base Specification 2.0, figure 206).

use nvme_sys::nvme_error_log_page;

use super::Status;

/// One entry: a command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorLogEntry {
    /// How many errors there were up to this one.
    pub error_count: u64,
    /// Submission queue of the command.
    pub queue_id: u16,
    /// The command's number in it.
    pub command_id: u16,
    /// What the drive answered.
    pub status: Status,
    /// Byte and bit of the command that was wrong, where that was it (bits 7:0 and 10:8); 0xffff: none.
    pub parameter_error_location: u16,
    /// First block of which the command failed.
    pub lba: u64,
    /// Namespace.
    pub namespace: u32,
}

impl ErrorLogEntry {
    /// None for an entry that was never used.
    pub(crate) fn decode(raw: &nvme_error_log_page) -> Option<ErrorLogEntry> {
        let error_count = u64::from_le(raw.error_count);
        (error_count != 0).then(|| ErrorLogEntry {
            error_count,
            queue_id: u16::from_le(raw.sqid),
            command_id: u16::from_le(raw.cmdid),
            // Here the phase bit is in place: the status field is bits 15:1.
            status: Status::from_raw(u16::from_le(raw.status_field) >> 1),
            parameter_error_location: u16::from_le(raw.parm_error_location),
            lba: u64::from_le(raw.lba),
            namespace: u32::from_le(raw.nsid),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_decoded_and_unused_ones_left_out() {
        let mut page = [0u8; 64];
        assert!(ErrorLogEntry::decode(&nvme_sys::from_bytes(&page).unwrap()).is_none());
        page[0] = 9;
        page[8] = 2;
        page[12..14].copy_from_slice(&(0x4281u16 << 1).to_le_bytes());
        page[16..24].copy_from_slice(&4096u64.to_le_bytes());
        page[24] = 1;
        let entry = ErrorLogEntry::decode(&nvme_sys::from_bytes(&page).unwrap()).unwrap();
        assert_eq!((entry.error_count, entry.queue_id, entry.lba, entry.namespace), (9, 2, 4096, 1));
        assert_eq!(entry.status.name(), Some("Unrecovered Read Error"));
        assert!(entry.status.do_not_retry());
    }
}
