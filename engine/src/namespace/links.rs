//! Hard links, removal and renaming.

use std::ffi::OsStr;

use super::{Body, MAX_LINKS, Name, Tree, check_name, no_name};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{NodeId, NodeKind, RenameFlags, Timestamp};

/// A node that lost its last name. Unless it is pinned, it has to be forgotten now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone {
    pub node: NodeId,
    pub pinned: bool,
}

impl<L> Tree<L> {
    /// Gives a node one more name.
    pub(crate) fn link(&mut self, id: NodeId, parent: NodeId, name: &OsStr, now: Timestamp) -> Result<()> {
        check_name(name)?;
        if self.directory(parent)?.get(name).is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("{name:?} exists already")));
        }
        self.check_alive(parent)?;
        let node = self.get_mut(id)?;
        let kind = node.kind;
        match kind {
            NodeKind::Directory => {
                return Err(Error::new(ErrorKind::PermissionDenied, "a directory cannot have a second name"));
            }
            _ if node.nlink == 0 => {
                return Err(Error::new(ErrorKind::NotFound, format!("node {id} was removed")));
            }
            _ if node.nlink >= MAX_LINKS => {
                return Err(Error::new(
                    ErrorKind::TooManyLinks,
                    format!("node {id} has {MAX_LINKS} names already"),
                ));
            }
            _ => {}
        }
        let name = Name::from(name);
        node.nlink += 1;
        node.ctime = now;
        node.links.push((parent, name.clone()));
        self.dirty.nodes.insert(id);
        self.add_entry(parent, name, id, kind, now)
    }

    /// Takes a name away that is not a directory's.
    pub(crate) fn unlink(&mut self, parent: NodeId, name: &OsStr, now: Timestamp) -> Result<Option<Gone>> {
        check_name(name)?;
        let entry = self.entry(parent, name)?;
        if entry.kind == NodeKind::Directory {
            return Err(Error::new(ErrorKind::IsDirectory, format!("{name:?} is a directory")));
        }
        self.take_entry(parent, name, now)?;
        Ok(self.drop_link(entry.node, parent, name, now))
    }

    /// Removes an empty directory.
    pub(crate) fn rmdir(&mut self, parent: NodeId, name: &OsStr, now: Timestamp) -> Result<Option<Gone>> {
        check_name(name)?;
        let entry = self.entry(parent, name)?;
        self.check_empty(entry.node, name)?;
        self.take_entry(parent, name, now)?;
        Ok(self.drop_link(entry.node, parent, name, now))
    }

    fn check_alive(&self, directory: NodeId) -> Result<()> {
        if self.get(directory)?.nlink == 0 {
            return Err(Error::new(ErrorKind::NotFound, format!("directory {directory} was removed")));
        }
        Ok(())
    }

    fn check_empty(&self, node: NodeId, name: &OsStr) -> Result<()> {
        match &self.get(node)?.body {
            Body::Directory(directory) if directory.is_empty() => Ok(()),
            Body::Directory(_) => {
                Err(Error::new(ErrorKind::NotEmpty, format!("directory {name:?} is not empty")))
            }
            _ => Err(Error::new(ErrorKind::NotDirectory, format!("{name:?} is not a directory"))),
        }
    }

    /// The node side of a removed entry. A directory goes to 0 links at once.
    fn drop_link(&mut self, id: NodeId, parent: NodeId, name: &OsStr, now: Timestamp) -> Option<Gone> {
        let node = self.nodes.get_mut(&id)?;
        node.links.retain(|(holder, link)| *holder != parent || &**link != name);
        node.ctime = now;
        node.nlink = if node.kind == NodeKind::Directory { 0 } else { node.nlink - 1 };
        if node.nlink > 0 {
            self.dirty.nodes.insert(id);
            return None;
        }
        // From here on it is in no snapshot, even if it stays open for long.
        self.dirty.nodes.remove(&id);
        self.dirty.xattrs.remove(&id);
        if node.stored {
            node.stored = false;
            self.dirty.removed.insert(id);
        }
        Some(Gone { node: id, pinned: node.pins > 0 })
    }

    fn is_within(&self, node: NodeId, ancestor: NodeId) -> Result<bool> {
        let mut at = node;
        loop {
            if at == ancestor {
                return Ok(true);
            }
            let parent = self.directory(at)?.parent;
            if parent == at {
                return Ok(false);
            }
            at = parent;
        }
    }

    /// `renameat2(2)`.
    pub(crate) fn rename(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        flags: RenameFlags,
        now: Timestamp,
    ) -> Result<Option<Gone>> {
        check_name(name)?;
        check_name(new_name)?;
        if flags.no_replace && flags.exchange {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "rename can exchange or refuse to replace, not both",
            ));
        }
        let source = self.entry(parent, name)?;
        let target = self.directory(new_parent)?.get(new_name);
        self.check_alive(new_parent)?;
        if source.kind == NodeKind::Directory && self.is_within(new_parent, source.node)? {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("directory {name:?} cannot move into itself"),
            ));
        }
        let Some(target) = target else {
            if flags.exchange {
                return Err(no_name(new_name));
            }
            self.move_entry(parent, name, new_parent, new_name, now)?;
            return Ok(None);
        };
        if flags.no_replace {
            return Err(Error::new(ErrorKind::Exists, format!("{new_name:?} exists already")));
        }
        if flags.exchange {
            if target.kind == NodeKind::Directory && self.is_within(parent, target.node)? {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("directory {new_name:?} cannot move into itself"),
                ));
            }
            self.exchange(parent, name, new_parent, new_name, now)?;
            return Ok(None);
        }
        if target.node == source.node {
            return Ok(None); // POSIX: two names of one file stay as they are
        }
        match (source.kind == NodeKind::Directory, target.kind == NodeKind::Directory) {
            (true, true) => {
                // Where the target holds the source, it is not empty.
                self.check_empty(target.node, new_name)?;
            }
            (true, false) => {
                return Err(Error::new(ErrorKind::NotDirectory, format!("{new_name:?} is not a directory")));
            }
            (false, true) => {
                return Err(Error::new(ErrorKind::IsDirectory, format!("{new_name:?} is a directory")));
            }
            (false, false) => {}
        }
        self.take_entry(new_parent, new_name, now)?;
        let gone = self.drop_link(target.node, new_parent, new_name, now);
        self.move_entry(parent, name, new_parent, new_name, now)?;
        Ok(gone)
    }

    fn move_entry(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        now: Timestamp,
    ) -> Result<()> {
        let entry = self.take_entry(parent, name, now)?;
        let new_name = Name::from(new_name);
        self.add_entry(new_parent, new_name.clone(), entry.node, entry.kind, now)?;
        self.relink(entry.node, (parent, name), (new_parent, new_name), now)
    }

    fn relink(
        &mut self,
        id: NodeId,
        from: (NodeId, &OsStr),
        to: (NodeId, Name),
        now: Timestamp,
    ) -> Result<()> {
        let parent = to.0;
        let node = self.get_mut(id)?;
        node.ctime = now;
        if let Some(link) =
            node.links.iter_mut().find(|(holder, link)| *holder == from.0 && **link == *from.1)
        {
            *link = to;
        }
        if let Body::Directory(directory) = &mut node.body {
            directory.parent = parent;
        }
        self.dirty.nodes.insert(id);
        Ok(())
    }

    fn exchange(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        now: Timestamp,
    ) -> Result<()> {
        let (one, other) = (self.entry(parent, name)?, self.entry(new_parent, new_name)?);
        if one.node == other.node {
            return Ok(());
        }
        self.directory_mut(parent)?.redirect(name, other.node, other.kind);
        self.directory_mut(new_parent)?.redirect(new_name, one.node, one.kind);
        let (name, new_name) = (Name::from(name), Name::from(new_name));
        for (holder, gets, gives) in [(parent, other.kind, one.kind), (new_parent, one.kind, other.kind)] {
            let holder = self.get_mut(holder)?;
            holder.mtime = now;
            holder.ctime = now;
            holder.nlink += u32::from(gets == NodeKind::Directory);
            holder.nlink -= u32::from(gives == NodeKind::Directory);
        }
        self.relink(one.node, (parent, &name), (new_parent, new_name.clone()), now)?;
        self.relink(other.node, (new_parent, &new_name), (parent, name.clone()), now)?;
        self.dirty.nodes.extend([parent, new_parent]);
        self.dirty.entries.extend([(parent, name), (new_parent, new_name)]);
        Ok(())
    }
}
