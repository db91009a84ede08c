//! An NVMe namespace by passthrough: `/dev/ngXnY`.
//!
//! Every transfer is one or several commands of the drive's own, so nothing is between it and the caller: no page cache, no
//! merging, no splitting by the kernel. Queues send them through io_uring; the blocking helpers here use the ioctl.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;

use super::{Device, DeviceKind, DeviceOptions, Target};
use crate::buffer::{Buffer, PAGE};
use crate::error::{Error, ErrorKind, Result};
use crate::passthrough::{Drive, NvmeTarget, io, ioctl, sysfs};

/// Largest transfer where neither the drive nor the kernel names a limit: what every drive of the last ten years takes.
const TRANSFER_UNKNOWN: u64 = 128 << 10;
/// Number of logical blocks is a field of 16 bits, 0's based.
const BLOCKS_MAX: u64 = 1 << 16;
/// Bounce buffers are at most this long, bytes.
const BOUNCE: usize = 256 << 10;

/// A namespace behind its generic character device. Opened for writing, its block device is claimed as well (O_EXCL), so that no
/// mount and no other pool can take it by that name.
pub struct NvmeCharDevice {
    file: File,
    name: String,
    namespace: u32,
    len: u64,
    lba_size: u32,
    max_transfer: u32,
    can_deallocate: bool,
    read_only: bool,
    /// Orders read-modify-writes.
    partial: Mutex<()>,
    /// Held for its claim.
    _claim: Option<File>,
}

impl NvmeCharDevice {
    /// Opens it and asks the drive what it is. [`ErrorKind::Busy`] when the namespace is mounted or claimed by someone else.
    pub fn open(path: impl AsRef<Path>, options: &DeviceOptions) -> Result<NvmeCharDevice> {
        NvmeCharDevice::open_with(path.as_ref(), options, !options.read_only)
    }

    /// The same without the claim, for who made sure otherwise that the namespace is free: a second one beside [`NvmeCharDevice::open`] in
    /// the same process.
    pub fn open_unclaimed(path: impl AsRef<Path>, options: &DeviceOptions) -> Result<NvmeCharDevice> {
        NvmeCharDevice::open_with(path.as_ref(), options, false)
    }

    fn open_with(path: &Path, options: &DeviceOptions, claimed: bool) -> Result<NvmeCharDevice> {
        let name = path.display().to_string();
        if sysfs::is_controller(path) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{name} is an NVMe controller: name one of its namespaces (/dev/ng0n1 or /dev/nvme0n1)"
                ),
            ));
        }
        if !sysfs::is_nvme_char(path) {
            return Err(ioctl::not_nvme(&name));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .open(path)
            .map_err(|error| Error::os(error, format!("open {name}")))?;
        let rdev = file.metadata().map_err(|error| Error::os(error, format!("stat {name}")))?.rdev();
        let claim = if claimed { claim(rdev, &name)? } else { None };
        let drive = Drive::of(&file, &name)?;
        let id = drive.namespace().unwrap_or_default();
        let controller = drive.controller()?;
        let namespace = drive.identify_namespace(id)?;
        let (lba_size, len) = geometry(&name, &namespace)?;
        let mdts = controller.max_transfer_bytes().unwrap_or(u64::MAX);
        let kernel = sysfs::kernel_limit(rdev).unwrap_or(TRANSFER_UNKNOWN);
        let lba = u64::from(lba_size);
        let max_transfer =
            mdts.min(kernel).min(BLOCKS_MAX * lba).min(super::KERNEL_MAX_TRANSFER.into()) / lba * lba;
        Ok(NvmeCharDevice {
            file,
            namespace: id,
            len,
            lba_size,
            max_transfer: max_transfer.max(lba) as u32,
            can_deallocate: controller.can_deallocate(),
            read_only: options.read_only,
            partial: Mutex::new(()),
            _claim: claim,
            name,
        })
    }

    fn nvme(&self) -> NvmeTarget<'_> {
        NvmeTarget {
            fd: self.file.as_fd(),
            namespace: self.namespace,
            lba_shift: self.lba_size.trailing_zeros(),
        }
    }

    fn align(&self) -> usize {
        self.lba_size as usize
    }

    /// Reads whole blocks, command by command.
    fn read_blocks(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let part = self.span(&buf[done..]);
            let at = offset + done as u64;
            let command = self.nvme().read(at, part);
            ioctl::io_read(self.file.as_fd(), command, &mut buf[done..done + part])
                .map_err(|fault| fault.error(format!("read {part} bytes at {at} of {}", self.name)))?;
            done += part;
        }
        Ok(())
    }

    fn write_blocks(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let part = self.span(&buf[done..]);
            let at = offset + done as u64;
            let command = self.nvme().write(at, part);
            ioctl::io_write(self.file.as_fd(), command, &buf[done..done + part])
                .map_err(|fault| fault.error(format!("write {part} bytes at {at} of {}", self.name)))?;
            done += part;
        }
        Ok(())
    }

    fn span(&self, rest: &[u8]) -> usize {
        io::span(rest.as_ptr() as usize, rest.len(), self.max_transfer as usize, self.align())
    }

    fn is_aligned(&self, offset: u64, buf: &[u8]) -> bool {
        let align = self.align();
        offset.is_multiple_of(align as u64)
            && buf.len().is_multiple_of(align)
            && (buf.as_ptr() as usize).is_multiple_of(align)
    }

    fn bounce(&self, len: usize) -> Result<Buffer> {
        Buffer::heap((len + 2 * self.align()).min(BOUNCE).next_multiple_of(PAGE))
    }
}

/// Takes the block device of the same namespace for ourselves. None where the kernel shows none.
fn claim(rdev: u64, name: &str) -> Result<Option<File>> {
    let Some(block) = sysfs::block_sibling(rdev) else { return Ok(None) };
    let opened = OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits() as i32).open(&block);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(Error::os(
            error,
            format!(
                "open {name}: its block device {} is mounted, part of another device, or held by another process",
                block.display()
            ),
        )),
        Err(error) => Err(Error::os(error, format!("claim {}, the block device of {name}", block.display()))),
    }
}

/// Bytes per block and in all, of a format that this can use.
fn geometry(name: &str, namespace: &crate::passthrough::Namespace) -> Result<(u32, u64)> {
    let refuse = |why: String| Err(Error::new(ErrorKind::Unsupported, format!("{name}: {why}")));
    let Some(format) = namespace.format() else {
        return refuse(format!(
            "it says that it has LBA format {}, which it does not list",
            namespace.format_index
        ));
    };
    if format.metadata_bytes != 0 {
        return refuse(format!(
            "its blocks carry {} bytes of metadata, which pools cannot use; `nvme format --lbaf` sets a format without",
            format.metadata_bytes
        ));
    }
    match (format.lba_bytes, namespace.size_bytes()) {
        (Some(lba @ 512..=4096), Some(len)) if len >= u64::from(lba) => Ok((lba, len)),
        (Some(512..=4096), _) => refuse(format!("it is {} blocks long", namespace.size_blocks)),
        _ => refuse(format!("its blocks are 2^{} bytes; 512 to 4096 are supported", format.lba_shift)),
    }
}

impl Device for NvmeCharDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::NvmeChar
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn lba_size(&self) -> u32 {
        self.lba_size
    }
    fn max_transfer(&self) -> u32 {
        self.max_transfer
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn target(&self) -> Target<'_> {
        Target::Nvme(self.nvme())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        super::check_range(self, "read", offset, buf.len() as u64)?;
        if self.is_aligned(offset, buf) {
            return self.read_blocks(offset, buf);
        }
        let align = self.align();
        let mut bounce = self.bounce(buf.len())?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let start = at / align as u64 * align as u64;
            let skip = (at - start) as usize;
            let want = (skip + buf.len() - done).next_multiple_of(align).min(bounce.len());
            self.read_blocks(start, &mut bounce[..want])?;
            let part = (want - skip).min(buf.len() - done);
            buf[done..done + part].copy_from_slice(&bounce[skip..skip + part]);
            done += part;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        super::check_writable(self, "write")?;
        super::check_range(self, "write", offset, buf.len() as u64)?;
        // Also for whole blocks: one must not slip between another's read and write.
        let _guard = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_aligned(offset, buf) {
            return self.write_blocks(offset, buf);
        }
        let align = self.align();
        let mut bounce = self.bounce(buf.len())?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let start = at / align as u64 * align as u64;
            let skip = (at - start) as usize;
            let part = (buf.len() - done).min(bounce.len() - skip);
            let span = (skip + part).next_multiple_of(align);
            // The blocks that are not overwritten whole keep the rest of their bytes.
            if skip != 0 {
                self.read_blocks(start, &mut bounce[..align])?;
            }
            if !(skip + part).is_multiple_of(align) && (skip == 0 || span > align) {
                self.read_blocks(start + (span - align) as u64, &mut bounce[span - align..span])?;
            }
            bounce[skip..skip + part].copy_from_slice(&buf[done..done + part]);
            self.write_blocks(start, &bounce[..span])?;
            done += part;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        ioctl::io_write(self.file.as_fd(), self.nvme().flush(), &[])
            .map_err(|fault| fault.error(format!("flush {}", self.name)))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        super::check_writable(self, "discard")?;
        super::check_range(self, "discard", offset, len)?;
        if !self.can_deallocate {
            return Ok(());
        }
        // Whole blocks within the range only; a range's length is a field of 32 bits.
        let lba = u64::from(self.lba_size);
        let (mut block, end) = (offset.div_ceil(lba), (offset + len) / lba);
        while block < end {
            let count = (end - block).min(u64::from(u32::MAX)) as u32;
            let range = self.nvme().deallocate_range(block * lba, count);
            ioctl::io_write(self.file.as_fd(), self.nvme().deallocate(), &range)
                .map_err(|fault| fault.error(format!("discard {len} bytes at {offset} of {}", self.name)))?;
            block += u64::from(count);
        }
        Ok(())
    }
}

impl std::fmt::Debug for NvmeCharDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NvmeCharDevice")
            .field("name", &self.name)
            .field("namespace", &self.namespace)
            .field("len", &self.len)
            .field("lba_size", &self.lba_size)
            .field("max_transfer", &self.max_transfer)
            .field("read_only", &self.read_only)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passthrough::{LbaFormat, Namespace};

    fn namespace(lba_shift: u8, metadata_bytes: u16, size_blocks: u64) -> Namespace {
        Namespace {
            id: 1,
            size_blocks,
            capacity_blocks: size_blocks,
            used_blocks: 0,
            features: 0,
            format_index: 0,
            metadata_inline: false,
            protection: 0,
            formats: vec![LbaFormat {
                index: 0,
                lba_bytes: (9..32).contains(&lba_shift).then(|| 1u32 << lba_shift),
                lba_shift,
                metadata_bytes,
                relative_performance: 0,
            }],
            nvm_capacity_bytes: 0,
            optimal_boundary_blocks: 0,
            preferred_write_blocks: 0,
            preferred_alignment_blocks: 0,
            nguid: [0; 16],
            eui64: [0; 8],
        }
    }

    #[test]
    fn formats_that_cannot_be_used_are_refused_with_the_reason() {
        assert_eq!(geometry("x", &namespace(9, 0, 100)).unwrap(), (512, 51200));
        assert_eq!(geometry("x", &namespace(12, 0, 100)).unwrap(), (4096, 409_600));
        let refused = |namespace: Namespace, word: &str| {
            let error = geometry("/dev/ng0n1", &namespace).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(word), "{error}");
        };
        refused(namespace(9, 8, 100), "8 bytes of metadata");
        refused(namespace(13, 0, 100), "2^13 bytes");
        refused(namespace(0, 0, 100), "2^0 bytes");
        refused(namespace(9, 0, 0), "0 blocks long");
        refused(namespace(9, 0, u64::MAX), "blocks long");
        refused(Namespace { format_index: 3, ..namespace(9, 0, 1) }, "LBA format 3");
    }

    #[test]
    fn other_nodes_are_refused() {
        for path in ["/dev/null", "/dev/zero"] {
            let error = NvmeCharDevice::open(path, &DeviceOptions::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
    }
}
