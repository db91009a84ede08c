//! npy: numpy's file of one array (NEP 1 and numpy.lib.format), read, and written as the header of a tensor's view.
//!
//! ```text
//! | "\x93NUMPY" | major u8 | minor u8 | header length: u16 (v1) or u32 (v2, v3) | header | data |
//! {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }  padded with spaces, '\n' last
//! ```
//!
//! What `np.load(view, mmap_mode="r")` gives for a tensor's view:
//!
//! | tensor | array | to go on |
//! |---|---|---|
//! | bool, integers, F16, F32, F64, C64, C128 | the same type and shape | |
//! | BF16 | `V2` (opaque, two bytes), same shape: numpy has no bfloat16, and this is what `np.save` of `ml_dtypes.bfloat16` writes | `.view(ml_dtypes.bfloat16)`; `torch.from_numpy(a.view("u2")).view(torch.bfloat16)` |
//! | the 8-bit floats | `V1`, same shape | `.view(ml_dtypes.float8_e4m3fn)`, `.view("u1")` |
//! | F4, F6, ggml's quantised types | `uint8`, same shape but for the last dimension, which counts bytes of a row (as gguf-py has it) | `gguf.dequantize(a, type)` |
//!
//! An opaque type rather than `uint16`, because arithmetic on it fails instead of giving nonsense.
//! The data of a view starts at a multiple of [`VIEW_ALIGN`], so that a mapping of it is page-aligned.

use std::collections::BTreeMap;

use super::cursor::Cursor;
use super::{
    Dtype, Format, MalformedKind as Kind, Parse, ReadAt, TensorIndex, TensorInfo, malformed, quoted,
};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header that is read. numpy itself refuses to evaluate more than 10,000 bytes (`max_header_size`).
pub const HEADER_MAX: u64 = 1 << 20;
/// The data of a view starts at a multiple of this.
pub const VIEW_ALIGN: usize = 4096;
/// numpy's limit (`NPY_MAXDIMS`) since 2.0; 32 before.
const DIMENSIONS_MAX: usize = 64;
/// The one tensor of an npy file is called so.
pub const TENSOR_NAME: &str = "data";

/// The npy v1.0 header of a tensor's view: what stands before its bytes in `.tensors/<file>/<tensor>.npy`.
///
/// Always [`VIEW_ALIGN`] bytes. `None` where numpy could not open it: more than 64 dimensions, or a last dimension
/// whose packed elements do not fill whole bytes.
pub fn npy_header(info: &TensorInfo) -> Option<Vec<u8>> {
    let descr = info.dtype.npy_descr()?;
    if info.shape.len() > DIMENSIONS_MAX {
        return None;
    }
    let mut shape = info.shape.clone();
    // Types without a byte-sized element are rows of bytes.
    let row = shape.last().copied();
    let packed = match info.dtype {
        Dtype::Ggml(t) => Some((row?.checked_mul(t.bytes.into())?, u64::from(t.block))),
        _ => match info.dtype.bits()? {
            bits if bits % 8 != 0 => Some((row?.checked_mul(bits.into())?, 8)),
            _ => None,
        },
    };
    if let Some((numerator, denominator)) = packed {
        if numerator % denominator != 0 {
            return None;
        }
        *shape.last_mut()? = numerator / denominator;
    }
    let shape = match shape.as_slice() {
        [one] => format!("({one},)"),
        many => format!("({})", many.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
    };
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let len = VIEW_ALIGN - 10;
    if text.len() >= len {
        return None; // 64 dimensions of 20 digits are 1,408 bytes, so this does not happen
    }
    let mut header = Vec::with_capacity(VIEW_ALIGN);
    header.extend(MAGIC);
    header.extend([1, 0]);
    header.extend((len as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header.resize(VIEW_ALIGN - 1, b' ');
    header.push(b'\n');
    Some(header)
}

pub(super) fn parse(size: u64, read_at: &mut ReadAt<'_>) -> Parse<TensorIndex> {
    let mut cursor = Cursor::new(size, read_at);
    if &cursor.array::<6>("the magic")? != MAGIC {
        return malformed(Kind::BadMagic, "it does not start with \\x93NUMPY");
    }
    let [major, minor] = cursor.array("the version")?;
    let len = match (major, minor) {
        (1, 0) => u64::from(cursor.u16("the header's length")?),
        (2 | 3, 0) => u64::from(cursor.u32("the header's length")?),
        _ => {
            return malformed(
                Kind::UnsupportedVersion,
                format!("npy version {major}.{minor}; 1.0, 2.0 and 3.0 are read"),
            );
        }
    };
    if len > HEADER_MAX {
        return malformed(
            Kind::HeaderTooLarge,
            format!("its header claims {len} bytes; at most {HEADER_MAX} are read"),
        );
    }
    let raw = cursor.bytes(len, "the header")?;
    // Versions 1 and 2 are Latin-1, version 3 is UTF-8; field names of structured types are all that could differ.
    let Ok(text) = std::str::from_utf8(&raw) else {
        return malformed(Kind::NotUtf8, "its header is neither ASCII nor UTF-8");
    };
    let header = Header::read(text)?;
    let Some(dtype) = Dtype::from_npy(&header.descr) else {
        return malformed(
            Kind::UnknownDtype,
            format!(
                "its descr {} has no tensor view (little-endian numbers and bool have)",
                quoted(&header.descr)
            ),
        );
    };
    if header.fortran_order && header.shape.len() > 1 {
        return malformed(Kind::UnsupportedVersion, "it is in Fortran order; tensors are in C order");
    }
    let Some(bytes) = dtype.tensor_bytes(&header.shape) else {
        return malformed(Kind::Overflow, format!("{dtype} x {:?} does not fit 64 bits", header.shape));
    };
    if bytes > cursor.remaining() {
        return malformed(
            Kind::BeyondEnd,
            format!(
                "{dtype} x {:?} is {bytes} bytes, but only {} follow the header",
                header.shape,
                cursor.remaining()
            ),
        );
    }
    let begin = cursor.position();
    let tensor = TensorInfo {
        name: TENSOR_NAME.into(),
        dtype,
        shape: header.shape,
        data_offsets: (begin, begin + bytes),
    };
    Ok(TensorIndex::new(Format::Npy, vec![tensor], BTreeMap::new()))
}

/// The three keys of the header's dictionary.
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<u64>,
}

impl Header {
    fn read(text: &str) -> Parse<Header> {
        let mut literal = Literal { rest: text };
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        literal.expect('{')?;
        while !literal.take('}') {
            let key = literal.string()?;
            literal.expect(':')?;
            let twice = match key {
                "descr" if literal.peek() == Some('[') => {
                    return malformed(
                        Kind::UnknownDtype,
                        "it holds a structured array, which has no tensor view",
                    );
                }
                "descr" => descr.replace(literal.string()?.to_owned()).is_some(),
                "fortran_order" => fortran_order.replace(literal.bool()?).is_some(),
                "shape" => shape.replace(literal.tuple()?).is_some(),
                _ => {
                    return malformed(
                        Kind::BadHeader,
                        format!("its header has the unknown key {}", quoted(key)),
                    );
                }
            };
            if twice {
                return malformed(
                    Kind::DuplicateName,
                    format!("its header has the key {} twice", quoted(key)),
                );
            }
            if !literal.take(',') {
                literal.expect('}')?;
                break;
            }
        }
        if !literal.rest.trim().is_empty() {
            return malformed(Kind::BadHeader, "something follows the dictionary in its header");
        }
        match (descr, fortran_order, shape) {
            (Some(descr), Some(fortran_order), Some(shape)) => Ok(Header { descr, fortran_order, shape }),
            _ => malformed(Kind::BadHeader, "its header lacks descr, fortran_order or shape"),
        }
    }
}

/// The part of Python's literals that numpy writes.
struct Literal<'a> {
    rest: &'a str,
}

impl<'a> Literal<'a> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.rest = &self.rest[c.len_utf8()..];
        }
        found
    }

    fn expect(&mut self, c: char) -> Parse<()> {
        if self.take(c) { Ok(()) } else { self.wrong(&format!("'{c}'")) }
    }

    fn wrong<T>(&self, wanted: &str) -> Parse<T> {
        malformed(
            Kind::BadHeader,
            format!("its header should have {wanted} where it has {}", quoted(self.rest)),
        )
    }

    fn string(&mut self) -> Parse<&'a str> {
        let quote = match self.peek() {
            Some(q @ ('\'' | '"')) => q,
            _ => return self.wrong("a string"),
        };
        let body = &self.rest[1..];
        match body.find([quote, '\\']) {
            Some(end) if body[end..].starts_with(quote) => {
                self.rest = &body[end + 1..];
                Ok(&body[..end])
            }
            _ => self.wrong("a plain string"),
        }
    }

    fn bool(&mut self) -> Parse<bool> {
        self.peek();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        self.wrong("True or False")
    }

    fn tuple(&mut self) -> Parse<Vec<u64>> {
        let mut items = Vec::new();
        self.expect('(')?;
        while !self.take(')') {
            self.peek();
            let digits = self.rest.len() - self.rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let Ok(item) = self.rest[..digits].parse() else {
                return if digits == 0 {
                    self.wrong("a length")
                } else {
                    malformed(
                        Kind::Overflow,
                        format!("the length {} does not fit 64 bits", quoted(&self.rest[..digits])),
                    )
                };
            };
            self.rest = self.rest[digits..].strip_prefix('L').unwrap_or(&self.rest[digits..]); // Python 2 wrote 3L
            items.push(item);
            if items.len() > DIMENSIONS_MAX {
                return malformed(Kind::BadHeader, format!("it has more than {DIMENSIONS_MAX} dimensions"));
            }
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, refused};
    use super::*;

    fn file(version: u8, header: &str, data: usize) -> Vec<u8> {
        let mut out = [MAGIC.as_slice(), &[version, 0]].concat();
        if version == 1 {
            out.extend((header.len() as u16).to_le_bytes());
        } else {
            out.extend((header.len() as u32).to_le_bytes());
        }
        out.extend(header.as_bytes());
        out.resize(out.len() + data, 1);
        out
    }

    fn refuse(header: &str, data: usize, kind: Kind, says: &str) {
        refused("a.npy", &file(1, header, data), kind, says);
    }

    #[test]
    fn reads_all_versions() {
        for version in 1..=3 {
            let bytes = file(version, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   \n", 24);
            let index = testing::read("a.npy", &bytes).unwrap().unwrap();
            let t = &index.tensors[0];
            assert_eq!((t.name.as_str(), t.dtype, t.shape.as_slice()), ("data", Dtype::F32, &[2, 3][..]));
            assert_eq!(t.data_offsets.1, bytes.len() as u64);
            assert_eq!(t.len(), 24);
        }
        for (shape, n) in [("()", 1), ("(5,)", 5), ("(5L,)", 5), ("(0, 7)", 0), ("(2,3,)", 6)] {
            let bytes = file(1, &format!("{{\"shape\":{shape},'fortran_order':False,'descr':'|u1'}}"), 6);
            assert_eq!(testing::read("a.npy", &bytes).unwrap().unwrap().tensors[0].len(), n, "{shape}");
        }
    }

    #[test]
    fn refuses_what_lies() {
        let h = |descr: &str, shape: &str| {
            format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n")
        };
        refuse(&h("'<f4'", "(7,)"), 24, Kind::BeyondEnd, "F32 x [7] is 28 bytes, but only 24 follow");
        refuse(&h("'<f4'", "(9223372036854775808,)"), 24, Kind::Overflow, "does not fit 64 bits");
        refuse(&h("'<f4'", "(18446744073709551616,)"), 24, Kind::Overflow, "18446744073709551616");
        refuse(&h("'<f4'", "(-1,)"), 24, Kind::BadHeader, "a length");
        refuse(
            &h("'<f4'", &format!("({})", "1,".repeat(65))),
            24,
            Kind::BadHeader,
            "more than 64 dimensions",
        );
        refuse(&h("'>f4'", "(1,)"), 24, Kind::UnknownDtype, "\">f4\" has no tensor view");
        refuse(&h("'|O'", "(1,)"), 24, Kind::UnknownDtype, "\"|O\"");
        refuse(&h("[('a', '<f4')]", "(1,)"), 24, Kind::UnknownDtype, "structured array");
        refuse(
            "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }",
            24,
            Kind::UnsupportedVersion,
            "Fortran order",
        );
        refuse("{'descr': '<f4', 'descr': '<f4', }", 24, Kind::DuplicateName, "\"descr\" twice");
        refuse("{'descr': '<f4', }", 24, Kind::BadHeader, "lacks");
        refuse("{'evil': 1}", 24, Kind::BadHeader, "unknown key \"evil\"");
        refuse("{'descr': __import__('os')}", 24, Kind::BadHeader, "a string");
        refuse(&(h("'<f4'", "(1,)") + "x"), 24, Kind::BadHeader, "something follows");
        refuse(&"{".repeat(60_000), 24, Kind::BadHeader, "a string");
        refuse("", 24, Kind::BadHeader, "'{'");
        refused("a.npy", b"\x93NUMPX\x01\0", Kind::BadMagic, "NUMPY");
        refused("a.npy", b"\x93NUM", Kind::Truncated, "the magic needs 6 bytes");
        refused("a.npy", b"\x93NUMPY\x04\0\x01\0\0\0x", Kind::UnsupportedVersion, "npy version 4.0");
        refused("a.npy", b"\x93NUMPY\x01\0\xff\xffx", Kind::Truncated, "the header needs 65535 bytes");
        refused(
            "a.npy",
            b"\x93NUMPY\x02\0\xff\xff\xff\xffx",
            Kind::HeaderTooLarge,
            "claims 4294967295 bytes",
        );
        refused("a.npy", b"\x93NUMPY\x01\0\x02\0\xff\xfe", Kind::NotUtf8, "neither ASCII nor UTF-8");
    }

    fn view(dtype: Dtype, shape: &[u64]) -> Option<(String, usize)> {
        let info = TensorInfo { name: "w".into(), dtype, shape: shape.to_vec(), data_offsets: (0, 0) };
        let header = npy_header(&info)?;
        assert_eq!(&header[..10], b"\x93NUMPY\x01\0\xf6\x0f");
        assert_eq!(*header.last().unwrap(), b'\n');
        Some((String::from_utf8(header[10..].to_vec()).unwrap().trim_end().to_owned(), header.len()))
    }

    #[test]
    fn headers_of_views() {
        let text =
            |descr, shape| format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        assert_eq!(view(Dtype::F32, &[2, 3]), Some((text("<f4", "(2, 3)"), 4096)));
        assert_eq!(view(Dtype::F32, &[]).unwrap().0, text("<f4", "()"));
        assert_eq!(view(Dtype::Bool, &[7]).unwrap().0, text("|b1", "(7,)"));
        assert_eq!(view(Dtype::BF16, &[0, 7]).unwrap().0, text("<V2", "(0, 7)"));
        assert_eq!(view(Dtype::F8E4M3, &[4]).unwrap().0, text("|V1", "(4,)"));
        assert_eq!(view(Dtype::F4, &[3, 4]).unwrap().0, text("|u1", "(3, 2)"));
        assert_eq!(view(Dtype::F6E2M3, &[4]).unwrap().0, text("|u1", "(3,)"));
        assert_eq!(view(Dtype::F4, &[4, 3]), None);
        assert_eq!(view(Dtype::from_ggml(12).unwrap(), &[3, 512]).unwrap().0, text("|u1", "(3, 288)"));
        assert_eq!(view(Dtype::F32, &[1; 65]), None);
        assert!(view(Dtype::F32, &[u64::MAX; 64]).is_some());
    }

    #[test]
    fn a_view_is_a_valid_npy_file() {
        let info =
            TensorInfo { name: "w".into(), dtype: Dtype::F64, shape: vec![2, 2], data_offsets: (99, 131) };
        let mut bytes = npy_header(&info).unwrap();
        bytes.extend([0; 32]);
        let index = testing::read("w.npy", &bytes).unwrap().unwrap();
        assert_eq!(index.tensors[0].shape, [2, 2]);
        assert_eq!(index.tensors[0].data_offsets, (4096, 4128));
    }
}
