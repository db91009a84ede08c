//! Bytes at offsets: devices, queues and buffers. Knows no tensors.
//!
//! Three ideas, from the bottom up:
//!
//! - a [`Device`] is a length of bytes that can be read and written at offsets: a preallocated file
//!   ([`FileDevice`]), a raw block device ([`BlockDevice`]), an NVMe namespace by passthrough ([`NvmeCharDevice`]), or a
//!   seeded one in memory ([`SimDevice`]);
//! - a [`Buffer`] is owned, aligned memory, cut from one [`Arena`] of huge pages that queues register with
//!   the kernel once;
//! - a [`Queue`] moves bytes between the two: one ring, one thread, many operations in flight. An [`Op`] owns
//!   its buffer from `push` until its [`Completion`] hands it back, so the kernel never writes into memory
//!   that somebody else may hold.
//!
//! ```
//! use std::sync::Arc;
//! use nvme::{Arena, ArenaOptions, Device, Op, Queue, SimDevice, SimOptions};
//!
//! let device: Arc<dyn Device> = Arc::new(SimDevice::new(1 << 20, SimOptions::default())?);
//! let arena = Arena::new(1 << 20, ArenaOptions::default())?;
//! let mut queue = Queue::builder().depth(8).arena(Some(&arena)).build()?;
//!
//! let mut page = arena.alloc(4096).expect("an empty arena of 1 MiB holds a page");
//! page.fill(7);
//! let done = queue.run(vec![Op::write(device.clone(), 8192, page)])?;
//! assert_eq!(*done[0].result.as_ref().unwrap(), 4096);
//!
//! let mut back = [0u8; 3];
//! device.read_at(8195, &mut back)?; // the blocking helpers take any alignment
//! assert_eq!(back, [7, 7, 7]);
//! # Ok::<(), nvme::Error>(())
//! ```
//!
//! Invariants: no call here waits without a deadline; a short transfer is continued or is an error, never a
//! success; memory that the kernel may still touch is never freed (it is leaked, and said so, when a device
//! does not answer).

pub mod buffer;
pub mod device;
pub mod error;
pub mod fault;
pub mod mapped;
mod page_cache;
pub mod passthrough;
pub mod queue;
mod sharing;
pub mod sim;
mod writeback;

pub use buffer::{Arena, ArenaOptions, Buffer};
pub use device::{
    BlockDevice, Device, DeviceKind, DeviceOptions, FileDevice, InlineIo, InlineOutcome, NvmeCharDevice,
    Target, open,
};
pub use error::{Error, ErrorKind, Result};
pub use fault::{Fault, FaultDevice, FaultIo, FaultPlan};
pub use mapped::MappedFile;
pub use page_cache::is_cached;
pub use queue::{Backend, Completion, Op, Queue, QueueBuilder, Refused, Verb, with_thread_queue};
pub use sharing::is_open_elsewhere;
pub use sim::{
    SimChange, SimDecision, SimDevice, SimHook, SimImage, SimIo, SimOptions, SimPower, SimRng, Survivors,
};
pub use writeback::start_writeback;
