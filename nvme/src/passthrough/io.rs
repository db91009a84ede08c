//! Read, write, flush and deallocate as NVMe commands (NVM Command Set Specification 1.0, section 3.2).

use std::os::fd::BorrowedFd;

use nvme_sys::{
    nvme_cmd_dsm, nvme_cmd_flush, nvme_cmd_read, nvme_cmd_write, nvme_io_opcode, nvme_uring_cmd, zeroed,
};

/// Bytes of the command area of a 128-byte SQE.
pub(crate) const SQE_COMMAND_BYTES: usize = 80;

const PAGE: usize = 4096;

/// A namespace to send commands to.
#[derive(Clone, Copy)]
pub struct NvmeTarget<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) namespace: u32,
    /// log2 of the bytes per logical block.
    pub(crate) lba_shift: u32,
}

impl NvmeTarget<'_> {
    fn command(&self, opcode: nvme_io_opcode) -> nvme_uring_cmd {
        let mut command: nvme_uring_cmd = zeroed();
        command.opcode = opcode as u8;
        command.nsid = self.namespace;
        command
    }

    fn transfer(&self, opcode: nvme_io_opcode, offset: u64, len: usize) -> nvme_uring_cmd {
        let mut command = self.command(opcode);
        let lba = offset >> self.lba_shift;
        command.cdw10 = lba as u32;
        command.cdw11 = (lba >> 32) as u32;
        // Number of logical blocks, 0's based, in bits 15:0: MDTS keeps a transfer within them.
        command.cdw12 = ((len >> self.lba_shift) as u32).saturating_sub(1) & 0xffff;
        command
    }

    /// Reads `len` bytes at `offset`, both multiples of the block, at most 65536 blocks.
    pub(crate) fn read(&self, offset: u64, len: usize) -> nvme_uring_cmd {
        self.transfer(nvme_cmd_read, offset, len)
    }

    /// Writes likewise.
    pub(crate) fn write(&self, offset: u64, len: usize) -> nvme_uring_cmd {
        self.transfer(nvme_cmd_write, offset, len)
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&self) -> nvme_uring_cmd {
        self.command(nvme_cmd_flush)
    }

    /// Deallocates one range (Dataset Management), given as [`Self::deallocate_range`].
    pub(crate) fn deallocate(&self) -> nvme_uring_cmd {
        let mut command = self.command(nvme_cmd_dsm);
        command.cdw10 = 0; // one range, 0's based
        command.cdw11 = 1 << 2; // AD: deallocate
        command
    }

    /// The list of one range: context attributes, length in blocks, first block (figure 42).
    pub(crate) fn deallocate_range(&self, offset: u64, blocks: u32) -> [u8; 16] {
        let mut range = [0; 16];
        range[4..8].copy_from_slice(&blocks.to_le_bytes());
        range[8..].copy_from_slice(&(offset >> self.lba_shift).to_le_bytes());
        range
    }
}

/// A command as a 128-byte SQE carries it, with its data's address.
pub(crate) fn sqe_bytes(mut command: nvme_uring_cmd, address: u64, len: u32) -> [u8; SQE_COMMAND_BYTES] {
    command.addr = address;
    command.data_len = len;
    let mut bytes = [0; SQE_COMMAND_BYTES];
    let command = nvme_sys::as_bytes(&command);
    bytes[..command.len()].copy_from_slice(command);
    bytes
}

/// How many bytes of `left` go into one command when they start at `address` in memory: no more than `max`, and, since the
/// limit may be one of memory segments, no more pages than an aligned transfer of `max` bytes touches.
pub(crate) fn span(address: usize, left: usize, max: usize, lba: usize) -> usize {
    let skew = address % PAGE;
    if left <= max && (skew == 0 || left + skew <= max) {
        return left;
    }
    if skew == 0 || max <= PAGE {
        return left.min(max);
    }
    left.min((max - skew) / lba * lba)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn commands_carry_blocks_not_bytes() {
        let file = tempfile::tempfile().unwrap();
        let target = NvmeTarget { fd: file.as_fd(), namespace: 3, lba_shift: 12 };
        let offset = (5u64 << 32 | 7) << 12;
        let bytes = sqe_bytes(target.read(offset, 128 << 10), 0x1122_3344_5566_7788, 128 << 10);
        // linux/nvme_ioctl.h, struct nvme_uring_cmd.
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[0], 2, "opcode Read");
        assert_eq!(u32_at(4), 3, "nsid");
        assert_eq!(u64::from_le_bytes(bytes[24..32].try_into().unwrap()), 0x1122_3344_5566_7788, "addr");
        assert_eq!(u32_at(36), 128 << 10, "data_len");
        assert_eq!((u32_at(40), u32_at(44)), (7, 5), "starting LBA, low and high");
        assert_eq!(u32_at(48), 31, "number of blocks, 0's based");
        assert!(bytes[52..].iter().all(|byte| *byte == 0));

        let small = NvmeTarget { lba_shift: 9, ..target };
        assert_eq!(small.write(4096, 512).cdw12, 0);
        assert_eq!((small.write(4096, 512).cdw10, small.write(4096, 512).opcode), (8, 1));
        assert_eq!(small.flush().opcode, 0);
        assert_eq!((small.deallocate().opcode, small.deallocate().cdw11), (9, 4));
        let range = small.deallocate_range(1 << 20, 16);
        assert_eq!(range, [0, 0, 0, 0, 16, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_transfer_is_split_at_the_limit_and_touches_no_more_pages_than_it_allows() {
        let max = 128 << 10;
        assert_eq!(span(0x10000, 4096, max, 512), 4096);
        assert_eq!(span(0x10000, max, max, 512), max);
        assert_eq!(span(0x10000, max + 512, max, 512), max);
        // 512 bytes into a page: a whole 128 KiB would touch 33 pages.
        assert_eq!(span(0x10200, max, max, 512), max - 512);
        assert_eq!(span(0x10200, 4096, max, 512), 4096);
        for (address, left) in [(0x10200, 10 << 20), (0x10e00, 1 << 20), (0x10000, 3 << 20)] {
            let (mut address, mut left): (usize, usize) = (address, left);
            while left > 0 {
                let len = span(address, left, max, 512);
                assert!(len > 0 && len.is_multiple_of(512) && len <= max);
                assert!((address + len).div_ceil(PAGE) - address / PAGE <= max / PAGE);
                (address, left) = (address + len, left - len);
            }
        }
        // Drives whose limit is a page or less.
        assert_eq!(span(0x10200, 8192, 4096, 512), 4096);
    }
}
