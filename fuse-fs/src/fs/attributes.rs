//! getattr, setattr, and the attributes of virtual nodes.

use std::time::Duration;

use engine::{Attr, NodeKind, SetAttr};

use super::nodes::lock;
use super::views::VNode;
use super::{Caller, Entry, Fs, OpenFile, VALIDITY, is_virtual};
use crate::error::{Errno, FsResult};

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

/// Largest file offset of the kernel (`MAX_LFS_FILESIZE`).
const MAX_SIZE: u64 = i64::MAX as u64;

/// Mode after a write, truncation or change of owner by somebody without `CAP_FSETID`: set-user-id goes, set-group-id goes where
/// it means privilege (with group execute; without, it asks for mandatory locking), as in `setattr_should_drop_suidgid`.
pub(crate) fn without_privileges(mode: u32) -> u32 {
    let mut mode = mode & !SET_UID;
    if mode & GROUP_EXECUTE != 0 {
        mode &= !SET_GID;
    }
    mode
}

impl<B: Send + Sync + 'static> Fs<B> {
    /// Attributes of a node.
    pub fn getattr(&self, ino: u64) -> FsResult<Entry> {
        self.check_alive()?;
        if is_virtual(ino) {
            let node = self.virtual_nodes.get(ino)?;
            return self.virtual_entry(node, ino);
        }
        match self.pool.getattr(ino) {
            Ok(attr) => Ok(self.entry(attr)),
            Err(error) if error.kind() == engine::ErrorKind::NotFound => {
                // A name is gone but somebody still holds the inode without an open file.
                let node = self.nodes.get(ino).ok_or(Errno::ESTALE)?;
                let orphan = *lock(&node.orphan);
                orphan.map(|attr| Entry { attr, validity: Duration::ZERO }).ok_or(Errno::ESTALE)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Wraps attributes with how long they may be cached. While somebody writes through passthrough, stores into a mapping change
    /// the modification time without any request, so nothing is cached then.
    pub(crate) fn entry(&self, attr: Attr) -> Entry {
        let written = self.nodes.get(attr.node).is_some_and(|node| node.has_writer());
        Entry { attr, validity: if written { Duration::ZERO } else { VALIDITY } }
    }

    /// Changes attributes. `change` with no field set means "drop set-user-id and set-group-id": that is what the kernel sends
    /// before a passed-through write by an unprivileged user.
    pub fn setattr(&self, ino: u64, change: &SetAttr, fh: Option<u64>, caller: Caller) -> FsResult<Entry> {
        self.check_writable(ino)?;
        let mut change = *change;
        let before = self.pool.getattr(ino)?;
        let empty = change.mode.is_none()
            && change.uid.is_none()
            && change.gid.is_none()
            && change.size.is_none()
            && change.atime.is_none()
            && change.mtime.is_none()
            && change.ctime.is_none();
        let owner_changes = change.uid.is_some() || change.gid.is_some();
        let truncates = change.size.is_some() && caller.must_drop_privileges();
        let is_directory = before.kind == NodeKind::Directory;
        if change.mode.is_none() && !is_directory && (empty || owner_changes || truncates) {
            let mode = without_privileges(before.mode);
            if mode != before.mode {
                change.mode = Some(mode);
            } else if empty {
                return Ok(self.entry(before));
            }
        }
        if let Some(size) = change.size {
            if size > MAX_SIZE {
                return Err(Errno::EFBIG);
            }
            // ftruncate on an open file goes to its handle: the file may have no name any more.
            if let Some(file) = fh.and_then(|fh| self.handles.get(fh).ok())
                && let OpenFile::Region(region) = &*file
                && region.id == ino
                && region.writable
            {
                region.handle.set_len(size)?;
                change.size = None;
            }
        }
        let attr = self.pool.setattr(ino, &change)?;
        Ok(self.entry(attr))
    }

    /// Clears set-user-id and set-group-id after a served write, where the kernel asked for it.
    pub(crate) fn drop_privileges(&self, ino: u64) -> FsResult<()> {
        let attr = self.pool.getattr(ino)?;
        let mode = without_privileges(attr.mode);
        if mode != attr.mode {
            self.pool.setattr(ino, &SetAttr { mode: Some(mode), ..SetAttr::default() })?;
        }
        Ok(())
    }

    pub(crate) fn virtual_entry(&self, node: VNode, ino: u64) -> FsResult<Entry> {
        let attr = self.virtual_attr(node, ino)?;
        let validity = match node {
            // Their size changes with every request.
            VNode::Stats | VNode::Metrics => Duration::ZERO,
            _ => VALIDITY,
        };
        Ok(Entry { attr, validity })
    }

    fn virtual_attr(&self, node: VNode, ino: u64) -> FsResult<Attr> {
        let own = |kind, mode, size: usize| Attr {
            node: ino,
            kind,
            mode,
            uid: self.options.owner.uid,
            gid: self.options.owner.gid,
            nlink: if kind == NodeKind::Directory { 2 } else { 1 },
            size: size as u64,
            allocated: 0,
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
            crtime: self.started,
            rdev: 0,
            generation: 0,
        };
        Ok(match node {
            VNode::Control => own(NodeKind::Directory, 0o555, 0),
            VNode::Stats | VNode::Metrics | VNode::Version => {
                own(NodeKind::Region, 0o444, self.text_of(node)?.len())
            }
            VNode::Tensors(directory) => {
                let attr = self.pool.getattr(directory)?;
                Attr { node: ino, mode: attr.mode & 0o555, size: 0, allocated: 0, ..attr }
            }
            VNode::TensorFile { region, .. } => {
                let attr = self.pool.getattr(region)?;
                // Who may read the file may list and enter it.
                let read = attr.mode & 0o444;
                Attr {
                    node: ino,
                    kind: NodeKind::Directory,
                    mode: read | read >> 2,
                    nlink: 2,
                    size: 0,
                    allocated: 0,
                    ..attr
                }
            }
            VNode::View { region, epoch, index } => {
                let view = self.listings.view(&self.pool, region, epoch, index)?;
                let attr = self.pool.getattr(region)?;
                Attr { node: ino, mode: attr.mode & 0o444, nlink: 1, size: view.len(), allocated: 0, ..attr }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileges_are_dropped_as_the_kernel_does() {
        assert_eq!(without_privileges(0o6755), 0o755);
        assert_eq!(without_privileges(0o2745), 0o2745, "without group execute it is no privilege");
        assert_eq!(without_privileges(0o4600), 0o600);
        assert_eq!(without_privileges(0o1644), 0o1644);
    }
}
