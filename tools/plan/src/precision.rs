//! How many bytes an element takes, as exact fractions.

use crate::model::Model;

/// Bytes of elements: `bytes` for each `block` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes of a block.
    pub bytes: u64,
    /// Elements in a block.
    pub block: u64,
}

impl Rate {
    const fn of(bytes: u64, block: u64) -> Rate {
        Rate { bytes, block }
    }

    /// Bytes of so many elements, rounded up.
    pub fn bytes_of(self, elements: u64) -> u64 {
        let bytes = (u128::from(elements) * u128::from(self.bytes)).div_ceil(u128::from(self.block));
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// A way to store weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// As it is written on the command line.
    pub name: &'static str,
    /// Matrices of attention and of dense feed-forward parts.
    pub linear: Rate,
    /// Routed experts.
    pub experts: Rate,
    /// Token embedding and output matrix.
    pub ends: Rate,
    /// Norms and biases.
    pub small: Rate,
    /// What it is.
    pub what: &'static str,
}

const BYTES_4: Rate = Rate::of(4, 1);
const BYTES_2: Rate = Rate::of(2, 1);
const BYTE: Rate = Rate::of(1, 1);

const fn even(name: &'static str, rate: Rate, small: Rate, what: &'static str) -> Precision {
    Precision { name, linear: rate, experts: rate, ends: rate, small, what }
}

/// Layers in few bits, the two ends of the model in 16.
const fn layers(name: &'static str, rate: Rate, what: &'static str) -> Precision {
    Precision { name, linear: rate, experts: rate, ends: BYTES_2, small: BYTES_2, what }
}

/// All that are known.
pub const PRECISIONS: &[Precision] = &[
    even("f32", BYTES_4, BYTES_4, "32-bit floats"),
    even("bf16", BYTES_2, BYTES_2, "bfloat16"),
    even("f16", BYTES_2, BYTES_2, "16-bit floats"),
    layers("fp8", BYTE, "8-bit floats, embedding and output in 16 bits"),
    layers("int8", BYTE, "8-bit integers, embedding and output in 16 bits"),
    layers(
        "nf4",
        Rate::of(36, 64),
        "4 bits and a 32-bit scale for each 64, as bitsandbytes has it; ends in 16 bits",
    ),
    layers(
        "int4-g128",
        Rate::of(133, 256),
        "4 bits, a 16-bit scale and a 4-bit zero for each 128, as AWQ and GPTQ have it; ends in 16 bits",
    ),
    Precision {
        name: "mxfp4",
        linear: BYTES_2,
        experts: Rate::of(17, 32),
        ends: BYTES_2,
        small: BYTES_2,
        what: "experts in 4-bit floats with an 8-bit scale for each 32, all else in 16 bits, as gpt-oss has it",
    },
    even("q8_0", Rate::of(34, 32), BYTES_4, "ggml's Q8_0 throughout"),
    even("q6_k", Rate::of(210, 256), BYTES_4, "ggml's Q6_K throughout"),
    even("q5_k", Rate::of(176, 256), BYTES_4, "ggml's Q5_K throughout"),
    even("q4_k", Rate::of(144, 256), BYTES_4, "ggml's Q4_K throughout (files named Q4_K_M mix it with Q6_K)"),
    even("q4_0", Rate::of(18, 32), BYTES_4, "ggml's Q4_0 throughout"),
    even("q3_k", Rate::of(110, 256), BYTES_4, "ggml's Q3_K throughout"),
    even("q2_k", Rate::of(84, 256), BYTES_4, "ggml's Q2_K throughout"),
    even("q4", Rate::of(1, 2), Rate::of(1, 2), "4 bits and nothing else: no format does it, tables count so"),
];

/// Ways to store keys and values.
pub const CACHES: &[(&str, Rate)] = &[
    ("f32", BYTES_4),
    ("bf16", BYTES_2),
    ("f16", BYTES_2),
    ("fp8", BYTE),
    ("q8_0", Rate::of(34, 32)),
    ("q4_0", Rate::of(18, 32)),
    ("q4", Rate::of(1, 2)),
];

fn spelled(name: &str) -> String {
    let name = name.to_lowercase();
    match name.as_str() {
        "fp32" | "float32" => "f32".into(),
        "fp16" | "float16" => "f16".into(),
        "bfloat16" => "bf16".into(),
        "f8" => "fp8".into(),
        "awq" | "gptq" | "int4" => "int4-g128".into(),
        "q8" => "q8_0".into(),
        _ => name,
    }
}

/// A precision by name.
pub fn precision(name: &str) -> Option<Precision> {
    let name = spelled(name);
    PRECISIONS.iter().find(|precision| precision.name == name).copied()
}

/// A precision of the cache by name.
pub fn cache(name: &str) -> Option<(&'static str, Rate)> {
    let name = spelled(name);
    CACHES.iter().find(|(known, _)| *known == name).copied()
}

/// Bytes of a model's weights by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Embedding, layers without routed experts, head, norms.
    pub dense: u64,
    /// Routed experts.
    pub experts: u64,
    /// Of the dense ones: an embedding that is looked up and not multiplied with.
    pub lookup: u64,
}

impl WeightBytes {
    /// All of them.
    pub fn total(self) -> u64 {
        self.dense.saturating_add(self.experts)
    }
}

/// Bytes of a model's weights. `None` as precision: as they are stored in its files.
pub fn weight_bytes(model: &Model, precision: Option<&Precision>) -> WeightBytes {
    if let (None, Some(stored)) = (precision, &model.stored) {
        return WeightBytes {
            dense: stored.bytes - stored.expert_bytes,
            experts: stored.expert_bytes,
            lookup: if model.tied() { 0 } else { stored.embedding_bytes },
        };
    }
    let precision = precision.copied().unwrap_or(PRECISIONS[1]);
    let linear: u64 = model.layers.iter().map(|layer| layer.dense() - layer.small).sum();
    let small: u64 = model.layers.iter().map(|layer| layer.small).sum::<u64>() + model.small;
    WeightBytes {
        dense: precision.linear.bytes_of(linear)
            + precision.ends.bytes_of(model.embedding + model.head)
            + precision.small.bytes_of(small),
        experts: precision.experts.bytes_of(model.routed()),
        lookup: if model.tied() { 0 } else { precision.ends.bytes_of(model.embedding) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::known;

    #[test]
    fn bytes_are_exact() {
        let model = known("Llama-3.1-8B").unwrap();
        let bytes = |name: &str| weight_bytes(&model, precision(name).as_ref()).total();
        assert_eq!(bytes("bf16"), 2 * 8_030_261_248);
        assert_eq!(bytes("FP32"), 4 * 8_030_261_248);
        // All matrices in blocks of 32 elements and 18 bytes; 65 norms of 4096 in f32.
        assert_eq!(bytes("q4_0"), (8_030_261_248 - 65 * 4096) / 32 * 18 + 65 * 4096 * 4);
        // 6,979,321,856 elements of matrices in layers, 2 x 525,336,576 at the ends.
        assert_eq!(bytes("fp8"), 6_979_321_856 + 2 * (2 * 525_336_576 + 65 * 4096));
    }

    #[test]
    fn names_and_what_they_mean() {
        for (index, one) in PRECISIONS.iter().enumerate() {
            assert_eq!(precision(one.name).as_ref(), Some(one));
            assert!(PRECISIONS[..index].iter().all(|other| other.name != one.name));
        }
        assert_eq!(precision("awq").unwrap().name, "int4-g128");
        assert_eq!(precision("q9"), None);
        assert_eq!(cache("FP16").unwrap().0, "f16");
        assert_eq!(Rate::of(18, 32).bytes_of(33), 19);
        assert_eq!(Rate::of(4, 1).bytes_of(u64::MAX), u64::MAX);
    }
}
