//! Extended attributes: the user's own, kept by the pool, and the read-only `user.nvtier.*` of tensor files and views.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use engine::tensors::{TensorIndex, TensorInfo};
use engine::{NodeId, NodeKind, XattrSet};

use super::views::{VNode, may_hold_tensors};
use super::{Fs, is_virtual};
use crate::error::{Errno, FsResult};

const OURS: &[u8] = b"user.nvtier.";
/// Limits of the kernel (`XATTR_NAME_MAX`, `XATTR_SIZE_MAX`).
const NAME_MAX: usize = 255;
const SIZE_MAX: usize = 64 << 10;

impl<B: Send + Sync + 'static> Fs<B> {
    /// Value of an attribute.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> FsResult<Vec<u8>> {
        self.check_alive()?;
        if let Some(ours) = name.as_bytes().strip_prefix(OURS) {
            return self.own_value(ino, ours);
        }
        check_namespace(name)?;
        if is_virtual(ino) {
            return Err(Errno::ENODATA);
        }
        Ok(self.pool.getxattr(ino, name)?)
    }

    /// Sets an attribute.
    pub fn setxattr(&self, ino: u64, name: &OsStr, value: &[u8], set: XattrSet) -> FsResult<()> {
        self.check_writable(ino)?;
        if name.as_bytes().starts_with(OURS) {
            return Err(Errno::EPERM);
        }
        check_namespace(name)?;
        if name.len() > NAME_MAX {
            return Err(Errno::ERANGE);
        }
        if value.len() > SIZE_MAX {
            return Err(Errno::E2BIG);
        }
        Ok(self.pool.setxattr(ino, name, value, set)?)
    }

    /// Removes an attribute.
    pub fn removexattr(&self, ino: u64, name: &OsStr) -> FsResult<()> {
        self.check_writable(ino)?;
        if name.as_bytes().starts_with(OURS) {
            return Err(Errno::EPERM);
        }
        check_namespace(name)?;
        Ok(self.pool.removexattr(ino, name)?)
    }

    /// Names, each ended by NUL. On files of the pool the derived `user.nvtier.*` are left out, so that `cp -a` and `rsync -X` do
    /// not try to set them elsewhere; on views there is nothing else.
    pub fn listxattr(&self, ino: u64) -> FsResult<Vec<u8>> {
        self.check_alive()?;
        let names: Vec<OsString> = if is_virtual(ino) {
            self.own_names(ino)?
                .into_iter()
                .map(|name| [OURS, name.as_bytes()].concat())
                .map(OsString::from_vec)
                .collect()
        } else {
            self.pool.listxattr(ino)?
        };
        let mut list = Vec::new();
        for name in names {
            list.extend_from_slice(name.as_bytes());
            list.push(0);
        }
        Ok(list)
    }

    fn own_names(&self, ino: u64) -> FsResult<Vec<&'static str>> {
        Ok(match self.virtual_nodes.get(ino)? {
            VNode::View { .. } => vec!["name", "dtype", "shape", "data_offsets", "format", "generation"],
            VNode::TensorFile { region, .. } => match self.listings.get(&self.pool, region) {
                Ok(_) => vec!["format", "tensors", "generation", "sealed"],
                Err(_) => vec!["error", "generation", "sealed"],
            },
            _ => vec![],
        })
    }

    fn own_value(&self, ino: u64, name: &[u8]) -> FsResult<Vec<u8>> {
        if !is_virtual(ino) {
            return self.region_value(ino, name, false);
        }
        match self.virtual_nodes.get(ino)? {
            VNode::View { region, epoch, index } => {
                let view = self.listings.view(&self.pool, region, epoch, index)?;
                let tensor = view.index.tensors.get(index as usize).ok_or(Errno::ESTALE)?;
                match name {
                    b"generation" | b"sealed" => self.region_value(region, name, true),
                    _ => tensor_value(&view.index, tensor, name),
                }
            }
            VNode::TensorFile { region, .. } => self.region_value(region, name, true),
            _ => Err(Errno::ENODATA),
        }
    }

    /// `known`: the caller came here through a name that says it is a tensor file.
    fn region_value(&self, region: NodeId, name: &[u8], known: bool) -> FsResult<Vec<u8>> {
        let attr = self.pool.getattr(region)?;
        if attr.kind != NodeKind::Region {
            return Err(Errno::ENODATA);
        }
        match name {
            b"generation" => return Ok(attr.generation.to_string().into_bytes()),
            b"sealed" => return Ok(u8::from(self.pool.is_sealed(region)?).to_string().into_bytes()),
            _ => {}
        }
        if !known {
            let path = self.pool.path_of(region)?;
            if !may_hold_tensors(OsStr::new(&path)) {
                return Err(Errno::ENODATA);
            }
        }
        let index = match (self.pool.tensors(region), name) {
            (Ok(index), _) => index,
            (Err(error), b"error") => return Ok(error.chain().into_bytes()),
            (Err(_), _) => return Err(Errno::ENODATA),
        };
        match (name, index.tensors.as_slice()) {
            (b"format", _) => Ok(format_name(&index)),
            (b"tensors", tensors) => Ok(tensors.len().to_string().into_bytes()),
            // What belongs to one tensor is told of a file that holds exactly one (a .npy file).
            (_, [only]) => tensor_value(&index, only, name),
            (b"dtype", [first, rest @ ..]) if rest.iter().all(|t| t.dtype == first.dtype) => {
                tensor_value(&index, first, name)
            }
            _ => Err(Errno::ENODATA),
        }
    }
}

fn format_name(index: &TensorIndex) -> Vec<u8> {
    format!("{:?}", index.format).to_lowercase().into_bytes()
}

fn tensor_value(index: &TensorIndex, tensor: &TensorInfo, name: &[u8]) -> FsResult<Vec<u8>> {
    let text = match name {
        b"name" => tensor.name.clone(),
        b"dtype" => tensor.dtype.to_string(),
        b"shape" => serde_json::to_string(&tensor.shape).unwrap_or_default(),
        b"data_offsets" => format!("[{},{}]", tensor.data_offsets.0, tensor.data_offsets.1),
        b"format" => return Ok(format_name(index)),
        _ => return Err(Errno::ENODATA),
    };
    Ok(text.into_bytes())
}

/// Access control lists are not kept; saying so (rather than "no such attribute") makes `ls` and `cp` stop asking.
fn check_namespace(name: &OsStr) -> FsResult<()> {
    let name = name.as_bytes();
    if [&b"user."[..], b"security.", b"trusted."].iter().any(|namespace| name.starts_with(namespace)) {
        Ok(())
    } else {
        Err(Errno::EOPNOTSUPP)
    }
}
