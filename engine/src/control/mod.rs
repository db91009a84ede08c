//! The control plane: a pool has one owner process, others reach it over a Unix socket.
//!
//! [`serve`] lets them in ([`ControlServer`]), [`Client`] is their side; [`Session`](crate::Session) chooses. What goes over the
//! socket is in [`protocol`], where the socket is in [`location`].
//!
//! - The kernel tells each side who the other is (`SO_PEERCRED`, `unix(7)`); the owner's user and root may enter, nobody else, and a
//!   client speaks to nobody but root and its own user (root also to the user whom the pool belongs to).
//! - A connection holds at most one open region to read and one to write. When it ends, however it ends, they are
//!   dropped: leases end, what was not committed is gone (or parked, where the writer asked to resume).
//! - Bytes of a region that is one file of a directory member do not pass through the owner: the client gets a lease, the file
//!   (`SCM_RIGHTS`, opened for reading only) and the checksums, and for writing the draft's file. Bytes of raw and striped pools, and
//!   of regions that are being written, pass as payloads, checked by the owner.
//! - Frames have a size limit, and each side has deadlines: a peer that stalls or lies costs a thread for a while, no more.

mod client;
pub(crate) mod frame;
mod kv;
pub mod location;
pub mod protocol;
mod remote_reader;
mod server;

pub use client::{Client, RemoteWriter};
pub use kv::RemoteBlocks;
pub use remote_reader::RemoteReader;
pub use server::{ControlServer, serve};

#[cfg(test)]
mod tests;
