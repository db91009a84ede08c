//! What a model is made of: how many parameters of which kind, and what a token leaves in the KV cache.

mod config;
mod families;
mod files;
mod known;

use serde::Serialize;

pub use config::from_config;
pub use files::from_path;
pub use known::{known, names as known_names};

/// How well the numbers of a model are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exactness {
    /// Counted by the rules of its architecture.
    Exact,
    /// Counted from the shapes in the file's header.
    Files,
    /// The architecture is not known here: counted as if it were built like Llama.
    LikeLlama,
}

/// A matrix that every token is multiplied with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// `q_proj`, `down_proj`, ...: the last part of its name.
    pub name: String,
    /// Columns.
    pub inputs: u64,
    /// Rows.
    pub outputs: u64,
}

/// The routed experts of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: u64,
    /// How many a token visits.
    pub used: u64,
    /// Parameters of one, its biases included.
    pub each: u64,
}

/// What a token leaves in the KV cache of a layer, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Keys, as transformers keeps them.
    pub keys: u64,
    /// Values likewise.
    pub values: u64,
    /// Only so many tokens are kept (sliding window).
    pub window: Option<u64>,
    /// Elements where keys and values are kept as one latent vector (MLA, as inference engines keep it).
    pub latent: Option<u64>,
}

impl Cache {
    /// Elements of a token; with `latent`, in the latent form where the layer has one.
    pub fn elements(&self, latent: bool) -> u64 {
        match self.latent {
            Some(elements) if latent => elements,
            _ => self.keys + self.values,
        }
    }

    /// Tokens that are kept of a context.
    pub fn kept(&self, context: u64) -> u64 {
        self.window.map_or(context, |window| window.min(context))
    }
}

/// One layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Matrices of attention and of the dense (or shared) feed-forward part, and the router.
    pub linears: Vec<Linear>,
    /// Routed experts.
    pub experts: Option<Experts>,
    /// Norms, biases, sinks: everything that stays in 16 bits or more.
    pub small: u64,
    /// What it keeps.
    pub cache: Cache,
    /// Multiplications of one query with one key and value, over all heads.
    pub attention_width: u64,
}

impl Layer {
    /// Parameters without the routed experts'.
    pub fn dense(&self) -> u64 {
        self.linears.iter().map(|linear| linear.inputs * linear.outputs).sum::<u64>() + self.small
    }

    /// Parameters of all routed experts.
    pub fn routed(&self) -> u64 {
        self.experts.map_or(0, |experts| experts.count * experts.each)
    }
}

/// How the weights lie in files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stored {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Of these, bytes of routed experts.
    pub expert_bytes: u64,
    /// Of these, bytes of the token embedding.
    pub embedding_bytes: u64,
    /// Types of tensors, the one with the most bytes first.
    pub dtypes: Vec<String>,
    /// How many tensors.
    pub tensors: u64,
    /// How many files.
    pub files: u64,
}

/// A model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// What to call it.
    pub name: String,
    /// Where the numbers come from, for people.
    pub source: String,
    /// `model_type` of transformers, or the architecture of a GGUF file.
    pub architecture: String,
    /// How well they are known.
    pub exactness: Exactness,
    /// Width of the hidden state.
    pub hidden: u64,
    /// Tokens that there are.
    pub vocabulary: u64,
    /// The longest context that it was made for.
    pub max_context: Option<u64>,
    /// Parameters of the token embedding (and of learned positions).
    pub embedding: u64,
    /// Parameters of the output matrix; 0 where it is the embedding (tied).
    pub head: u64,
    /// Final norms, biases of the head.
    pub small: u64,
    /// All layers.
    pub layers: Vec<Layer>,
    /// The precision that its configuration names.
    pub precision: Option<String>,
    /// How it lies in files, where there are files.
    pub stored: Option<Stored>,
    /// What the reader should know.
    pub notes: Vec<String>,
}

impl Model {
    /// All parameters; tied matrices count once.
    pub fn parameters(&self) -> u64 {
        self.layers.iter().map(|layer| layer.dense() + layer.routed()).sum::<u64>()
            + self.embedding
            + self.head
            + self.small
    }

    /// Parameters that a token is multiplied with or added to. The embedding is looked up, not multiplied, unless it is the head, too.
    pub fn active(&self) -> u64 {
        let layers: u64 = self
            .layers
            .iter()
            .map(|layer| layer.dense() + layer.experts.map_or(0, |experts| experts.used * experts.each))
            .sum();
        layers + self.small + self.output_matrix()
    }

    /// Parameters of the matrix that makes the logits, tied or not.
    pub fn output_matrix(&self) -> u64 {
        if self.head > 0 { self.head } else { self.hidden * self.vocabulary }
    }

    /// Whether the output matrix is the embedding.
    pub fn tied(&self) -> bool {
        self.head == 0
    }

    /// Parameters of all routed experts.
    pub fn routed(&self) -> u64 {
        self.layers.iter().map(Layer::routed).sum()
    }

    /// Elements that a token adds to the KV cache, over all layers.
    pub fn cache_elements(&self, latent: bool) -> u64 {
        self.layers.iter().map(|layer| layer.cache.elements(latent)).sum()
    }

    /// Elements in the KV cache of one sequence of so many tokens: layers with a window keep no more than that.
    pub fn cache_elements_of(&self, context: u64, latent: bool) -> u64 {
        self.layers
            .iter()
            .map(|layer| layer.cache.elements(latent).saturating_mul(layer.cache.kept(context)))
            .fold(0, u64::saturating_add)
    }

    /// Multiplications and additions to compute tokens `from..to` of a prompt; the logits are made once.
    pub fn prefill_flops(&self, from: u64, to: u64) -> f64 {
        let tokens = to.saturating_sub(from) as f64;
        if tokens == 0.0 {
            return 0.0;
        }
        let matrices = 2.0 * (self.active() - self.output_matrix()) as f64 * tokens;
        let attention: f64 = self
            .layers
            .iter()
            .map(|layer| {
                let pairs = match layer.cache.window {
                    Some(window) if window < to => pairs_in_window(from, to, window),
                    _ => (to as f64).powi(2) / 2.0 - (from as f64).powi(2) / 2.0,
                };
                2.0 * layer.attention_width as f64 * pairs
            })
            .sum();
        matrices + attention + 2.0 * self.output_matrix() as f64
    }

    /// Refuses numbers that no model has, before anything multiplies them further.
    pub(crate) fn checked(self) -> Result<Model, String> {
        const MOST: u128 = 1 << 56;
        let mut all = u128::from(self.embedding) + u128::from(self.head) + u128::from(self.small);
        for layer in &self.layers {
            for linear in &layer.linears {
                all += u128::from(linear.inputs) * u128::from(linear.outputs);
            }
            if let Some(experts) = layer.experts {
                all += u128::from(experts.count) * u128::from(experts.each);
                if experts.used > experts.count {
                    return Err(format!(
                        "a token is said to visit {} experts of {}",
                        experts.used, experts.count
                    ));
                }
            }
            all += u128::from(layer.small);
        }
        match all {
            0 => Err("it has no parameters".into()),
            1..MOST => Ok(self),
            _ => Err(format!("{all} parameters are more than any model has")),
        }
    }
}

/// Pairs of a query in `from..to` and a key of the `window` tokens up to it.
fn pairs_in_window(from: u64, to: u64, window: u64) -> f64 {
    let ramp = from.min(window)..to.min(window);
    let growing = (ramp.end as f64).powi(2) / 2.0 - (ramp.start as f64).powi(2) / 2.0;
    growing + to.saturating_sub(from.max(window)) as f64 * window as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_bound_what_is_kept_and_computed() {
        let cache = Cache { keys: 8, values: 8, window: Some(100), latent: None };
        assert_eq!((cache.kept(50), cache.kept(500), cache.elements(true)), (50, 100, 16));
        assert_eq!(pairs_in_window(0, 100, 100), 5000.0);
        assert_eq!(pairs_in_window(0, 300, 100), 5000.0 + 200.0 * 100.0);
        assert_eq!(pairs_in_window(200, 300, 100), 100.0 * 100.0);
        assert_eq!(pairs_in_window(0, 50, 100), 1250.0);
    }

    #[test]
    fn absurd_models_are_refused() {
        let mut model = known("llama-3.1-8b").unwrap();
        model.layers[0].experts = Some(Experts { count: 2, used: 3, each: 1 });
        assert!(model.clone().checked().unwrap_err().contains("3 experts of 2"));
        model.layers[0].experts = Some(Experts { count: 1 << 40, used: 1, each: 1 << 40 });
        assert!(model.checked().unwrap_err().contains("more than any model"));
    }
}
