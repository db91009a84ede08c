"""Full fine-tuning of models that are larger than the memory of the device, and than the host's: weights, gradients and the optimizer's state lie in a pool,
and are on the device when they are used. The numbers are plain PyTorch's, bit for bit.

::

    model = AutoModelForCausalLM.from_pretrained(path)
    model.gradient_checkpointing_enable()
    with nvtier.Pool("/mnt/nvme/pool") as pool:
        model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, run="first", lr=1e-5, precision="mixed", vram="20GiB", ram="32GiB")
        for batch in batches:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.save_pretrained("fine-tuned")
        optimizer.close()

What is in the pool is the checkpoint: after a crash, ``offload(..., resume=True)`` goes on after the last step that was committed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._offload import offload, plan, remove
    from ._optimizer import Optimizer
    from ._trainer import adapt

__all__ = ["Optimizer", "adapt", "offload", "plan", "remove"]

#: Where each name is: torch is imported with the first of them, and mistakes in files of a training are told before.
_NAMES = {"Optimizer": "_optimizer", "adapt": "_trainer", "offload": "_offload", "plan": "_offload", "remove": "_offload"}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value
