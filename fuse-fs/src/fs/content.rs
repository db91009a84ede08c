//! Bytes: open, read, write, release, and the rest that works on open files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::{Allocate, Borrower, Handle, NodeId, Seek};

use super::counters::add;
use super::handles::{OpenFile, RegionFile};
use super::nodes::{ContentVersion, IoMode, lock};
use super::views::{VNode, View};
use super::{Caller, Fs, Passthrough, is_virtual};
use crate::error::{Errno, FsResult};

/// Bytes that one copy request moves at most, so that the kernel can show progress and take signals in between.
const COPY_PIECE: u64 = 64 << 20;
const COPY_BUFFER: usize = 1 << 20;

/// What an open may do.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Empty the file first (`O_TRUNC`).
    pub truncate: bool,
    /// The opener asked for `O_DIRECT`.
    pub direct: bool,
}

/// How the kernel is to treat an open file.
#[derive(Debug)]
pub enum IoPath<B> {
    /// By itself, on the backing file of this token.
    Passthrough(Arc<B>),
    /// Through its page cache, filled by us. `keep_cache`: what it holds of this node is still right.
    Cached {
        /// Whether pages of earlier opens stay valid.
        keep_cache: bool,
    },
    /// Every request to us.
    Direct,
}

/// Answer to open.
#[derive(Debug)]
pub struct Opened<B> {
    /// Number of the open file.
    pub fh: u64,
    /// Where its bytes come from.
    pub path: IoPath<B>,
    /// Whether `close` needs to tell us (it can report errors of writes only).
    pub flush_on_close: bool,
}

impl<B: Send + Sync + 'static> Fs<B> {
    /// Opens a file. `register` makes a backing file known to the kernel.
    pub fn open(
        &self,
        ino: u64,
        access: Access,
        caller: Caller,
        register: &mut dyn FnMut(&File) -> io::Result<B>,
    ) -> FsResult<Opened<B>> {
        self.check_alive()?;
        if access.write || access.truncate {
            self.check_writable(ino)?;
        }
        if is_virtual(ino) {
            return self.open_virtual(ino);
        }
        let opened = self.open_region(ino, access, register)?;
        if access.truncate && caller.must_drop_privileges() {
            self.drop_privileges(ino)?;
        }
        Ok(opened)
    }

    fn open_region(
        &self,
        ino: NodeId,
        access: Access,
        register: &mut dyn FnMut(&File) -> io::Result<B>,
    ) -> FsResult<Opened<B>> {
        let node = self.nodes.get_or_insert(ino);
        let mut state = lock(&node.open);
        let engine_access = match (access.read, access.write) {
            (_, false) => engine::Access::Read,
            (false, true) => engine::Access::Write,
            (true, true) => engine::Access::ReadWrite,
        };
        let handle = match self.pool.open_region(ino, engine_access, access.truncate) {
            Ok(handle) => handle,
            // The kernel asked by inode, with a name that it had cached while another process replaced the region: ESTALE makes it
            // look the name up again, ENOENT would reach the caller although a region of that name exists.
            Err(error) if error.kind() == engine::ErrorKind::NotFound => return Err(Errno::ESTALE),
            Err(error) => return Err(error.into()),
        };
        let path = match &state.mode {
            Some(IoMode::Passthrough { token, file }) => {
                if !handle.backing().is_some_and(|now| same_file(&now, file)) {
                    // The engine promises one content for all handles of a node. Opening anything else would fail with EIO in the
                    // kernel; the shared file at least keeps all openers coherent.
                    tracing::error!(node = ino, "the region's backing file changed while it was open");
                }
                IoPath::Passthrough(token.clone())
            }
            Some(IoMode::Served) => self.served(&mut state.cached, ino, access.direct),
            None => match self.hand_over(&handle, access, register) {
                Some((token, file)) => {
                    state.mode = Some(IoMode::Passthrough { token: token.clone(), file });
                    IoPath::Passthrough(token)
                }
                None => {
                    state.mode = Some(IoMode::Served);
                    // Who only writes, and alone, has no use for the page cache: around it a write is copied once, not twice.
                    let around = access.write && !access.read && self.writes_around_cache();
                    self.served(&mut state.cached, ino, access.direct || around)
                }
            },
        };
        let passed = match &state.mode {
            Some(IoMode::Passthrough { file, .. }) => Some(file.clone()),
            _ => None,
        };
        match path {
            IoPath::Passthrough(_) => {
                // What the kernel cached while the node was served is not kept up to date from here on.
                state.cached = None;
                add(&self.counters.passthrough_opens, 1);
            }
            _ => add(&self.counters.served_opens, 1),
        }
        state.opens += 1;
        if access.write {
            node.writers.fetch_add(1, Ordering::Relaxed);
            if let Some(file) = &passed {
                self.early_writeback.watch(file);
            }
        }
        drop(state);
        // The kernel reports errors of passed-through writes by itself.
        let flush_on_close = access.write && passed.is_none();
        let reader = match path {
            IoPath::Direct => Borrower::Program,
            _ => Borrower::PageCache,
        };
        let file = RegionFile { id: ino, handle, node, writable: access.write, reader, passed };
        let fh = self.handles.insert(OpenFile::Region(file));
        Ok(Opened { fh, path, flush_on_close })
    }

    fn hand_over(
        &self,
        handle: &Handle,
        access: Access,
        register: &mut dyn FnMut(&File) -> io::Result<B>,
    ) -> Option<(Arc<B>, Arc<File>)> {
        if self.passthrough() != Passthrough::On || (access.write && self.quota) {
            return None;
        }
        let file = handle.backing()?;
        match register(&file) {
            Ok(token) => Some((Arc::new(token), file)),
            Err(error) => {
                // EPERM (no CAP_SYS_ADMIN) and ELOOP (the pool lies on a stacked file system) will not change: ask no more.
                tracing::warn!(%error, "the kernel refused passthrough; serving reads and writes instead");
                self.set_passthrough(Passthrough::Off(format!("refused by the kernel: {error}")));
                None
            }
        }
    }

    fn served(&self, cached: &mut Option<ContentVersion>, ino: NodeId, direct: bool) -> IoPath<B> {
        if direct {
            return IoPath::Direct;
        }
        let current = self.pool.getattr(ino).ok().map(ContentVersion::from);
        let keep_cache = current.is_some() && *cached == current;
        *cached = current;
        IoPath::Cached { keep_cache }
    }

    fn open_virtual(&self, ino: u64) -> FsResult<Opened<B>> {
        let (file, path) = match self.virtual_nodes.get(ino)? {
            VNode::View { region, epoch, index } => {
                let view = Arc::new(self.listings.view(&self.pool, region, epoch, index)?);
                let handle = self.pool.open_region(region, engine::Access::Read, false)?;
                // The inode stands for this very content (see VNode::View), so cached pages never go stale.
                (OpenFile::View { view, handle }, IoPath::Cached { keep_cache: true })
            }
            node @ (VNode::Stats | VNode::Metrics | VNode::Version) => {
                (OpenFile::Text(self.text_of(node)?.into_bytes().into()), IoPath::Direct)
            }
            _ => return Err(Errno::EISDIR),
        };
        Ok(Opened { fh: self.handles.insert(file), path, flush_on_close: false })
    }

    /// Reads up to `len` bytes and hands them to `reply` as slices, once; fewer only at the end of the file.
    pub fn read(&self, fh: u64, offset: u64, len: usize, reply: &mut dyn FnMut(&[&[u8]])) -> FsResult<usize> {
        self.check_alive()?;
        let count = match &*self.handles.get(fh)? {
            OpenFile::Region(region) => region.handle.read_with(offset, len, region.reader, reply)?,
            OpenFile::View { view, handle } => self.read_view(view, handle, offset, len, reply)?,
            OpenFile::Text(text) => {
                let start = text.len().min(usize::try_from(offset).unwrap_or(usize::MAX));
                let part = &text[start..text.len().min(start.saturating_add(len))];
                reply(&[part]);
                part.len()
            }
        };
        add(&self.counters.served_read_bytes, count as u64);
        Ok(count)
    }

    fn read_view(
        &self,
        view: &View,
        handle: &Handle,
        offset: u64,
        len: usize,
        reply: &mut dyn FnMut(&[&[u8]]),
    ) -> FsResult<usize> {
        let header_len = view.header.len() as u64;
        let len = (len as u64).min(view.len().saturating_sub(offset));
        if offset >= header_len {
            let start = view.start + (offset - header_len);
            let count = handle.read_with(start, len as usize, Borrower::PageCache, reply)?;
            return if count as u64 == len { Ok(count) } else { Err(Errno::ESTALE) };
        }
        let header = &view.header[offset as usize..header_len.min(offset + len) as usize];
        let rest = len - header.len() as u64;
        let mut data = vec![0; rest as usize];
        let mut filled = 0;
        while filled < data.len() {
            match handle.read_at(view.start + filled as u64, &mut data[filled..])? {
                0 => return Err(Errno::ESTALE),
                count => filled += count,
            }
        }
        reply(&[header, &data]);
        Ok(len as usize)
    }

    /// Writes at `offset`. `kill_privileges`: the kernel asks to clear set-user-id and set-group-id.
    pub fn write(&self, fh: u64, offset: u64, data: &[u8], kill_privileges: bool) -> FsResult<usize> {
        let file = self.handles.get(fh)?;
        let region = writable(&file)?;
        self.check_writable(region.id)?;
        if kill_privileges {
            self.drop_privileges(region.id)?;
        }
        let mut written = 0;
        while written < data.len() {
            match region.handle.write_at(offset + written as u64, &data[written..]) {
                Ok(0) => break,
                Ok(count) => written += count,
                // POSIX: what fitted is reported, the error comes with the next write.
                Err(_) if written > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        add(&self.counters.served_write_bytes, written as u64);
        Ok(written)
    }

    /// A descriptor was closed: reports errors of writes that had been put off.
    pub fn flush(&self, fh: u64) -> FsResult<()> {
        match &*self.handles.get(fh)? {
            OpenFile::Region(region) if region.writable => Ok(region.handle.flush()?),
            _ => Ok(()),
        }
    }

    /// The last descriptor and mapping of an open file went.
    pub fn release(&self, fh: u64) -> FsResult<()> {
        let file = self.handles.remove(fh).ok_or(Errno::EBADF)?;
        self.release_file(&file);
        self.closer.close(file);
        Ok(())
    }

    pub(crate) fn release_file(&self, file: &OpenFile<B>) {
        let OpenFile::Region(region) = file else { return };
        if region.writable {
            region.node.writers.fetch_sub(1, Ordering::Relaxed);
        }
        let token = {
            let mut state = lock(&region.node.open);
            state.opens = state.opens.saturating_sub(1);
            if state.opens == 0 { state.mode.take() } else { None }
        };
        drop(token);
    }

    /// Makes content and name durable.
    pub fn fsync(&self, fh: u64) -> FsResult<()> {
        self.check_alive()?;
        match &*self.handles.get(fh)? {
            OpenFile::Region(region) => Ok(region.handle.sync()?),
            _ => Ok(()),
        }
    }

    /// Makes the names of a directory durable (with everything else: the pool has one log).
    pub fn fsync_dir(&self, ino: u64) -> FsResult<()> {
        self.check_alive()?;
        if is_virtual(ino) || self.options.read_only {
            return Ok(());
        }
        // A new file is in no snapshot before it is closed, and its name is one of those that are promised now.
        self.closer.settle();
        Ok(self.pool.sync()?)
    }

    /// Reserves, punches or zeroes.
    pub fn allocate(&self, fh: u64, offset: u64, len: u64, mode: Allocate) -> FsResult<()> {
        let file = self.handles.get(fh)?;
        let region = writable(&file)?;
        self.check_writable(region.id)?;
        if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Errno::EFBIG);
        }
        Ok(region.handle.allocate(offset, len, mode)?)
    }

    /// Next data or hole at or after `offset`.
    pub fn seek(&self, fh: u64, offset: u64, what: Seek) -> FsResult<u64> {
        self.check_alive()?;
        let (len, found) = match &*self.handles.get(fh)? {
            OpenFile::Region(region) => (region.handle.size(), Some(region.handle.seek(offset, what)?)),
            OpenFile::View { view, .. } => (view.len(), None),
            OpenFile::Text(text) => (text.len() as u64, None),
        };
        match (found, what) {
            (Some(found), _) => Ok(found),
            (None, _) if offset >= len => Err(Errno::ENXIO),
            (None, Seek::Data) => Ok(offset),
            (None, Seek::Hole) => Ok(len),
        }
    }

    /// Copies between two open files inside the daemon: one piece, the kernel asks again for the rest.
    pub fn copy_range(&self, from: (u64, u64), to: (u64, u64), len: u64) -> FsResult<u64> {
        let (source, target) = (self.handles.get(from.0)?, self.handles.get(to.0)?);
        let region = writable(&target)?;
        self.check_writable(region.id)?;
        let len = len.min(COPY_PIECE);
        if let OpenFile::Region(source) = &*source
            && let (Some(source), Some(target)) = (&source.passed, &region.passed)
        {
            match copy_files(source, from.1, target, to.1, len) {
                // The backing file was opened for a reader first.
                Err(Errno::EBADF) => {}
                result => return result,
            }
        }
        let mut buffer = vec![0; COPY_BUFFER.min(len as usize)];
        let mut copied = 0;
        while copied < len {
            let want = buffer.len().min((len - copied) as usize);
            let read = match &*source {
                OpenFile::Region(source) => source.handle.read_at(from.1 + copied, &mut buffer[..want])?,
                _ => return Err(Errno::EXDEV),
            };
            if read == 0 {
                break;
            }
            let mut written = 0;
            while written < read {
                match region.handle.write_at(to.1 + copied + written as u64, &buffer[written..read]) {
                    Ok(count) if count > 0 => written += count,
                    Ok(_) => return Err(Errno::EIO),
                    Err(_) if copied > 0 => return Ok(copied),
                    Err(error) => return Err(error.into()),
                }
            }
            copied += read as u64;
        }
        Ok(copied)
    }

    /// Attributes by open file, which works for a file without a name too.
    pub fn open_files(&self) -> usize {
        self.handles.len()
    }
}

fn writable<B>(file: &OpenFile<B>) -> FsResult<&RegionFile<B>> {
    match file {
        OpenFile::Region(region) if region.writable => Ok(region),
        OpenFile::Region(_) => Err(Errno::EBADF),
        _ => Err(Errno::EROFS),
    }
}

fn same_file(a: &Arc<File>, b: &Arc<File>) -> bool {
    Arc::ptr_eq(a, b)
        || match (a.metadata(), b.metadata()) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        }
}

/// Lets the file system below copy (it may share blocks). Both offsets are explicit, so shared descriptors do not interfere.
fn copy_files(source: &File, from: u64, target: &File, to: u64, len: u64) -> FsResult<u64> {
    let (mut from, mut to) = (from, to);
    let count = rustix::fs::copy_file_range(
        source,
        Some(&mut from),
        target,
        Some(&mut to),
        usize::try_from(len).unwrap_or(usize::MAX),
    )?;
    Ok(count as u64)
}
