//! Element types of tensors: safetensors' words, plus ggml's block-quantised types.

use std::fmt;

/// The type of a tensor's elements.
///
/// Plain types carry safetensors' meaning and little-endian byte order. A [`Dtype::Ggml`] tensor is made of
/// blocks of elements that share scales; it has no size per element, only per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // the variants are the field's own names
pub enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F16,
    BF16,
    F32,
    F64,
    /// Two `F32`: a complex number.
    C64,
    /// Two `F64`: a complex number (npy only; safetensors has no name for it).
    C128,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
    /// Four bits (OCP E2M1), two to a byte.
    F4,
    /// Six bits, four in three bytes.
    F6E2M3,
    /// Six bits, four in three bytes.
    F6E3M2,
    /// A block-quantised type of ggml.
    Ggml(GgmlType),
}

/// One of ggml's block-quantised types: `block` elements take `bytes` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GgmlType {
    /// The number that GGUF files carry (`enum ggml_type` in ggml.h).
    pub id: u32,
    /// ggml's name, for example `Q4_K`.
    pub name: &'static str,
    /// Elements in a block; a row's length is a multiple of it.
    pub block: u32,
    /// Bytes of a block.
    pub bytes: u32,
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn q(id: u32, name: &'static str, block: u32, bytes: u32) -> GgmlType {
    GgmlType { id, name, block, bytes }
}

/// ggml.h `enum ggml_type` and the block structs of ggml-common.h. Numbers that are missing were removed from GGUF
/// (4, 5: Q4_2, Q4_3; 31-33 and 36-38: repacked layouts that were never meant for files).
/// Q8_1 is 36 bytes in ggml since its scale and sum became half precision; it never appears in model files.
const QUANTISED: &[GgmlType] = &[
    q(2, "Q4_0", 32, 18),
    q(3, "Q4_1", 32, 20),
    q(6, "Q5_0", 32, 22),
    q(7, "Q5_1", 32, 24),
    q(8, "Q8_0", 32, 34),
    q(9, "Q8_1", 32, 36),
    q(10, "Q2_K", 256, 84),
    q(11, "Q3_K", 256, 110),
    q(12, "Q4_K", 256, 144),
    q(13, "Q5_K", 256, 176),
    q(14, "Q6_K", 256, 210),
    q(15, "Q8_K", 256, 292),
    q(16, "IQ2_XXS", 256, 66),
    q(17, "IQ2_XS", 256, 74),
    q(18, "IQ3_XXS", 256, 98),
    q(19, "IQ1_S", 256, 50),
    q(20, "IQ4_NL", 32, 18),
    q(21, "IQ3_S", 256, 110),
    q(22, "IQ2_S", 256, 82),
    q(23, "IQ4_XS", 256, 136),
    q(29, "IQ1_M", 256, 56),
    q(34, "TQ1_0", 256, 54),
    q(35, "TQ2_0", 256, 66),
    q(39, "MXFP4", 32, 17),
    q(40, "NVFP4", 64, 36),
    q(41, "Q1_0", 128, 18),
];

impl Dtype {
    /// Bits of one element; `None` for a block-quantised type, whose elements have no size of their own.
    pub fn bits(self) -> Option<u32> {
        Some(match self {
            Dtype::F4 => 4,
            Dtype::F6E2M3 | Dtype::F6E3M2 => 6,
            Dtype::Bool | Dtype::U8 | Dtype::I8 => 8,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E8M0 | Dtype::F8E4M3Fnuz | Dtype::F8E5M2Fnuz => 8,
            Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::BF16 => 16,
            Dtype::U32 | Dtype::I32 | Dtype::F32 => 32,
            Dtype::U64 | Dtype::I64 | Dtype::F64 | Dtype::C64 => 64,
            Dtype::C128 => 128,
            Dtype::Ggml(_) => return None,
        })
    }

    /// Bytes of a tensor of this shape (C order, the last dimension is contiguous). `None` when the number
    /// does not fit 64 bits, is not whole bytes, or a row is not whole blocks.
    pub fn tensor_bytes(self, shape: &[u64]) -> Option<u64> {
        // A zero anywhere makes the tensor empty, whatever the other lengths are; still refuse products that
        // overflow before the zero is met, as the safetensors crate does.
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
        match self {
            Dtype::Ggml(t) => {
                let row = shape.last().copied().unwrap_or(1);
                if row % u64::from(t.block) != 0 {
                    return None;
                }
                (elements / u64::from(t.block)).checked_mul(u64::from(t.bytes))
            }
            _ => {
                let bits = elements.checked_mul(u64::from(self.bits()?))?;
                (bits % 8 == 0).then_some(bits / 8)
            }
        }
    }

    /// The `descr` of the npy view of such a tensor; see [`super::npy`] for what each choice means to numpy.
    pub fn npy_descr(self) -> Option<&'static str> {
        Some(match self {
            Dtype::Bool => "|b1",
            Dtype::U8 => "|u1",
            Dtype::I8 => "|i1",
            Dtype::U16 => "<u2",
            Dtype::I16 => "<i2",
            Dtype::U32 => "<u4",
            Dtype::I32 => "<i4",
            Dtype::U64 => "<u8",
            Dtype::I64 => "<i8",
            Dtype::F16 => "<f2",
            Dtype::F32 => "<f4",
            Dtype::F64 => "<f8",
            Dtype::C64 => "<c8",
            Dtype::C128 => "<c16",
            // Numpy has no such floats. An opaque type opens, keeps the element size and shape, and refuses
            // arithmetic instead of giving wrong numbers; `.view(...)` turns it into the real type.
            Dtype::BF16 => "<V2",
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E8M0 | Dtype::F8E4M3Fnuz | Dtype::F8E5M2Fnuz => "|V1",
            // Several elements share a byte: rows of raw bytes.
            Dtype::F4 | Dtype::F6E2M3 | Dtype::F6E3M2 | Dtype::Ggml(_) => "|u1",
        })
    }

    /// The name in a safetensors header, which is also what `user.nvtier.dtype` says. ggml types keep ggml's names.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bool => "BOOL",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::U16 => "U16",
            Dtype::I16 => "I16",
            Dtype::U32 => "U32",
            Dtype::I32 => "I32",
            Dtype::U64 => "U64",
            Dtype::I64 => "I64",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
            Dtype::C64 => "C64",
            Dtype::C128 => "C128",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::F8E5M2 => "F8_E5M2",
            Dtype::F8E8M0 => "F8_E8M0",
            Dtype::F8E4M3Fnuz => "F8_E4M3FNUZ",
            Dtype::F8E5M2Fnuz => "F8_E5M2FNUZ",
            Dtype::F4 => "F4",
            Dtype::F6E2M3 => "F6_E2M3",
            Dtype::F6E3M2 => "F6_E3M2",
            Dtype::Ggml(t) => t.name,
        }
    }

    /// From the name in a safetensors header.
    pub fn from_safetensors(name: &str) -> Option<Dtype> {
        Some(match name {
            "BOOL" => Dtype::Bool,
            "U8" => Dtype::U8,
            "I8" => Dtype::I8,
            "U16" => Dtype::U16,
            "I16" => Dtype::I16,
            "U32" => Dtype::U32,
            "I32" => Dtype::I32,
            "U64" => Dtype::U64,
            "I64" => Dtype::I64,
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            "F32" => Dtype::F32,
            "F64" => Dtype::F64,
            "C64" => Dtype::C64,
            "F8_E4M3" => Dtype::F8E4M3,
            "F8_E5M2" => Dtype::F8E5M2,
            "F8_E8M0" => Dtype::F8E8M0,
            "F8_E4M3FNUZ" => Dtype::F8E4M3Fnuz,
            "F8_E5M2FNUZ" => Dtype::F8E5M2Fnuz,
            "F4" => Dtype::F4,
            "F6_E2M3" => Dtype::F6E2M3,
            "F6_E3M2" => Dtype::F6E3M2,
            _ => return None,
        })
    }

    /// From the number in a GGUF tensor record (`enum ggml_type`).
    pub fn from_ggml(id: u32) -> Option<Dtype> {
        Some(match id {
            0 => Dtype::F32,
            1 => Dtype::F16,
            24 => Dtype::I8,
            25 => Dtype::I16,
            26 => Dtype::I32,
            27 => Dtype::I64,
            28 => Dtype::F64,
            30 => Dtype::BF16,
            _ => Dtype::Ggml(*QUANTISED.iter().find(|t| t.id == id)?),
        })
    }

    /// From an npy `descr`. Only little-endian and byte-sized types that have a name here.
    pub fn from_npy(descr: &str) -> Option<Dtype> {
        Some(match descr {
            "|b1" | "?" => Dtype::Bool,
            "|u1" | "<u1" => Dtype::U8,
            "|i1" | "<i1" => Dtype::I8,
            "<u2" => Dtype::U16,
            "<i2" => Dtype::I16,
            "<u4" => Dtype::U32,
            "<i4" => Dtype::I32,
            "<u8" => Dtype::U64,
            "<i8" => Dtype::I64,
            "<f2" => Dtype::F16,
            "<f4" => Dtype::F32,
            "<f8" => Dtype::F64,
            "<c8" => Dtype::C64,
            "<c16" => Dtype::C128,
            _ => return None,
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl serde::Serialize for Dtype {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        assert_eq!(Dtype::F32.tensor_bytes(&[]), Some(4));
        assert_eq!(Dtype::F32.tensor_bytes(&[3, 0, 5]), Some(0));
        assert_eq!(Dtype::F32.tensor_bytes(&[1 << 40, 1 << 40]), None);
        assert_eq!(Dtype::U64.tensor_bytes(&[1 << 61]), None);
        assert_eq!(Dtype::F4.tensor_bytes(&[3]), None);
        assert_eq!(Dtype::F4.tensor_bytes(&[2, 4]), Some(4));
        let q4_0 = Dtype::from_ggml(2).unwrap();
        assert_eq!(q4_0.tensor_bytes(&[10, 64]), Some(10 * 2 * 18));
        assert_eq!(q4_0.tensor_bytes(&[10, 65]), None);
        assert_eq!(q4_0.tensor_bytes(&[]), None);
    }

    #[test]
    fn names_go_round() {
        for name in ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"] {
            assert_eq!(Dtype::from_safetensors(name).unwrap().name(), name);
        }
        for name in
            ["F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64"]
        {
            assert_eq!(Dtype::from_safetensors(name).unwrap().name(), name);
        }
        assert_eq!(Dtype::from_safetensors("F128"), None);
        assert_eq!(Dtype::from_ggml(4), None);
        assert_eq!(Dtype::from_ggml(14).unwrap().name(), "Q6_K");
    }
}
