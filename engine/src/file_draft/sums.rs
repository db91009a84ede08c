//! Checksums of a file, by reading it back.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::SeekFrom;

use super::read_file;

/// Read at a time; also what one thread takes at a time. A multiple of every chunk size.
const PIECE: u64 = 4 << 20;
/// Files below this are read by the caller alone.
const PARALLEL: u64 = 16 << 20;
const THREADS_MAX: usize = 8;
/// Most bytes of sums for a file that is mostly holes: 1 TiB of them with chunks of 16 KiB. What is stored has more.
const SPARSE_SUMS: u64 = 256 << 20;

/// Processors for this process. Asking reads cgroup files, so it is asked once.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, |count| count.get()))
}

/// CRC-32 of `len` zeros.
fn zero_sum(len: u64) -> u32 {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut hasher = crc32fast::Hasher::new();
    let mut left = len;
    while left > 0 {
        let now = left.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..now as usize]);
        left -= now;
    }
    hasher.finalize()
}

/// The sum of every chunk of the first `size` bytes, by several threads where that helps; holes are not read. `None`: cancelled.
/// A file that is shorter than `size` is an error.
pub(crate) fn file_sums(
    file: &File,
    size: u64,
    chunk_size: u32,
    cancel: &AtomicBool,
) -> io::Result<Option<Vec<u32>>> {
    let pieces = size.div_ceil(PIECE);
    let chunks = size.div_ceil(chunk_size as u64) as usize;
    let allocated = crate::member::directory::allocated(&file.metadata()?);
    // Holes have sums too. A file of nothing but holes, as large as offsets go, must not take all memory for them.
    if chunks as u64 * 4 > SPARSE_SUMS + allocated / 1024 {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!(
                "{size} bytes of which only {allocated} are stored would have {chunks} checksums, most of holes"
            ),
        ));
    }
    let threads = if size < PARALLEL { 1 } else { cores().min(THREADS_MAX).min(pieces as usize) };
    // Looking for holes is a system call; where as much is allocated as there is, there are none.
    let sparse = allocated < size;
    if threads < 2 {
        let mut sums = Vec::with_capacity(chunks);
        let mut buffer = Vec::new();
        for piece in 0..pieces {
            if cancel.load(Relaxed) {
                return Ok(None);
            }
            piece_sums(file, piece, size, chunk_size, sparse, &mut buffer, &mut sums)?;
        }
        return Ok(Some(sums));
    }
    let next = AtomicU64::new(0);
    let failed = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let parts = Mutex::new(Vec::with_capacity(pieces as usize));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                loop {
                    let piece = next.fetch_add(1, Relaxed);
                    if piece >= pieces || stop.load(Relaxed) || cancel.load(Relaxed) {
                        return;
                    }
                    let mut sums = Vec::with_capacity((PIECE / chunk_size as u64) as usize);
                    match piece_sums(file, piece, size, chunk_size, sparse, &mut buffer, &mut sums) {
                        Ok(()) => parts.lock().unwrap_or_else(PoisonError::into_inner).push((piece, sums)),
                        Err(error) => {
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            stop.store(true, Relaxed);
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let mut parts = parts.into_inner().unwrap_or_else(PoisonError::into_inner);
    if parts.len() as u64 != pieces {
        return Ok(None);
    }
    parts.sort_unstable_by_key(|(piece, _)| *piece);
    Ok(Some(parts.into_iter().flat_map(|(_, sums)| sums).collect()))
}

fn piece_sums(
    file: &File,
    piece: u64,
    size: u64,
    chunk_size: u32,
    sparse: bool,
    buffer: &mut Vec<u8>,
    sums: &mut Vec<u32>,
) -> io::Result<()> {
    let start = piece * PIECE;
    let len = PIECE.min(size - start);
    let chunk = chunk_size as u64;
    // One look a piece: a sparse file is read in time of its data.
    let hole = sparse
        && match rustix::fs::seek(file, SeekFrom::Data(start)) {
            Ok(data) => data >= start + len,
            Err(error) => error == rustix::io::Errno::NXIO,
        };
    if hole {
        if file.metadata()?.len() < start + len {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
        }
        let whole = zero_sum(chunk);
        sums.extend((0..len / chunk).map(|_| whole));
        if !len.is_multiple_of(chunk) {
            sums.push(zero_sum(len % chunk));
        }
        return Ok(());
    }
    buffer.resize(len as usize, 0);
    if read_file(file, start, buffer)? as u64 != len {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
    }
    sums.extend(buffer.chunks(chunk_size as usize).map(crc32fast::hash));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn plain(bytes: &[u8], chunk: u32) -> Vec<u32> {
        bytes.chunks(chunk as usize).map(crc32fast::hash).collect()
    }

    #[test]
    fn sums_are_those_of_the_bytes_whatever_the_size() {
        let go = AtomicBool::new(false);
        for (size, chunk) in [
            (1usize, 4096u32),
            (4096, 4096),
            (4097, 4096),
            (100_000, 16 << 10),
            ((20 << 20) + 5, 16 << 10),
            (17 << 20, 4 << 20),
        ] {
            let bytes: Vec<u8> = (0..size).map(|index| (index * 31 % 251) as u8).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            assert_eq!(
                file_sums(&file, size as u64, chunk, &go).unwrap().unwrap(),
                plain(&bytes, chunk),
                "{size} by {chunk}"
            );
            assert!(file_sums(&file, size as u64 + 1, chunk, &go).is_err(), "shorter than it should be");
        }
    }

    #[test]
    fn holes_are_zeros() {
        let go = AtomicBool::new(false);
        let file = tempfile::tempfile().unwrap();
        let size = (40u64 << 20) + 77;
        file.set_len(size).unwrap();
        file.write_all_at(b"in the middle", 21 << 20).unwrap();
        let mut bytes = vec![0; size as usize];
        bytes[21 << 20..(21 << 20) + 13].copy_from_slice(b"in the middle");
        assert_eq!(file_sums(&file, size, 16 << 10, &go).unwrap().unwrap(), plain(&bytes, 16 << 10));
    }

    #[test]
    fn a_cancelled_one_gives_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        for size in [1 << 20, 64 << 20] {
            assert_eq!(file_sums(&file, size, 16 << 10, &AtomicBool::new(true)).unwrap(), None);
        }
    }
}
