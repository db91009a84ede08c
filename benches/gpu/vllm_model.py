#!/usr/bin/env python3
"""A Llama of random weights, the same ones every time on the same kind of device, as a safetensors checkpoint without a tokenizer:
`vllm_model.py FOLDER SHAPE`. Needs torch, transformers and safetensors.

Queries and keys are large enough that each token looks at a few others: what is generated depends on what is in the cache."""

import json
import os
import sys

#: `cache`: positions that the model knows; bytes of keys and values for each are layers x heads x 2 x dimension x 2.
SHAPES = {
    # Qwen2.5-3B's numbers, without its biases and with a smaller vocabulary: 2.9 G parameters, 36 KiB of cache a token.
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=32000),
    "crowd": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, vocab_size=8000),
    "small": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000),
}
POSITIONS = 140_000
SHARD = 2 << 30
SHARPNESS = 1.8


def main(folder, name):
    import torch
    import transformers
    from safetensors.torch import save_file

    shape = SHAPES[name]
    device, kind = ("cuda", torch.bfloat16) if name != "small" else ("cpu", torch.float32)
    os.makedirs(folder, exist_ok=True)
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=POSITIONS, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype=kind,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(1)
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def tensors():
        yield "model.embed_tokens.weight", (vocabulary, hidden), 1.0
        for layer in range(shape["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (hidden,), None
            yield f"{at}.self_attn.q_proj.weight", (hidden, hidden), SHARPNESS * hidden**-0.5
            yield f"{at}.self_attn.k_proj.weight", (heads, hidden), SHARPNESS * hidden**-0.5
            yield f"{at}.self_attn.v_proj.weight", (heads, hidden), hidden**-0.5
            yield f"{at}.self_attn.o_proj.weight", (hidden, hidden), hidden**-0.5
            yield f"{at}.post_attention_layernorm.weight", (hidden,), None
            yield f"{at}.mlp.gate_proj.weight", (inner, hidden), hidden**-0.5
            yield f"{at}.mlp.up_proj.weight", (inner, hidden), hidden**-0.5
            yield f"{at}.mlp.down_proj.weight", (hidden, inner), inner**-0.5
        yield "model.norm.weight", (hidden,), None
        yield "lm_head.weight", (vocabulary, hidden), hidden**-0.5

    shards, size, total = [{}], 0, 0
    for tensor, dims, std in tensors():
        value = torch.ones(dims, dtype=kind) if std is None else (torch.randn(dims, device=device, generator=generator) * std).to(kind).cpu()
        size += value.numel() * value.element_size()
        total += value.numel() * value.element_size()
        shards[-1][tensor] = value
        if size >= SHARD:
            shards.append({})
            size = 0
    shards = [shard for shard in shards if shard]
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, os.path.join(folder, file), metadata={"format": "pt"})
        where.update({tensor: file for tensor in shard})
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as index:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, index)
    print(f"{folder}: {total / 1e9:.2f} GB in {len(shards)} files")


if __name__ == "__main__":
    main(*sys.argv[1:])
