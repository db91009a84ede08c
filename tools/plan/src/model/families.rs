//! How architectures differ, as data. `tests/python/test_plan.py` compares each row with
//! transformers; it has not been run yet.

/// Which matrices have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// A key of the configuration says so; the value where it is not given.
    Key(&'static str, bool),
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QkNorm {
    None,
    /// One of a head's width for all heads.
    PerHead,
    /// Over all heads together.
    AllHeads,
    /// As [`QkNorm::PerHead`], or [`QkNorm::AllHeads`] where the second is true, if this key of the configuration says so.
    Key(&'static str, bool),
}

/// Feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mlp {
    /// gate, up, down.
    Gated,
    /// up, down.
    Plain,
}

/// Which layers see a window only, where `layer_types` does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Windows {
    /// None.
    Never,
    /// All, if there is a `sliding_window`.
    All,
    /// All but each n-th.
    AllButEach(u64),
    /// From `max_window_layers` on, if `use_sliding_window`.
    QwenLike,
}

/// Routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moe {
    /// Keys of their number, and the value where none is given.
    pub count: (&'static [&'static str], u64),
    /// Keys of how many a token visits.
    pub used: (&'static [&'static str], u64),
    /// Key of their width.
    pub width: &'static str,
    /// Biases in experts and router.
    pub biased: bool,
    /// Experts that every token visits.
    pub shared: Shared,
    /// Which layers have experts.
    pub layers: MoeLayers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shared {
    None,
    /// As wide as so many routed ones.
    Times(&'static str),
    /// Of a width of its own, with a gate.
    Gated(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MoeLayers {
    All,
    /// All but the first; the key says how many.
    AfterFirst(&'static str),
    /// Each n-th (`decoder_sparse_step`), but `mlp_only_layers`.
    Sparse,
}

/// An architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Family {
    pub model_type: &'static str,
    /// Whether input and output matrix are one, where the configuration does not say.
    pub tied: bool,
    /// Biases of q, k and v; of the output projection; of the feed-forward part; of the head.
    pub qkv: Bias,
    pub out: Bias,
    pub mlp_bias: Bias,
    pub head_bias: bool,
    pub qk_norm: QkNorm,
    pub mlp: Mlp,
    /// Norms of a layer, parameters of a norm for each of the hidden width (2: with bias), and the same of the last norm.
    pub norms: u64,
    pub norm_width: u64,
    /// One number a head that attention may look at instead of a token.
    pub sinks: bool,
    /// Multi-head latent attention.
    pub latent: bool,
    pub windows: Windows,
    pub moe: Option<Moe>,
    /// Width of a head where neither `head_dim` nor a division gives it.
    pub head_dim: Option<u64>,
}

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    tied: false,
    qkv: Bias::Key("attention_bias", false),
    out: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    head_bias: false,
    qk_norm: QkNorm::None,
    mlp: Mlp::Gated,
    norms: 2,
    norm_width: 1,
    sinks: false,
    latent: false,
    windows: Windows::Never,
    moe: None,
    head_dim: None,
};

const PLAIN: Family = Family { qkv: Bias::Never, out: Bias::Never, mlp_bias: Bias::Never, ..LLAMA };

const QWEN_MOE: Moe = Moe {
    count: (&["num_experts", "num_local_experts"], 60),
    used: (&["num_experts_per_tok"], 4),
    width: "moe_intermediate_size",
    biased: false,
    shared: Shared::None,
    layers: MoeLayers::Sparse,
};

const DEEPSEEK_MOE: Moe = Moe {
    count: (&["n_routed_experts", "num_local_experts", "num_experts"], 64),
    used: (&["num_experts_per_tok"], 8),
    width: "moe_intermediate_size",
    biased: false,
    shared: Shared::Times("n_shared_experts"),
    layers: MoeLayers::AfterFirst("first_k_dense_replace"),
};

/// All that are known.
pub(super) const FAMILIES: &[Family] = &[
    LLAMA,
    Family { model_type: "granite", ..LLAMA },
    Family { model_type: "smollm3", tied: true, ..LLAMA },
    Family { model_type: "mistral", windows: Windows::All, ..PLAIN },
    Family { model_type: "ministral", windows: Windows::All, ..PLAIN },
    Family {
        model_type: "mixtral",
        windows: Windows::All,
        moe: Some(Moe {
            count: (&["num_local_experts", "num_experts"], 8),
            used: (&["num_experts_per_tok"], 2),
            width: "intermediate_size",
            biased: false,
            shared: Shared::None,
            layers: MoeLayers::All,
        }),
        ..PLAIN
    },
    Family { model_type: "qwen2", qkv: Bias::Always, windows: Windows::QwenLike, ..PLAIN },
    Family {
        model_type: "qwen2_moe",
        qkv: Bias::Key("qkv_bias", true),
        windows: Windows::QwenLike,
        moe: Some(Moe { shared: Shared::Gated("shared_expert_intermediate_size"), ..QWEN_MOE }),
        ..PLAIN
    },
    Family {
        model_type: "qwen3",
        qk_norm: QkNorm::PerHead,
        windows: Windows::QwenLike,
        mlp_bias: Bias::Never,
        head_dim: Some(128),
        ..LLAMA
    },
    Family {
        model_type: "qwen3_moe",
        qk_norm: QkNorm::PerHead,
        windows: Windows::QwenLike,
        mlp_bias: Bias::Never,
        moe: Some(Moe {
            count: (&["num_experts", "num_local_experts"], 128),
            used: (&["num_experts_per_tok"], 8),
            ..QWEN_MOE
        }),
        ..LLAMA
    },
    Family { model_type: "gemma", tied: true, mlp_bias: Bias::Never, head_dim: Some(256), ..LLAMA },
    Family {
        model_type: "gemma2",
        tied: true,
        mlp_bias: Bias::Never,
        norms: 4,
        windows: Windows::AllButEach(2),
        head_dim: Some(256),
        ..LLAMA
    },
    Family {
        model_type: "gemma3_text",
        tied: true,
        mlp_bias: Bias::Never,
        norms: 4,
        qk_norm: QkNorm::PerHead,
        windows: Windows::AllButEach(6),
        head_dim: Some(256),
        ..LLAMA
    },
    Family { model_type: "phi3", windows: Windows::All, ..PLAIN },
    Family {
        model_type: "phi",
        qkv: Bias::Always,
        out: Bias::Always,
        mlp_bias: Bias::Always,
        head_bias: true,
        mlp: Mlp::Plain,
        norms: 1,
        norm_width: 2,
        ..LLAMA
    },
    Family {
        model_type: "gpt_oss",
        qkv: Bias::Key("attention_bias", true),
        out: Bias::Key("attention_bias", true),
        sinks: true,
        windows: Windows::AllButEach(2),
        head_dim: Some(64),
        moe: Some(Moe {
            count: (&["num_local_experts", "num_experts"], 128),
            used: (&["num_experts_per_tok", "experts_per_token"], 4),
            width: "intermediate_size",
            biased: true,
            shared: Shared::None,
            layers: MoeLayers::All,
        }),
        ..LLAMA
    },
    Family { model_type: "glm", qkv: Bias::Key("attention_bias", true), head_dim: Some(128), ..PLAIN },
    Family {
        model_type: "glm4",
        qkv: Bias::Key("attention_bias", true),
        norms: 4,
        head_dim: Some(128),
        ..PLAIN
    },
    Family {
        model_type: "glm4_moe",
        qkv: Bias::Key("attention_bias", false),
        qk_norm: QkNorm::Key("use_qk_norm", false),
        head_dim: Some(128),
        moe: Some(Moe { count: (&["n_routed_experts", "num_local_experts"], 128), ..DEEPSEEK_MOE }),
        ..PLAIN
    },
    Family { model_type: "olmo", mlp_bias: Bias::Never, norms: 0, norm_width: 0, ..LLAMA },
    Family { model_type: "olmo2", mlp_bias: Bias::Never, qk_norm: QkNorm::AllHeads, ..LLAMA },
    Family {
        model_type: "olmo3",
        mlp_bias: Bias::Never,
        qk_norm: QkNorm::AllHeads,
        windows: Windows::AllButEach(4),
        ..LLAMA
    },
    Family {
        model_type: "olmoe",
        mlp_bias: Bias::Never,
        qk_norm: QkNorm::AllHeads,
        moe: Some(Moe {
            count: (&["num_experts", "num_local_experts"], 64),
            used: (&["num_experts_per_tok"], 8),
            width: "intermediate_size",
            biased: false,
            shared: Shared::None,
            layers: MoeLayers::All,
        }),
        ..LLAMA
    },
    Family {
        model_type: "cohere",
        tied: true,
        mlp_bias: Bias::Never,
        norms: 1,
        qk_norm: QkNorm::Key("use_qk_norm", true),
        ..LLAMA
    },
    Family {
        model_type: "cohere2",
        tied: true,
        mlp_bias: Bias::Never,
        norms: 1,
        windows: Windows::AllButEach(4),
        ..LLAMA
    },
    Family {
        model_type: "starcoder2",
        tied: true,
        qkv: Bias::Key("use_bias", true),
        out: Bias::Key("use_bias", true),
        mlp_bias: Bias::Key("use_bias", true),
        mlp: Mlp::Plain,
        norm_width: 2,
        windows: Windows::All,
        ..LLAMA
    },
    Family {
        model_type: "gpt_neox",
        qkv: Bias::Key("attention_bias", true),
        out: Bias::Key("attention_bias", true),
        mlp_bias: Bias::Always,
        mlp: Mlp::Plain,
        norm_width: 2,
        ..LLAMA
    },
    Family {
        model_type: "deepseek_v2",
        latent: true,
        mlp_bias: Bias::Key("mlp_bias", false),
        moe: Some(Moe { used: (&["num_experts_per_tok"], 6), ..DEEPSEEK_MOE }),
        ..LLAMA
    },
    Family {
        model_type: "deepseek_v3",
        latent: true,
        mlp_bias: Bias::Never,
        moe: Some(Moe { count: (&["n_routed_experts", "num_local_experts"], 256), ..DEEPSEEK_MOE }),
        ..LLAMA
    },
];

/// The family of a `model_type`.
pub(super) fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_type == model_type)
}
