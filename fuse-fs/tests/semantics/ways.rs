//! Section 1: two ways to the bytes.

use std::fs;

use crate::common::{Mount, Way, pattern};

#[test]
fn passthrough_is_used_where_it_can_be() {
    let Some(mount) = Mount::new(Way::Passed) else { return };
    let content = pattern(1, 300_000);
    fs::write(mount.path("a"), &content).unwrap();
    assert_eq!(fs::read(mount.path("a")).unwrap(), content);
    let stats = mount.stats();
    assert_eq!(stats["mount"]["passthrough"], true);
    assert_eq!(stats["mount"]["opens"]["served"], 0, "{stats:#}");
    assert_eq!(stats["mount"]["requests"]["read"], 0, "{stats:#}");
    assert_eq!(stats["mount"]["requests"]["write"], 0, "{stats:#}");
}

#[test]
fn served_files_read_back() {
    let Some(mount) = Mount::new(Way::Served) else { return };
    let content = pattern(2, 3_000_001);
    fs::write(mount.path("a"), &content).unwrap();
    assert_eq!(fs::read(mount.path("a")).unwrap(), content);
    let stats = mount.stats();
    assert_eq!(stats["mount"]["passthrough"], false);
    assert!(stats["mount"]["passthrough_off_because"].as_str().unwrap().contains("verify"), "{stats:#}");
    assert_eq!(stats["mount"]["opens"]["passthrough"], 0, "{stats:#}");
    assert_eq!(stats["mount"]["served_write_bytes"], content.len());
}

/// Opens of one inode at the same time must agree, whatever their order and flags.
#[test]
fn mixed_opens_never_fail() {
    for way in [Way::Passed, Way::Served] {
        let Some(mount) = Mount::new(way) else { return };
        let path = mount.path("mixed");
        fs::write(&path, b"0123456789").unwrap();
        let open = |read: bool, write: bool, truncate: bool| {
            fs::File::options().read(read).write(write).truncate(truncate).open(&path).unwrap()
        };
        for round in 0..50u64 {
            // A seeded shuffle of opens and closes, holding up to eight at once.
            let mut held = Vec::new();
            let order = pattern(round, 64);
            for byte in order {
                match byte % 5 {
                    0 => held.push(open(true, false, false)),
                    1 => held.push(open(true, true, false)),
                    2 => held.push(open(false, true, false)),
                    3 => held.push(open(false, true, true)),
                    _ if !held.is_empty() => drop(held.swap_remove(byte as usize % held.len())),
                    _ => {}
                }
                if held.len() > 8 {
                    held.clear();
                }
            }
            drop(held);
            fs::write(&path, b"0123456789").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"0123456789", "round {round}");
        }
    }
}
