"""Training without tiers, for models that fit: torch's own AdamW, with the methods that ``nvtier.train.offload``'s optimizer has.

The loop knows either only by these: ``step``, ``zero_grad`` and ``param_groups`` of any optimizer, and

- ``clip_grad_norm_(max_norm)``: the norm, as a tensor;
- ``commit(extra, wait)``: makes the step that was made durable, sooner or later, together with ``extra``, which JSON can hold;
- ``resumed``: the ``extra`` of the commit that is gone on from; None, or an empty dict, where there was none;
- ``stats()``: bytes, by tier;
- ``weights()``: names and weights, on the host where they stream;
- ``save_pretrained(folder)``: the model in Hugging Face's layout;
- ``close()``; or ``__exit__`` with an error, after which the last commit counts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import torch

from .._errors import Corrupt, Error, Exists, InvalidArgument, NoSpace, NotFound, PoolBusy

_FOLDER = "nvtier-train"
_FORMAT = 1


def plain(
    model: torch.nn.Module, *, pool: str, run: str, precision: str, resume: Union[bool, str] = "auto", **options: Any
) -> Tuple[torch.nn.Module, "PlainAdamW"]:
    """Model and optimizer as ``nvtier.train.offload`` gives them, all of it in the memory of the device; state goes to a file below ``pool``."""
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != wanted:
            raise InvalidArgument(f"precision {precision} trains {wanted}, and {name} is {parameter.dtype}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, PlainAdamW(model, os.path.join(pool, _FOLDER, run), resume, **options)


def remove(pool: str, run: str) -> bool:
    """Forgets a run. False: there is none."""
    state = os.path.join(pool, _FOLDER, run)
    if not os.path.exists(state + ".pt"):
        return False
    with _lock(state + ".lock"):
        os.remove(state + ".pt")
    return True


class PlainAdamW(torch.optim.AdamW):
    """Fused AdamW, and a file with its state."""

    def __init__(self, model: torch.nn.Module, state_path: str, resume: Union[bool, str], **options: Any) -> None:
        self._model = model
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not self._named:
            raise InvalidArgument("the model has no parameter that is trained")
        self._parameters = [parameter for _, parameter in self._named]
        super().__init__(self._parameters, fused=True, **options)
        self._path = state_path + ".pt"
        self._lock = _lock(state_path + ".lock")
        #: The ``extra`` of the commit that is gone on from.
        self.resumed: Optional[Dict[str, Any]] = None
        if os.path.exists(self._path + ".part"):
            os.remove(self._path + ".part")
        there = os.path.exists(self._path)
        if resume is True and not there:
            raise NotFound(f"resume the run {os.path.basename(state_path)!r}: there is no {self._path}")
        if resume is False and there:
            raise Exists(f"begin a run: there is a {self._path} already")
        if there:
            self.resumed = self._load()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales gradients to a global norm of at most ``max_norm``."""
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)

    def commit(self, extra: Dict[str, Any], wait: bool = True) -> None:
        """Writes all state, whole or not at all: another file takes the old one's name once it is on the drive. It always waits."""
        state = {
            "format": _FORMAT,
            "extra": json.dumps(extra),
            "names": [name for name, _ in self._named],
            "weights": [tensor.detach() for tensor in self._parameters],
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
        # Weights and states; what is computed with is not to be seen from here on a host.
        held = sum(tensor.numel() * tensor.element_size() for tensor in (*self._model.parameters(), *self._model.buffers()))
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
        return sum(3 * tensor.numel() * tensor.element_size() for tensor in self._parameters)

    def weights(self) -> Iterator[Tuple[str, torch.Tensor]]:
        """All parameters by name."""
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach()

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

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _buffers(self) -> Dict[str, torch.Tensor]:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return {name: tensor for name, tensor in self._model.state_dict().items() if name not in parameters}

    def _load(self) -> Dict[str, Any]:
        state = _read(self._path)
        self._same_names(self._path, state)
        with torch.no_grad():
            for tensor, saved in zip(self._parameters, state["weights"]):
                tensor.copy_(saved)
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
