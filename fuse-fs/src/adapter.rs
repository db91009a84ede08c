//! The kernel's side: every FUSE request becomes one call of [`Fs`] and one answer.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::{Allocate, Attr, NodeKind, Seek, SetAttr, Timestamp, XattrSet};
use fuser::{
    BackingId, BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, OFlags};

use crate::error::{Errno, FsResult};
use crate::fs::{
    Access, Caller, DirectoryEntry, Entry, Fs, IoPath, NewNodeRequest, Opened, Operation, Passthrough, Timed,
    VALIDITY,
};

/// Block size of `stat` and `statfs`, and the unit in which space is reported.
const BLOCK: u32 = 4096;
const NAME_MAX: u32 = 255;
/// Requests the kernel may have waiting for us (readahead, asynchronous direct I/O) before it holds callers back.
const MAX_BACKGROUND: u16 = 256;
/// Nodes are never reused, so one generation serves all.
const GENERATION: Generation = Generation(0);

/// How the session was configured; made by [`crate::mount()`].
#[derive(Debug, Clone)]
pub(crate) struct AdapterOptions {
    /// Ask for passthrough.
    pub passthrough: Passthrough,
    /// Largest read or write request in bytes.
    pub max_request: u32,
}

/// `fuser`'s view of the file system.
#[derive(Debug)]
pub(crate) struct Adapter {
    fs: Arc<Fs<BackingId>>,
    options: AdapterOptions,
}

impl Adapter {
    pub fn new(fs: Arc<Fs<BackingId>>, options: AdapterOptions) -> Adapter {
        Adapter { fs, options }
    }

    /// Counts a request and passes its result through.
    fn counted<T>(&self, operation: Operation, result: FsResult<T>) -> FsResult<T> {
        self.fs.counters().count(operation, &result);
        result
    }
}

thread_local! {
    /// Where a read of several slices is put together: a reply takes one.
    static GATHER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            // O_TRUNC arrives with the open, so that truncation and open are one step.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Without it the kernel asks for security.capability before every single write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel does not offer this");
            }
        }
        // Never FUSE_WRITEBACK_CACHE: the kernel refuses passthrough with it.
        let passthrough = match &self.options.passthrough {
            Passthrough::Off(reason) => Passthrough::Off(reason.clone()),
            Passthrough::On if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_err() => {
                Passthrough::Off(
                    "the kernel is older than 6.9 or built without CONFIG_FUSE_PASSTHROUGH".to_owned(),
                )
            }
            Passthrough::On => match config.set_max_stack_depth(1) {
                Ok(_) => Passthrough::On,
                Err(_) => Passthrough::Off("the kernel does not allow stacking".to_owned()),
            },
        };
        self.fs.set_passthrough(passthrough);
        self.fs.set_writes_around_cache(drops_cache_after_direct_writes());
        let _ = config.set_max_write(self.options.max_request);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_time_granularity(Duration::from_nanos(1));
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.counted(Operation::Lookup, self.fs.lookup(parent.0, name)) {
            Ok(entry) => reply_entry(reply, &entry),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(ino.0, nlookup);
        let _ = self.counted(Operation::Forget, Ok(()));
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.counted(Operation::GetAttr, self.fs.getattr(ino.0)) {
            Ok(entry) => reply.attr(&entry.validity, &file_attr(&entry.attr)),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(time_or_now),
            mtime: mtime.map(time_or_now),
            ctime: ctime.map(timestamp),
        };
        let result = self.fs.setattr(ino.0, &change, fh.map(|fh| fh.0), caller(request));
        match self.counted(Operation::SetAttr, result) {
            Ok(entry) => reply.attr(&entry.validity, &file_attr(&entry.attr)),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.counted(Operation::ReadLink, self.fs.readlink(ino.0)) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let result = node_kind(mode).and_then(|kind| {
            let node = NewNodeRequest { kind, mode, rdev: u64::from(rdev), target: None };
            self.fs.make_node(parent.0, name, node, caller(request))
        });
        match self.counted(Operation::MkNod, result) {
            Ok(entry) => reply_entry(reply, &entry),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let node = NewNodeRequest { kind: NodeKind::Directory, mode, rdev: 0, target: None };
        match self.counted(Operation::MkDir, self.fs.make_node(parent.0, name, node, caller(request))) {
            Ok(entry) => reply_entry(reply, &entry),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, self.counted(Operation::Unlink, self.fs.unlink(parent.0, name)));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, self.counted(Operation::RmDir, self.fs.rmdir(parent.0, name)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = Some(target.as_os_str().to_owned());
        let node = NewNodeRequest { kind: NodeKind::Symlink, mode: 0o777, rdev: 0, target };
        match self.counted(Operation::SymLink, self.fs.make_node(parent.0, name, node, caller(request))) {
            Ok(entry) => reply_entry(reply, &entry),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let known = fuser::RenameFlags::RENAME_NOREPLACE | fuser::RenameFlags::RENAME_EXCHANGE;
        let result = if known.contains(flags) {
            let flags = engine::RenameFlags {
                no_replace: flags.contains(fuser::RenameFlags::RENAME_NOREPLACE),
                exchange: flags.contains(fuser::RenameFlags::RENAME_EXCHANGE),
            };
            self.fs.rename(parent.0, name, newparent.0, newname, flags)
        } else {
            Err(Errno::EINVAL)
        };
        reply_empty(reply, self.counted(Operation::Rename, result));
    }

    fn link(&self, _request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        match self.counted(Operation::Link, self.fs.link(ino.0, newparent.0, newname)) {
            Ok(entry) => reply_entry(reply, &entry),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mut register = |file: &File| reply.open_backing(file);
        let result = self.fs.open(ino.0, access(flags), caller(request), &mut register);
        match self.counted(Operation::Open, result) {
            Ok(opened) => {
                let (fh, flags) = (FileHandle(opened.fh), open_flags(&opened));
                match &opened.path {
                    IoPath::Passthrough(token) => reply.opened_passthrough(fh, flags, token),
                    _ => reply.opened(fh, flags),
                }
            }
            Err(error) => reply.error(raw(error)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let mut register = |file: &File| reply.open_backing(file);
        let node = NewNodeRequest { kind: NodeKind::Region, mode, rdev: 0, target: None };
        let caller = caller(request);
        let access = access(OpenFlags(flags));
        let made = if access.write {
            self.fs.make_file(parent.0, name, node, caller).map(|(entry, created)| (entry, Some(created)))
        } else {
            self.fs.make_node(parent.0, name, node, caller).map(|entry| (entry, None))
        };
        // `_created` goes when the file is open.
        let result = made.and_then(|(entry, _created)| {
            let opened = self.fs.open(entry.attr.node, access, caller, &mut register);
            // The kernel hears of the node only with a success.
            opened.map(|opened| (entry, opened)).inspect_err(|_| self.fs.forget(entry.attr.node, 1))
        });
        match self.counted(Operation::Create, result) {
            Ok((entry, opened)) => {
                let attr = file_attr(&entry.attr);
                let (fh, flags) = (FileHandle(opened.fh), open_flags(&opened));
                match &opened.path {
                    IoPath::Passthrough(token) => {
                        reply.created_passthrough(&VALIDITY, &attr, GENERATION, fh, flags, token);
                    }
                    _ => reply.created(&VALIDITY, &attr, GENERATION, fh, flags),
                }
            }
            Err(error) => reply.error(raw(error)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _span = tracing::trace_span!("fuse_read", fh = fh.0, offset, size).entered();
        let _running = self.fs.counters().time(Timed::Read);
        let mut reply = Some(reply);
        let result = self.fs.read(fh.0, offset, size as usize, &mut |slices| {
            let Some(reply) = reply.take() else { return };
            match slices {
                [] => reply.data(&[]),
                [one] => reply.data(one),
                several => GATHER.with_borrow_mut(|buffer| {
                    buffer.clear();
                    for slice in several {
                        buffer.extend_from_slice(slice);
                    }
                    self.fs.count_gathered();
                    reply.data(buffer);
                }),
            }
        });
        let result = self.counted(Operation::Read, result);
        if let Some(reply) = reply {
            match result {
                Ok(_) => reply.data(&[]),
                Err(error) => reply.error(raw(error)),
            }
        }
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        // It has ended before the answer, so that who gets it finds it counted.
        let running = self.fs.counters().time(Timed::Write);
        let _span = tracing::trace_span!("fuse_write", fh = fh.0, offset, size = data.len()).entered();
        let result = self.counted(Operation::Write, self.fs.write(fh.0, offset, data, kill));
        drop(running);
        match result {
            Ok(count) => reply.written(count as u32),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply_empty(reply, self.counted(Operation::Flush, self.fs.flush(fh.0)));
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(reply, self.counted(Operation::Release, self.fs.release(fh.0)));
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let running = self.fs.counters().time(Timed::FSync);
        let _span = tracing::trace_span!("fuse_fsync", fh = fh.0).entered();
        let result = self.counted(Operation::FSync, self.fs.fsync(fh.0));
        drop(running);
        reply_empty(reply, result);
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let result = self.fs.read_dir(ino.0, offset, false, &mut |entry| {
            reply.add(INodeNo(entry.ino), entry.next, file_type(entry.kind), entry.name)
        });
        match self.counted(Operation::ReadDir, result) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let result = self.fs.read_dir(ino.0, offset, true, &mut |found: &DirectoryEntry<'_>| {
            let Some(entry) = &found.entry else { return false };
            let attr = file_attr(&entry.attr);
            reply.add(INodeNo(found.ino), found.next, found.name, &entry.validity, &attr, GENERATION)
        });
        match self.counted(Operation::ReadDirPlus, result) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(reply, self.counted(Operation::FSyncDir, self.fs.fsync_dir(ino.0)));
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.counted(Operation::StatFs, self.fs.stat()) {
            Ok(stat) => {
                let block = u64::from(BLOCK);
                let (total, free) = (stat.capacity_bytes / block, stat.free_bytes / block);
                // Nodes live in the catalog, whose only limit is space.
                let free_nodes = free.max(1);
                reply.statfs(total, free, free, stat.nodes + free_nodes, free_nodes, BLOCK, NAME_MAX, BLOCK);
            }
            Err(error) => reply.error(raw(error)),
        }
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let set = match flags {
            1 => XattrSet::Create,
            2 => XattrSet::Replace,
            _ => XattrSet::Any,
        };
        reply_empty(reply, self.counted(Operation::SetXAttr, self.fs.setxattr(ino.0, name, value, set)));
    }

    fn getxattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        reply_xattr(reply, size, self.counted(Operation::GetXAttr, self.fs.getxattr(ino.0, name)));
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        reply_xattr(reply, size, self.counted(Operation::ListXAttr, self.fs.listxattr(ino.0)));
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, self.counted(Operation::RemoveXAttr, self.fs.removexattr(ino.0, name)));
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        let result: FsResult<()> = self.counted(Operation::IoCtl, Err(Errno::ENOTTY));
        reply.error(raw(result.err().unwrap_or(Errno::ENOTTY)));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let result = allocate_mode(mode).and_then(|mode| self.fs.allocate(fh.0, offset, length, mode));
        reply_empty(reply, self.counted(Operation::FAllocate, result));
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // linux/fs.h; the kernel answers all other kinds itself.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let result = match (u64::try_from(offset), whence) {
            (Ok(offset), SEEK_DATA) => self.fs.seek(fh.0, offset, Seek::Data),
            (Ok(offset), SEEK_HOLE) => self.fs.seek(fh.0, offset, Seek::Hole),
            (Err(_), _) => Err(Errno::ENXIO),
            _ => Err(Errno::EINVAL),
        };
        match self.counted(Operation::LSeek, result) {
            Ok(offset) => reply.offset(offset as i64),
            Err(error) => reply.error(raw(error)),
        }
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let result = self.fs.copy_range((fh_in.0, offset_in), (fh_out.0, offset_out), len);
        match self.counted(Operation::CopyFileRange, result) {
            Ok(count) => reply.written(count as u32),
            Err(error) => reply.error(raw(error)),
        }
    }
}

/// Since Linux 6.10 ("fuse: Invalidate the page cache after FOPEN_DIRECT_IO write"); before, a read that met such a write could leave old bytes in
/// the page cache.
fn drops_cache_after_direct_writes() -> bool {
    let name = rustix::system::uname();
    let mut numbers = name.release().to_str().unwrap_or_default().split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok()).unwrap_or(0);
    (next(), next()) >= (6, 10)
}

fn raw(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.raw())
}

fn reply_empty(reply: ReplyEmpty, result: FsResult<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(raw(error)),
    }
}

fn reply_entry(reply: ReplyEntry, entry: &Entry) {
    reply.entry_with_ttls(&entry.validity, &VALIDITY, &file_attr(&entry.attr), GENERATION);
}

/// `size` 0 asks how long the value is (`getxattr(2)`).
fn reply_xattr(reply: ReplyXattr, size: u32, result: FsResult<Vec<u8>>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(raw(Errno::ERANGE)),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(raw(error)),
    }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

fn access(flags: OpenFlags) -> Access {
    let mode = flags.acc_mode();
    let flags = OFlags::from_bits_retain(flags.0 as u32);
    Access {
        read: mode != OpenAccMode::O_WRONLY,
        write: mode != OpenAccMode::O_RDONLY,
        truncate: flags.contains(OFlags::TRUNC),
        direct: flags.contains(OFlags::DIRECT),
    }
}

fn open_flags(opened: &Opened<BackingId>) -> FopenFlags {
    let mut flags = match &opened.path {
        IoPath::Passthrough(_) | IoPath::Cached { keep_cache: false } => FopenFlags::empty(),
        IoPath::Cached { keep_cache: true } => FopenFlags::FOPEN_KEEP_CACHE,
        IoPath::Direct => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
    };
    if !opened.flush_on_close {
        flags |= FopenFlags::FOPEN_NOFLUSH;
    }
    flags
}

fn allocate_mode(mode: i32) -> FsResult<Allocate> {
    let flags = FallocateFlags::from_bits_retain(mode as u32);
    let keep_size = flags.contains(FallocateFlags::KEEP_SIZE);
    match flags - FallocateFlags::KEEP_SIZE {
        rest if rest.is_empty() => Ok(Allocate::Reserve { keep_size }),
        // fallocate(2): punching must keep the size.
        rest if rest == FallocateFlags::PUNCH_HOLE && keep_size => Ok(Allocate::PunchHole),
        rest if rest == FallocateFlags::ZERO_RANGE => Ok(Allocate::ZeroRange { keep_size }),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

fn node_kind(mode: u32) -> FsResult<NodeKind> {
    use rustix::fs::FileType as Type;
    Ok(match Type::from_raw_mode(mode) {
        Type::RegularFile => NodeKind::Region,
        Type::Fifo => NodeKind::Fifo,
        Type::Socket => NodeKind::Socket,
        Type::CharacterDevice => NodeKind::CharDevice,
        Type::BlockDevice => NodeKind::BlockDevice,
        _ => return Err(Errno::EINVAL),
    })
}

fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::Region => FileType::RegularFile,
        NodeKind::Symlink => FileType::Symlink,
        NodeKind::Fifo => FileType::NamedPipe,
        NodeKind::Socket => FileType::Socket,
        NodeKind::CharDevice => FileType::CharDevice,
        NodeKind::BlockDevice => FileType::BlockDevice,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.node),
        size: attr.size,
        // st_blocks counts 512 bytes whatever st_blksize says.
        blocks: attr.allocated.div_ceil(512),
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.crtime),
        kind: file_type(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev as u32,
        blksize: BLOCK,
        flags: 0,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.nanos));
    let seconds = Duration::from_secs(time.secs.unsigned_abs());
    let base = if time.secs < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    base.and_then(|base| base.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// Undoes `fuser`'s conversion: it turns (seconds, nanoseconds) before the epoch into `epoch - (-seconds, nanoseconds)`, so the two
/// numbers of the request can be had back exactly.
fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp { secs: since.as_secs() as i64, nanos: since.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Timestamp { secs: -(before.as_secs() as i64), nanos: before.subsec_nanos() }
        }
    }
}

fn time_or_now(time: TimeOrNow) -> Timestamp {
    match time {
        TimeOrNow::Now => Timestamp::now(),
        TimeOrNow::SpecificTime(time) => timestamp(time),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_survive() {
        // What fuser makes of utimensat's (-2 s, 800 ms), that is 1.2 s before the epoch.
        let from_fuser = UNIX_EPOCH - Duration::new(2, 800_000_000);
        let time = timestamp(from_fuser);
        assert_eq!(time, Timestamp { secs: -2, nanos: 800_000_000 });
        assert_eq!(system_time(time), UNIX_EPOCH - Duration::from_millis(1200));
        assert_eq!(system_time(Timestamp { secs: 5, nanos: 1 }), UNIX_EPOCH + Duration::new(5, 1));
    }

    #[test]
    fn fallocate_modes_are_told_apart() {
        let keep = FallocateFlags::KEEP_SIZE.bits() as i32;
        let punch = FallocateFlags::PUNCH_HOLE.bits() as i32;
        let zero = FallocateFlags::ZERO_RANGE.bits() as i32;
        assert_eq!(allocate_mode(0), Ok(Allocate::Reserve { keep_size: false }));
        assert_eq!(allocate_mode(keep), Ok(Allocate::Reserve { keep_size: true }));
        assert_eq!(allocate_mode(punch | keep), Ok(Allocate::PunchHole));
        assert_eq!(allocate_mode(punch), Err(Errno::EOPNOTSUPP));
        assert_eq!(allocate_mode(zero), Ok(Allocate::ZeroRange { keep_size: false }));
        assert_eq!(allocate_mode(0x08), Err(Errno::EOPNOTSUPP), "collapse range");
    }

    #[test]
    fn open_flags_are_read() {
        let flags = OFlags::RDWR | OFlags::TRUNC | OFlags::DIRECT;
        let access = access(OpenFlags(flags.bits() as i32));
        assert!(access.read && access.write && access.truncate && access.direct);
        let read_only = super::access(OpenFlags(0));
        assert!(read_only.read && !read_only.write && !read_only.truncate);
    }
}
