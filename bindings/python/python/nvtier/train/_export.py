"""Models as safetensors files of Hugging Face's layout, from tensors that come one after the other."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, Iterator, Tuple, Union

import torch

from .._errors import Exists


def save_pretrained(
    model: torch.nn.Module,
    weights: Iterator[Tuple[str, torch.Tensor]],
    folder: Union[str, os.PathLike],
    max_shard_bytes: int,
) -> None:
    from ..torch import save_file

    folder = os.fspath(folder)
    if os.path.isfile(folder):
        raise Exists(f"save to {folder}: it is a file; a folder is needed")
    os.makedirs(folder, exist_ok=True)
    index: Dict[str, int] = {}
    shards = 0
    total = 0
    shard: Dict[str, torch.Tensor] = {}
    size = 0

    def part(number: int) -> str:
        return os.path.join(folder, f".nvtier-{number}.safetensors.part")

    def write() -> None:
        nonlocal shards, shard, size
        save_file(shard, part(shards), metadata={"format": "pt"})
        index.update({name: shards for name in shard})
        shards, shard, size = shards + 1, {}, 0

    try:
        for name, tensor in _all(model, weights):
            bytes = tensor.numel() * tensor.element_size()
            if shard and size + bytes > max_shard_bytes:
                write()
            shard[name] = tensor
            size += bytes
            total += bytes
        write()
        names = [
            "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)
        ]
        for number, name in enumerate(names):
            os.replace(part(number), os.path.join(folder, name))
    finally:
        for number in range(shards + 1):
            if os.path.exists(part(number)):
                os.remove(part(number))
    if shards > 1:
        table = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in sorted(index.items())}}
        with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump(table, file, indent=2, sort_keys=True)
    for what in ("config", "generation_config"):
        config: Any = getattr(model, what, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)


def _all(model: torch.nn.Module, weights: Iterator[Tuple[str, torch.Tensor]]) -> Iterator[Tuple[str, torch.Tensor]]:
    yield from weights
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer.detach().cpu().contiguous()
