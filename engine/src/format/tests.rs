//! Superblocks that were cut, flipped, or lie.

use super::*;

fn superblock() -> Superblock {
    Superblock {
        pool: [7; 16],
        index: 1,
        chunk_size: 16 << 10,
        stripe_unit: 1 << 20,
        created: 1_700_000_000,
        sequence: 3,
        catalog_offset: 1 << 20,
        catalog_len: 16 << 20,
        data_offset: 17 << 20,
        data_len: 1 << 30,
        members: vec![
            MemberEntry { id: [1; 16], kind: MemberKind::Directory, bytes: 5, path: "/pool/ä\n".into() },
            MemberEntry { id: [2; 16], kind: MemberKind::Block, bytes: 6, path: "/dev/nvme0n1".into() },
            MemberEntry { id: [3; 16], kind: MemberKind::Image, bytes: 7, path: "".into() },
        ],
        own_path: "/somewhere".into(),
    }
}

#[test]
fn a_superblock_comes_back() {
    let block = superblock().encode().unwrap();
    assert_eq!(Superblock::decode(&block), Copy::Good(superblock()));
    // The places that every version keeps.
    assert_eq!(block[..8], *b"NVTIERSB");
    assert_eq!(block[8..12], 1u32.to_le_bytes());
}

#[test]
fn every_flipped_bit_is_found() {
    let block = superblock().encode().unwrap();
    for bit in 0..SUPERBLOCK_BYTES * 8 {
        let mut bad = block;
        bad[bit / 8] ^= 1 << (bit % 8);
        match Superblock::decode(&bad) {
            Copy::Damaged(_) => assert!(bit >= 64, "bit {bit}"),
            Copy::Absent => assert!(bit < 64, "bit {bit}"),
            other => panic!("bit {bit}: {other:?}"),
        }
    }
    for len in [0, 7, 15, 16, 100, 4095] {
        assert!(!matches!(Superblock::decode(&block[..len]), Copy::Good(_)), "{len} bytes");
    }
}

/// A right sum over wrong values.
#[test]
fn lies_are_found() {
    let lie = |change: &dyn Fn(&mut [u8])| {
        let mut block = superblock().encode().unwrap();
        change(&mut block);
        block[12..16].fill(0);
        let sum = crc32fast::hash(&block);
        block[12..16].copy_from_slice(&sum.to_le_bytes());
        Superblock::decode(&block)
    };
    assert!(matches!(lie(&|_| {}), Copy::Good(_)));
    assert_eq!(lie(&|block| block[8] = 9), Copy::Newer(9));
    type Change<'a> = &'a dyn Fn(&mut [u8]);
    let lies: [Change<'_>; 12] = [
        &|block| block[32] = 3,                            // index beyond the members
        &|block| block[34] = 0,                            // no members
        &|block| block[34] = 17,                           // too many
        &|block| block[34..36].fill(0xff),                 // far too many
        &|block| block[36] = 1,                            // chunk size not a power of two
        &|block| block[36..40].fill(0),                    // none
        &|block| block[40] = 1,                            // stripe unit not of whole chunks
        &|block| block[80..96].fill(0xff),                 // zone beyond 2^64
        &|block| block[83] = 0,                            // data within the catalog
        &|block| block[66] = 0,                            // catalog over the superblock
        &|block| block[TABLE + 16] = 9,                    // member of no kind
        &|block| block[TABLE + 18..TABLE + 20].fill(0xff), // path beyond the block
    ];
    for (index, change) in lies.iter().enumerate() {
        assert!(matches!(lie(change), Copy::Damaged(_)), "lie {index}");
    }
}

#[test]
fn the_newer_copy_counts() {
    let old = Superblock { sequence: 2, created: 5, ..superblock() };
    for (copies, wanted) in [
        (vec![Copy::Good(superblock()), Copy::Good(old.clone())], "second"),
        (vec![Copy::Good(old.clone()), Copy::Good(superblock())], "first"),
    ] {
        let found = choose(Path::new("x"), copies).unwrap();
        assert_eq!(found.superblock, superblock());
        assert!(found.damaged.unwrap().contains(wanted));
    }
    let newer = choose(Path::new("x"), vec![Copy::Good(old), Copy::Newer(2)]).unwrap_err();
    assert_eq!(newer.kind(), ErrorKind::NewerFormat);
    let absent = choose(Path::new("x"), vec![Copy::Absent, Copy::Absent]).unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotAPool);
}

#[test]
fn paths_that_do_not_fit_are_refused() {
    let member =
        MemberEntry { id: [1; 16], kind: MemberKind::Directory, bytes: 0, path: "p".repeat(300).into() };
    let error = Superblock { members: vec![member; 16], ..superblock() }.encode().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NameTooLong);
}
