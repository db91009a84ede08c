"""vLLM: weights by ``--load-format nvtier``, and its KV cache in a pool, by a tier or a connector. Installing nvtier beside vLLM is enough.

Weights go from their files to the GPU of each worker by nvtier's lane, in the order of the files, at most 1 GiB ahead of the
model. ``--model-loader-extra-config '{"cache": "direct"}'`` says how files are read (auto, direct, buffered). Every rank of a
tensor-parallel group reads whole tensors, as vLLM's own loader does. vLLM finds the format as a general plugin.

``NvtierTier`` keeps what leaves vLLM's CPU tier in a KV store of a pool (vLLM 0.33 and 0.26), by configuration alone::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592, "secondary_tiers": [
        {"type": "NvtierTier", "module_path": "nvtier.vllm", "pool": "/mnt/nvme0/pool", "budget": 200000000000}]}}'

``NvtierConnector`` keeps prompts' blocks there, from the device and to it, without a CPU tier (vLLM 0.26)::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "NvtierConnector", "kv_connector_module_path": "nvtier.vllm",
      "kv_role": "kv_both", "kv_connector_extra_config": {"pool": "/mnt/nvme0/pool", "budget": 200000000000}}'

Keys of both: ``pool``; ``store`` (name, ``vllm``), ``budget`` (bytes), ``fingerprint`` (text that changes with the weights; default: a
digest of the model's weight files), ``tenant_key`` (of a request's ``kv_transfer_params``, ``tenant``), ``threads``, ``deadline`` (seconds),
``ram`` (bytes on their way), ``ttl``, ``write_bytes_per_day``, ``second_offer``, ``quotas`` (bytes by tenant: ``{"alice": "10GiB"}``),
``tenant_quota`` (of tenants who are new); of the tier: ``locality`` (vLLM's: ``LOCAL``),
``backpressure`` (vLLM's).
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

_registered = False


def register() -> None:
    """Makes the load format and the tier known to the vLLM of this process. Called by vLLM, in every process of it."""
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.model_loader import register_model_loader

        from ._vllm_loader import NvtierModelLoader
    except ImportError as error:
        # vLLM starts for whatever format it is asked for; only this one is not there then.
        logging.getLogger(__name__).warning("--load-format nvtier does not fit this vLLM: %s", error)
        return
    register_model_loader("nvtier")(NvtierModelLoader)
    _registered = True
    try:
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
    except ImportError:
        # A vLLM without tiers.
        return
    # Where a tier's configuration can name a module, this is not needed.
    SecondaryTierFactory.register_tier("NvtierTier", __name__, "NvtierTier")


#: Where what vLLM looks up here by name is: who only loads weights, or has a vLLM without some of it, does not import the rest.
_PLACES = {"NvtierTier": "_vllm_tier", "NvtierConnector": "_vllm_connector", "weights_digest": "_vllm_weights"}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{place}", __package__), name)
