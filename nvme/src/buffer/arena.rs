//! One mapping of huge pages, prefaulted once, cut into buffers.

use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::Advice;
#[cfg(not(miri))]
use rustix::mm::{MapFlags, ProtFlags};

use super::allocator::Allocator;
use super::{Buffer, Owner, PAGE};
use crate::error::{Error, ErrorKind, Result};

/// Size and alignment of a huge page on x86-64 and on arm64 with 4 KiB base pages, bytes.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// How an [`Arena`] gets its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaOptions {
    /// Use huge pages: reserved ones (MAP_HUGETLB) where there are enough, else transparent ones
    /// (`madvise(MADV_HUGEPAGE)`). Arenas below 2 MiB take base pages. Default: true.
    pub huge: bool,
    /// Back every page with memory now, by several threads, rather than at first touch. Default: true.
    pub prefault: bool,
    /// `mlock` it, so that it cannot be swapped out. Registering with io_uring pins it anyway. Default: false.
    pub lock: bool,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        ArenaOptions { huge: true, prefault: true, lock: false }
    }
}

/// What kind of pages back the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(miri, allow(dead_code))]
enum Pages {
    /// Reserved huge pages of `HUGE_PAGE`.
    Hugetlb,
    /// Asked for by madvise; the kernel grants what it can.
    Transparent,
    /// Base pages.
    Base,
}

pub(super) struct ArenaInner {
    /// What mmap returned, for munmap.
    map: NonNull<u8>,
    map_len: usize,
    /// The first byte in use: `map` moved up to a multiple of HUGE_PAGE (of PAGE for a small arena).
    base: NonNull<u8>,
    len: usize,
    pages: Pages,
    prefaulted: bool,
    state: Mutex<Allocator>,
}

// SAFETY: the mapping is plain memory, owned by this value until Drop; ranges of it are handed out by the
// allocator under a mutex, each to one Buffer.
unsafe impl Send for ArenaInner {}
// SAFETY: see Send; `&ArenaInner` gives no access to the bytes, only their address.
unsafe impl Sync for ArenaInner {}

impl ArenaInner {
    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(super) fn free(&self, offset: usize, len: usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).free(offset, len);
    }
}

impl Drop for ArenaInner {
    fn drop(&mut self) {
        // SAFETY: `map` and `map_len` are what mmap gave; every Buffer holds an Arc of this, so none is left.
        #[cfg(not(miri))]
        if let Err(error) = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), self.map_len) } {
            tracing::error!("munmap of an arena of {} bytes: {error}", self.map_len);
        }
        #[cfg(miri)]
        plain::unmap(self.map, self.map_len);
    }
}

/// One mapping, cut into [`Buffer`]s. Cloning gives another handle to the same memory, which is unmapped when
/// the last handle and the last buffer are gone.
#[derive(Clone)]
pub struct Arena(pub(super) Arc<ArenaInner>);

impl Arena {
    /// Maps `bytes`, rounded up to 4096. Fails (never panics or aborts) when there is no memory.
    pub fn new(bytes: usize, options: ArenaOptions) -> Result<Arena> {
        let too_big = || Error::new(ErrorKind::NoMemory, format!("map an arena of {bytes} bytes"));
        let len = bytes.max(1).checked_next_multiple_of(PAGE).ok_or_else(too_big)?;
        #[cfg(not(miri))]
        let huge = options.huge && len >= HUGE_PAGE;
        #[cfg(miri)]
        let (map, map_len, base, pages) = plain::map(len)?;
        #[cfg(not(miri))]
        let (map, map_len, base, pages) = match huge.then(|| map_hugetlb(len)).flatten() {
            Some((map, map_len)) => (map, map_len, map, Pages::Hugetlb),
            None => map_base(len, huge)?,
        };
        let prefaulted = options.prefault || options.lock;
        let inner =
            ArenaInner { map, map_len, base, len, pages, prefaulted, state: Mutex::new(Allocator::new(len)) };
        if options.prefault && !cfg!(miri) {
            prefault(inner.base, len).map_err(|error| {
                Error::os(
                    error,
                    format!("back an arena of {len} bytes with memory; ask for less, or free some"),
                )
            })?;
        }
        if options.lock && !cfg!(miri) {
            lock(inner.base, len)?;
        }
        Ok(Arena(Arc::new(inner)))
    }

    /// Cuts `len` bytes, rounded up to 4096. None when no free range is that long. O(log n) at worst, a pop for
    /// a size that was freed before.
    pub fn alloc(&self, len: usize) -> Option<Buffer> {
        let len = len.max(1).checked_next_multiple_of(PAGE)?;
        let offset = self.0.state.lock().unwrap_or_else(PoisonError::into_inner).alloc(len)?;
        // SAFETY: the allocator returns `offset + len <= self.0.len`, so the sum stays inside the mapping.
        let ptr = unsafe { self.0.base.add(offset) };
        Some(Buffer { ptr, len, owner: Owner::Arena(self.0.clone()) })
    }

    /// Backs the first `bytes` with memory now: buffers that are cut out first lie there. May be called while buffers are in use, and is a hint: what it could not do (before
    /// Linux 5.14, or where memory is short) is done, or fails, where the memory is used.
    pub fn populate(&self, bytes: usize) {
        let bytes = bytes.min(self.0.len);
        if bytes > 0 && !self.0.prefaulted && !cfg!(miri) {
            // SAFETY: the range lies inside the mapping, which `self` keeps mapped; populating writes no contents (madvise(2)).
            let done =
                unsafe { rustix::mm::madvise(self.0.base().cast(), bytes, Advice::LinuxPopulateWrite) };
            if let Err(error) = done {
                tracing::debug!("backing {bytes} bytes of an arena with memory: {error}");
            }
        }
    }

    /// Size, bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// An arena is never empty.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes not cut out at the moment. They need not be contiguous.
    pub fn free_bytes(&self) -> usize {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).free_bytes()
    }

    /// First byte, for registering the whole arena with a driver (CUDA). Valid for `len()` bytes as long as a
    /// handle lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.base()
    }

    /// Size of the pages behind it where they are huge: 2 MiB, or 0 for base pages. For transparent huge pages
    /// this is what was asked for: see [`Arena::resident_huge_bytes`] for what was granted.
    pub fn huge_page_bytes(&self) -> usize {
        match self.0.pages {
            Pages::Hugetlb | Pages::Transparent => HUGE_PAGE,
            Pages::Base => 0,
        }
    }

    /// Every page was backed with memory when it was made.
    pub fn is_prefaulted(&self) -> bool {
        self.0.prefaulted
    }

    /// Bytes that huge pages back right now, read from `/proc/self/smaps`. For `doctor`: not cheap.
    pub fn resident_huge_bytes(&self) -> usize {
        if self.0.pages == Pages::Hugetlb {
            return self.0.len;
        }
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        huge_bytes_in_smaps(&smaps, self.0.base() as usize)
    }

    pub(crate) fn id(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("len", &self.0.len).field("pages", &self.0.pages).finish()
    }
}

/// `AnonHugePages` of the mapping that holds `address`.
fn huge_bytes_in_smaps(smaps: &str, address: usize) -> usize {
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or("");
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            inside = (start..end).contains(&address);
        } else if inside && first == "AnonHugePages:" {
            let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok());
            return kib.unwrap_or(0) * 1024;
        }
    }
    0
}

/// Memory of the heap in place of a mapping, since Miri knows no madvise and few flags of mmap.
#[cfg(miri)]
mod plain {
    use std::alloc::Layout;

    use super::*;

    pub(super) fn map(len: usize) -> Result<(NonNull<u8>, usize, NonNull<u8>, Pages)> {
        let too_big = || Error::new(ErrorKind::NoMemory, format!("allocate an arena of {len} bytes"));
        let layout = Layout::from_size_align(len, HUGE_PAGE).map_err(|_| too_big())?;
        // SAFETY: an arena is at least a page long, so the size is not zero.
        let map = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(too_big)?;
        Ok((map, len, map, Pages::Base))
    }

    pub(super) fn unmap(map: NonNull<u8>, len: usize) {
        if let Ok(layout) = Layout::from_size_align(len, HUGE_PAGE) {
            // SAFETY: `map` came from `map` above with this very layout, and is freed once.
            unsafe { std::alloc::dealloc(map.as_ptr(), layout) };
        }
    }
}

/// Reserved huge pages, when enough are free. MAP_HUGETLB reserves at mmap time, so touching cannot SIGBUS.
#[cfg(not(miri))]
fn map_hugetlb(len: usize) -> Option<(NonNull<u8>, usize)> {
    let map_len = len.checked_next_multiple_of(HUGE_PAGE)?;
    // MAP_HUGE_2MB: log2 of the size from bit 26, see mmap(2).
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let ptr = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), map_len, ProtFlags::READ | ProtFlags::WRITE, flags)
    };
    NonNull::new(ptr.ok()?.cast()).map(|ptr| (ptr, map_len))
}

/// Base pages, with room to align to a huge page when those are wanted transparently.
#[cfg(not(miri))]
fn map_base(len: usize, huge: bool) -> Result<(NonNull<u8>, usize, NonNull<u8>, Pages)> {
    let fail = |error: rustix::io::Errno| {
        Error::os(error, format!("map an arena of {len} bytes; ask for less, or raise RLIMIT_AS"))
    };
    let map_len =
        if huge { len.checked_add(HUGE_PAGE).ok_or_else(|| fail(rustix::io::Errno::NOMEM))? } else { len };
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let ptr = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            map_len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    };
    let map = NonNull::new(ptr.map_err(fail)?.cast::<u8>()).ok_or_else(|| fail(rustix::io::Errno::NOMEM))?;
    if !huge {
        return Ok((map, map_len, map, Pages::Base));
    }
    let pad = (map.as_ptr() as usize).next_multiple_of(HUGE_PAGE) - map.as_ptr() as usize;
    // SAFETY: pad < HUGE_PAGE and map_len = len + HUGE_PAGE, so `map + pad + len` lies inside the mapping.
    let base = unsafe { map.add(pad) };
    // SAFETY: the range lies inside the mapping just made; the advice changes no contents.
    let advised = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
    // EINVAL: a kernel without transparent huge pages. Base pages then, which is only slower.
    let pages = if advised.is_ok() { Pages::Transparent } else { Pages::Base };
    Ok((map, map_len, base, pages))
}

/// Backs the range with memory, one share per thread. Zeroing is memory-bound, so a few threads are enough.
fn prefault(base: NonNull<u8>, len: usize) -> rustix::io::Result<()> {
    const SHARE_MIN: usize = 64 << 20;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let share = len.div_ceil(threads).max(SHARE_MIN).next_multiple_of(HUGE_PAGE);
    let start = base.as_ptr() as usize;
    let populate = |offset: usize| -> rustix::io::Result<()> {
        let part = share.min(len - offset);
        let ptr = (start + offset) as *mut u8;
        // SAFETY: `offset + part <= len`, so the range lies inside the mapping; populating writes no contents.
        match unsafe { rustix::mm::madvise(ptr.cast(), part, Advice::LinuxPopulateWrite) } {
            // Before Linux 5.14: touch every page instead.
            Err(rustix::io::Errno::INVAL) => {
                for page in (0..part).step_by(PAGE) {
                    // SAFETY: inside the range above; nobody else knows the mapping yet, and zero is what it holds.
                    unsafe { ptr.add(page).write_volatile(0) };
                }
                Ok(())
            }
            other => other,
        }
    };
    if share >= len {
        return populate(0);
    }
    std::thread::scope(|scope| {
        let populate = &populate;
        let workers: Vec<_> =
            (0..len).step_by(share).map(|offset| scope.spawn(move || populate(offset))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Err(rustix::io::Errno::FAULT)))
    })
}

fn lock(base: NonNull<u8>, len: usize) -> Result<()> {
    // SAFETY: the range lies inside the mapping; locking changes no contents.
    unsafe { rustix::mm::mlock(base.as_ptr().cast(), len) }.map_err(|error| {
        let limit = memlock_limit().map_or("none".into(), |bytes| format!("{bytes} bytes"));
        Error::os(
            error,
            format!(
                "lock an arena of {len} bytes in memory; RLIMIT_MEMLOCK is {limit}: raise it (ulimit -l, \
                 LimitMEMLOCK=) or turn locking off"
            ),
        )
        .with_kind(ErrorKind::NoMemory)
    })
}

/// RLIMIT_MEMLOCK in bytes; None when unlimited.
pub(crate) fn memlock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel about its pages")]
    fn what_is_cut_out_first_can_be_backed_before() {
        const MIB: usize = 1 << 20;
        let arena = Arena::new(32 * MIB, ArenaOptions { prefault: false, huge: false, ..Default::default() })
            .unwrap();
        let mut used = arena.alloc(MIB).unwrap();
        used.fill(7);
        let resident = |offset: usize, pages: usize| {
            let mut found = vec![0u8; pages];
            // SAFETY: the pages lie in the arena's mapping, and `found` has a byte for each (mincore(2)).
            let done =
                unsafe { libc::mincore(arena.as_ptr().add(offset).cast(), pages * PAGE, found.as_mut_ptr()) };
            assert_eq!(done, 0);
            found.iter().filter(|page| **page & 1 == 1).count()
        };
        let pages = 8 * MIB / PAGE;
        assert_eq!(resident(0, 8192), MIB / PAGE);
        arena.populate(8 * MIB);
        let now = resident(0, pages);
        // A kernel before 5.14 knows no such call: then nothing has changed.
        assert!(now == pages || now == MIB / PAGE, "{now} of {pages} pages");
        assert_eq!(resident(8 * MIB, 6144), 0);
        assert!(used.iter().all(|byte| *byte == 7));
        arena.populate(usize::MAX);
        assert!(used.iter().all(|byte| *byte == 7));
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel about its pages")]
    fn an_arena_of_huge_pages_is_aligned_to_them() {
        let arena = Arena::new(6 << 20, ArenaOptions::default()).unwrap();
        assert_eq!(arena.as_ptr() as usize % HUGE_PAGE, 0);
        assert_eq!(arena.len(), 6 << 20);
        assert!(arena.resident_huge_bytes() <= arena.len() + HUGE_PAGE);
        let small = Arena::new(100, ArenaOptions::default()).unwrap();
        assert_eq!((small.len(), small.huge_page_bytes()), (4096, 0));
    }

    #[test]
    fn buffers_are_disjoint_and_writable_to_the_last_byte() {
        let arena = Arena::new(1 << 20, ArenaOptions { prefault: false, ..Default::default() }).unwrap();
        let mut all: Vec<Buffer> = std::iter::from_fn(|| arena.alloc(5 * PAGE)).collect();
        assert_eq!(all.len(), (1 << 20) / (5 * PAGE));
        for (i, buffer) in all.iter_mut().enumerate() {
            buffer.fill(i as u8);
        }
        assert!(all.iter().enumerate().all(|(i, buffer)| buffer.iter().all(|&b| b == i as u8)));
    }

    #[test]
    fn an_arena_larger_than_the_address_space_is_an_error() {
        let error = Arena::new(usize::MAX - 8192, ArenaOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMemory);
    }

    #[test]
    fn smaps_is_searched_by_address() {
        let smaps = "7f00-8f00 rw-p 00 00:00 0\nAnonHugePages:  4 kB\na000-b000 rw-p 0\nRss: 9 kB\nAnonHugePages:  2048 kB\n";
        assert_eq!(huge_bytes_in_smaps(smaps, 0xa800), 2 << 20);
        assert_eq!(huge_bytes_in_smaps(smaps, 0xc000), 0);
    }
}
