//! Tables of the kernel: mounts and disks.

use crate::digest;
use crate::source::Source;

pub fn run(input: &[u8]) -> u64 {
    let mounts = fuse_fs::fuzzing::mountinfo(input);
    assert!(mounts.len() <= input.len() / 9 + 1, "a line of mountinfo has at least 9 bytes");
    let lines = input.split(|byte| *byte == b'\n').count();
    assert!(mounts.len() <= lines);
    let disks = bench::fuzzing::disk_stats(&String::from_utf8_lossy(input));
    assert!(disks <= lines + input.iter().filter(|byte| **byte == b'\r').count());

    // Blocks that `nvtier bench` reads back: only what was sealed passes.
    let mut source = Source::new(input);
    let (kind, offset) = (source.u8() as usize % 3, source.u64());
    let mut block = source.rest().to_vec();
    let as_read = bench::fuzzing::check_block(&block, offset);
    if block.len() >= 24 {
        bench::fuzzing::seal_block(kind, &mut block, offset);
        let sealed = bench::fuzzing::check_block(&block, offset);
        assert!(sealed[kind] && sealed.iter().filter(|good| **good).count() == 1, "{sealed:?}");
        assert_eq!(bench::fuzzing::check_block(&block, offset ^ 1), [false; 3]);
        let last = block.len() - 1;
        block[last] ^= 1;
        assert_eq!(bench::fuzzing::check_block(&block, offset), [false; 3]);
    }
    digest(&(mounts, disks, as_read))
}
