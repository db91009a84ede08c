"""What the blocks of a vLLM request depend on besides its tokens: the adapter that computes them, pictures and sounds in its prompt; for
``nvtier.vllm``."""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Dict, List, Optional, Tuple

from . import kv
from ._vllm_weights import weights_digest, weights_folder

logger = logging.getLogger(__name__)

#: An adapter as vLLM knows it, and its files as they were: names, sizes, times, inodes.
_Known = Tuple[str, List[Any], bytes]


def media_extras(features: Any, tokens: int, block_tokens: int) -> Optional[List[bytes]]:
    """Of each whole block of a prompt, what stands in the place of its tokens: which picture or sound, and from which of its tokens on. vLLM tells them
    apart by a hash of their content. None: there is nothing."""
    if not features:
        return None
    extras: List[List[Any]] = [[] for _ in range(tokens // block_tokens)]
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        offset, length = feature.mm_position.offset, feature.mm_position.length
        # Blocks behind it know it by the blocks before them.
        for block in range(offset // block_tokens, min(-(-(offset + length) // block_tokens), len(extras))):
            extras[block].append([feature.modality, feature.identifier, offset - block * block_tokens])
    return [json.dumps(extra).encode() if extra else b"" for extra in extras]


class Adapters:
    """Digests of LoRA adapters: of their weights' bytes and their configuration, which has their scale. Files are looked at and read by a thread of its
    own: the scheduler waits for no drive."""

    def __init__(self, config: Any, deadline: float) -> None:
        self._dtype = str(getattr(config, "lora_dtype", None))
        self._deadline = deadline
        self._thread = ThreadPoolExecutor(1, "nvtier-adapters")
        #: By vLLM's number of an adapter. What it was when it was first used here is what vLLM has in memory.
        self._known: Dict[int, _Known] = {}
        #: By request.
        self._asked: Dict[str, Tuple[float, Future[Optional[bytes]]]] = {}
        #: What did not come in time. Until it does nobody else waits as long.
        self._late: Optional[Future[Optional[bytes]]] = None

    def digest(self, request: str, lora: Any) -> Tuple[bool, Optional[bytes]]:
        """Whether it is known by now, and what it is. None: nobody can tell, and nothing is to be stored."""
        if request not in self._asked:
            if self._late is not None and not self._late.done():
                return True, None
            self._asked[request] = (time.monotonic(), self._thread.submit(self._look, lora))
        since, answer = self._asked[request]
        if answer.done():
            del self._asked[request]
            return True, answer.result()
        if time.monotonic() - since < self._deadline:
            return False, None
        del self._asked[request]
        self._late = answer
        logger.warning("nvtier: adapter %s is not read after %g s: requests with it are computed and not stored", lora.lora_name, self._deadline)
        return True, None

    def forget(self, request: str) -> None:
        """A request asks no more."""
        self._asked.pop(request, None)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look(self, lora: Any) -> Optional[bytes]:
        try:
            return self._digest(lora)
        except Exception as error:
            logger.warning("nvtier: requests with adapter %s are computed and not stored: %s", lora.lora_name, error)
            return None

    def _digest(self, lora: Any) -> Optional[bytes]:
        if lora.load_inplace or lora.tensorizer_config_dict:
            # Another adapter takes its place in a running engine, or it is not in files that can be read here.
            return None
        folder = weights_folder(os.path.expanduser(lora.lora_path))
        files = []
        for name in sorted(os.listdir(folder)):
            found = os.stat(os.path.join(folder, name))
            files.append([name, found.st_size, found.st_mtime_ns, found.st_ino])
        known = self._known.get(lora.lora_int_id)
        if known is not None:
            if known[:2] == (folder, files):
                return known[2]
            # vLLM may have either in memory: it reads them again when it needs the adapter again.
            logger.warning("nvtier: adapter %s (%s) is not what it was: requests with it are computed and not stored", lora.lora_name, folder)
            return None
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            described = json.load(file)
        digest = kv.fingerprint(weights=weights_digest(folder), config=described, dtype=self._dtype)
        self._known[lora.lora_int_id] = (folder, files, digest)
        return digest
