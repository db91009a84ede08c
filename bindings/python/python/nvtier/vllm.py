"""vLLM: ``--load-format nvtier``. Installing nvtier beside vLLM is enough: vLLM finds it as a general plugin.

Weights go from their files to the GPU of each worker by nvtier's lane, in the order of the files, at most 1 GiB ahead of the
model. ``--model-loader-extra-config '{"cache": "direct"}'`` says how files are read (auto, direct, buffered). Every rank of a
tensor-parallel group reads whole tensors, as vLLM's own loader does.
"""

from __future__ import annotations

import logging

_registered = False


def register() -> None:
    """Makes the load format known to the vLLM of this process. Called by vLLM, in every process of it."""
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
