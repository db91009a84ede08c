//! Extended attributes (`xattr(7)`).

use std::ffi::{OsStr, OsString};

use super::{MAX_NAME, MAX_XATTR, MAX_XATTRS, Tree};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{NodeId, Timestamp, XattrSet};

fn absent(name: &OsStr) -> Error {
    Error::new(ErrorKind::NoAttribute, format!("there is no extended attribute {name:?}"))
}

fn check(name: &OsStr) -> Result<()> {
    if name.is_empty() || name.as_encoded_bytes().contains(&0) {
        return Err(Error::new(
            ErrorKind::InvalidName,
            format!("{name:?} cannot name an extended attribute"),
        ));
    }
    if name.len() > MAX_NAME {
        return Err(Error::new(
            ErrorKind::RangeTooSmall,
            format!("an attribute name of {} bytes; at most {MAX_NAME} are possible", name.len()),
        ));
    }
    Ok(())
}

impl<L> Tree<L> {
    pub(crate) fn getxattr(&self, node: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        let xattrs = self.get(node)?.xattrs.as_ref();
        xattrs.and_then(|xattrs| xattrs.get(name)).cloned().ok_or_else(|| absent(name))
    }

    pub(crate) fn listxattr(&self, node: NodeId) -> Result<Vec<OsString>> {
        Ok(self.get(node)?.xattrs.iter().flat_map(|xattrs| xattrs.keys().cloned()).collect())
    }

    pub(crate) fn setxattr(
        &mut self,
        id: NodeId,
        name: &OsStr,
        value: &[u8],
        flags: XattrSet,
        now: Timestamp,
    ) -> Result<()> {
        check(name)?;
        if value.len() > MAX_XATTR {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("an attribute of {} bytes; at most {MAX_XATTR} are possible", value.len()),
            ));
        }
        let node = self.get_mut(id)?;
        let xattrs = node.xattrs.get_or_insert_default();
        let others: usize = xattrs
            .iter()
            .filter(|(other, _)| *other != name)
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let there = xattrs.contains_key(name);
        let refused = match flags {
            XattrSet::Create if there => {
                Some(Error::new(ErrorKind::Exists, format!("extended attribute {name:?} exists already")))
            }
            XattrSet::Replace if !there => Some(absent(name)),
            _ if others + name.len() + value.len() > MAX_XATTRS => Some(Error::new(
                ErrorKind::NoSpace,
                format!("extended attributes of one node can take {MAX_XATTRS} bytes, these would take more"),
            )),
            _ => None,
        };
        if let Some(error) = refused {
            if xattrs.is_empty() {
                node.xattrs = None;
            }
            return Err(error);
        }
        xattrs.insert(name.to_os_string(), value.to_vec());
        node.ctime = now;
        self.mark_xattrs(id);
        Ok(())
    }

    pub(crate) fn removexattr(&mut self, id: NodeId, name: &OsStr, now: Timestamp) -> Result<()> {
        let node = self.get_mut(id)?;
        let xattrs = node.xattrs.as_mut().ok_or_else(|| absent(name))?;
        xattrs.remove(name).ok_or_else(|| absent(name))?;
        if xattrs.is_empty() {
            node.xattrs = None;
        }
        node.ctime = now;
        self.mark_xattrs(id);
        Ok(())
    }

    fn mark_xattrs(&mut self, id: NodeId) {
        if self.nodes.get(&id).is_some_and(|node| node.nlink > 0) {
            self.dirty.nodes.insert(id);
            self.dirty.xattrs.insert(id);
        }
    }
}
