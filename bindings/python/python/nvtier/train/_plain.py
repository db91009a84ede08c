"""Training without tiers, for models that fit: torch's own AdamW, with the methods that ``nvtier.train.offload``'s optimizer has.

The loop knows either only by these: ``step``, ``zero_grad`` and ``param_groups`` of any optimizer, and

- ``clip_grad_norm_(max_norm)``: the norm, as a tensor;
- ``commit(extra)``: makes the step that was made durable together with ``extra``, which JSON can hold;
- ``resumed``: None, or the ``extra`` of the commit that is gone on from;
- ``stats()``: bytes by tier;
- ``save_pretrained(folder)``: what ``model.save_pretrained(folder)`` writes;
- ``close()``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
from typing import Any, Dict, List, Optional, Tuple

import torch

from .._errors import Corrupt, Error, InvalidArgument, NoSpace, NotFound, PoolBusy

_FOLDER = "nvtier-train"
_FORMAT = 1


def plain(
    model: torch.nn.Module,
    *,
    pool: str,
    run: str,
    precision: str = "mixed",
    resume: bool = True,
    lr: float,
    betas: Tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tuple[torch.nn.Module, "PlainAdamW"]:
    """Model and optimizer as ``nvtier.train.offload`` gives them, all of it in the memory of the device; state goes to a file below ``pool``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision not in ("mixed", "bf16", "fp32"):
        raise InvalidArgument(f"precision must be mixed, bf16 or fp32, not {precision}")
    working = torch.float32 if precision == "fp32" else torch.bfloat16
    masters: List[torch.Tensor] = []
    for parameter in model.parameters():
        if precision == "mixed" and parameter.requires_grad:
            # Of the checkpoint's own precision, before it is rounded.
            masters.append(parameter.detach().to(device, torch.float32, copy=True))
        # Not model.to(): buffers, such as frequencies of rotary embeddings, keep their type.
        parameter.data = parameter.data.to(working)
    model.to(device)
    state = os.path.join(pool, _FOLDER, run)
    return model, PlainAdamW(model, masters, state, resume, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class PlainAdamW(torch.optim.AdamW):
    """Fused AdamW on parameters, or on fp32 masters that bf16 parameters follow. Gradients of several backward passes are summed in the masters' type."""

    def __init__(self, model: torch.nn.Module, masters: List[torch.Tensor], state_path: str, resume: bool, **options: Any) -> None:
        self._model = model
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not self._named:
            raise InvalidArgument("the model has no parameter that is trained")
        self._parameters = [parameter for _, parameter in self._named]
        self._masters = masters
        super().__init__(masters or self._parameters, fused=True, **options)
        for parameter, master in zip(self._parameters, masters):
            parameter.register_post_accumulate_grad_hook(_into(master))
        self._path = state_path + ".pt"
        self._lock = _lock(state_path + ".lock")
        #: The ``extra`` of the commit that is gone on from.
        self.resumed: Optional[Dict[str, Any]] = None
        for left in (self._path + ".part", *([] if resume else [self._path])):
            if os.path.exists(left):
                os.remove(left)
        if os.path.exists(self._path):
            self.resumed = self._load()

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters):
                parameter.copy_(master)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._masters:
            for parameter in self._parameters:
                parameter.grad = None

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales gradients to a global norm of at most ``max_norm``."""
        return torch.nn.utils.clip_grad_norm_(self._masters or self._parameters, max_norm)

    def commit(self, extra: Dict[str, Any]) -> None:
        """Writes all state, whole or not at all: another file takes the old one's name once it is on the drive."""
        state = {
            "format": _FORMAT,
            "extra": json.dumps(extra),
            "names": [name for name, _ in self._named],
            "weights": [tensor.detach() for tensor in self._masters or self._parameters],
            "buffers": self._buffers(),
            "optimizer": self.state_dict(),
        }
        part = self._path + ".part"
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            if os.path.exists(part):
                os.remove(part)
            # torch covers the error of a write by its own of an archive that was not closed.
            cause: Optional[BaseException] = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if isinstance(error, Exception) and cause is not None:
                kind = NoSpace if cause.errno in (errno.ENOSPC, errno.EDQUOT) else Error
                raise kind(f"write {part}: {cause.strerror}; the state of the commit before is still there") from error
            raise
        os.replace(part, self._path)
        _sync_folder(os.path.dirname(self._path))

    def stats(self) -> Dict[str, int]:
        """Bytes by tier."""
        device = self._parameters[0].device
        # Weights, masters and states; what is computed with is not to be seen from here on a host.
        held = sum(tensor.numel() * tensor.element_size() for tensor in (*self._model.parameters(), *self._model.buffers(), *self._masters))
        for state in self.state.values():
            held += sum(tensor.numel() * tensor.element_size() for tensor in state.values() if torch.is_tensor(tensor))
        on_gpu = device.type == "cuda"
        return {
            "vram": torch.cuda.memory_allocated(device) if on_gpu else 0,
            "ram": 0 if on_gpu else held,
            "nvme": os.path.getsize(self._path) if os.path.exists(self._path) else 0,
        }

    def state_bytes(self) -> int:
        """About how many bytes a commit writes."""
        weights = self._masters or self._parameters
        return sum(3 * tensor.numel() * tensor.element_size() for tensor in weights)

    def save_pretrained(self, folder: str) -> None:
        """As the model's own."""
        self._model.save_pretrained(folder)

    def save_state(self, path: str) -> None:
        """AdamW's state alone, for another run to begin with (``load_state``)."""
        torch.save({"format": _FORMAT, "names": [name for name, _ in self._named], "optimizer": self.state_dict()}, path)

    def load_state(self, path: str) -> None:
        """What ``save_state`` wrote. Rates and other options stay those of this run."""
        state = _read(path)
        self._same_names(path, state)
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        self.load_state_dict(state["optimizer"])
        for group, own in zip(self.param_groups, options):
            group.update(own)

    def close(self) -> None:
        """Lets another process have the run."""
        self._lock.close()

    def _buffers(self) -> Dict[str, torch.Tensor]:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return {name: tensor for name, tensor in self._model.state_dict().items() if name not in parameters}

    def _load(self) -> Dict[str, Any]:
        state = _read(self._path)
        self._same_names(self._path, state)
        with torch.no_grad():
            for tensor, saved in zip(self._masters or self._parameters, state["weights"]):
                tensor.copy_(saved)
            for parameter, master in zip(self._parameters, self._masters):
                parameter.copy_(master)
        self._model.load_state_dict(state["buffers"], strict=False)
        self.load_state_dict(state["optimizer"])
        return json.loads(state["extra"])

    def _same_names(self, path: str, state: Dict[str, Any]) -> None:
        if state["names"] != [name for name, _ in self._named]:
            raise InvalidArgument(f"go on from {path}: it is of a model with other parameters")


def _read(path: str) -> Dict[str, Any]:
    if not os.path.exists(path):
        raise NotFound(f"read {path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise InvalidArgument(f"read {path}: it is of format {state['format']}, this version knows {_FORMAT}")
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, OSError, pickle.UnpicklingError) as error:
        if isinstance(error, InvalidArgument):
            raise
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Corrupt(f"read {path}: it is damaged or no state of a training ({text}); --fresh starts without it") from error
    return state


def _into(master: torch.Tensor) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient

    return hook


def _lock(path: str) -> Any:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise PoolBusy(f"lock {path}: another process trains this run; wait for it, or name another one with --run") from None
    return file


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
