//! `config.json` of transformers -> a model.

use serde_json::Value;

use super::families::{self, Bias, Family, Mlp, MoeLayers, QkNorm, Shared, Windows};
use super::{Cache, Exactness, Experts, Layer, Linear, Model};

/// No width or count in a configuration is larger: products of three still fit 64 bits.
const WIDTH_MAX: u64 = 1 << 20;
/// The same for counts of tokens.
const TOKENS_MAX: u64 = 1 << 24;
const LAYERS_MAX: u64 = 4096;

/// A configuration, asked by key.
struct Config<'a>(&'a Value);

impl Config<'_> {
    /// A whole number; `None` where it is not given or null. A number that no model has is an error.
    fn number(&self, key: &str) -> Result<Option<u64>, String> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let tokens =
                    ["vocab_size", "max_position_embeddings", "n_positions", "seq_length", "sliding_window"];
                let most = if tokens.contains(&key) { TOKENS_MAX } else { WIDTH_MAX };
                match value.as_u64() {
                    Some(number) if number <= most => Ok(Some(number)),
                    _ => Err(format!("`{key}` is {value}; a whole number of at most {most} is expected")),
                }
            }
        }
    }

    fn first(&self, keys: &[&str]) -> Result<Option<u64>, String> {
        for key in keys {
            if let Some(number) = self.number(key)? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    fn needed(&self, keys: &[&str]) -> Result<u64, String> {
        match self.first(keys)? {
            Some(0) => Err(format!("`{}` is 0", keys[0])),
            Some(number) => Ok(number),
            None => Err(format!("`{}` is missing", keys[0])),
        }
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    fn has(&self, bias: Bias) -> bool {
        match bias {
            Bias::Never => false,
            Bias::Always => true,
            Bias::Key(key, default) => self.flag(key, default),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }
}

/// Reads a configuration. `name`: what to call the model.
///
/// Errors, in words: a key is missing or cannot be right; the text is not that of a decoder-only language model.
pub fn from_config(name: &str, source: &str, config: &Value) -> Result<Model, String> {
    if !config.is_object() {
        return Err("it is not a JSON object".into());
    }
    let mut notes = Vec::new();
    let inner = match config.get("text_config").filter(|inner| inner.is_object()) {
        Some(inner) => {
            notes.push("only the language model is counted, not its encoders of images or sound".to_owned());
            inner
        }
        None => config,
    };
    let (config_of, outer) = (Config(inner), Config(config));
    let model_type = config_of.text("model_type").or(outer.text("model_type")).unwrap_or("");
    if config_of.flag("is_encoder_decoder", false) {
        return Err(format!(
            "`{model_type}` has an encoder and a decoder; models with a decoder only are counted"
        ));
    }
    let (family, exactness) = match families::family(model_type) {
        Some(family) => (family, Exactness::Exact),
        None => {
            notes.push(match model_type {
                "" => "`model_type` is missing: counted as if it were built like Llama".to_owned(),
                other => format!(
                    "the architecture `{other}` is not known here: counted as if it were built like Llama"
                ),
            });
            (&families::LLAMA, Exactness::LikeLlama)
        }
    };
    let mut model = build(&config_of, family)?;
    model.name = name.to_owned();
    model.source = source.to_owned();
    model.architecture = if model_type.is_empty() { "unknown".into() } else { model_type.to_owned() };
    model.exactness = exactness;
    model.precision = precision(config, &mut notes).or_else(|| precision(inner, &mut notes));
    model.notes = notes;
    model.checked()
}

/// What the configuration says about how weights are stored.
fn precision(config: &Value, notes: &mut Vec<String>) -> Option<String> {
    if let Some(quantization) = config.get("quantization_config").filter(|value| value.is_object()) {
        let text = |key: &str| quantization.get(key).and_then(Value::as_str).unwrap_or("");
        let bits = quantization.get("bits").and_then(Value::as_u64);
        let found = match (text("quant_method"), bits) {
            ("fp8" | "fbgemm_fp8", _) => Some("fp8"),
            ("mxfp4", _) => Some("mxfp4"),
            ("awq" | "gptq", Some(4) | None) => Some("int4-g128"),
            ("awq" | "gptq", Some(8)) => Some("int8"),
            ("bitsandbytes", _) if Config(quantization).flag("load_in_8bit", false) => Some("int8"),
            ("bitsandbytes", _) => Some("nf4"),
            ("compressed-tensors", _) if text("format").contains("pack") => Some("int4-g128"),
            ("compressed-tensors", _) if text("format").contains("float") => Some("fp8"),
            _ => None,
        };
        match found {
            Some(found) => return Some(found.into()),
            None => notes.push(format!(
                "the quantization `{}` of its configuration is not known here: give --precision",
                text("quant_method")
            )),
        }
    }
    let config = Config(config);
    match config.text("dtype").or(config.text("torch_dtype"))?.trim_start_matches("torch.") {
        "float32" => Some("f32".into()),
        "float16" => Some("f16".into()),
        "bfloat16" => Some("bf16".into()),
        _ => None,
    }
}

/// Widths of attention.
struct Heads {
    queries: u64,
    keys: u64,
    width: u64,
}

fn build(config: &Config<'_>, family: &Family) -> Result<Model, String> {
    let hidden = config.needed(&["hidden_size", "n_embd", "d_model"])?;
    let count = config.needed(&["num_hidden_layers", "n_layer", "n_layers"])?;
    if count > LAYERS_MAX {
        return Err(format!("{count} layers are more than any model has"));
    }
    let queries = config.needed(&["num_attention_heads", "n_head", "n_heads"])?;
    let keys = config.first(&["num_key_value_heads"])?.filter(|heads| *heads > 0).unwrap_or(queries);
    let width = match config.number("head_dim")?.filter(|width| *width > 0) {
        Some(width) => width,
        None => match family.head_dim {
            Some(width) if !family.latent => width,
            _ => hidden / queries,
        },
    };
    let heads = Heads { queries, keys, width };
    let vocabulary = config.needed(&["vocab_size"])?;
    let tied = config.flag("tie_word_embeddings", family.tied);
    let windows = windows(config, family, count)?;
    let mut layers = Vec::with_capacity(count as usize);
    for (index, window) in (0..count).zip(windows) {
        let mut layer = if family.latent {
            latent_attention(config, hidden, &heads)?
        } else {
            attention(config, family, hidden, &heads)
        };
        layer.cache.window = window;
        layer.small += family.norms * family.norm_width * hidden;
        feed_forward(config, family, hidden, index, &mut layer)?;
        layers.push(layer);
    }
    Ok(Model {
        name: String::new(),
        source: String::new(),
        architecture: String::new(),
        exactness: Exactness::Exact,
        hidden,
        vocabulary,
        max_context: config.first(&["max_position_embeddings", "n_positions", "seq_length"])?,
        embedding: vocabulary * hidden,
        head: if tied { 0 } else { vocabulary * hidden },
        small: family.norm_width * hidden + if family.head_bias { vocabulary } else { 0 },
        layers,
        precision: None,
        stored: None,
        notes: Vec::new(),
    })
}

/// The window of each layer.
fn windows(config: &Config<'_>, family: &Family, layers: u64) -> Result<Vec<Option<u64>>, String> {
    let window = config.number("sliding_window")?.filter(|window| *window > 0);
    if let Some(types) = config.0.get("layer_types").and_then(Value::as_array) {
        if types.len() as u64 != layers {
            return Err(format!("`layer_types` names {} layers, `num_hidden_layers` {layers}", types.len()));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(window),
                _ => Err(format!("a layer of the type {kind} is not known here: only attention is counted")),
            })
            .collect();
    }
    let from = config.number("max_window_layers")?.unwrap_or(28);
    let each = config.first(&["sliding_window_pattern", "_sliding_window_pattern"])?.filter(|each| *each > 0);
    let is_windowed = |index: u64| match family.windows {
        Windows::Never => false,
        Windows::All => true,
        Windows::AllButEach(default) => !(index + 1).is_multiple_of(each.unwrap_or(default)),
        Windows::QwenLike => config.flag("use_sliding_window", false) && index >= from,
    };
    Ok((0..layers).map(|index| window.filter(|_| is_windowed(index))).collect())
}

fn linear(name: &str, inputs: u64, outputs: u64) -> Linear {
    Linear { name: name.to_owned(), inputs, outputs }
}

fn attention(config: &Config<'_>, family: &Family, hidden: u64, heads: &Heads) -> Layer {
    let (queries, keys) = (heads.queries * heads.width, heads.keys * heads.width);
    let mut small = 0;
    if config.has(family.qkv) {
        small += queries + 2 * keys;
    }
    if config.has(family.out) {
        small += hidden;
    }
    small += match family.qk_norm {
        QkNorm::PerHead => 2 * heads.width,
        QkNorm::AllHeads => queries + keys,
        QkNorm::Key(key, all) if config.flag(key, false) => {
            if all {
                queries + keys
            } else {
                2 * heads.width
            }
        }
        QkNorm::None | QkNorm::Key(..) => 0,
    };
    if family.sinks {
        small += heads.queries;
    }
    Layer {
        linears: vec![
            linear("q_proj", hidden, queries),
            linear("k_proj", hidden, keys),
            linear("v_proj", hidden, keys),
            linear("o_proj", queries, hidden),
        ],
        experts: None,
        small,
        cache: Cache { keys, values: keys, window: None, latent: None },
        attention_width: 2 * queries,
    }
}

/// Multi-head latent attention of DeepSeek: keys and values are made from one short vector a token.
fn latent_attention(config: &Config<'_>, hidden: u64, heads: &Heads) -> Result<Layer, String> {
    let short = config.needed(&["kv_lora_rank"])?;
    let (rope, plain) = (config.needed(&["qk_rope_head_dim"])?, config.needed(&["qk_nope_head_dim"])?);
    let value = config.needed(&["v_head_dim"])?;
    let queries = heads.queries * (rope + plain);
    let values = heads.queries * value;
    let mut linears = Vec::new();
    let mut small = short;
    match config.number("q_lora_rank")?.filter(|rank| *rank > 0) {
        Some(rank) => {
            linears.extend([linear("q_a_proj", hidden, rank), linear("q_b_proj", rank, queries)]);
            small += rank;
            if config.flag("attention_bias", false) {
                small += rank;
            }
        }
        None => linears.push(linear("q_proj", hidden, queries)),
    }
    linears.extend([
        linear("kv_a_proj_with_mqa", hidden, short + rope),
        linear("kv_b_proj", short, heads.queries * (plain + value)),
        linear("o_proj", values, hidden),
    ]);
    if config.flag("attention_bias", false) {
        small += short + rope + hidden;
    }
    Ok(Layer {
        linears,
        experts: None,
        small,
        cache: Cache { keys: queries, values, window: None, latent: Some(short + rope) },
        attention_width: queries + values,
    })
}

fn feed_forward(
    config: &Config<'_>,
    family: &Family,
    hidden: u64,
    index: u64,
    layer: &mut Layer,
) -> Result<(), String> {
    if let Some(moe) = &family.moe {
        let count = config.first(moe.count.0)?.unwrap_or(moe.count.1);
        let sparse = count > 0
            && match moe.layers {
                MoeLayers::All => true,
                MoeLayers::AfterFirst(key) => index >= config.number(key)?.unwrap_or(1),
                MoeLayers::Sparse => {
                    let step = config.number("decoder_sparse_step")?.filter(|step| *step > 0).unwrap_or(1);
                    let dense = config.0.get("mlp_only_layers").and_then(Value::as_array);
                    let is_dense =
                        dense.is_some_and(|list| list.iter().any(|item| item.as_u64() == Some(index)));
                    (index + 1).is_multiple_of(step) && !is_dense
                }
            };
        if sparse {
            let width = config.needed(&[moe.width])?;
            let mut each = 3 * hidden * width;
            layer.linears.push(linear("router", hidden, count));
            if moe.biased {
                each += 2 * width + hidden;
                layer.small += count;
            }
            let used = config.first(moe.used.0)?.unwrap_or(moe.used.1);
            layer.experts = Some(Experts { count, used, each });
            let shared = match moe.shared {
                Shared::None => 0,
                Shared::Times(key) => config.number(key)?.unwrap_or(0) * width,
                Shared::Gated(key) => {
                    layer.linears.push(linear("shared_expert_gate", hidden, 1));
                    config.needed(&[key])?
                }
            };
            if shared > 0 {
                gated(hidden, shared, layer);
            }
            return Ok(());
        }
    }
    let width = match config.first(&["intermediate_size", "n_inner"])? {
        Some(width) if width > 0 => width,
        _ => 4 * hidden,
    };
    match family.mlp {
        Mlp::Gated => gated(hidden, width, layer),
        Mlp::Plain => {
            layer.linears.extend([linear("up_proj", hidden, width), linear("down_proj", width, hidden)]);
        }
    }
    if config.has(family.mlp_bias) {
        layer.small += hidden + if family.mlp == Mlp::Gated { 2 * width } else { width };
    }
    Ok(())
}

fn gated(hidden: u64, width: u64, layer: &mut Layer) {
    layer.linears.extend([
        linear("gate_proj", hidden, width),
        linear("up_proj", hidden, width),
        linear("down_proj", width, hidden),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000,
        })
    }

    #[test]
    fn a_small_llama_by_hand() {
        let model = from_config("m", "test", &llama()).unwrap();
        let attention = 64 * 64 * 2 + 64 * 32 * 2;
        let layer = attention + 3 * 64 * 128 + 2 * 64;
        assert_eq!(model.parameters(), 2 * layer + 2 * 64_000 + 64);
        assert_eq!(model.cache_elements(true), 2 * 2 * 32);
        assert_eq!(model.active(), 2 * layer + 64_000 + 64);
    }

    #[test]
    fn what_cannot_be_right_is_named() {
        let with = |key: &str, value: Value| {
            let mut config = llama();
            config[key] = value;
            from_config("m", "test", &config).unwrap_err()
        };
        assert!(with("hidden_size", json!(null)).contains("`hidden_size` is missing"));
        assert!(with("hidden_size", json!(0)).contains("`hidden_size` is 0"));
        assert!(with("vocab_size", json!(-5)).contains("`vocab_size` is -5"));
        assert!(with("vocab_size", json!(1u64 << 40)).contains("at most"));
        assert!(with("num_hidden_layers", json!(100_000)).contains("more than any model"));
        assert!(with("layer_types", json!(["full_attention"])).contains("names 1 layers"));
        assert!(with("layer_types", json!(["linear_attention", "full_attention"])).contains("not known"));
        assert!(with("is_encoder_decoder", json!(true)).contains("encoder"));
        assert!(from_config("m", "test", &json!([1])).unwrap_err().contains("not a JSON object"));
    }

    #[test]
    fn an_unknown_architecture_is_told() {
        let mut config = llama();
        config["model_type"] = json!("newest");
        let model = from_config("m", "test", &config).unwrap();
        assert_eq!(model.exactness, Exactness::LikeLlama);
        assert!(model.notes[0].contains("`newest`"));
    }

    #[test]
    fn stored_precisions() {
        let mut config = llama();
        config["torch_dtype"] = json!("bfloat16");
        assert_eq!(from_config("m", "t", &config).unwrap().precision.as_deref(), Some("bf16"));
        for (quantization, name) in [
            (json!({"quant_method": "mxfp4"}), "mxfp4"),
            (json!({"quant_method": "awq", "bits": 4}), "int4-g128"),
            (json!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "nf4"),
            (json!({"quant_method": "fp8", "weight_block_size": [128, 128]}), "fp8"),
        ] {
            config["quantization_config"] = quantization;
            assert_eq!(from_config("m", "t", &config).unwrap().precision.as_deref(), Some(name));
        }
    }
}
