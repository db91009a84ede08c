//! Tests of the frames; `engine/tests/control.rs` has those of processes.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::frame::{Connection, Frame};
use super::protocol::{PAYLOAD_MAX, REQUEST_MAX, Reply, Request, VERSION};
use super::serve;
use crate::error::{Error, ErrorKind};
use crate::pool::{FormatOptions, OpenOptions, Pool};

fn pair() -> (Connection, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    (Connection::new(a, REQUEST_MAX), b)
}

const SOON: Option<Duration> = Some(Duration::from_secs(20));

fn received(bytes: &[u8]) -> crate::Result<Option<Frame<Request>>> {
    let (connection, mut peer) = pair();
    peer.write_all(bytes).unwrap();
    drop(peer);
    connection.receive(SOON)
}

#[test]
fn a_frame_carries_message_payload_and_file() {
    let (a, peer) = pair();
    let b = Connection::new(peer, REQUEST_MAX);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"inside").unwrap();
    let payload = vec![7; PAYLOAD_MAX as usize];
    let sent = Request::Write { offset: 1 << 40 };
    std::thread::scope(|scope| {
        // More than a socket buffer: both sides must be at work.
        scope.spawn(|| a.send(&sent, &payload, Some(file.as_fd())).unwrap());
        let frame = b.receive::<Request>(SOON).unwrap().unwrap();
        assert_eq!(frame.message, sent);
        assert_eq!(frame.payload, payload);
        let mut same = File::from(frame.fd.expect("a file"));
        same.rewind().unwrap();
        let mut text = String::new();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
    });
    a.send(&Request::Sync, &[], None).unwrap();
    let frame = b.receive::<Request>(SOON).unwrap().unwrap();
    assert!(frame.message == Request::Sync && frame.payload.is_empty() && frame.fd.is_none());
    drop(a);
    assert!(b.receive::<Request>(SOON).unwrap().is_none());
}

fn kind(bytes: &[u8]) -> ErrorKind {
    received(bytes).err().expect("an error").kind()
}

#[test]
fn bad_frames_are_refused_before_memory_is_taken() {
    let head = |json: u32, payload: u32| [json.to_le_bytes(), payload.to_le_bytes()].concat();
    assert_eq!(kind(&head(REQUEST_MAX + 1, 0)), ErrorKind::Protocol);
    assert_eq!(kind(&head(2, PAYLOAD_MAX + 1)), ErrorKind::Protocol);
    assert_eq!(kind(&head(u32::MAX, u32::MAX)), ErrorKind::Protocol);
    assert_eq!(kind(&[head(4, 0), b"null".to_vec()].concat()), ErrorKind::Protocol);
    assert_eq!(kind(&[head(13, 0), b"{\"op\":\"evil\"}".to_vec()].concat()), ErrorKind::Protocol);
    assert_eq!(kind(&head(0, 0)), ErrorKind::Protocol);
    let deep = "[".repeat(100_000);
    assert_eq!(kind(&[head(100_000, 0), deep.into_bytes()].concat()), ErrorKind::Protocol);
    // The end within a frame.
    assert_eq!(kind(b"\x01"), ErrorKind::Stale);
    assert_eq!(kind(&head(10, 0)), ErrorKind::Stale);
    assert_eq!(kind(&[head(13, 4), b"{\"op\":\"sync\"}".to_vec()].concat()), ErrorKind::Stale);
    assert!(received(b"").unwrap().is_none());
}

/// The thread of a client that has just gone may live on for a moment; the pool must not.
#[test]
fn no_client_keeps_the_pool_open_after_its_server_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let pool = Pool::open(&path, &OpenOptions::default()).unwrap();
    for round in 0..300 {
        let server = serve(pool.clone()).unwrap();
        let client = Connection::new(UnixStream::connect(server.path()).unwrap(), PAYLOAD_MAX);
        client.send(&Request::Hello { version: VERSION }, &[], None).unwrap();
        assert!(client.receive::<Reply>(SOON).unwrap().is_some());
        drop(client);
        drop(server);
        assert!(pool.is_last(), "round {round}");
    }
    pool.close().unwrap();
}

#[test]
fn silence_is_a_timeout() {
    let (connection, _peer) = pair();
    let error = connection.receive::<Request>(Some(Duration::from_millis(20))).err().expect("an error");
    assert_eq!(error.kind(), ErrorKind::Timeout);
}

#[test]
fn a_gone_peer_is_stale_not_a_signal() {
    let (connection, peer) = pair();
    drop(peer);
    let error = connection.send(&Request::Sync, &[], None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stale);
}

#[test]
fn errors_keep_their_kind() {
    let reply = Reply::error(&Error::new(ErrorKind::NoSpace, "full"));
    let json = serde_json::to_string(&reply).unwrap();
    assert!(json.contains("no_space"), "{json}");
    assert_eq!(serde_json::from_str::<Reply>(&json).unwrap(), reply);
    // A kind that only a newer owner knows.
    let newer = json.replace("no_space", "out_of_luck");
    assert_eq!(
        serde_json::from_str::<Reply>(&newer).unwrap(),
        Reply::error(&Error::new(ErrorKind::Io, "full"))
    );
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = received(&bytes);
        let framed = [&(bytes.len() as u32).to_le_bytes()[..], &[0; 4], &bytes].concat();
        let _ = received(&framed);
    }
}
