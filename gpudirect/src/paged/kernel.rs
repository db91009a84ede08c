//! The kernel of a [`Move`], written in PTX by hand: a driver compiles it for its device when it is loaded.
//!
//! A launch takes everything by value, tables included, so that nothing has to be uploaded before it or kept until it ends:
//!
//! ```text
//! byte  0  u64  staging: first byte of this launch's part
//!       8  u64  staging, plane to plane
//!      16  u64  staging, block to block
//!      24  u64  planes, block to block
//!      32  u64  slow dimension, paged       40  u64  slow dimension, staging
//!      48  u64  fast dimension, paged       56  u64  fast dimension, staging
//!      64  u32  blocks of this launch       68  u32  units of a run
//!      72  u32  runs of a block: slow * fast 76  u32  fast
//!      80  u32  units of a block            84  u32  1: scatter
//!      88  u32  where the block numbers start, from byte 128
//!     128  u64 * planes, u32 * blocks
//! ```
//!
//! A unit is the widest access (16, 8, 4, 2 or 1 bytes) that all addresses and strides are multiples of; there is an entry for
//! each. `ctaid.x` is a plane and a block, `ctaid.y` a part of the block's units. A thread takes [`UNROLL`] units at a time, all
//! loads before all stores.

use super::{Move, Way};

/// Threads of a group.
pub(crate) const THREADS: u32 = 256;
/// Units that a thread has under way.
pub(crate) const UNROLL: u32 = 4;
/// Bytes of a launch's arguments; 4096 is the most on every device.
pub(crate) const ARGS: usize = 3968;
/// Where the tables start.
const HEAD: usize = 128;
/// Planes of one launch, at most: half of the tables.
const PLANES: usize = (ARGS - HEAD) / 16;
/// Widths of a unit, each with its entry.
pub(crate) const WIDTHS: [u64; 5] = [16, 8, 4, 2, 1];

/// The entry for units of a width.
pub(crate) fn entry(width: u64) -> String {
    format!("nvtier_move_{width}")
}

/// One launch of a move.
pub(crate) struct Launch {
    /// Arguments by value, [`ARGS`] bytes.
    pub args: Box<[u64; ARGS / 8]>,
    /// Groups: plane and block, part of a block.
    pub grid: (u32, u32),
}

impl Move {
    /// Bytes of a unit: what everything is a multiple of.
    pub(crate) fn width(&self) -> u64 {
        let [slow, fast] = self.dims;
        let all = [
            self.run,
            self.block_stride,
            self.staging,
            self.staging_plane,
            self.staging_block,
            slow.paged,
            slow.staging,
            fast.paged,
            fast.staging,
        ];
        let bits =
            self.planes.iter().map(|plane| plane.address).chain(all).fold(16, |bits, value| bits | value);
        1 << bits.trailing_zeros().min(4)
    }

    /// Calls `launch` for each launch that it takes: one, unless there are very many planes or blocks.
    pub(crate) fn launches<E>(&self, launch: &mut dyn FnMut(Launch) -> Result<(), E>) -> Result<(), E> {
        let [slow, fast] = self.dims;
        let width = self.width();
        let run_units = (self.run / width) as u32;
        let runs = (slow.count * fast.count) as u32;
        let units = u64::from(run_units) * u64::from(runs);
        for (first_plane, planes) in (0..).step_by(PLANES).zip(self.planes.chunks(PLANES)) {
            let most = (ARGS - HEAD - planes.len() * 8) / 4;
            for (first_block, blocks) in (0..).step_by(most).zip(self.blocks.chunks(most)) {
                let mut args = Box::new([0u64; ARGS / 8]);
                args[0] = self.staging + first_plane * self.staging_plane + first_block * self.staging_block;
                args[1] = self.staging_plane;
                args[2] = self.staging_block;
                args[3] = self.block_stride;
                args[4..8].copy_from_slice(&[slow.paged, slow.staging, fast.paged, fast.staging]);
                let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
                args[8] = pair(blocks.len() as u32, run_units);
                args[9] = pair(runs, fast.count as u32);
                args[10] = pair(units as u32, (self.way == Way::Scatter).into());
                args[11] = planes.len() as u64 * 8;
                for (slot, plane) in args[HEAD / 8..].iter_mut().zip(planes) {
                    *slot = plane.address;
                }
                for (slot, two) in args[HEAD / 8 + planes.len()..].iter_mut().zip(blocks.chunks(2)) {
                    *slot = pair(two[0], two.get(1).copied().unwrap_or(0));
                }
                let parts = units.div_ceil((THREADS * UNROLL).into()).clamp(1, 65_535) as u32;
                launch(Launch { args, grid: ((planes.len() * blocks.len()) as u32, parts) })?;
            }
        }
        Ok(())
    }
}

/// The module: an entry for each width.
pub(crate) fn ptx() -> String {
    let mut text = String::from(".version 6.0\n.target sm_50\n.address_size 64\n");
    for width in WIDTHS {
        write_entry(&mut text, width);
    }
    text
}

/// Registers of unit `k`, and how it is loaded and stored.
fn access(width: u64, k: u32) -> (String, &'static str) {
    match width {
        16 => (format!("{{%v{k}_0, %v{k}_1, %v{k}_2, %v{k}_3}}"), "v4.u32"),
        8 => (format!("%v{k}"), "u64"),
        4 => (format!("%v{k}"), "u32"),
        2 => (format!("%v{k}"), "u16"),
        _ => (format!("%v{k}"), "u8"),
    }
}

fn write_entry(text: &mut String, width: u64) {
    let mut line = |l: &str| {
        text.push_str(l);
        text.push('\n');
    };
    line(&format!(".visible .entry {}(.param .align 8 .b8 args[{ARGS}])\n{{", entry(width)));
    line(".reg .pred %scatter, %whole, %more, %p0, %p1, %p2, %p3;");
    line(".reg .b32 %tile, %plane, %blocks, %block, %number, %t0, %t1, %t2, %t3;");
    line(".reg .b32 %unit, %units, %step, %threads, %runs, %fast, %run_units, %u0, %u1, %u2, %u3;");
    line(".reg .b64 %args, %entry, %paged, %staging, %from, %to, %x0, %x1, %x2;");
    line(".reg .b64 %from_slow, %to_slow, %from_fast, %to_fast;");
    line(".reg .b64 %a0, %a1, %a2, %a3, %b0, %b1, %b2, %b3;");
    for k in 0..UNROLL {
        line(&match width {
            16 => format!(".reg .b32 %v{k}_0, %v{k}_1, %v{k}_2, %v{k}_3;"),
            8 => format!(".reg .b64 %v{k};"),
            4 => format!(".reg .b32 %v{k};"),
            _ => format!(".reg .b16 %v{k};"),
        });
    }
    // Which plane and which block this group has.
    for l in [
        "mov.u32 %tile, %ctaid.x;",
        "ld.param.u32 %blocks, [args+64];",
        "div.u32 %plane, %tile, %blocks;",
        "mul.lo.u32 %t0, %plane, %blocks;",
        "sub.u32 %block, %tile, %t0;",
        "mov.u64 %args, args;",
        "mul.wide.u32 %x0, %plane, 8;",
        "add.u64 %entry, %args, %x0;",
        "ld.param.u64 %paged, [%entry+128];",
        "ld.param.u32 %t1, [args+88];",
        "cvt.u64.u32 %x1, %t1;",
        "mul.wide.u32 %x0, %block, 4;",
        "add.u64 %x0, %x0, %x1;",
        "add.u64 %entry, %args, %x0;",
        "ld.param.u32 %number, [%entry+128];",
        // Where it is on both sides.
        "cvt.u64.u32 %x0, %number;",
        "ld.param.u64 %x1, [args+24];",
        "mul.lo.u64 %x0, %x0, %x1;",
        "add.u64 %paged, %paged, %x0;",
        "ld.param.u64 %staging, [args+0];",
        "cvt.u64.u32 %x0, %plane;",
        "ld.param.u64 %x1, [args+8];",
        "mul.lo.u64 %x0, %x0, %x1;",
        "add.u64 %staging, %staging, %x0;",
        "cvt.u64.u32 %x0, %block;",
        "ld.param.u64 %x1, [args+16];",
        "mul.lo.u64 %x0, %x0, %x1;",
        "add.u64 %staging, %staging, %x0;",
        // From and to, once and for all.
        "ld.param.u32 %t0, [args+84];",
        "setp.ne.u32 %scatter, %t0, 0;",
        "selp.b64 %from, %staging, %paged, %scatter;",
        "selp.b64 %to, %paged, %staging, %scatter;",
        "ld.param.u64 %x0, [args+32];",
        "ld.param.u64 %x1, [args+40];",
        "selp.b64 %from_slow, %x1, %x0, %scatter;",
        "selp.b64 %to_slow, %x0, %x1, %scatter;",
        "ld.param.u64 %x0, [args+48];",
        "ld.param.u64 %x1, [args+56];",
        "selp.b64 %from_fast, %x1, %x0, %scatter;",
        "selp.b64 %to_fast, %x0, %x1, %scatter;",
        "ld.param.u32 %run_units, [args+68];",
        "ld.param.u32 %runs, [args+72];",
        "ld.param.u32 %fast, [args+76];",
        "ld.param.u32 %units, [args+80];",
        "setp.eq.u32 %whole, %runs, 1;",
        // unit = (ctaid.y * UNROLL * threads) + tid, step = nctaid.y * UNROLL * threads
        "mov.u32 %threads, %ntid.x;",
        "mov.u32 %t0, %ctaid.y;",
        "mov.u32 %t1, %nctaid.y;",
        "mov.u32 %t2, %tid.x;",
    ] {
        line(l);
    }
    line(&format!("mul.lo.u32 %t3, %threads, {UNROLL};"));
    line("mul.lo.u32 %step, %t1, %t3;");
    line("mul.lo.u32 %t0, %t0, %t3;");
    line("add.u32 %unit, %t0, %t2;");
    line("LOOP:");
    line("setp.lt.u32 %more, %unit, %units;");
    line("@!%more bra DONE;");
    for k in 0..UNROLL {
        line(&match k {
            0 => "mov.u32 %u0, %unit;".to_owned(),
            _ => format!("add.u32 %u{k}, %u{}, %threads;", k - 1),
        });
        line(&format!("setp.lt.u32 %p{k}, %u{k}, %units;"));
    }
    line("@%whole bra WHOLE;");
    for k in 0..UNROLL {
        // run = u / run_units, its rest is the place in it; slow = run / fast, its rest is fast's
        line(&format!("div.u32 %t0, %u{k}, %run_units;"));
        line("mul.lo.u32 %t1, %t0, %run_units;");
        line(&format!("sub.u32 %t1, %u{k}, %t1;"));
        line("div.u32 %t2, %t0, %fast;");
        line("mul.lo.u32 %t3, %t2, %fast;");
        line("sub.u32 %t3, %t0, %t3;");
        line(&format!("mul.wide.u32 %x0, %t1, {width};"));
        line("cvt.u64.u32 %x1, %t2;");
        line("cvt.u64.u32 %x2, %t3;");
        for (side, base) in [("a", "from"), ("b", "to")] {
            line(&format!("add.u64 %{side}{k}, %{base}, %x0;"));
            line(&format!("mad.lo.u64 %{side}{k}, %x1, %{base}_slow, %{side}{k};"));
            line(&format!("mad.lo.u64 %{side}{k}, %x2, %{base}_fast, %{side}{k};"));
        }
    }
    line("bra MOVE;");
    line("WHOLE:");
    for k in 0..UNROLL {
        line(&format!("mul.wide.u32 %x0, %u{k}, {width};"));
        line(&format!("add.u64 %a{k}, %from, %x0;"));
        line(&format!("add.u64 %b{k}, %to, %x0;"));
    }
    line("MOVE:");
    for k in 0..UNROLL {
        let (registers, kind) = access(width, k);
        line(&format!("@%p{k} ld.global.{kind} {registers}, [%a{k}];"));
    }
    for k in 0..UNROLL {
        let (registers, kind) = access(width, k);
        line(&format!("@%p{k} st.global.{kind} [%b{k}], {registers};"));
    }
    line("add.u32 %unit, %unit, %step;");
    line("bra LOOP;");
    line("DONE:");
    line("ret;");
    line("}");
}
