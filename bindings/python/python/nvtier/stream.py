"""Inference of models that are larger than the device's memory: weights lie in a pool, a part of them in pinned host memory, and are on the device when they are used.

::

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = nvtier.stream.offload(model, pool="/mnt/nvme/pool", name="llama-3b", vram="2GiB", ram="4GiB")
    model.generate(...)

A block (layer) is fetched while the one before it computes. ``load`` takes a model whose weights are in the pool already, without having them in memory.

Keys and values of a long context need not be on the device either::

    with nvtier.stream.Cache(model, vram="4GiB", ram="16GiB") as cache:
        model.generate(..., past_key_values=cache)
"""

from __future__ import annotations

import json
import os
import weakref
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Tuple, Union

import torch

from . import _nvtier
from ._experts import Experts, Layer, find_layers
from ._errors import InvalidArgument, NoSpace, NotFound, NotSupported, OutOfDeviceMemory
from ._meta import leave_meta, prepare
from ._nvtier import Pool
from ._sizes import size_of
from .kv import digest_tensors
from .train._blocks import Block, find_blocks, take_apart
from .train._manager import Manager
from .train._offload import _block_bytes, _device, _move_buffers, _number, _pool_of, _ram_share, _state_name, _take_in, _unit_bytes
from .train._optimizer import check_layout, describe

if TYPE_CHECKING:
    from ._context import Cache

__all__ = ["Cache", "close", "load", "offload", "remove", "stats"]

_FORMAT = 1
_PoolLike = Union[str, "os.PathLike[str]", Pool]


def __getattr__(name: str) -> Any:
    # Models need not be of transformers.
    if name != "Cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._context import Cache

    globals()[name] = Cache
    return Cache


def offload(
    model: torch.nn.Module,
    *,
    pool: _PoolLike,
    name: str,
    vram: Union[None, int, str] = None,
    ram: Union[int, str] = 0,
    device: Union[None, str, torch.device] = None,
    blocks: Optional[Iterable[torch.nn.Module]] = None,
    deadline: float = 60.0,
) -> torch.nn.Module:
    """Takes the model's weights into the pool, under ``name``, where it does not have these very weights already, and returns the model, whose weights come and go.

    ``vram``: bytes of weights on the device at a time; None: no limit. ``ram``: bytes of pinned host memory that keep a part of them. Both are hard.
    ``blocks``: the modules that stream; default: the layers, and what is about as large.

    Experts of mixture-of-experts layers, where transformers keeps those of a layer in one tensor, come one by one when a token is routed to them; the device's
    room that the rest leaves keeps the ones that were used last.
    """
    if any(param.is_meta for param in model.parameters()):
        raise InvalidArgument("offload of a model on the meta device: it has no weights; load() takes those that the pool has")
    digest = digest_tensors(dict(model.named_parameters())).hex()
    return _stream(model, pool, name, vram, ram, device, blocks, deadline, digest)


def load(
    model: torch.nn.Module,
    *,
    pool: _PoolLike,
    name: str,
    vram: Union[None, int, str] = None,
    ram: Union[int, str] = 0,
    device: Union[None, str, torch.device] = None,
    blocks: Optional[Iterable[torch.nn.Module]] = None,
    deadline: float = 60.0,
) -> torch.nn.Module:
    """As :func:`offload`, of weights that were offloaded under that name before; those that the model has are not looked at, and may be on the meta device. (So may buffers of
    a transformers model, which its class makes again; of others they must not: ``accelerate.init_empty_weights()`` makes such a model.)"""
    prepare(model)
    return _stream(model, pool, name, vram, ram, device, blocks, deadline, None)


def remove(pool: _PoolLike, name: str) -> bool:
    """Removes a model's weights from a pool. False: it has none of that name."""
    return _nvtier.State.remove(_pool_of(pool), _state_name("name", name, "stream"))


def _manager(model: torch.nn.Module) -> Manager:
    manager: Optional[Manager] = getattr(model, "_nvtier_stream", None)
    if manager is None:
        raise InvalidArgument("this model was not offloaded by nvtier.stream")
    return manager


def close(model: torch.nn.Module) -> None:
    """Gives memory and pool back, and closes its caches; the weights stay in the pool, and the model is of no use any more. Once more is fine."""
    manager = _manager(model)
    for cache in list(model.__dict__.get("_nvtier_caches", ())):
        cache.close()
    for block in manager.blocks:
        block.keep = False
    manager.drop_all()
    manager.detach(closed=True)
    if manager.experts is not None:
        manager.experts.close()
    manager.state.close()
    if manager.closes is not None:
        manager.closes.close()
        manager.closes = None


def stats(model: torch.nn.Module) -> Dict[str, Any]:
    """Bytes moved since it was offloaded, by tier, and what is on the device now and was at most; with ``experts``, how often one was on the device when it was
    needed, where the model has some."""
    manager = _manager(model)
    found = {**manager.state.moved(), "device_bytes": manager.device_bytes, "device_peak_bytes": manager.device_peak}
    if manager.experts is not None:
        found["experts"] = manager.experts.stats()
    return found


def _stream(
    model: torch.nn.Module,
    pool: _PoolLike,
    name: str,
    vram: Union[None, int, str],
    ram: Union[int, str],
    device: Union[None, str, torch.device],
    blocks: Optional[Iterable[torch.nn.Module]],
    deadline: float,
    digest: Optional[str],
) -> torch.nn.Module:
    if getattr(model, "_nvtier_stream", None) is not None or getattr(model, "_nvtier_optimizer", None) is not None:
        raise InvalidArgument("this model is offloaded already")
    # Weights that the pool has come from nowhere else.
    otherwise = next((param.device for param in model.parameters() if digest is not None), torch.device("cpu"))
    where = _device("nvtier.stream", device, otherwise)
    vram_bytes, ram_bytes = size_of("vram", vram), size_of("ram", ram) or 0
    model.requires_grad_(False)
    expert_layers = find_layers(model)
    found_blocks = find_blocks(model, blocks)
    leave_meta(model, where)
    listed, rest = take_apart(model, found_blocks, "fp32", False)
    every = [rest, *listed]
    sizes = {block: _size(block) for block in every}
    expert_bytes = max((layer.bytes for layer in expert_layers), default=0)
    # One computes while another one comes.
    least = sizes[rest] + max((sizes[block] for block in listed), default=0) + 2 * expert_bytes
    if vram_bytes is not None and vram_bytes < least:
        raise OutOfDeviceMemory(
            f"vram={vram_bytes} bytes: this model needs at least {least}, which is its largest block, two experts where it has some, and what does not stream"
        )
    left = _keep(listed, sizes, rest, vram_bytes, 2 * expert_bytes)

    opened = _pool_of(pool)
    state_name = _state_name("name", name, "stream")
    found = _nvtier.State.look(opened, state_name)
    meta = None if found is None else json.loads(found[1])
    if digest is None and meta is None:
        raise NotFound(f"load the weights {name!r}: the pool has none of that name")
    if digest is not None and meta is not None and meta.get("digest") != digest:
        # Others, or not whole: they are not the model's.
        _nvtier.State.remove(opened, state_name)
        found = meta = None
    lens = [_unit_bytes(block, plane) for block in every for plane in block.layout.planes()]
    expert_lens = [layer.bytes for layer in expert_layers for _ in range(layer.count)]
    lens += expert_lens
    block_bytes = found[0] if found is not None else _block_bytes(lens)
    budget = _nvtier.State.room_for(lens, 0, block_bytes)
    free = int(opened.stat()["free_bytes"])
    if found is None and budget > free:
        raise NoSpace(f"the weights need {budget} bytes of the pool, and {free} are free")
    share, share_bytes = _ram_share(every, ram_bytes, block_bytes)
    in_ram = _experts_in_ram(expert_layers, ram_bytes - share_bytes, block_bytes)
    share_bytes += len(in_ram) * _slots_of(expert_bytes, block_bytes)
    state = _nvtier.State(opened, name=state_name, budget=budget, block_bytes=block_bytes, ram=share_bytes, deadline=deadline)
    try:
        if not _number(state, every, share, fresh=found is None, others=expert_lens):
            raise InvalidArgument(f"the weights {name!r} in the pool are of another model")
        manager = Manager(state, listed, rest, where, vram_bytes, write_at_once=True)
        manager.cyclic = True
        if expert_layers:
            count = len(expert_lens) if left is None else min(len(expert_lens), left // expert_bytes)
            manager.experts = Experts(expert_layers, state, where, count)
            manager.experts.number(len(lens) - len(expert_lens))
            manager.count_bytes(count * expert_bytes)
            for layer, expert in in_ram:
                state.keep_in_ram(layer.first + expert)
        layout = describe(every, manager) + [layer.describe() for layer in expert_layers]
        if meta is not None:
            check_layout(meta["layout"], layout)
        for block in every:
            _take_in(manager, block, fresh=meta is None)
        if meta is None:
            if manager.experts is not None:
                manager.experts.take_in()
            state.commit(json.dumps({"format": _FORMAT, "layout": layout, "digest": digest}).encode()).wait()
    except BaseException:
        state.close()
        raise
    _move_buffers(model, where)
    manager.attach()
    if manager.experts is not None:
        manager.experts.attach()
    for block in listed:
        assert block.module is not None
        block.module._register_state_dict_hook(_refuse_state_dict)
    manager.closes = None if opened is pool else opened
    model._nvtier_stream = manager  # type: ignore[assignment]
    #: Where its caches are, and which there are.
    model.__dict__["_nvtier_pool"], model.__dict__["_nvtier_caches"] = opened, weakref.WeakSet()
    return model.eval()


def _size(block: Block) -> int:
    return sum(_unit_bytes(block, plane) for plane in block.layout.planes())


def _keep(listed: List[Block], sizes: Dict[Block, int], rest: Block, vram: Optional[int], least_experts: int) -> Optional[int]:
    """Blocks that stay on the device: as many as leave room for the largest other one twice, and for experts. What goes round in a circle gains nothing from
    keeping the latest. Returns the room that is left for experts, which not every token needs; None: no limit."""
    if vram is None:
        for block in listed:
            block.keep = True
        return None
    largest = max((sizes[block] for block in listed), default=0)
    left = vram - sizes[rest] - least_experts - 2 * largest
    for block in listed:
        if sizes[block] <= left:
            block.keep = True
            left -= sizes[block]
    if all(block.keep for block in listed):
        left += 2 * largest
    return least_experts + max(left, 0)


def _slots_of(bytes: int, block_bytes: int) -> int:
    """Host memory that a unit takes."""
    return -(-bytes // block_bytes) * (-(-block_bytes // 4096) * 4096)


def _experts_in_ram(layers: List[Layer], ram: int, block_bytes: int) -> List[Tuple[Layer, int]]:
    """Experts that are kept in host memory, as many of one layer as of another."""
    kept: List[Tuple[Layer, int]] = []
    for expert in range(max((layer.count for layer in layers), default=0)):
        for layer in layers:
            bytes = _slots_of(layer.bytes, block_bytes)
            if expert < layer.count and bytes <= ram:
                kept.append((layer, expert))
                ram -= bytes
    return kept


def _refuse_state_dict(module: torch.nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
    raise NotSupported("state_dict() of a model that nvtier.stream offloaded: its weights are in the pool")
