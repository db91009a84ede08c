"""The model loader that ``nvtier.vllm`` registers: vLLM's default one, with another source of tensors."""

from __future__ import annotations

import copy
import time
from typing import Any, Iterator, List, Tuple

import torch
from tqdm.auto import tqdm
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

try:
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
except ImportError:  # before experts were filtered by rank

    def should_skip_weight(weight_name: str, local_expert_ids: Any) -> bool:
        return False


from . import torch as nvtier_torch

_CACHES = ("auto", "direct", "buffered")


class NvtierModelLoader(DefaultModelLoader):
    """Finds, names and checks weights as vLLM does; reads them as nvtier does."""

    def __init__(self, load_config: LoadConfig) -> None:
        extra = load_config.model_loader_extra_config
        if not isinstance(extra, dict):
            raise ValueError(f"model_loader_extra_config must be a dict for load format nvtier, got {type(extra).__name__}")
        extra = dict(extra)
        self._cache = extra.pop("cache", "auto")
        if self._cache not in _CACHES:
            raise ValueError(f"cache must be one of {', '.join(_CACHES)}, got {self._cache!r}")
        # To the default loader these are safetensors files: it knows no other word for them.
        inner = copy.copy(load_config)
        inner.load_format = "safetensors"
        inner.model_loader_extra_config = extra
        super().__init__(inner)

    def _get_weights_iterator(self, source: Any) -> Iterator[Tuple[str, torch.Tensor]]:
        _, files, use_safetensors = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not use_safetensors or self.load_config.safetensors_load_strategy == "torchao":
            # Pickled weights, or tensors that torchao puts together from several: not nvtier's.
            yield from super()._get_weights_iterator(source)
            return
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        for name, tensor in self._tensors(sorted(files)):
            yield source.prefix + name, tensor

    def _tensors(self, files: List[str]) -> Iterator[Tuple[str, torch.Tensor]]:
        device = f"cuda:{torch.cuda.current_device()}" if current_platform.is_cuda() else "cpu"
        rank = torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
        skip = getattr(self, "local_expert_ids", None)
        quiet = not self.load_config.use_tqdm_on_load or rank != 0
        with tqdm(total=None, desc="nvtier", unit="B", unit_scale=True, unit_divisor=1000, disable=quiet) as bar:
            for file in files:
                with nvtier_torch.safe_open(file, device=device, cache=self._cache) as f:
                    for name in f.offset_keys():
                        if should_skip_weight(name, skip):
                            continue
                        tensor = f.get_tensor(name)
                        bar.update(tensor.numel() * tensor.element_size())
                        yield name, tensor
