"""`nvtier plan` against transformers: the same parameters, the same elements in the KV cache, for every architecture that it knows.

Parameters: the model of each configuration on the meta device, where it takes no memory. KV cache: a real model of the same architecture, with the
same kinds of attention and narrow everything else, which runs on some tokens; the size of the cache that it leaves is counted.
"""

import json

import pytest

from conftest import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Published sizes of each architecture. Where a key is missing, the class of transformers has the right default.
LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
MODELS = {
    "llama": LLAMA,
    "llama-tied-biased": dict(LLAMA, model_type="llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=96),
    "granite": dict(LLAMA, num_hidden_layers=40, vocab_size=49155),
    "smollm3": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4, intermediate_size=11008, vocab_size=128256),
    "mistral": dict(LLAMA, vocab_size=32768, sliding_window=4096),
    "ministral": dict(LLAMA, num_hidden_layers=36, intermediate_size=12288, vocab_size=131072, head_dim=128, sliding_window=4096),
    "mixtral": dict(LLAMA, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2),
    "qwen2": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064),
    "qwen2_moe": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632, vocab_size=151936, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632),
    "qwen3": dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, intermediate_size=12288, vocab_size=151936, head_dim=128),
    "qwen3_moe": dict(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, intermediate_size=6144, vocab_size=151936, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=2, mlp_only_layers=[3]),
    "gemma": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, intermediate_size=24576, vocab_size=256000, head_dim=256),
    "gemma2": dict(hidden_size=3584, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, intermediate_size=14336, vocab_size=256000, head_dim=256, sliding_window=4096),
    "gemma3_text": dict(hidden_size=2560, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4, intermediate_size=10240, vocab_size=262208, head_dim=256, sliding_window=1024),
    "phi3": dict(hidden_size=3072, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=8192, vocab_size=32064, sliding_window=2047),
    "phi": dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=10240, vocab_size=51200),
    "gpt_oss": dict(hidden_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, intermediate_size=2880, vocab_size=201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128),
    "glm": dict(hidden_size=4096, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=2, intermediate_size=13696, vocab_size=151552, head_dim=128),
    "glm4": dict(hidden_size=4096, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=2, intermediate_size=13696, vocab_size=151552, head_dim=128),
    "glm4_moe": dict(hidden_size=4096, num_hidden_layers=46, num_attention_heads=96, num_key_value_heads=8, intermediate_size=10944, vocab_size=151552, head_dim=128, n_routed_experts=128, num_experts_per_tok=8, moe_intermediate_size=1408, n_shared_experts=1, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True),
    "olmo": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008, vocab_size=50304),
    "olmo2": dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8, intermediate_size=13824, vocab_size=100352),
    "olmo3": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008, vocab_size=100278, sliding_window=4096),
    "olmoe": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, intermediate_size=1024, vocab_size=50304, num_experts=64, num_experts_per_tok=8),
    "cohere": dict(hidden_size=8192, num_hidden_layers=40, num_attention_heads=64, num_key_value_heads=64, intermediate_size=22528, vocab_size=256000),
    "cohere-normed": dict(model_type="cohere", hidden_size=12288, num_hidden_layers=64, num_attention_heads=96, num_key_value_heads=8, intermediate_size=33792, vocab_size=256000, use_qk_norm=True),
    "cohere2": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=256000, sliding_window=4096),
    "starcoder2": dict(hidden_size=3072, num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2, intermediate_size=12288, vocab_size=49152, sliding_window=4096),
    "gpt_neox": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=16384, vocab_size=50432),
    "deepseek_v2": dict(hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, intermediate_size=10944, vocab_size=102400, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408, first_k_dense_replace=1),
    "deepseek_v3": dict(hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, intermediate_size=18432, vocab_size=129280, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048, first_k_dense_replace=3),
}
# The same, narrow enough to run: attention keeps its shape relative to itself.
NARROW = dict(hidden_size=64, num_hidden_layers=8, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16, vocab_size=128, num_experts=8, num_local_experts=8, n_routed_experts=8)
TOKENS = 40
WINDOW = 16


def config_of(name, narrow=False):
    """A configuration of transformers."""
    values = dict(MODELS[name])
    kind = values.pop("model_type", name)
    if narrow:
        values.update({key: value for key, value in NARROW.items() if key in values})
        heads = values["num_attention_heads"]
        # 4 query heads; as many key heads as before, in proportion.
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = max(1, values["num_key_value_heads"] * 4 // heads)
        values["num_attention_heads"] = 4
        if "head_dim" in values:
            values["head_dim"] = 24
        if "kv_lora_rank" in values:
            values.update(kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, num_key_value_heads=4)
            values["q_lora_rank"] = values["q_lora_rank"] and 24
            # Routing by groups needs as many experts as there are groups, and more in each than are chosen.
            values.update(n_group=1, topk_group=1)
        if values.get("sliding_window"):
            values["sliding_window"] = WINDOW
        values.pop("mlp_only_layers", None)
        values["pad_token_id"] = None
        values["max_position_embeddings"] = 512
    return transformers.AutoConfig.for_model(kind, **values)


def saved(config, folder):
    """The configuration as transformers writes it beside a model."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return folder / "config.json"


def planned(nvtier, path, *options):
    """What `nvtier plan` says about a model."""
    text = run(nvtier, "plan", path, "--json", "--gpu", "none", "--ram", "1TB", "--drive", "gen4:100TB", *options)
    return json.loads(text)["model"]


@pytest.mark.parametrize("name", MODELS)
def test_parameters(nvtier, scratch, name):
    config = config_of(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    expected = sum(parameter.numel() for parameter in model.parameters())
    got = planned(nvtier, saved(config, scratch / "plan" / name))
    assert got["exactness"] == "exact"
    assert got["parameters"] == expected
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert got["tied"] == tied
    assert got["weights_bytes"] == 2 * expected or config.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_kv_cache(nvtier, scratch, name):
    config = config_of(name, narrow=True)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    path = saved(config, scratch / "plan" / f"{name}-narrow")
    got = planned(nvtier, path, "--kv-precision", "f32", "--context", TOKENS)
    # The test must be able to fail: what is compared is a real model's.
    assert got["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        cache = model(input_ids=torch.arange(TOKENS)[None] % config.vocab_size, use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    assert len(layers) == config.num_hidden_layers
    per_token = sum(keys[0, :, 0].numel() + values[0, :, 0].numel() for keys, values in layers)
    assert got["kv"]["bytes_per_token"] == 4 * per_token
    # What is kept of more tokens than a window has: transformers keeps one less, since the next token comes to it.
    kept = sum(keys[0].numel() + values[0].numel() for keys, values in layers)
    windowed = [keys.shape[2] < TOKENS for keys, _ in layers]
    assert got["kv"]["layers_with_window"] == sum(windowed)
    missing = sum(
        keys[0, :, 0].numel() + values[0, :, 0].numel() for (keys, values), short in zip(layers, windowed) if short
    )
    assert all(keys.shape[2] == WINDOW - 1 for (keys, _), short in zip(layers, windowed) if short)
    assert got["kv"]["bytes_per_session"] == 4 * (kept + missing)
    if "kv_lora_rank" in MODELS[name]:
        # transformers keeps the latent vectors; what attention makes of them is what older engines keep.
        assert got["kv"]["latent"] and per_token == (config.kv_lora_rank + config.qk_rope_head_dim) * len(layers)
        width = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        assert got["kv"]["bytes_per_token_expanded"] == 4 * width * len(layers)
        expanded = planned(nvtier, path, "--kv-precision", "f32", "--expanded-kv")
        assert expanded["kv"]["bytes_per_token"] == 4 * width * len(layers)


def test_files_of_a_real_model(nvtier, model):
    """Counted from headers alone, with a configuration beside it, and from a GGUF file: the same model."""
    snapshot = planned(nvtier, model / "snapshot")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model / "snapshot")
    assert snapshot["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert snapshot["stored"]["bytes"] == snapshot["weights_bytes"] > 0
    gguf = planned(nvtier, model / "model.gguf")
    assert gguf["exactness"] == "files"
    assert gguf["parameters"] == snapshot["parameters"]
    assert gguf["kv"]["elements_per_token"] == snapshot["kv"]["elements_per_token"]
    assert gguf["layers"] == snapshot["layers"]
