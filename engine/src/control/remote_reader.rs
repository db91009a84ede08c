//! A region of another process's pool, read.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use super::client::{ask_on, lock, unexpected};
use super::frame::Connection;
use super::protocol::{PAYLOAD_MAX, Reply, Request};
use crate::error::{Error, ErrorKind, Result};

/// Chunks whose checksums are asked for at once: 64 KiB.
const SUMS: u64 = 16 << 10;
/// Such blocks that are kept; with chunks of 16 KiB they cover 16 GiB.
const BLOCKS_KEPT: usize = 64;

/// A region open for reading in the owner.
///
/// Where the region is one file, it is read here, and checked here with the lease's checksums. What does not match is asked of the
/// owner, who knows whether it is damaged or was changed since. Other regions' bytes come from the owner, checked there.
#[derive(Debug)]
pub struct RemoteReader {
    size: u64,
    chunk_size: u64,
    /// The region's bytes themselves, where they are one file.
    file: Option<File>,
    sums: Mutex<HashMap<u64, Arc<Vec<u32>>>>,
    connection: Mutex<Connection>,
}

impl RemoteReader {
    pub(super) fn new(
        size: u64,
        chunk_size: u32,
        file: Option<File>,
        connection: Connection,
    ) -> RemoteReader {
        RemoteReader {
            size,
            chunk_size: chunk_size.into(),
            file,
            sums: Mutex::default(),
            connection: Mutex::new(connection),
        }
    }

    /// Bytes, when it was opened.
    pub fn len(&self) -> u64 {
        self.size
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// The region's file, read-only, where the bytes come from it and not through the owner.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Bytes under one checksum.
    pub fn chunk_size(&self) -> u64 {
        self.chunk_size
    }

    /// CRC-32 of a chunk: of its bytes up to the end of the region. For who reads [`file`](Self::file) himself.
    pub fn sum(&self, chunk: u64) -> Result<u32> {
        let sums = self.sums(chunk / SUMS)?;
        sums.get((chunk % SUMS) as usize).copied().ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, format!("the region has no checksum of chunk {chunk}"))
        })
    }

    /// See [`RegionReader::read_at`](crate::RegionReader::read_at).
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let len = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        if let Some(file) = &self.file {
            if self.read_direct(file, offset, buf)? {
                return Ok(len);
            }
            tracing::debug!("{len} bytes at {offset} do not match their checksums; the owner is asked");
        }
        self.read_through_owner(offset, buf)
    }

    /// Reads the file and checks the chunks; `false` where one does not match, `buf` is of no use then.
    fn read_direct(&self, file: &File, offset: u64, mut buf: &mut [u8]) -> Result<bool> {
        let mut at = offset;
        let mut around = Vec::new();
        while !buf.is_empty() {
            let within = at % self.chunk_size;
            let chunk_start = at - within;
            let chunk_end = (chunk_start + self.chunk_size).min(self.size);
            let good = if within == 0 && buf.len() as u64 >= chunk_end - chunk_start {
                // All whole chunks at once; the last one of the region is whole when its short end is wanted.
                let whole = if at + buf.len() as u64 == self.size {
                    buf.len() as u64
                } else {
                    buf.len() as u64 / self.chunk_size * self.chunk_size
                };
                let (now, rest) = std::mem::take(&mut buf).split_at_mut(whole as usize);
                buf = rest;
                at += whole;
                self.read_chunks(file, chunk_start, now)?
            } else {
                around.resize((chunk_end - chunk_start) as usize, 0);
                let good = self.read_chunks(file, chunk_start, &mut around)?;
                let wanted = &around[within as usize..];
                let n = wanted.len().min(buf.len());
                let (now, rest) = std::mem::take(&mut buf).split_at_mut(n);
                now.copy_from_slice(&wanted[..n]);
                buf = rest;
                at += n as u64;
                good
            };
            if !good {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads and checks whole chunks.
    fn read_chunks(&self, file: &File, start: u64, buf: &mut [u8]) -> Result<bool> {
        match file.read_exact_at(buf, start) {
            // Shorter than it was: changed in place.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other.map_err(|e| Error::io(format!("read {} bytes at {start}", buf.len()), e))?,
        }
        let first = start / self.chunk_size;
        let mut block: Option<(u64, Arc<Vec<u32>>)> = None;
        for (chunk, bytes) in (first..).zip(buf.chunks(self.chunk_size as usize)) {
            let (index, within) = (chunk / SUMS, (chunk % SUMS) as usize);
            let sums = match &block {
                Some((at, sums)) if *at == index => sums.clone(),
                _ => self.sums(index)?,
            };
            if sums.get(within) != Some(&crc32fast::hash(bytes)) {
                return Ok(false);
            }
            block = Some((index, sums));
        }
        Ok(true)
    }

    /// A block of checksums.
    fn sums(&self, index: u64) -> Result<Arc<Vec<u32>>> {
        let kept = || self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sums) = kept().get(&index) {
            return Ok(sums.clone());
        }
        let frame =
            ask_on(&lock(&self.connection), &Request::Sums { first: index * SUMS, count: SUMS as u32 }, &[])?;
        if !matches!(frame.message, Reply::Data) {
            return Err(unexpected(&frame.message));
        }
        let sums =
            frame.payload.chunks_exact(4).map(|raw| u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]));
        let sums = Arc::new(sums.collect::<Vec<_>>());
        let mut kept = kept();
        if kept.len() >= BLOCKS_KEPT {
            kept.clear();
        }
        kept.insert(index, sums.clone());
        Ok(sums)
    }

    fn read_through_owner(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        for part in buf.chunks_mut(PAYLOAD_MAX as usize) {
            let request = Request::Read { offset: offset + done as u64, len: part.len() as u32 };
            let frame = ask_on(&lock(&self.connection), &request, &[])?;
            if !matches!(frame.message, Reply::Data) || frame.payload.len() > part.len() {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "the pool's owner answered a read with something else",
                ));
            }
            part[..frame.payload.len()].copy_from_slice(&frame.payload);
            done += frame.payload.len();
            if frame.payload.len() < part.len() {
                break;
            }
        }
        Ok(done)
    }
}
