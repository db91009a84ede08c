//! Which parts of an arena a ring has registered as fixed buffers.
//!
//! Registering pins pages, and so backs them with memory. An arena that was prefaulted is registered whole, at once.
//! One that was not (a RAM budget that may never be used up) is registered by parts, each when an operation first
//! touches it: otherwise the first operation of every thread would wait for gigabytes to be zeroed.

use std::io;

use io_uring::Submitter;

use crate::buffer::Arena;
use crate::error::{Error, Result};

/// The most bytes per registered buffer: the kernel refuses iovecs above 1 GiB (io_uring_register(2)).
const PART_MAX: usize = 1 << 30;
/// Bytes per buffer where parts are registered one by one: a few milliseconds of work each.
const PART_LAZY: usize = 32 << 20;
/// The most buffers per ring (IORING_MAX_REG_BUFFERS).
const PARTS_MAX: usize = 1 << 14;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Untouched,
    Registered,
}

pub(super) struct FixedBuffers {
    /// Pinned by the kernel; kept mapped too, so that its addresses stay its own.
    arena: Arena,
    id: usize,
    base: usize,
    /// log2 of the bytes per part.
    shift: u32,
    parts: Vec<Part>,
}

impl FixedBuffers {
    pub(super) fn register(submitter: &Submitter<'_>, arena: &Arena) -> Result<FixedBuffers> {
        let lazy = !arena.is_prefaulted() && arena.len() > PART_LAZY;
        let mut part = if lazy { PART_LAZY } else { PART_MAX };
        while arena.len().div_ceil(part) > PARTS_MAX && part < PART_MAX {
            part *= 2;
        }
        let mut fixed = FixedBuffers {
            arena: arena.clone(),
            id: arena.id(),
            base: arena.as_ptr() as usize,
            shift: part.trailing_zeros(),
            parts: vec![Part::Untouched; arena.len().div_ceil(part)],
        };
        // Linux 5.19 takes a table of nothing yet; an older one takes everything now.
        if lazy && submitter.register_buffers_sparse(fixed.parts.len() as u32).is_ok() {
            return Ok(fixed);
        }
        let iovecs: Vec<libc::iovec> = (0..fixed.parts.len()).map(|part| fixed.iovec(part)).collect();
        // SAFETY: the iovecs cover exactly the arena's mapping, which `fixed.arena` keeps mapped for as long as the
        // ring may use the registration; the kernel pins the pages besides.
        unsafe { submitter.register_buffers(&iovecs) }.map_err(|error| refused(error, arena.len()))?;
        fixed.parts.fill(Part::Registered);
        Ok(fixed)
    }

    fn iovec(&self, part: usize) -> libc::iovec {
        let offset = part << self.shift;
        let len = (1usize << self.shift).min(self.arena.len() - offset);
        libc::iovec { iov_base: self.arena.as_ptr().wrapping_add(offset).cast(), iov_len: len }
    }

    /// Address of the arena: buffers with this `arena_id` are in it.
    #[inline]
    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// The registered buffer that holds `len` bytes (not 0) at `address`, which lies in the arena. None when they cross
    /// from one part into the next. An error once: the caller then goes on without fixed buffers.
    #[inline]
    pub(super) fn index(
        &mut self,
        submitter: &Submitter<'_>,
        address: usize,
        len: usize,
    ) -> Result<Option<u16>> {
        let at = address - self.base;
        let part = at >> self.shift;
        if part != (at + len - 1) >> self.shift {
            return Ok(None);
        }
        if self.parts[part] == Part::Untouched {
            self.register_part(submitter, part)?;
        }
        Ok(Some(part as u16))
    }

    #[cold]
    fn register_part(&mut self, submitter: &Submitter<'_>, part: usize) -> Result<()> {
        let iovec = self.iovec(part);
        // SAFETY: as in `register`, for one part.
        unsafe { submitter.register_buffers_update(part as u32, &[iovec], None) }
            .map_err(|error| refused(error, iovec.iov_len))?;
        self.parts[part] = Part::Registered;
        Ok(())
    }
}

#[cold]
fn refused(error: io::Error, len: usize) -> Error {
    let hint = match (error.raw_os_error(), crate::buffer::memlock_limit()) {
        (Some(libc::ENOMEM), Some(limit)) => format!(
            "; RLIMIT_MEMLOCK is {limit} bytes: raise it (ulimit -l, LimitMEMLOCK=, docker --ulimit memlock=-1) or use a \
             smaller budget"
        ),
        _ => String::new(),
    };
    Error::os(
        error,
        format!(
            "register {len} bytes of an arena with io_uring (going on without, which costs more CPU){hint}"
        ),
    )
}
