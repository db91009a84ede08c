//! A checkpoint in the layout of a real Llama: configuration, safetensors shards, index; weights from a seeded generator.
//!
//! No framework and no download: names, shapes, types and headers are what `save_pretrained` writes, so everything that
//! opens a checkpoint opens this one. What it says is noise.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::failure::{Failure, Outcome};
use crate::interrupt;

const HIDDEN: u64 = 1024;
const INTERMEDIATE: u64 = 2816;
const HEADS: u64 = 16;
const KV_HEADS: u64 = 8;
const VOCABULARY: u64 = 32_000;
const BYTES_PER_WEIGHT: u64 = 2;

/// What was made.
#[derive(Debug)]
pub struct Checkpoint {
    /// The shards, in order.
    pub shards: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Decoder layers.
    pub layers: u64,
}

struct Tensor {
    name: String,
    shape: Vec<u64>,
}

impl Tensor {
    fn new(name: impl Into<String>, shape: &[u64]) -> Self {
        Self { name: name.into(), shape: shape.to_vec() }
    }

    fn len(&self) -> u64 {
        self.shape.iter().product::<u64>() * BYTES_PER_WEIGHT
    }
}

/// Writes a checkpoint of about `size` bytes into `directory`, which is made.
pub fn write(directory: &Path, size: u64, seed: u64) -> Outcome<Checkpoint> {
    let layers = layers_for(size);
    let tensors = tensors(layers);
    let tensor_bytes: u64 = tensors.iter().map(Tensor::len).sum();
    let shards = split(&tensors, tensor_bytes.div_ceil(3));
    let count = shards.len();
    fs::create_dir(directory)
        .map_err(|error| Failure::io(format!("make {}", directory.display()), &error))?;
    let mut weight_map = Map::new();
    let mut paths = Vec::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
        for tensor in *shard {
            weight_map.insert(tensor.name.clone(), Value::from(name.clone()));
        }
        let path = directory.join(&name);
        write_shard(&path, shard, seed.wrapping_mul(1000).wrapping_add(index as u64))?;
        paths.push(path);
    }
    write_json(directory, "config.json", &config(layers))?;
    write_json(
        directory,
        "generation_config.json",
        &json!({ "_from_model_config": true, "bos_token_id": 1, "eos_token_id": 2 }),
    )?;
    write_json(
        directory,
        "model.safetensors.index.json",
        &json!({ "metadata": { "total_size": tensor_bytes }, "weight_map": weight_map }),
    )?;
    Ok(Checkpoint { shards: paths, tensor_bytes, tensors: tensors.len(), layers })
}

fn config(layers: u64) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HIDDEN / HEADS,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 4096,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": VOCABULARY,
    })
}

fn layer(index: u64) -> Vec<Tensor> {
    let name = |part: &str| format!("model.layers.{index}.{part}.weight");
    let kv = HIDDEN / HEADS * KV_HEADS;
    vec![
        Tensor::new(name("input_layernorm"), &[HIDDEN]),
        Tensor::new(name("mlp.down_proj"), &[HIDDEN, INTERMEDIATE]),
        Tensor::new(name("mlp.gate_proj"), &[INTERMEDIATE, HIDDEN]),
        Tensor::new(name("mlp.up_proj"), &[INTERMEDIATE, HIDDEN]),
        Tensor::new(name("post_attention_layernorm"), &[HIDDEN]),
        Tensor::new(name("self_attn.k_proj"), &[kv, HIDDEN]),
        Tensor::new(name("self_attn.o_proj"), &[HIDDEN, HIDDEN]),
        Tensor::new(name("self_attn.q_proj"), &[HIDDEN, HIDDEN]),
        Tensor::new(name("self_attn.v_proj"), &[kv, HIDDEN]),
    ]
}

fn tensors(layers: u64) -> Vec<Tensor> {
    let mut tensors = vec![Tensor::new("model.embed_tokens.weight", &[VOCABULARY, HIDDEN])];
    tensors.extend((0..layers).flat_map(layer));
    tensors.push(Tensor::new("model.norm.weight", &[HIDDEN]));
    tensors.push(Tensor::new("lm_head.weight", &[VOCABULARY, HIDDEN]));
    tensors
}

/// At least one layer: the smallest checkpoint has some 150 MB, most of it the two vocabulary matrices.
fn layers_for(size: u64) -> u64 {
    let per_layer: u64 = layer(0).iter().map(Tensor::len).sum();
    let fixed: u64 = tensors(0).iter().map(Tensor::len).sum();
    (size.saturating_sub(fixed) / per_layer).max(1)
}

/// Consecutive tensors of at most `limit` bytes together; a larger one is alone.
fn split(tensors: &[Tensor], limit: u64) -> Vec<&[Tensor]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && bytes + tensor.len() > limit {
            shards.push(&tensors[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += tensor.len();
    }
    shards.push(&tensors[start..]);
    shards
}

/// The header: its length, then JSON padded with blanks so that the data starts at a multiple of 8.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.len();
        entries.insert(
            tensor.name.clone(),
            json!({ "dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}

fn write_shard(path: &Path, tensors: &[Tensor], seed: u64) -> Outcome {
    let tried = || format!("write {}", path.display());
    let file = File::create_new(path).map_err(|error| Failure::io(tried(), &error))?;
    let mut out = BufWriter::with_capacity(1 << 20, &file);
    out.write_all(&header(tensors)).map_err(|error| Failure::io(tried(), &error))?;
    let mut weights = Weights(seed);
    let mut block = vec![0; 1 << 20];
    let mut left: u64 = tensors.iter().map(Tensor::len).sum();
    while left > 0 {
        interrupt::check()?;
        let len = left.min(block.len() as u64) as usize;
        weights.fill(&mut block[..len]);
        out.write_all(&block[..len]).map_err(|error| Failure::io(tried(), &error))?;
        left -= len as u64;
    }
    out.flush().map_err(|error| Failure::io(tried(), &error))?;
    drop(out);
    // Only clean pages can be dropped from the page cache, which every cold measurement needs.
    file.sync_all().map_err(|error| Failure::io(tried(), &error))
}

fn write_json(directory: &Path, name: &str, value: &Value) -> Outcome {
    let path = directory.join(name);
    fs::write(&path, format!("{value:#}\n"))
        .map_err(|error| Failure::io(format!("write {}", path.display()), &error))
}

/// bf16 numbers of the size of real weights: sign and mantissa are random, the exponent is one of 8.
struct Weights(u64);

impl Weights {
    fn fill(&mut self, bytes: &mut [u8]) {
        for group in bytes.chunks_mut(8) {
            // SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            // In each of the four: keep sign (bit 15), the low three exponent bits (9 to 7) and mantissa (6 to 0), and
            // make the rest of the exponent 0b01110: exponents 112 to 119, less the bias of 127 that is 2^-15 to 2^-8.
            let four = (z & 0x83ff_83ff_83ff_83ff) | 0x3800_3800_3800_3800;
            group.copy_from_slice(&four.to_le_bytes()[..group.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_a_valid_llama_of_about_the_size_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("m");
        let made = write(&directory, 200 << 20, 7).unwrap();
        assert!((150 << 20..220 << 20).contains(&made.tensor_bytes), "{}", made.tensor_bytes);
        let mut names = Vec::new();
        for shard in &made.shards {
            let bytes = fs::read(shard).unwrap();
            let name = shard.file_name().unwrap().to_str().unwrap();
            let index = engine::tensors::parse(name, bytes.len() as u64, &mut |offset, buffer| {
                let offset = offset as usize;
                buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
                Ok(())
            });
            names.extend(index.unwrap().unwrap().tensors.into_iter().map(|tensor| tensor.name));
        }
        assert_eq!(names.len(), made.tensors);
        assert_eq!(names.len() as u64, 3 + 9 * made.layers);
        let index: Value =
            serde_json::from_slice(&fs::read(directory.join("model.safetensors.index.json")).unwrap())
                .unwrap();
        assert_eq!(index["weight_map"].as_object().unwrap().len(), made.tensors);
        assert_eq!(index["metadata"]["total_size"], made.tensor_bytes);
    }

    #[test]
    fn the_same_seed_gives_the_same_weights_of_a_sensible_size() {
        let (mut a, mut b, mut other) = (vec![0; 4096], vec![0; 4096], vec![0; 4096]);
        Weights(1).fill(&mut a);
        Weights(1).fill(&mut b);
        Weights(2).fill(&mut other);
        assert!(a == b && a != other);
        for two in a.chunks_exact(2) {
            let value = f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16);
            assert!((2f32.powi(-15)..2f32.powi(-7)).contains(&value.abs()), "{value}");
        }
    }
}
