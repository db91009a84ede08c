//! A path -> a model: `config.json`, a snapshot directory, safetensors and GGUF files. Headers are read, never data.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::tensors::{self, TensorIndex};
use serde_json::Value;

use super::{Cache, Exactness, Layer, Linear, Model, Stored, config};

/// The longest configuration that is read.
const CONFIG_MAX: u64 = 16 << 20;

/// What a path says about a model. `Ok(None)`: there is no such path.
///
/// Errors, in words: it cannot be read, or holds no model.
pub fn from_path(path: &Path) -> Result<Option<Model>, String> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("look at {}: {error}", path.display())),
    };
    let model = if metadata.is_dir() {
        directory(path)
    } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        read_config(path)
    } else {
        let beside = path.parent().map(|folder| folder.join("config.json")).filter(|file| file.is_file());
        weights(path, std::slice::from_ref(&path.to_path_buf()), beside.as_deref())
    };
    model.map(Some)
}

fn named(path: &Path) -> String {
    let path = if path.file_name().is_some_and(|name| name == "config.json") {
        path.parent().filter(|parent| parent.file_name().is_some()).unwrap_or(path)
    } else {
        path
    };
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn read_config(path: &Path) -> Result<Model, String> {
    let tried = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let length = fs::metadata(path).map_err(|error| tried(&error))?.len();
    if length > CONFIG_MAX {
        return Err(tried(&format!("{length} bytes are too long for a configuration")));
    }
    let text = fs::read(path).map_err(|error| tried(&error))?;
    let value: Value =
        serde_json::from_slice(&text).map_err(|error| tried(&format!("it is not JSON: {error}")))?;
    config::from_config(&named(path), &path.display().to_string(), &value).map_err(|error| tried(&error))
}

fn directory(path: &Path) -> Result<Model, String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .map_err(|error| format!("list {}: {error}", path.display()))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let with = |extension: &str| -> Vec<PathBuf> {
        names.iter().filter(|name| name.ends_with(extension)).map(|name| path.join(name)).collect()
    };
    let config = path.join("config.json");
    let config = config.is_file().then_some(config);
    let mut safetensors = with(".safetensors");
    // Some repositories hold the same weights once more in their author's own layout.
    let indexed = listed(path)?;
    if !indexed.is_empty() {
        safetensors = indexed;
    } else if safetensors.iter().any(|file| named(file).starts_with("model")) {
        safetensors.retain(|file| named(file).starts_with("model"));
    }
    if !safetensors.is_empty() {
        return weights(path, &safetensors, config.as_deref());
    }
    if let Some(config) = &config {
        return read_config(config);
    }
    match with(".gguf") {
        files if files.is_empty() => {
            Err(format!("{} holds neither a config.json nor safetensors or GGUF files", path.display()))
        }
        // One model in several quantizations lies side by side; one model in several parts says so in their names.
        files if files.len() > 1 && !files.iter().all(|file| named(file).contains("-of-")) => Err(format!(
            "{} holds {} GGUF files: name one of them, such as {}",
            path.display(),
            files.len(),
            files[0].display()
        )),
        files => weights(path, &files, None),
    }
}

/// The files that `model.safetensors.index.json` names; none where there is no such file.
fn listed(path: &Path) -> Result<Vec<PathBuf>, String> {
    let index = path.join("model.safetensors.index.json");
    let Ok(text) = fs::read(&index) else { return Ok(Vec::new()) };
    let value: Value = serde_json::from_slice(&text)
        .map_err(|error| format!("{}: it is not JSON: {error}", index.display()))?;
    let mut files: Vec<String> = value["weight_map"]
        .as_object()
        .into_iter()
        .flat_map(|map| map.values())
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    files.sort();
    files.dedup();
    match files.iter().find(|name| name.contains('/')) {
        Some(name) => Err(format!("{}: `{name}` is not the name of a file beside it", index.display())),
        None => Ok(files.into_iter().map(|name| path.join(name)).collect()),
    }
}

fn header(path: &Path) -> Result<TensorIndex, String> {
    let tried = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let file = File::open(path).map_err(|error| tried(&error))?;
    let size = file.metadata().map_err(|error| tried(&error))?.len();
    let mut read_at = |offset: u64, buffer: &mut [u8]| {
        file.read_exact_at(buffer, offset)
            .map_err(|error| engine::Error::io(format!("read {}", path.display()), error))
    };
    match tensors::parse(&named(path), size, &mut read_at) {
        Ok(Some(index)) => Ok(index),
        Ok(None) if size == 0 => Err(tried(&"it is empty")),
        Ok(None) => Err(tried(&"it is neither a config.json nor a safetensors or GGUF file")),
        Err(error) => Err(describe(&error)),
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A model from the headers of its files, with the structure from its configuration where there is one.
fn weights(path: &Path, files: &[PathBuf], config: Option<&Path>) -> Result<Model, String> {
    let indices = files.iter().map(|file| header(file)).collect::<Result<Vec<_>, _>>()?;
    let counted = count(&indices, files.len() as u64);
    let mut model = match config {
        Some(config) => {
            let mut model = read_config(config)?;
            model.name = named(path);
            // A file or two of a snapshot are not the model.
            let (whole, here) = (model.parameters(), counted.parameters);
            let quantized = counted.stored.dtypes.iter().any(|dtype| !is_plain(dtype));
            if !quantized && here * 10 < whole * 9 {
                return Err(format!(
                    "{} holds {here} parameters of the {whole} that {} describes: give the directory, with all files",
                    path.display(),
                    config.display()
                ));
            }
            model
        }
        None => structure(path, &indices, &counted)?,
    };
    model.source = format!("{} ({} files)", path.display(), files.len());
    model.stored = Some(counted.stored);
    model.checked()
}

fn is_plain(dtype: &str) -> bool {
    matches!(dtype, "F32" | "F16" | "BF16" | "F64")
}

struct Counted {
    stored: Stored,
    parameters: u64,
    embedding: u64,
    head: u64,
    small: u64,
    layers: BTreeMap<u64, Layer>,
    hidden: u64,
    vocabulary: u64,
}

/// The number behind `layers.`, `h.` or `blk.` in a tensor's name.
fn layer_of(name: &str) -> Option<u64> {
    let mut parts = name.split('.');
    while let Some(part) = parts.next() {
        if matches!(part, "layers" | "h" | "blk" | "blocks" | "layer") {
            return parts.next()?.parse().ok();
        }
    }
    None
}

fn count(indices: &[TensorIndex], files: u64) -> Counted {
    let mut dtypes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut all = Counted {
        stored: Stored {
            bytes: 0,
            expert_bytes: 0,
            embedding_bytes: 0,
            dtypes: Vec::new(),
            tensors: 0,
            files,
        },
        parameters: 0,
        embedding: 0,
        head: 0,
        small: 0,
        layers: BTreeMap::new(),
        hidden: 0,
        vocabulary: 0,
    };
    for tensor in indices.iter().flat_map(|index| &index.tensors) {
        let elements = tensor.shape.iter().fold(1u64, |product, length| product.saturating_mul(*length));
        let name = tensor.name.as_str();
        all.stored.bytes += tensor.len();
        all.stored.tensors += 1;
        all.parameters += elements;
        *dtypes.entry(tensor.dtype.name()).or_default() += tensor.len();
        let is = |words: &[&str]| words.iter().any(|word| name.contains(word));
        let expert = is(&[".experts.", "_exps."]);
        if expert {
            all.stored.expert_bytes += tensor.len();
        }
        match layer_of(name) {
            None if is(&["embed_tokens.weight", "token_embd.weight", "wte.weight", "embed_in.weight"]) => {
                all.embedding += elements;
                all.stored.embedding_bytes += tensor.len();
                if let [vocabulary, hidden] = tensor.shape[..] {
                    (all.vocabulary, all.hidden) = (vocabulary, hidden);
                }
            }
            None if is(&["lm_head.weight", "embed_out.weight"]) || name == "output.weight" => {
                all.head += elements
            }
            None => all.small += elements,
            Some(index) => {
                let layer = all.layers.entry(index).or_default();
                match tensor.shape[..] {
                    _ if expert => {
                        let experts = layer.experts.get_or_insert_default();
                        // Packed: one tensor for all. Single: the highest number tells how many.
                        experts.count = experts.count.max(expert_count(name, &tensor.shape));
                        experts.each += elements; // the sum, until all are known
                    }
                    [outputs, inputs] if name.ends_with(".weight") => {
                        let short = name.rsplit('.').nth(1).unwrap_or(name).to_owned();
                        layer.linears.push(Linear { name: short, inputs, outputs });
                    }
                    _ => layer.small += elements,
                }
            }
        }
    }
    for layer in all.layers.values_mut() {
        if let Some(experts) = &mut layer.experts {
            experts.each /= experts.count.max(1);
            experts.used = experts.count;
        }
    }
    let mut dtypes: Vec<(&str, u64)> = dtypes.into_iter().collect();
    dtypes.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    all.stored.dtypes = dtypes.into_iter().map(|(name, _)| name.to_owned()).collect();
    all
}

fn expert_count(name: &str, shape: &[u64]) -> u64 {
    let after = name.split(".experts.").nth(1).and_then(|rest| rest.split('.').next()?.parse::<u64>().ok());
    match after {
        Some(index) => index.saturating_add(1),
        None => shape.first().copied().unwrap_or(0),
    }
}

/// The structure that the headers alone tell.
fn structure(path: &Path, indices: &[TensorIndex], counted: &Counted) -> Result<Model, String> {
    let text = |key: &str| indices.iter().find_map(|index| index.metadata.get(key));
    let architecture = text("general.architecture").cloned();
    let number =
        |key: &str| -> Option<u64> { text(&format!("{}.{key}", architecture.as_deref()?))?.parse().ok() };
    let mut layers: Vec<Layer> = Vec::with_capacity(counted.layers.len());
    for (index, layer) in &counted.layers {
        let mut layer = layer.clone();
        let rows = |names: &[&str]| {
            layer
                .linears
                .iter()
                .find(|linear| names.contains(&linear.name.as_str()))
                .map(|linear| linear.outputs)
        };
        let latent = rows(&["attn_kv_a_mqa", "kv_a_proj_with_mqa"]);
        let keys = rows(&["k_proj", "attn_k"]);
        let values = rows(&["v_proj", "attn_v"]);
        let queries = rows(&["q_proj", "attn_q"]);
        let heads = number("attention.head_count");
        layer.cache = match (latent, keys, values) {
            (Some(latent), ..) => Cache { keys: latent, values: 0, window: None, latent: Some(latent) },
            (None, Some(keys), Some(values)) => Cache { keys, values, window: None, latent: None },
            // One matrix for all three: only the metadata tells them apart.
            _ => match (number("attention.head_count_kv").or(heads), heads) {
                (Some(kv), Some(heads)) if heads > 0 => {
                    let width = number("attention.key_length").unwrap_or(counted.hidden / heads);
                    let value = number("attention.value_length").unwrap_or(width);
                    Cache {
                        keys: kv.saturating_mul(width),
                        values: kv.saturating_mul(value),
                        window: None,
                        latent: None,
                    }
                }
                _ => {
                    return Err(format!(
                        "{}: layer {index} does not show what it keeps for a token; put its config.json beside it",
                        path.display()
                    ));
                }
            },
        };
        layer.attention_width = 2 * queries.unwrap_or(layer.cache.keys);
        if let (Some(experts), Some(used)) = (&mut layer.experts, number("expert_used_count")) {
            experts.used = used.min(experts.count);
        }
        layers.push(layer);
    }
    if layers.is_empty() {
        return Err(format!("{} holds no layers of a language model", path.display()));
    }
    let mut notes = Vec::new();
    if let Some(window) = number("attention.sliding_window").filter(|window| *window > 0) {
        notes.push(format!(
            "some layers keep only {window} tokens; the file does not say which, so all are counted as keeping everything"
        ));
    }
    if layers.iter().any(|layer| layer.experts.is_some()) && number("expert_used_count").is_none() {
        notes.push("how many experts a token visits is not in the file: all are counted".into());
    }
    Ok(Model {
        name: named(path),
        source: String::new(),
        architecture: architecture.clone().unwrap_or_else(|| "from its tensors".into()),
        exactness: Exactness::Files,
        hidden: counted.hidden,
        vocabulary: counted.vocabulary,
        max_context: number("context_length"),
        embedding: counted.embedding,
        head: counted.head,
        small: counted.small,
        layers,
        precision: None,
        stored: None,
        notes,
    })
}
