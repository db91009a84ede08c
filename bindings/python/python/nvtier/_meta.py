"""Models on the meta device: parameters without memory, buffers, and weights that are read from their files a block at a time."""

from __future__ import annotations

import copy
import os
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Union

import torch

from . import _nvtier, _paths
from ._errors import InvalidArgument, Malformed, NotFound, NotSupported
from .train._blocks import Block
from .train._manager import nothing


def empty_parameters() -> Any:
    """A context in which models are made with parameters on the meta device and real buffers: accelerate's."""
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise NotSupported("a model without weights is made with accelerate, which is not installed: pip install accelerate") from None
    return init_empty_weights(include_buffers=False)


def prepare(model: torch.nn.Module) -> None:
    """Of a model that is on the meta device: has weights tied that are one (accelerate makes each anew), and gives buffers that are there the values that the model's class
    makes, as they are in no file."""
    tie = getattr(model, "tie_weights", None)
    if tie is not None and any(param.is_meta for param in model.parameters()):
        tie()
    lacking = [key for key, buffer in model.named_buffers() if buffer.is_meta]
    if not lacking:
        return
    make = getattr(type(model), "_from_config", None)
    if make is None:
        raise InvalidArgument(
            f"the buffer {lacking[0]} is on the meta device, and only models of transformers are known to make theirs again: "
            "make the model with accelerate.init_empty_weights()"
        )
    with torch.random.fork_rng(devices=[]), empty_parameters():
        twin = make(copy.deepcopy(model.config))
    theirs = dict(twin.named_modules())
    for name, module in model.named_modules():
        other = theirs.get(name)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                made = None if other is None else other._buffers.get(key)
                if made is None or made.shape != buffer.shape:
                    raise InvalidArgument(
                        f"the buffer {name}.{key} is on the meta device, and the model's configuration makes another model: "
                        "make the model with accelerate.init_empty_weights()"
                    )
                module._buffers[key] = made.to(buffer.dtype)
        for key, value in vars(module).items():
            # Some keep one of their buffers under another name, too.
            if isinstance(value, torch.Tensor) and value.is_meta and isinstance(getattr(other, key, None), torch.Tensor):
                module.__dict__[key] = getattr(other, key)


def leave_meta(model: torch.nn.Module, device: torch.device, blocks: Iterable[Block] = ()) -> Dict[torch.nn.Parameter, torch.nn.Parameter]:
    """Parameters on the meta device become such with a shape and no memory on the device. Which became which; ``blocks`` that were made of the model have the new ones."""
    made: Dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, param in module._parameters.items():
            if param is not None and param.is_meta:
                if param not in made:
                    blank = nothing(param.dtype, device).expand(param.shape)
                    made[param] = torch.nn.Parameter(blank, requires_grad=param.requires_grad)
                module._parameters[key] = made[param]
    for block in blocks:
        for entry in block.params:
            entry.param = made.get(entry.param, entry.param)
    return made


class _Found(NamedTuple):
    file: str
    shape: List[int]


class Weights:
    """Of the parameters of a model that are on the meta device, in the safetensors files of a folder in Hugging Face's layout."""

    def __init__(self, model: torch.nn.Module, folder: Union[str, "os.PathLike[str]"]) -> None:
        self.folder = os.fspath(folder)
        self._tensors: Dict[str, _Found] = {}
        if not os.path.exists(self.folder):
            raise NotFound(f"take weights from {self.folder}: there is no such folder")
        for file in _paths.resolve(self.folder):
            if not file.endswith(".safetensors"):
                raise NotSupported(f"take weights from {file}: safetensors files are supported")
            opened = _nvtier.TensorFile([file])
            for name in opened.keys():
                self._tensors[name] = _Found(file, list(opened.info(name).shape))
        prefix = getattr(model, "base_model_prefix", "")
        names: Dict[torch.nn.Parameter, List[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            if param.is_meta:
                names.setdefault(param, []).append(name)
        #: Tensors that are a parameter: several where the files have a tied one more than once.
        self._of: Dict[torch.nn.Parameter, List[str]] = {}
        lacking = []
        for param, known in names.items():
            found = [key for name in known if (key := self._key(name, prefix)) is not None]
            if not found:
                lacking.append(known[0])
            for key in found:
                if self._tensors[key].shape != list(param.shape):
                    raise Malformed(f"take weights from {self.folder}: {key} is {self._tensors[key].shape}, and the model's is {list(param.shape)}")
            self._of[param] = found
        if lacking:
            raise Malformed(
                f"take weights from {self.folder}: its files lack {len(lacking)} weights of the model, {', '.join(lacking[:3])} first. What has to be "
                "initialised, or is made of several tensors (as transformers does for some models), is for from_pretrained: load the model before"
            )
        self._buffers(model, prefix)

    def _key(self, name: str, prefix: str) -> Optional[str]:
        """What a parameter is called in the files, which may be those of the model below a head, or of one above it."""
        for key in (name, name[len(prefix) + 1 :] if prefix and name.startswith(prefix + ".") else None, f"{prefix}.{name}" if prefix else None):
            if key is not None and key in self._tensors:
                return key
        return None

    def _buffers(self, model: torch.nn.Module, prefix: str) -> None:
        """Those that belong to the model's state."""
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                key = self._key(f"{path}.{name}" if path else name, prefix)
                if buffer is not None and key is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = self._load([key])[key].to(buffer.dtype)

    def moved(self, made: Dict[torch.nn.Parameter, torch.nn.Parameter]) -> None:
        """Parameters were replaced by others."""
        for old, new in made.items():
            if old in self._of:
                self._of[new] = self._of.pop(old)

    def fill(self, block: Block) -> None:
        """Loads a block's parameters to the host."""
        wanted = {entry.param: self._of[entry.param] for entry in block.params if entry.param in self._of}
        tensors = self._load([key for keys in wanted.values() for key in keys])
        for param, keys in wanted.items():
            for other in keys[1:]:
                if not torch.equal(tensors[keys[0]], tensors[other]):
                    raise Malformed(f"take weights from {self.folder}: {keys[0]} and {other} are one weight of the model, and differ in the files")
            param.data = tensors[keys[0]].to(param.dtype)

    def _load(self, names: List[str]) -> Dict[str, torch.Tensor]:
        from .torch import load_file

        if not names:
            return {}
        files = sorted({self._tensors[name].file for name in names})
        return load_file(files, filters=names)
