//! Float32 weights as two halves: bfloat16, which is what a module sees, and the low 16 bits with a bit an element that says which way a tie was
//! rounded. Training keeps weights so (`nvtier.train`, precision `mixed`); an update needs them whole for a moment.
//!
//! ```text
//! split   hi = the float32 rounded to the nearest bfloat16, ties to even     lo = its low 16 bits
//!         tie bit = lo is 0x8000 and it was rounded up
//! join    up = the tie bit where lo is 0x8000, else lo > 0x8000              float32 = (hi - up) << 16 | lo
//! ```
//!
//! Both are one pass over memory, a kernel in PTX by hand as that of [`paged`](crate::paged): 8 elements and the byte of their tie bits are a
//! thread's. Not a number becomes `0x7fff`, which is what devices make of it.

use crate::error::{Error, ErrorKind, Result};

/// Elements of a thread.
const EACH: u64 = 8;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Halves to float32.
    Join,
    /// Float32 to halves.
    Split,
}

/// Addresses on a device. All begin at a multiple of 16 bytes but `ties`.
#[derive(Clone, Copy, Debug)]
pub struct Halves {
    /// Which way.
    pub way: Way,
    /// Float32, `count` of them.
    pub master: u64,
    /// Bfloat16, `count` of them.
    pub hi: u64,
    /// 16 bits each, `count` of them.
    pub lo: u64,
    /// A bit an element, the lowest of a byte first; whole bytes.
    pub ties: u64,
    /// Elements.
    pub count: u64,
}

impl Halves {
    /// Its ranges: address and bytes.
    pub(crate) fn ranges(&self) -> [(u64, u64); 4] {
        let count = self.count;
        [(self.master, 4 * count), (self.hi, 2 * count), (self.lo, 2 * count), (self.ties, count.div_ceil(8))]
    }

    /// Refuses what the kernel cannot do.
    pub(crate) fn check(&self) -> Result<()> {
        let aligned = (self.master | self.hi | self.lo).is_multiple_of(16);
        match aligned && self.count > 0 && self.count < 1 << 40 {
            true => Ok(()),
            false => {
                let context = format!("{self:x?}: addresses must be multiples of 16, and elements 1 to 2^40");
                Err(Error::new(ErrorKind::Invalid, context))
            }
        }
    }

    /// Threads that it takes.
    pub(crate) fn threads(&self) -> u64 {
        self.count.div_ceil(EACH)
    }
}

/// Name of a way's entry.
pub(crate) fn entry(way: Way) -> &'static str {
    match way {
        Way::Join => "nvtier_join",
        Way::Split => "nvtier_split",
    }
}

/// The entries, to follow the head of a module.
pub(crate) fn ptx() -> String {
    let mut text = String::new();
    for way in [Way::Join, Way::Split] {
        write_entry(&mut text, way);
    }
    text
}

/// `%x0..%x7` of 16 bits each from the four words of `%w`, or back.
fn unpack(line: &mut dyn FnMut(String), to: &str) {
    for k in 0..8 {
        let word = k / 2;
        match k % 2 {
            0 => line(format!("and.b32 %{to}{k}, %w{word}, 0xffff;")),
            _ => line(format!("shr.u32 %{to}{k}, %w{word}, 16;")),
        }
    }
}

fn pack(line: &mut dyn FnMut(String), from: &str) {
    for word in 0..4 {
        let (low, high) = (2 * word, 2 * word + 1);
        line(format!("shl.b32 %w{word}, %{from}{high}, 16;"));
        line(format!("or.b32 %w{word}, %w{word}, %{from}{low};"));
    }
}

fn write_entry(text: &mut String, way: Way) {
    let mut line = |l: String| {
        text.push_str(&l);
        text.push('\n');
    };
    let fixed = |line: &mut dyn FnMut(String), lines: &[&str]| lines.iter().for_each(|l| line(l.to_string()));
    line(format!(
        ".visible .entry {}(.param .u64 master, .param .u64 hi, .param .u64 lo, .param .u64 ties, .param .u64 count)\n{{",
        entry(way)
    ));
    fixed(
        &mut line,
        &[
            ".reg .pred %out, %rest, %p, %q, %in<8>;",
            ".reg .b16 %s;",
            ".reg .b32 %w<4>, %h<8>, %l<8>, %m<8>, %t, %u, %v;",
            ".reg .b64 %group, %first, %end, %count, %at, %hi, %lo, %ties, %master;",
            "mov.u32 %u, %ctaid.x;",
            "mov.u32 %v, %ntid.x;",
            "mul.wide.u32 %group, %u, %v;",
            "mov.u32 %u, %tid.x;",
            "cvt.u64.u32 %at, %u;",
            "add.u64 %group, %group, %at;",
            "shl.b64 %first, %group, 3;",
            "ld.param.u64 %count, [count];",
            "setp.ge.u64 %out, %first, %count;",
            "@%out ret;",
            // Where this thread's elements are.
            "ld.param.u64 %ties, [ties];",
            "add.u64 %ties, %ties, %group;",
            "shl.b64 %at, %first, 1;",
            "ld.param.u64 %hi, [hi];",
            "add.u64 %hi, %hi, %at;",
            "ld.param.u64 %lo, [lo];",
            "add.u64 %lo, %lo, %at;",
            "shl.b64 %at, %first, 2;",
            "ld.param.u64 %master, [master];",
            "add.u64 %master, %master, %at;",
            "add.u64 %end, %first, 8;",
            "setp.gt.u64 %rest, %end, %count;",
        ],
    );
    for k in 0..8 {
        line(format!("add.u64 %at, %first, {k};"));
        line(format!("setp.lt.u64 %in{k}, %at, %count;"));
    }
    line("@%rest bra load_rest;".into());
    match way {
        Way::Join => {
            for (plane, to) in [("hi", "h"), ("lo", "l")] {
                line(format!("ld.global.v4.u32 {{%w0, %w1, %w2, %w3}}, [%{plane}];"));
                unpack(&mut line, to);
            }
        }
        Way::Split => {
            line("ld.global.v4.u32 {%m0, %m1, %m2, %m3}, [%master];".into());
            line("ld.global.v4.u32 {%m4, %m5, %m6, %m7}, [%master+16];".into());
        }
    }
    line("bra compute;\nload_rest:".into());
    for k in 0..8 {
        match way {
            Way::Join => {
                for (plane, to) in [("hi", "h"), ("lo", "l")] {
                    line(format!("mov.u32 %{to}{k}, 0;"));
                    line(format!("mov.u16 %s, 0;\n@%in{k} ld.global.u16 %s, [%{plane}+{}];", 2 * k));
                    line(format!("cvt.u32.u16 %{to}{k}, %s;"));
                }
            }
            Way::Split => {
                line(format!("mov.u32 %m{k}, 0;\n@%in{k} ld.global.u32 %m{k}, [%master+{}];", 4 * k));
            }
        }
    }
    line("compute:".into());
    match way {
        Way::Join => {
            line("ld.global.u8 %t, [%ties];".into());
            for k in 0..8 {
                line(format!("shr.u32 %v, %t, {k};\nand.b32 %v, %v, 1;"));
                line(format!("setp.eq.u32 %p, %l{k}, 0x8000;\nsetp.gt.u32 %q, %l{k}, 0x8000;"));
                line("selp.u32 %u, 1, 0, %q;\nselp.u32 %u, %v, %u, %p;".into());
                line(format!("sub.u32 %m{k}, %h{k}, %u;\nshl.b32 %m{k}, %m{k}, 16;"));
                line(format!("or.b32 %m{k}, %m{k}, %l{k};"));
            }
        }
        Way::Split => {
            line("mov.u32 %t, 0;".into());
            for k in 0..8 {
                line(format!("and.b32 %l{k}, %m{k}, 0xffff;\nshr.u32 %u, %m{k}, 16;"));
                line(format!(
                    "and.b32 %v, %u, 1;\nadd.u32 %v, %v, 0x7fff;\nadd.u32 %v, %v, %m{k};\nshr.u32 %h{k}, %v, 16;"
                ));
                line(format!("and.b32 %v, %m{k}, 0x7fffffff;\nsetp.gt.u32 %p, %v, 0x7f800000;"));
                line(format!("selp.u32 %h{k}, 0x7fff, %h{k}, %p;"));
                line(format!("setp.ne.u32 %q, %h{k}, %u;\nsetp.eq.and.u32 %p, %l{k}, 0x8000, %q;"));
                line(format!("selp.u32 %v, {}, 0, %p;\nor.b32 %t, %t, %v;", 1u32 << k));
            }
            line("st.global.u8 [%ties], %t;".into());
        }
    }
    line("@%rest bra store_rest;".into());
    match way {
        Way::Join => {
            line("st.global.v4.u32 [%master], {%m0, %m1, %m2, %m3};".into());
            line("st.global.v4.u32 [%master+16], {%m4, %m5, %m6, %m7};".into());
        }
        Way::Split => {
            for (plane, from) in [("hi", "h"), ("lo", "l")] {
                pack(&mut line, from);
                line(format!("st.global.v4.u32 [%{plane}], {{%w0, %w1, %w2, %w3}};"));
            }
        }
    }
    line("ret;\nstore_rest:".into());
    for k in 0..8 {
        match way {
            Way::Join => line(format!("@%in{k} st.global.u32 [%master+{}], %m{k};", 4 * k)),
            Way::Split => {
                for (plane, from) in [("hi", "h"), ("lo", "l")] {
                    line(format!(
                        "cvt.u16.u32 %s, %{from}{k};\n@%in{k} st.global.u16 [%{plane}+{}], %s;",
                        2 * k
                    ));
                }
            }
        }
    }
    line("ret;\n}".into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_cannot_do_is_refused() {
        let fine = Halves { way: Way::Join, master: 4096, hi: 8192, lo: 16384, ties: 3, count: 5 };
        fine.check().unwrap();
        assert_eq!(fine.ranges(), [(4096, 20), (8192, 10), (16384, 10), (3, 1)]);
        assert_eq!(fine.threads(), 1);
        for wrong in
            [Halves { hi: 8194, ..fine }, Halves { count: 0, ..fine }, Halves { count: 1 << 40, ..fine }]
        {
            assert_eq!(wrong.check().unwrap_err().kind(), ErrorKind::Invalid);
        }
    }
}
