//! Where superblocks are, and what else may be there: a file or block device that takes any bytes, or an NVMe character device,
//! which is reached by commands of whole blocks.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nvme::{Device, DeviceOptions};

/// An open place.
#[derive(Debug)]
pub(crate) enum Place {
    File(File),
    Device(Arc<dyn Device>),
}

impl Place {
    /// Opens what is there; with `write` a block device or NVMe namespace is claimed, so that one in use, under whatever name, is busy.
    pub(crate) fn open(path: &Path, write: bool) -> io::Result<Place> {
        let kind = std::fs::metadata(path)?.file_type();
        if kind.is_char_device() {
            let options = DeviceOptions { direct: true, read_only: !write };
            return nvme::open(path, &options).map(Place::Device).map_err(from_device);
        }
        let flags = if write && kind.is_block_device() {
            rustix::fs::OFlags::EXCL
        } else {
            rustix::fs::OFlags::empty()
        };
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map(Place::File)
    }

    /// Length in bytes.
    pub(crate) fn len(&mut self) -> io::Result<u64> {
        match self {
            Place::File(file) => file.seek(SeekFrom::End(0)),
            Place::Device(device) => Ok(device.len()),
        }
    }

    /// Up to `len` bytes from `offset`: fewer at the end.
    pub(crate) fn read_up_to(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let file = match self {
            Place::File(file) => file,
            Place::Device(device) => {
                let left = device.len().saturating_sub(offset);
                bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                device.read_at(offset, &mut bytes).map_err(from_device)?;
                return Ok(bytes);
            }
        };
        let mut done = 0;
        while done < len {
            match file.read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// Writes all of `bytes`.
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Place::File(file) => file.write_all_at(bytes, offset),
            Place::Device(device) => device.write_at(offset, bytes).map_err(from_device),
        }
    }

    /// Makes it durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        match self {
            Place::File(file) => file.sync_all(),
            Place::Device(device) => device.flush().map_err(from_device),
        }
    }
}

fn from_device(error: nvme::Error) -> io::Error {
    use nvme::ErrorKind as Device;
    let kind = match error.kind() {
        Device::NotFound => io::ErrorKind::NotFound,
        Device::PermissionDenied => io::ErrorKind::PermissionDenied,
        Device::Busy => io::ErrorKind::ResourceBusy,
        Device::NoSpace => io::ErrorKind::StorageFull,
        Device::Timeout => io::ErrorKind::TimedOut,
        Device::Unsupported => io::ErrorKind::Unsupported,
        Device::Misaligned | Device::Invalid | Device::OutOfRange => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
