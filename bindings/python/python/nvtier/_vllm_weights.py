"""What a model's weights are, whatever they are called; for ``nvtier.vllm``."""

from __future__ import annotations

import mmap
import os
from typing import Any, List, Optional

import numpy as np

from . import _nvtier, kv
from ._errors import InvalidArgument


def weights_folder(model: str, revision: Optional[str] = None) -> str:
    """Where a model's files are: it is a folder, or Hugging Face's name of what is in its cache."""
    if os.path.isdir(model):
        return model
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(model, revision=revision, local_files_only=True)
    except Exception as error:
        raise InvalidArgument(
            f"the weights of {model!r} are not on this machine ({error}), and blocks are not to meet other weights of the same name:"
            ' set "fingerprint" in the configuration to something that changes with the weights'
        ) from error


def weights_digest(model: str, revision: Optional[str] = None) -> bytes:
    """A digest of a model's weight files, whatever they are called: of their bytes, or where they lie in Hugging Face's cache, of the digests
    that they are named by there."""
    folder = weights_folder(model, revision)
    names = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", ".bin", ".pt", ".gguf")))
    if not names:
        raise InvalidArgument(f'{folder} has no weights: set "fingerprint" in the configuration to something that changes with the weights')
    parts: List[Any] = []
    for name in names:
        path = os.path.realpath(os.path.join(folder, name))
        blob = os.path.basename(path)
        if os.path.basename(os.path.dirname(path)) == "blobs" and len(blob) == 64:
            parts.append(["sha256", blob])
            continue
        size = os.path.getsize(path)
        if not size:
            parts.append(["empty"])
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, dtype=np.uint8)
            parts.append(["bytes", *_nvtier.kv_digest_memory("cpu", [(view.ctypes.data, size)])])
            del view
    return kv.fingerprint(weights=parts)
