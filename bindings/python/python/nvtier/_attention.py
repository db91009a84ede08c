"""Attention of tokens behind others that needs no mask.

transformers gives PyTorch's scaled dot product attention a mask of ``tokens x (tokens before + tokens)`` where tokens are computed behind a cache.
With a mask PyTorch cannot take its flash kernel, and takes one that needs up to twice as long. The mask says nothing but "causal, aligned
to the lower right", which that kernel knows how to do by itself (``torch.nn.attention.bias.causal_lower_right``).
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional, Tuple

import torch

try:
    from torch.backends.cuda import SDPAParams, can_use_flash_attention
    from torch.nn.attention.bias import causal_lower_right
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError:  # before transformers 4.53 masks could not be left to somebody else; PyTorch has had its part since 2.3
    AttentionInterface = None

__all__ = ["without_masks"]

#: What it is called among transformers' kinds of attention.
_NAME = "nvtier_sdpa"


def _mask(*args: Any, **asked: Any) -> Optional[torch.Tensor]:
    """No mask where it would say "causal" and no more: the last of the tokens sees all keys, each one before it one less."""
    tokens, keys, before = asked.get("q_length", 0), asked.get("kv_length", 0), asked.get("q_offset", 0)
    padding = asked.get("attention_mask")
    plain = (
        not args
        and asked.get("allow_is_causal_skip", True)
        and asked.get("mask_function") is causal_mask_function
        and asked.get("local_size") is None
        and asked.get("kv_offset", 0) == 0
        and 1 < tokens < keys
        and isinstance(before, int)
        and before + tokens == keys
        and (padding is None or (padding.shape[-1] == keys and bool(padding.all())))
    )
    return None if plain else sdpa_mask(*args, **asked)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    **others: Any,
) -> Tuple[torch.Tensor, None]:
    """Query, key and value: ``[batch, heads, tokens, size]``; the result: ``[batch, tokens, heads, size]``."""
    tokens, keys = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None or not causal or not 1 < tokens < keys or others.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    groups = getattr(module, "num_key_value_groups", 1)
    shared = groups > 1 and _shares_heads(query, key, value, dropout)
    if groups > 1 and not shared:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    heads = {"enable_gqa": True} if shared else {}
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=causal_lower_right(tokens, keys), dropout_p=dropout, scale=scaling, **heads
    )
    return found.transpose(1, 2).contiguous(), None


def _shares_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the flash kernel takes keys and values with fewer heads than the queries have."""
    try:
        return can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, True))
    except TypeError:  # before PyTorch 2.5 nothing did
        return False


if AttentionInterface is not None:
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)


@contextlib.contextmanager
def without_masks(model: Any) -> Iterator[None]:
    """In here a model whose attention is PyTorch's (``sdpa``) computes tokens behind a cache that grows (not one of a fixed size) without a mask
    where that makes no difference. Other models are as they were."""
    config = model.config.get_text_config(decoder=True)
    before = getattr(config, "_attn_implementation", None)
    if AttentionInterface is None or before != "sdpa" or getattr(config, "sub_configs", None):
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
