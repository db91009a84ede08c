"""``import nvtier.patch``: safetensors' ``safe_open`` and ``safetensors.torch.load_file`` load through nvtier from then on, and so do
transformers' ``from_pretrained`` and whatever else calls them.

Other ways in: ``NVTIER_PATCH=1`` in the environment of any Python with nvtier installed, or ``python -m nvtier.patch script.py``.
``undo()`` takes it back; ``calls()`` counts what nvtier served. Files that do not end in ``.safetensors``, frameworks other than
PyTorch, and devices other than the host and CUDA are left to safetensors itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Tuple

_MISSING = object()
_PT = ("pt", "torch", "pytorch")

_lock = threading.RLock()
_counts: Dict[str, int] = {"load_file": 0, "safe_open": 0, "tensors": 0, "left": 0}
_replaced: List[Tuple[ModuleType, str, Any, Any]] = []
_originals: Dict[str, Any] = {}
_active = False


def calls() -> Dict[str, int]:
    """How often nvtier served ``load_file`` and ``safe_open``, tensors it loaded for the latter, and calls left to safetensors."""
    with _lock:
        return dict(_counts)


def count(what: str) -> None:
    """One more."""
    with _lock:
        _counts[what] += 1


def _ours(filename: Any, framework: Any, device: Any) -> bool:
    if not _active or framework not in _PT or not isinstance(filename, (str, os.PathLike)):
        return False
    if not os.fspath(filename).lower().endswith(".safetensors"):
        return False
    # A number is a GPU's; torch.device prints as its name.
    name = "cuda" if isinstance(device, int) else str(device)
    return name.split(":")[0] in ("cpu", "cuda")


class safe_open:
    """``safetensors.safe_open``, by nvtier where nvtier can."""

    def __new__(cls, filename: Any, framework: Any, device: Any = "cpu", *, backend: Any = _MISSING) -> Any:
        if not _ours(filename, framework, device):
            count("left")
            options = {} if backend is _MISSING else {"backend": backend}  # older versions know none
            return _originals["safe_open"](filename, framework, device, **options)
        from . import _patched

        count("safe_open")
        return _patched.SafeOpen(filename, framework, device)


def load_file(filename: Any, device: Any = "cpu", *, backend: Any = _MISSING) -> Any:
    """``safetensors.torch.load_file``, by nvtier where nvtier can."""
    if not _ours(filename, "pt", device):
        count("left")
        options = {} if backend is _MISSING else {"backend": backend}
        return _originals["load_file"](filename, device, **options)
    from . import _patched

    count("load_file")
    return _patched.load_file(filename, device)


def _set(module: ModuleType, attribute: str, value: Any) -> None:
    _replaced.append((module, attribute, getattr(module, attribute), value))
    setattr(module, attribute, value)


def _everywhere(original: Any, value: Any) -> None:
    """In every module that has imported the original by name already."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.startswith(("nvtier", "safetensors._")):
            continue
        for attribute, there in list(vars(module).items()):
            if there is original:
                _set(module, attribute, value)


def _patch_safetensors(module: ModuleType) -> None:
    _originals["safe_open"] = module.safe_open
    _everywhere(module.safe_open, safe_open)


def _patch_safetensors_torch(module: ModuleType) -> None:
    _originals["load_file"] = module.load_file
    _everywhere(module.load_file, load_file)


def _patch_core_model_loading(module: ModuleType) -> None:
    # Where each tensor goes is known here, and only here: it is loaded there at once, without a stop on the host.
    original = getattr(module, "_materialize_copy", None)
    if original is None:
        return

    def materialize(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        from . import _patched

        if isinstance(tensor, _patched.Slice):
            return _patched.materialize(tensor, device, dtype)
        return original(tensor, device, dtype)

    _set(module, "_materialize_copy", materialize)


def _patch_modeling_utils(module: ModuleType) -> None:
    # It reserves in torch's allocator what the model will take; nvtier's tensors are not from there, and would not fit beside it.
    if hasattr(module, "caching_allocator_warmup"):
        _set(module, "caching_allocator_warmup", lambda *_, **__: None)


_PATCHES: Dict[str, Callable[[ModuleType], None]] = {
    "safetensors": _patch_safetensors,
    "safetensors.torch": _patch_safetensors_torch,
    "transformers.core_model_loading": _patch_core_model_loading,
    "transformers.modeling_utils": _patch_modeling_utils,
}
_waiting: Dict[str, Callable[[ModuleType], None]] = {}


class _Loader(importlib.abc.Loader):
    """A module's own loader, and after it the patch."""

    def __init__(self, inner: Any, patch: Callable[[ModuleType], None]) -> None:
        self._inner, self._patch = inner, patch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Optional[ModuleType]:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        with _lock:
            if _active:
                self._patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the modules that are to be patched when they are imported first."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        patch = _waiting.pop(name, None)
        if patch is None:
            return None
        # The name is out of the list: this does not come here again.
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        spec.loader = _Loader(spec.loader, patch)
        return spec


_finder = _Finder()


def apply() -> None:
    """Replaces them. Twice is as good as once."""
    global _active
    with _lock:
        if _active:
            return
        _active = True
        sys.meta_path.insert(0, _finder)
        for name, patch in _PATCHES.items():
            module = sys.modules.get(name)
            if module is not None:
                patch(module)
            else:
                _waiting[name] = patch


def undo() -> None:
    """Puts everything back. Files that are open stay nvtier's."""
    global _active
    with _lock:
        if not _active:
            return
        _active = False
        _waiting.clear()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        while _replaced:
            module, attribute, original, value = _replaced.pop()
            if getattr(module, attribute, _MISSING) is value:
                setattr(module, attribute, original)
        # Modules that were imported meanwhile have them by name.
        for name, ours in (("safe_open", safe_open), ("load_file", load_file)):
            if name in _originals:
                _everywhere(ours, _originals[name])
        _replaced.clear()


def _main() -> None:
    import runpy

    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit("usage: python -m nvtier.patch SCRIPT [ARGUMENT...]\n       python -m nvtier.patch -m MODULE [ARGUMENT...]")
    # This module runs as __main__; the patch is in the one that has its own name.
    importlib.import_module("nvtier.patch")
    if arguments[0] == "-m" and len(arguments) > 1:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main()
else:
    apply()
