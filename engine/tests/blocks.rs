//! Blocks of KV stores through a session: in the owner, through its control socket, and both at once.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use engine::kv::{Get, Key, Miss, Put, Settings, Stored};
use engine::{Blocks, ErrorKind, FormatOptions, Pool, Session, SessionOptions};
use nvme::Buffer;

const BLOCK: u32 = 10_000;

fn open(path: &Path) -> Session {
    Session::open(path, SessionOptions { serve: true, ..SessionOptions::default() }).unwrap()
}

fn settings() -> Settings {
    Settings { budget_bytes: Some(64 << 20), ..Settings::default() }
}

fn blocks(session: &Session, tenant: &str) -> Blocks {
    session.blocks(&settings(), b"print", BLOCK, tenant, None).unwrap()
}

fn key(n: u64) -> Key {
    let mut bytes = [3; 32];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Key::new(&bytes).unwrap()
}

fn fill(buffer: &mut [u8], n: u64) {
    buffer
        .iter_mut()
        .enumerate()
        .for_each(|(at, byte)| *byte = ((at as u64 * 31) ^ n.wrapping_mul(97)) as u8);
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn put(blocks: &Blocks, numbers: impl Iterator<Item = u64>) -> Vec<Stored> {
    let puts = numbers.map(|n| {
        let mut buffer = Buffer::heap(blocks.slot_bytes()).unwrap();
        fill(&mut buffer[..BLOCK as usize], n);
        Put { key: key(n), buffer, start: 0 }
    });
    blocks.put(puts.collect(), soon()).into_iter().map(|done| done.result).collect()
}

/// Which of them are there; their bytes are compared.
fn get(blocks: &Blocks, numbers: impl Iterator<Item = u64>, by: Instant) -> Vec<Result<(), Miss>> {
    let numbers: Vec<u64> = numbers.collect();
    let gets = numbers.iter().map(|n| Get {
        key: key(*n),
        buffer: Buffer::heap(blocks.slot_bytes()).unwrap(),
        start: 0,
    });
    let done = blocks.get(gets.collect(), by);
    assert_eq!(done.len(), numbers.len());
    let check = |(n, done): (&u64, engine::kv::GetDone)| {
        assert_eq!(done.key, key(*n));
        if done.result.is_ok() {
            let mut wanted = vec![0; BLOCK as usize];
            fill(&mut wanted, *n);
            assert!(done.buffer.unwrap()[..BLOCK as usize] == wanted, "block {n}");
        }
        done.result
    };
    numbers.iter().zip(done).map(check).collect()
}

#[test]
fn owner_and_clients_share_a_store() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let (owner, client) = (open(&path), open(&path));
    let (here, there) = (blocks(&owner, "t"), blocks(&client, "t"));
    assert!(!here.is_remote() && there.is_remote());
    assert_eq!((here.slot_bytes(), there.slot_bytes()), (12_288, 12_288));
    assert!(put(&there, 0..50).iter().all(|stored| matches!(stored, Stored::New)));
    assert!(put(&here, 40..100).iter().take(10).all(|stored| matches!(stored, Stored::Present)));
    for blocks in [&here, &there] {
        assert!(get(blocks, 0..100, soon()).iter().all(Result::is_ok));
        assert!(matches!(get(blocks, 100..101, soon())[0], Err(Miss::Absent)));
        assert_eq!(blocks.lookup(&(0..120).map(key).collect::<Vec<_>>()).unwrap(), 100);
        assert_eq!(blocks.contains(&[key(99), key(100)]).unwrap(), [true, false]);
        assert_eq!(blocks.stat().unwrap().blocks, 100);
        blocks.flush().unwrap();
    }
    assert_eq!(there.pin(&[key(0), key(200)], true).unwrap(), 1);
    assert_eq!(here.stat().unwrap().pinned, 1);
    assert_eq!(there.remove(&[key(5), key(6)]).unwrap(), 2);
    assert_eq!(here.lookup(&(0..20).map(key).collect::<Vec<_>>()).unwrap(), 5);
    there.set_quota(1 << 20).unwrap();
    // Another tenant, or another fingerprint, sees none of it.
    assert!(get(&blocks(&client, "u"), 0..3, soon()).iter().all(|got| matches!(got, Err(Miss::Absent))));
    let other = client.blocks(&settings(), b"other", BLOCK, "t", None).unwrap();
    assert!(get(&other, 0..3, soon()).iter().all(|got| matches!(got, Err(Miss::Absent))));
    // Too late is a miss of the call, and harms nothing.
    for blocks in [&here, &there] {
        assert!(
            matches!(&get(blocks, 0..1, Instant::now())[0], Err(Miss::Failed(error)) if error.kind() == ErrorKind::Timeout)
        );
        assert!(get(blocks, 0..1, soon())[0].is_ok());
    }
    drop((here, there, other));
    drop(client);
    owner.close().unwrap();
}

#[test]
fn clients_in_many_threads_and_an_owner_that_goes() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let (owner, client) = (open(&path), open(&path));
    let there = blocks(&client, "");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Relaxed) as u64;
                    if n >= 40 {
                        return;
                    }
                    assert!(put(&there, n * 5..n * 5 + 5).iter().all(|stored| matches!(stored, Stored::New)));
                    assert!(get(&there, n * 5..n * 5 + 5, soon()).iter().all(Result::is_ok));
                }
            });
        }
    });
    owner.close().unwrap();
    // Nobody owns the pool: each block is a miss, and no call hangs.
    assert!(get(&there, 0..3, soon()).iter().all(|got| matches!(got, Err(Miss::Failed(_)))));
    assert!(put(&there, 300..302).iter().all(|stored| matches!(stored, Stored::Failed(_))));
    assert!(there.lookup(&[key(0)]).is_err());
    let again = open(&path);
    // The client finds whoever owns it now.
    assert!(get(&there, 0..200, soon()).iter().all(Result::is_ok));
    assert!(get(&blocks(&again, ""), 0..200, soon()).iter().all(Result::is_ok));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let (owner, client) = (open(&path), open(&path));
    for session in [&owner, &client] {
        let kind = |settings: &Settings, print: &[u8], bytes: u32| {
            session.blocks(settings, print, bytes, "", None).unwrap_err().kind()
        };
        assert_eq!(kind(&settings(), b"", 0), ErrorKind::InvalidArgument);
        assert_eq!(kind(&settings(), b"", u32::MAX), ErrorKind::InvalidArgument);
        assert_eq!(kind(&settings(), &[0; 100_000], BLOCK), ErrorKind::TooLarge);
        assert_eq!(kind(&Settings { name: "../x".into(), ..settings() }, b"", BLOCK), ErrorKind::InvalidName);
        // It goes on being of use.
        assert!(put(&blocks(session, "x"), 0..1).iter().all(|stored| !matches!(stored, Stored::Failed(_))));
    }
    let looking =
        Session::open(&path, SessionOptions { read_only: true, ..SessionOptions::default() }).unwrap();
    assert_eq!(looking.blocks(&settings(), b"", BLOCK, "", None).unwrap_err().kind(), ErrorKind::ReadOnly);
}

/// Loads that go on: each block comes once, right, whoever owns the pool, and what nobody waits for harms no later call.
#[test]
fn loads_go_on_while_what_came_is_used() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let (owner, client) = (open(&path), open(&path));
    let (here, there) = (blocks(&owner, "t"), blocks(&client, "t"));
    assert!(put(&here, 0..60).iter().all(|stored| matches!(stored, Stored::New)));
    let mut wanted = vec![0; BLOCK as usize];
    for (blocks, lanes) in [(&here, 1), (&here, 3), (&there, 1), (&there, 2)] {
        let ask =
            |n: u64| (n, Get { key: key(n), buffer: Buffer::heap(blocks.slot_bytes()).unwrap(), start: 0 });
        let mut loads = blocks.loads(lanes).unwrap();
        assert!(loads.wait().is_none() && loads.poll().is_none());
        // 60 to 69 are not there.
        let mut left = (0..70).map(ask);
        let mut came = vec![0; 70];
        loop {
            while loads.under_way() < 9
                && let Some(get) = left.next()
            {
                loads.begin(vec![get], soon());
            }
            let Some((n, done)) = loads.wait() else { break };
            came[n as usize] += 1;
            assert_eq!((done.key, done.result.is_ok()), (key(n), n < 60), "{n}");
            if n < 60 {
                fill(&mut wanted, n);
                assert!(done.buffer.unwrap()[..BLOCK as usize] == wanted, "block {n}");
            }
        }
        assert!(came.iter().all(|times| *times == 1), "{came:?}");
        // Too late is a miss; other loads are not.
        loads.begin(vec![ask(1)], Instant::now());
        loads.begin(vec![ask(2), ask(3)], soon());
        let mut good: Vec<(u64, bool)> =
            std::iter::from_fn(|| loads.wait()).map(|(n, done)| (n, done.result.is_ok())).collect();
        good.sort_unstable();
        assert_eq!(good, [(1, false), (2, true), (3, true)]);
        // Bad arguments come back as misses.
        let small = Get { key: key(4), buffer: Buffer::heap(4096).unwrap(), start: 0 };
        if !blocks.is_remote() {
            loads.begin(vec![(4, small)], soon());
            let (n, done) = loads.wait().unwrap();
            assert!(
                n == 4
                    && matches!(done.result, Err(Miss::Failed(error)) if error.kind() == ErrorKind::InvalidArgument)
            );
        }
        // Nobody waits for these.
        loads.begin((10..30).map(ask).collect(), soon());
        drop(loads);
        assert!(get(blocks, 0..60, soon()).iter().all(Result::is_ok));
        assert!(put(blocks, 0..1).iter().all(|stored| matches!(stored, Stored::Present)));
    }
    drop((here, there));
    drop(client);
    owner.close().unwrap();
}
