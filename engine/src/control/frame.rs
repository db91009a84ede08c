//! Frames on a Unix stream socket, with deadlines and file descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::PAYLOAD_MAX;
use crate::error::{Error, ErrorKind, Result};

/// A frame that has begun must be through by then, in either direction.
pub(super) const FRAME_DEADLINE: Duration = Duration::from_secs(30);

/// Bytes of a frame for which memory is taken at a time.
const PIECE: usize = 256 << 10;

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    /// Longest JSON taken from the peer.
    json_max: u32,
}

/// What one frame carried.
pub(crate) struct Frame<T> {
    pub message: T,
    pub payload: Vec<u8>,
    pub fd: Option<OwnedFd>,
}

impl Connection {
    pub fn new(stream: UnixStream, json_max: u32) -> Connection {
        Connection { stream, json_max }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a frame whole, or fails; after a failure the connection is of no use.
    pub fn send(&self, message: &impl Serialize, payload: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let json = serde_json::to_vec(message)
            .map_err(|e| Error::with_source(ErrorKind::Protocol, "encode a control message", e))?;
        let json_len = u32::try_from(json.len()).unwrap_or(u32::MAX);
        if payload.len() > PAYLOAD_MAX as usize || json_len == u32::MAX {
            return Err(Error::new(ErrorKind::Protocol, "a control message is too long to send"));
        }
        let mut head = [0; 8];
        head[..4].copy_from_slice(&json_len.to_le_bytes());
        head[4..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        self.send_all(&mut [IoSlice::new(&head), IoSlice::new(&json), IoSlice::new(payload)], fd)
            .map_err(|e| ended("send to the other side of the control socket", e))
    }

    fn send_all(&self, mut parts: &mut [IoSlice<'_>], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let deadline = Instant::now() + FRAME_DEADLINE;
        IoSlice::advance_slices(&mut parts, 0); // drops empty parts
        while !parts.is_empty() {
            self.stream.set_write_timeout(Some(left(deadline)?))?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = fd.as_slice();
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::other("no room for a file descriptor"));
            }
            match sendmsg(self.stream.as_fd(), parts, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(n) => {
                    fd = None; // it went with the first byte
                    IoSlice::advance_slices(&mut parts, n);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives a frame; `None` when the peer closed between frames. `first`: how long its first byte may take (`None`: for ever).
    pub fn receive<T: DeserializeOwned>(&self, first: Option<Duration>) -> Result<Option<Frame<T>>> {
        let what = "receive from the other side of the control socket";
        let mut fd = None;
        let mut head = [0; 8];
        self.stream.set_read_timeout(first).map_err(|e| ended(what, e))?;
        let got = self.receive_some(&mut head, &mut fd).map_err(|e| ended(what, e))?;
        if got == 0 {
            return Ok(None);
        }
        let deadline = Instant::now() + FRAME_DEADLINE;
        self.receive_all(&mut head[got..], deadline, &mut fd).map_err(|e| ended(what, e))?;
        let [a, b, c, d, e, f, g, h] = head;
        let (json_len, payload_len) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        if json_len > self.json_max || payload_len > PAYLOAD_MAX {
            let context = format!(
                "the other side of the control socket sent a frame of {json_len} + {payload_len} bytes; at most {} + {PAYLOAD_MAX} are taken",
                self.json_max
            );
            return Err(Error::new(ErrorKind::Protocol, context));
        }
        let mut json = Vec::new();
        let mut payload = Vec::new();
        for (part, len) in [(&mut json, json_len), (&mut payload, payload_len)] {
            // Memory is taken as bytes come, not as the peer says that they will.
            while part.len() < len as usize {
                let at = part.len();
                part.resize((at + PIECE).min(len as usize), 0);
                self.receive_all(&mut part[at..], deadline, &mut fd).map_err(|e| ended(what, e))?;
            }
        }
        let message = serde_json::from_slice(&json).map_err(|e| {
            Error::with_source(
                ErrorKind::Protocol,
                "the other side of the control socket sent what is no message",
                e,
            )
        })?;
        Ok(Some(Frame { message, payload, fd }))
    }

    fn receive_all(&self, mut buf: &mut [u8], deadline: Instant, fd: &mut Option<OwnedFd>) -> io::Result<()> {
        while !buf.is_empty() {
            self.stream.set_read_timeout(Some(left(deadline)?))?;
            match self.receive_some(buf, fd)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => buf = &mut buf[n..],
            }
        }
        Ok(())
    }

    fn receive_some(&self, buf: &mut [u8], fd: &mut Option<OwnedFd>) -> io::Result<usize> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(buf)];
            match recvmsg(self.stream.as_fd(), into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => {
                    for message in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = message {
                            for one in fds {
                                *fd = Some(one); // one a frame is all that is sent; any other is closed here
                            }
                        }
                    }
                    return Ok(received.bytes);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// An error of the socket. The other side's end is `Stale`, its silence `Timeout`.
fn ended(what: &str, error: io::Error) -> Error {
    use io::ErrorKind as Os;
    let kind = match error.kind() {
        Os::WouldBlock | Os::TimedOut => ErrorKind::Timeout,
        Os::UnexpectedEof
        | Os::BrokenPipe
        | Os::ConnectionReset
        | Os::ConnectionAborted
        | Os::NotConnected => ErrorKind::Stale,
        _ => return Error::io(what, error),
    };
    Error::with_source(kind, what, error)
}
