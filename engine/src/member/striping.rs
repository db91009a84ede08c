//! Extents over 1..16 members: who gets which stripe unit.
//!
//! Unit `u` of a region (default 1 MiB) goes to member `(node + u) % members`, so that a stream keeps all drives busy and
//! small regions spread. Where that member is full any other takes its turn: striping is for speed, extents say the truth.

use std::sync::Arc;

use nvme::Device;

use super::{Hint, Member};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Extent;
use crate::types::NodeId;

/// The members of a pool as one space; see the module documentation.
#[derive(Debug)]
pub struct Stripes {
    members: Vec<Arc<dyn Member>>,
    chunk_size: u32,
    unit: u64,
}

impl Stripes {
    /// Over these members, in the order of their index. `unit` is a multiple of the chunk size.
    pub fn new(members: Vec<Arc<dyn Member>>, chunk_size: u32, unit: u64) -> Result<Stripes> {
        if members.is_empty() || members.len() > 16 || !unit.is_multiple_of(chunk_size as u64) || unit == 0 {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{} members with stripe unit {unit} and chunk size {chunk_size}: 1 to 16 members and whole chunks are needed",
                    members.len()
                ),
            ));
        }
        Ok(Stripes { members, chunk_size, unit })
    }

    /// The members.
    pub fn members(&self) -> &[Arc<dyn Member>] {
        &self.members
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// Bytes of a stripe unit.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// What lies under an extent; it begins there at its `offset`.
    pub fn device(&self, extent: &Extent) -> Result<Arc<dyn Device>> {
        Ok(self.member(extent.member)?.open(extent)?.0)
    }

    /// The member's name, for messages.
    pub fn member_name(&self, member: u16) -> String {
        self.members
            .get(member as usize)
            .map_or_else(|| format!("member {member}"), |member| member.path().display().to_string())
    }

    fn member(&self, member: u16) -> Result<&Arc<dyn Member>> {
        self.members.get(member as usize).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("an extent names member {member}, the pool has {}", self.members.len()),
            )
        })
    }

    /// Space for some of the `len` bytes at `logical` of a region, at least a chunk, at most to the end of the stripe unit: as much as
    /// there is in one member. `after` has the last extent that this draft got of each member.
    pub fn allocate(
        &self,
        node: NodeId,
        after: &mut [Option<Extent>],
        logical: u64,
        len: u64,
    ) -> Result<Vec<Extent>> {
        let unit_index = logical / self.unit;
        let count = self.members.len();
        let first = ((node % count as u64 + unit_index % count as u64) % count as u64) as usize;
        let mut len = len.min((unit_index + 1) * self.unit - logical);
        loop {
            let mut refused = None;
            for index in (first..count).chain(0..first) {
                let hint = Hint { node, logical, after: after[index] };
                match self.members[index].allocate(len, &hint) {
                    Ok(extents) => {
                        after[index] = extents.last().copied().or(after[index]);
                        return Ok(extents);
                    }
                    Err(error) if error.kind() == ErrorKind::NoSpace => refused = Some(error),
                    Err(error) => return Err(error),
                }
            }
            if len <= self.chunk_size as u64 {
                return Err(
                    refused.unwrap_or_else(|| Error::new(ErrorKind::NoSpace, "the pool has no members"))
                );
            }
            len = (len / 2).next_multiple_of(self.chunk_size as u64);
        }
    }

    /// Gives extents back. Goes on after an error, and returns the first.
    pub fn free(&self, extents: &[Extent]) -> Result<()> {
        let mut first = Ok(());
        for extent in extents {
            let done =
                self.member(extent.member).and_then(|member| member.free(std::slice::from_ref(extent)));
            first = first.and(done);
        }
        first
    }
}
