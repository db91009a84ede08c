"""What ``nvtier.patch`` puts in the place of safetensors' functions, once torch is needed."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, Optional, Tuple, Type

import torch
from safetensors import SafetensorError

from . import patch
from . import torch as _torch
from ._errors import Error

_CLASSES: Dict[type, Type[Error]] = {}


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors are caught as those of both libraries."""
    try:
        yield
    except Error as error:
        if isinstance(error, SafetensorError):
            raise
        kind = type(error)
        if kind not in _CLASSES:
            _CLASSES[kind] = type(kind.__name__, (kind, SafetensorError), {"__doc__": kind.__doc__, "__module__": "nvtier"})
        raise _CLASSES[kind](str(error)) from error


class Slice(_torch.TensorSlice):
    """A slice that counts and speaks of errors as both libraries do."""

    def _get(self, cut: Optional[Tuple[int, int, int]] = None) -> torch.Tensor:
        with _errors():
            tensor = super()._get(cut)
        patch.count("tensors")
        return tensor

    def on(self, device: Any) -> Slice:
        where, then = _torch._device(device)
        return Slice(self._file, self._name, where, then)


class SafeOpen(_torch.safe_open):
    """``safe_open`` for who expects the one of safetensors."""

    def __init__(self, filename: Any, framework: str, device: Any) -> None:
        with _errors():
            super().__init__(filename, framework, device)

    def _open(self) -> Any:
        with _errors():
            return super()._open()

    def get_slice(self, name: str) -> Slice:
        with _errors():
            return Slice(self._open(), name, self._where, self._then)

    def get_tensors(self) -> Dict[str, torch.Tensor]:
        with _errors():
            tensors = super().get_tensors()
        for _ in tensors:
            patch.count("tensors")
        return tensors


def load_file(filename: Any, device: Any) -> Dict[str, torch.Tensor]:
    """``safetensors.torch.load_file``."""
    with _errors():
        return _torch.load_file(filename, device)


def materialize(tensor: Slice, device: Any, dtype: Optional[torch.dtype]) -> torch.Tensor:
    """A whole tensor on its device, as a type."""
    if device is not None and not isinstance(device, bool):
        kind = "cuda" if isinstance(device, int) else str(device).split(":")[0]
        if kind in ("cpu", "cuda"):
            tensor, device = tensor.on(device), None
    loaded = tensor[...]
    return loaded if device is None and dtype is None else loaded.to(device=device, dtype=dtype)
