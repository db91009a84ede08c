"""How blocks lie in vLLM's memory, and which of its configurations are supported; for ``nvtier.vllm``."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Tuple

import torch

from . import _nvtier
from ._errors import NotSupported
from .kv import _device


class Layout:
    """Planes of a worker's KV caches: of each layer one, or one of K and one of V, whose blocks are pieces without gaps."""

    def __init__(self, caches: Dict[str, torch.Tensor], blocks: int) -> None:
        planes: List[Tuple[int, int]] = []
        shapes = set()
        told: List[Any] = []
        self.keep: List[torch.Tensor] = []
        seen = set()
        for name, cache in caches.items():
            if not isinstance(cache, torch.Tensor):
                raise NotSupported(f"the KV cache of {name} is a {type(cache).__name__}: tensors, of full attention, are supported")
            if cache.data_ptr() in seen:
                # Layers may share one.
                continue
            seen.add(cache.data_ptr())
            starts, stride, page, order = _pages(name, cache, blocks)
            planes.extend((start, (blocks - 1) * stride + page) for start in starts)
            shapes.add((stride, page, _device(cache)))
            told.append([name, str(cache.dtype), order, page])
            self.keep.append(cache)
        if len(shapes) != 1:
            raise NotSupported(f"KV caches whose blocks lie in {len(shapes)} different ways: all layers have to be alike")
        stride, page, self.device = shapes.pop()
        self.planes = planes
        self.shape = (blocks, stride, 1, page, 1, page, page)
        self.block_bytes = page * len(planes)
        first = self.keep[0]
        self._first = f"{tuple(first.shape)}, strides {tuple(first.stride())}, {first.dtype}"
        #: Equal where a block's bytes mean the same.
        self.digest = _nvtier.kv_digest(json.dumps([self.device.split(":")[0], told]).encode())

    def describe(self) -> str:
        """What was found, for a log."""
        blocks = self.shape[0]
        return f"{blocks} blocks of {self.block_bytes} bytes in {len(self.planes)} planes on {self.device}; the first layer's: {self._first}"


def _pages(name: str, cache: torch.Tensor, blocks: int) -> Tuple[List[int], int, int, List[Any]]:
    """Addresses of the first block, bytes from one block to the next, bytes of a block, and the order of what is in it."""
    shape, stride, size = tuple(cache.shape), cache.stride(), cache.element_size()
    if shape[0] % blocks == 0:
        outer, dim = 1, 0
    elif len(shape) > 1 and shape[0] == 2 and shape[1] % blocks == 0:
        outer, dim = 2, 1
    else:
        raise NotSupported(f"the KV cache of {name} has the shape {shape} for {blocks} blocks: nvtier does not know such a layout")
    # A block of vLLM's may be several of the kernel's.
    parts = shape[dim] // blocks
    inner = list(zip(shape[dim + 1 :], stride[dim + 1 :]))
    elements = 1
    for length, _ in inner:
        elements *= length
    extent = sum((length - 1) * step for length, step in inner) + 1
    if extent != elements or stride[dim] < elements or (parts > 1 and stride[dim] != elements):
        raise NotSupported(f"the KV cache of {name} has gaps in its blocks: shape {shape}, strides {stride}")
    starts = [cache.data_ptr() + half * stride[0] * size if dim else cache.data_ptr() for half in range(outer)]
    return starts, stride[dim] * parts * size, elements * parts * size, [outer, parts, inner]


def refuse(config: Any, caches: Any) -> None:
    """Says so if a configuration's blocks are more than the pages of one group of layers, or depend on more than the tokens before them."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = config.parallel_config
    for what in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, what, 1) != 1:
            raise NotSupported(f"{what}={getattr(parallel, what)}: nvtier's connector supports tensor and data parallelism")
    if config.speculative_config is not None:
        raise NotSupported("speculative decoding: nvtier's connector does not support it")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise NotSupported("calculate_kv_scales: blocks would depend on what came before in this process")
    groups = caches.kv_cache_groups
    if len(groups) != 1:
        raise NotSupported(f"a model with {len(groups)} groups of KV caches: nvtier's connector supports one, of full attention")
    spec = groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec) or getattr(spec, "non_causal", False):
        raise NotSupported(f"KV caches of kind {type(spec).__name__}: nvtier's connector supports causal full attention")
