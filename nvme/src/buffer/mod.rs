//! Memory that drives may write into: one [`Arena`], cut into [`Buffer`]s.
//!
//! What this is not: a cache. A buffer has one owner, and returns to its arena when dropped.

#![allow(unsafe_code)]

mod allocator;
mod arena;

pub(crate) use arena::memlock_limit;
pub use arena::{Arena, ArenaOptions};

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use arena::ArenaInner;

/// Alignment and granularity of every buffer, bytes: no drive asks for more.
pub const PAGE: usize = 4096;

enum Owner {
    Arena(Arc<ArenaInner>),
    Heap(Layout),
}

/// Owned, aligned memory: a slice of an [`Arena`], or stand-alone from [`Buffer::heap`].
///
/// Its length is what was asked for, rounded up to [`PAGE`]. The bytes are initialized, but may be those of
/// an earlier owner: whoever hands them on writes them first.
pub struct Buffer {
    /// Aligned to PAGE.
    ptr: NonNull<u8>,
    /// A multiple of PAGE.
    len: usize,
    owner: Owner,
}

// SAFETY: a Buffer is the only owner of its `len` bytes: the arena's allocator hands out disjoint ranges, the
// heap does too. Nothing in it is bound to a thread.
unsafe impl Send for Buffer {}
// SAFETY: `&Buffer` gives only `&[u8]`; there is no interior mutability.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Stand-alone zeroed memory of at least `len` bytes, 4096-aligned.
    pub fn heap(len: usize) -> Result<Buffer> {
        let out_of_memory = || Error::new(ErrorKind::NoMemory, format!("allocate a buffer of {len} bytes"));
        let len = len.max(1).checked_next_multiple_of(PAGE).ok_or_else(out_of_memory)?;
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| out_of_memory())?;
        // SAFETY: `layout` has a size >= PAGE, so not zero.
        let ptr = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        Ok(Buffer { ptr, len, owner: Owner::Heap(layout) })
    }

    /// Where it starts in its arena, bytes; None for a stand-alone buffer.
    pub fn arena_offset(&self) -> Option<usize> {
        match &self.owner {
            Owner::Arena(arena) => Some(self.ptr.as_ptr() as usize - arena.base() as usize),
            Owner::Heap(_) => None,
        }
    }

    /// True when it was cut from `arena`.
    pub fn is_in(&self, arena: &Arena) -> bool {
        matches!(&self.owner, Owner::Arena(inner) if Arc::ptr_eq(inner, &arena.0))
    }

    /// True when `next` was cut from the same arena and begins where this one ends: the two are one piece of memory.
    pub fn is_followed_by(&self, next: &Buffer) -> bool {
        self.arena_offset().is_some()
            && self.arena_id() == next.arena_id()
            && self.arena_offset().map(|offset| offset + self.len) == next.arena_offset()
    }

    /// Address of the arena it was cut from: an identity, compared by queues on every operation.
    pub(crate) fn arena_id(&self) -> usize {
        match &self.owner {
            Owner::Arena(arena) => Arc::as_ptr(arena) as usize,
            Owner::Heap(_) => 0,
        }
    }

    /// First byte, for handing to the kernel. Valid for `len()` bytes while the Buffer lives.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len` initialized bytes (zeroed by mmap or alloc_zeroed) that only this
        // Buffer owns; the borrow of `self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.owner {
            Owner::Arena(arena) => arena.free(self.ptr.as_ptr() as usize - arena.base() as usize, self.len),
            // SAFETY: `ptr` came from `alloc_zeroed` with this very layout in `heap`, and is freed once.
            Owner::Heap(layout) => unsafe { std::alloc::dealloc(self.ptr.as_ptr(), *layout) },
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the bytes: they may be a model's weights, and there are many.
        f.debug_struct("Buffer").field("len", &self.len).field("arena_offset", &self.arena_offset()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heap_buffer_is_aligned_rounded_zeroed_and_fallible() {
        let mut buffer = Buffer::heap(5000).unwrap();
        assert_eq!(buffer.len(), 8192);
        assert_eq!(buffer.as_ptr() as usize % PAGE, 0);
        assert!(buffer.iter().all(|&b| b == 0));
        buffer[8191] = 1;
        assert_eq!(buffer.arena_offset(), None);
        assert_eq!(Buffer::heap(usize::MAX).unwrap_err().kind(), ErrorKind::NoMemory);
        assert_eq!(Buffer::heap(0).unwrap().len(), PAGE);
    }

    #[test]
    fn only_pieces_of_one_arena_follow_each_other() {
        let arena = || Arena::new(4 * PAGE, ArenaOptions::default()).unwrap();
        let (one, other) = (arena(), arena());
        let mut cut: Vec<Buffer> = (0..3).map(|_| one.alloc(PAGE).unwrap()).collect();
        cut.sort_by_key(Buffer::arena_offset);
        assert!(cut[0].is_followed_by(&cut[1]) && cut[1].is_followed_by(&cut[2]));
        assert!(!cut[0].is_followed_by(&cut[2]) && !cut[1].is_followed_by(&cut[0]));
        let mut elsewhere: Vec<Buffer> = (0..3).map(|_| other.alloc(PAGE).unwrap()).collect();
        elsewhere.sort_by_key(Buffer::arena_offset);
        assert!(!cut[0].is_followed_by(&elsewhere[1]));
        let heap = Buffer::heap(PAGE).unwrap();
        assert!(!heap.is_followed_by(&heap) && !cut[0].is_followed_by(&heap));
    }

    #[test]
    fn a_buffer_returns_to_its_arena_from_another_thread() {
        let arena = Arena::new(64 << 10, ArenaOptions::default()).unwrap();
        let buffer = arena.alloc(arena.len()).unwrap();
        assert!(arena.alloc(1).is_none());
        assert!(buffer.is_in(&arena));
        std::thread::spawn(move || drop(buffer)).join().unwrap();
        assert_eq!(arena.free_bytes(), arena.len());
        assert!(arena.alloc(arena.len()).is_some());
    }
}
