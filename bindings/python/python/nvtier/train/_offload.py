"""``nvtier.train.offload``: takes a model apart and into a pool."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch

from .. import _nvtier
from .._errors import Error, Exists, InvalidArgument, NoSpace, NotFound, NotSupported, OutOfDeviceMemory
from .._meta import Weights, leave_meta, prepare
from .._mounts import pool_mounted_at
from .._nvtier import Pool
from .._sizes import size_of
from ._blocks import Block, find_blocks, take_apart, weight_plane
from ._manager import Manager
from ._optimizer import Optimizer, describe
from ._planes import SPLIT, Place, low_parts, seen, split
from ._ranks import Alone, Found, Ranks, parts_of, ranks_of
from ._spill import ACTIVATIONS, Spill, room_in

#: Blocks that a plane is cut into are of up to this many bytes.
_BLOCK_MOST = 4 << 20
_BLOCK_LEAST = 64 << 10


def offload(
    model: torch.nn.Module,
    optimizer_class: type = torch.optim.AdamW,
    *,
    pool: Union[str, "os.PathLike[str]", Pool],
    run: str = "run",
    precision: str = "fp32",
    vram: Union[None, int, str] = None,
    ram: Union[int, str] = 0,
    device: Union[None, str, torch.device] = None,
    blocks: Optional[Iterable[torch.nn.Module]] = None,
    param_groups: Optional[Sequence[Dict[str, Any]]] = None,
    accumulate: bool = True,
    step_in: str = "forward",
    commit_every: int = 1,
    resume: Union[bool, str] = False,
    deadline: float = 60.0,
    group: Any = None,
    activations: Union[None, int, str] = None,
    activations_ram: Union[int, str] = 0,
    weights: Union[None, str, "os.PathLike[str]"] = None,
    **options: Any,
) -> Tuple[torch.nn.Module, Optimizer]:
    """Takes the model's parameters into the pool, and returns the model and the optimizer that trains it there.

    ``optimizer_class``: ``torch.optim.AdamW``, with its ``options`` (the kernels are those of ``fused=True``).
    ``pool``: a pool, its path, or where it is mounted. ``run``: a name; what the pool holds of it is the run's checkpoint. ``resume``: ``True`` goes on with it, ``"auto"`` where there is one.
    ``precision``: ``fp32``; ``bf16`` (weights and state); ``mixed`` (float32 weights under ``torch.autocast``).
    ``vram``: bytes on the device for weights, gradients and state (activations and what PyTorch needs come on top); None: no limit.
    ``ram``: bytes of host memory, pinned, that keep a part of it; a number or ``"32GiB"``.
    ``blocks``: modules that stream; default: the layers of the model, and large embeddings and heads.
    ``accumulate``: whether gradients of several micro-batches are added up; False saves 2 bytes a weight in ``mixed``.
    ``step_in``: ``forward``, when a block is used next: exact clipping, any number of micro-batches. ``backward``, as soon as its gradients are there: without
    clipping and with one micro-batch a step, gradients never leave the device, and state moves while the backward pass computes; the run takes twice its
    state's space in the pool.
    ``commit_every``: steps from one durable commit to the next. With more than 1 a crash costs up to so many steps, what is in the RAM share is written
    with a commit only and takes twice its space in the pool, and the rest up to three times.
    ``group``: a process group of ``torch.distributed``; default: all processes, where it is initialised. Each rank calls this, has an equal part of all
    state in its pool (or in the one that they share), and trains with micro-batches of its own; gradients are their mean.
    ``activations``: where inputs of blocks wait for the backward pass: None: on the device; ``"pool"``, or so many bytes of it at most (``"64GiB"``); with
    ``activations_ram``, in so much pinned host memory first. For models with (non-reentrant) gradient checkpointing.
    ``weights``: of a model that was made on the meta device (``with torch.device("meta")``), the folder with its safetensors files: they go into the pool a block at a
    time, and the model is never in memory as a whole. A run that is gone on with has them already.
    """
    if optimizer_class is not torch.optim.AdamW:
        raise NotSupported(f"nvtier.train: {getattr(optimizer_class, '__name__', optimizer_class)}; torch.optim.AdamW is supported")
    if precision not in ("fp32", "bf16", "mixed"):
        raise InvalidArgument(f"precision={precision!r}: fp32, bf16 or mixed")
    if step_in not in ("forward", "backward"):
        raise InvalidArgument(f"step_in={step_in!r}: forward or backward")
    passing = step_in == "backward"
    accumulate &= not passing
    if commit_every < 1:
        raise InvalidArgument(f"commit_every={commit_every}: steps, 1 or more")
    if resume not in (True, False, "auto"):
        raise InvalidArgument(f"resume={resume!r}: True, False or 'auto'")
    if getattr(model, "_nvtier_optimizer", None) is not None:
        raise InvalidArgument("this model is offloaded already")
    defaults = _defaults(model, optimizer_class, options)
    where = _device("nvtier.train", device, next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu")))
    on_meta = any(param.is_meta for param in model.parameters())
    if weights is not None and not on_meta:
        raise InvalidArgument("weights=...: this model has weights already; the folder is for a model that was made on the meta device")
    ram_bytes, vram_bytes = size_of("ram", ram) or 0, size_of("vram", vram)
    spill_ram = size_of("activations_ram", activations_ram) or 0
    if activations != "pool":
        size_of("activations", activations)
    if activations is None and spill_ram:
        raise InvalidArgument("activations_ram without activations: activations='pool' moves them out of the device's memory, activations=0 to host memory only")
    ranks = ranks_of(group, where)
    if passing and ranks.world > 1:
        raise NotSupported("nvtier.train: step_in='backward' with several ranks, whose gradients are summed first; use step_in='forward'")
    opened = ranks.together(lambda: _pool_of(pool))
    name = ranks.together(lambda: _run_name(run))
    found = ranks.find(opened, name, run)
    if found is None and resume is True:
        raise NotFound(f"resume the run {run!r}: the pool has none of that name")
    if found is not None and resume is False:
        raise Exists(f"the pool has a run {run!r} already: resume=True goes on with it, nvtier.train.remove(pool, {run!r}) removes it")
    if on_meta and weights is None and found is None:
        raise InvalidArgument("nvtier.train: a model on the meta device has no weights to begin with: name the folder of its files, weights=..., or load it on the host first")

    def from_files() -> Optional[Weights]:
        prepare(model)
        return None if weights is None or found is not None else Weights(model, weights)

    source = ranks.together(from_files)

    def apart() -> Tuple[List[Block], Block]:
        listed, rest = take_apart(model, find_blocks(model, blocks), precision, accumulate, passing, ranks.rank, ranks.world)
        if not any(entry.trainable for block in [rest, *listed] for entry in block.params):
            raise InvalidArgument("this model has no trainable parameters")
        least = _least_device_bytes(listed, rest)
        if vram_bytes is not None and vram_bytes < least:
            raise OutOfDeviceMemory(
                f"vram={vram_bytes} bytes: this model needs at least {least}, which is its largest block with all of its state, and what does not stream"
            )
        return listed, rest

    listed, rest = ranks.together(apart)
    every = [rest, *listed]
    made = leave_meta(model, where, every)
    if source is not None:
        source.moved(made)
    if made and param_groups is not None:
        param_groups = [{**group, "params": _replaced(group["params"], made)} for group in param_groups]
    lens = [_unit_bytes(block, plane) for block in every for plane in block.layout.planes()]
    block_bytes = found.block_bytes if found is not None else _block_bytes(lens)
    largest = max(sum(_unit_bytes(block, plane) for plane in block.layout.planes()) for block in every)
    slack = max(2 * largest, sum(lens) // 16) if commit_every == 1 else sum(lens)
    share, share_bytes = _ram_share(every, ram_bytes, block_bytes)
    if passing:
        # A step is written beside the one before it, whose commit is waited for.
        extra = sum(lens)
    elif commit_every == 1:
        # Another commit is on its way while new versions are written.
        extra = 3 * slack
    else:
        # As before; what is in the RAM share is written by commits alone, one after the other.
        extra = 2 * sum(lens) - sum(_unit_bytes(block, plane) for block, plane in share)
    # With several ranks the commit before is held.
    budget = _nvtier.State.room_for(lens, extra + (slack if ranks.world > 1 else 0), block_bytes)
    if found is None:
        _check_space(ranks, opened, budget, sum(lens))
    spill_room = None if activations is None else ranks.together(lambda: room_in(opened, activations, budget if found is None else extra, ranks.world))
    if isinstance(ranks, Ranks):
        # What decides when they commit, and what they say to each other.
        ranks.same({
            "the model, its parameters that are trained, precision, or blocks": describe(every),
            "commit_every": commit_every,
            "ram": [(block.name, plane) for block, plane in share],
        })  # fmt: skip
    state = ranks.together(
        lambda: _nvtier.State(
            opened, name=ranks.name(name), budget=budget, block_bytes=block_bytes, ram=share_bytes, deadline=deadline,
            hold=ranks.world > 1, at=found.at if found is not None else None,
        )
    )  # fmt: skip
    try:
        optimizer = _start(model, state, listed, rest, where, vram_bytes, share, param_groups, defaults, slack, commit_every, passing, found, ranks, source)
        if spill_room is not None:
            manager = optimizer._manager
            manager.spill = Spill(opened, f"{ranks.name(name)}{ACTIVATIONS}", manager, spill_room, spill_ram, deadline)
            manager.spill.attach(model)
    except BaseException:
        state.close()
        if found is None:
            # What was begun is no run.
            with contextlib.suppress(Error):
                _nvtier.State.remove(opened, ranks.name(name))
        raise
    optimizer.run = run
    if opened is not pool:
        optimizer.closes = opened
    model._nvtier_optimizer = optimizer  # type: ignore[assignment]
    return model, optimizer


def _replaced(params: Any, made: Dict[Any, Any]) -> List[Any]:
    """A group's parameters, or names and parameters, with those that took the place of others."""
    listed: List[Any] = [params] if isinstance(params, torch.Tensor) else list(params)
    return [(entry[0], made.get(entry[1], entry[1])) if isinstance(entry, tuple) else made.get(entry, entry) for entry in listed]


def _pool_of(pool: Union[str, "os.PathLike[str]", Pool]) -> Pool:
    """A pool, by its path or by that of its mount."""
    return pool if isinstance(pool, Pool) else Pool(pool_mounted_at(pool) or pool)


def remove(pool: Union[str, "os.PathLike[str]", Pool], run: str) -> bool:
    """Removes a run from a pool, with everything of it. False: there is none."""
    opened, name = _pool_of(pool), _run_name(run)
    parts = [name, *parts_of(opened, name)]
    for part in parts:
        _nvtier.State.remove(opened, f"{part}{ACTIVATIONS}")
    return any([_nvtier.State.remove(opened, part) for part in parts])


def _check_space(ranks: Alone, pool: Pool, budget: int, state: int) -> None:
    """Refuses what a pool has no room for; several ranks may share one."""
    free = int(pool.stat()["free_bytes"])
    mine = str(pool.info()["id"])
    sharing = [bytes for other, bytes in ranks.tell((mine, budget)) if other == mine]
    if sum(sharing) > free:
        of = "" if len(sharing) == 1 else f", as much for each of the {len(sharing)} ranks that share it"
        error = NoSpace(f"the run needs {budget} bytes of the pool ({state} of weights, gradients and state){of}, and {free} are free")
    else:
        error = None

    def refuse() -> None:
        if error is not None:
            raise error

    ranks.together(refuse)


def plan(
    model: torch.nn.Module,
    *,
    precision: str = "fp32",
    blocks: Optional[Iterable[torch.nn.Module]] = None,
    accumulate: bool = True,
    step_in: str = "forward",
    ranks: int = 1,
) -> Dict[str, int]:
    """What a run will need, before anything is written; the model may be on the meta device. Bytes: ``state`` in the pool, ``least_vram``, ``written`` and
    ``read`` by a step with one micro-batch and no RAM share, ``largest_block`` with all of its state. With several ranks, of each."""
    if ranks < 1:
        raise InvalidArgument(f"ranks={ranks}: 1 or more")
    passing = step_in == "backward"
    listed, rest = take_apart(model, find_blocks(model, blocks), precision, accumulate and not passing, passing, 0, ranks)
    every = [rest, *listed]

    def total(blocks: List[Block], planes: Any) -> int:
        return sum(_unit_bytes(block, plane) for block in blocks for plane in planes(block))

    def all_planes(block: Block) -> List[str]:
        return list(block.layout.planes())

    def kept(block: Block) -> List[str]:
        return [plane for plane in block.layout.planes() if not plane.startswith("frozen")]

    def seen(block: Block) -> List[str]:
        return [plane for plane in block.layout.planes() if plane in ("w", "hi") or plane.startswith("frozen")]

    again = [block for block in listed if passing or not block.forward_only]
    return {
        "parameters": sum(entry.param.numel() for block in every for entry in block.params),
        "state": total(every, all_planes),
        "least_vram": _least_device_bytes(listed, rest),
        "largest_block": max(total([block], all_planes) for block in every),
        "written": total(every, kept),
        "read": total(listed, all_planes) + total(again, seen),
    }


def _start(
    model: torch.nn.Module,
    state: Any,
    listed: List[Block],
    rest: Block,
    device: torch.device,
    vram: Optional[int],
    share: List[Tuple[Block, str]],
    param_groups: Optional[Sequence[Dict[str, Any]]],
    defaults: Dict[str, Any],
    slack: int,
    commit_every: int,
    passing: bool,
    found: Optional[Found],
    ranks: Alone,
    source: Optional[Weights],
) -> Optimizer:
    every = [rest, *listed]

    def number() -> None:
        if not _number(state, every, share, fresh=found is None):
            raise InvalidArgument("the run in the pool is of another model, precision or choice of blocks")

    ranks.together(number)
    manager = Manager(state, listed, rest, device, vram, commit_every == 1, ranks)
    manager.steps_in_backward = passing
    groups = list(param_groups) if param_groups is not None else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = ranks.together(lambda: Optimizer(model, manager, groups, defaults, slack, commit_every))
    meta = None if found is None else found.meta
    if meta is not None:
        ranks.together(lambda: optimizer.restore(meta))
    elif manager.ranks is not None:
        manager.ranks.begin()
    for block in every:
        if source is not None:
            source.fill(block)
        _take_in(manager, block, fresh=meta is None)
    _move_buffers(model, device)
    if manager.ranks is not None:
        for buffer in model.buffers():
            manager.ranks.first(buffer)
    manager.attach()
    for block in listed:
        assert block.module is not None
        block.module._register_state_dict_hook(_filler(optimizer, block))
    if meta is None:
        optimizer.commit(wait=True)
    return optimizer


def _number(state: Any, every: List[Block], share: List[Tuple[Block, str]], fresh: bool, others: Sequence[int] = ()) -> bool:
    """Gives every plane its unit, and those of the RAM share their memory; after them come ``others`` of these lengths. False: the state has other units."""
    names = [(block, plane) for block in every for plane in block.layout.planes()]
    lens = [_unit_bytes(block, plane) for block, plane in names] + list(others)
    first = state.add(lens) if fresh and lens else 0
    if state.units() != lens:
        return False
    for number, (block, plane) in enumerate(names, start=first):
        block.number(plane, number)
        if state.has(number):
            block.stored.add(plane)
    for block, plane in share:
        state.keep_in_ram(block.units[plane])
        block.in_ram.add(plane)
    return True


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _take_in(manager: Manager, block: Block, fresh: bool) -> None:
    """Puts a block's weights into its units, or forgets what the model came with."""
    stays = block is manager.rest
    if fresh or stays:
        for plane in block.layout.planes():
            if stays and plane in block.stored:
                manager._fetch(block, plane)
            elif stays or plane not in ("m", "v", "sm", "sv", "g", "sg"):
                # What lies between parameters has a value as well.
                block.planes[plane] = manager._empty(*block.layout.room(plane)).zero_()
    if fresh:
        with torch.no_grad():
            for entry in block.params:
                data, piece = entry.param.data.reshape(-1), block.piece(entry)
                if manager.ranks is not None:
                    data = manager.ranks.first(data.to(manager.device))
                data = data[piece.skip : piece.skip + piece.length]
                if entry.kind == SPLIT:
                    low, ties = low_parts(block.planes["lo"], block.layout.share(SPLIT), Place(piece.start, piece.length))
                    split(data.to(manager.device), block.own(entry, "hi"), low, ties, manager.state)
                else:
                    block.own(entry, weight_plane(entry)).copy_(data)
        for plane in list(block.planes):
            if plane not in ("m", "v", "sm", "sv"):
                manager._store(block, plane)
    if stays:
        for plane, (tensor, ticket) in list(block.coming.items()):
            ticket.wait()
            block.planes[plane] = tensor
        block.coming.clear()
        manager._bind(block)
    else:
        for entry in block.params:
            dtype = torch.bfloat16 if entry.kind == SPLIT else entry.param.dtype
            entry.param.data = manager._blank(entry, dtype)
        manager._drop(block, list(block.planes))


def _filler(optimizer: Optimizer, block: Block) -> Any:
    """``state_dict`` of a block: its weights, fetched to the host."""

    def fill(module: torch.nn.Module, state_dict: Dict[str, Any], prefix: str, metadata: Any) -> None:
        manager = optimizer._manager
        optimizer._catch_up()
        inside = {param: name for name, param in module.named_parameters()}
        with optimizer._resident(block):
            for entry in block.params:
                name = prefix + inside[entry.param]
                if name in state_dict:
                    state_dict[name] = manager.master(block, entry)

    return fill


def _defaults(model: torch.nn.Module, optimizer_class: type, options: Dict[str, Any]) -> Dict[str, Any]:
    """The optimizer's defaults, as its class makes them of the options; it also refuses wrong ones."""
    one = torch.nn.Parameter(torch.zeros(1))
    made = optimizer_class([one], **options)
    defaults = dict(made.defaults)
    for key, fine in (("amsgrad", (False, None)), ("capturable", (False,)), ("differentiable", (False,))):
        if defaults.get(key) not in fine:
            raise NotSupported(f"nvtier.train: {key}={defaults[key]!r}")
    return defaults


def _device(what: str, device: Union[None, str, torch.device], otherwise: torch.device) -> torch.device:
    """Where a model is to run: what was asked for, else the GPU, else ``otherwise``."""
    where = torch.device(device) if device is not None else torch.device("cuda") if torch.cuda.is_available() else otherwise
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if where.type not in ("cpu", "cuda"):
        raise NotSupported(f"{what} on {where}: cpu and cuda are supported")
    return where


def _run_name(run: str) -> str:
    return _state_name("run", run, "train")


def _state_name(what: str, name: str, kind: str) -> str:
    """The state's name in the pool."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InvalidArgument(f"{what}={name!r}: letters, digits, '.', '_' and '-', up to 100 of them")
    return f"{kind}-{name}"


def _unit_bytes(block: Block, plane: str) -> int:
    dtype, count = block.layout.planes()[plane]
    return count * dtype.itemsize


def _block_bytes(lens: List[int]) -> int:
    """Of a size that the larger units have several of; small ones waste the rest of theirs."""
    mean = sum(lens) // max(len(lens), 1)
    return min(max(1 << max(mean // 8, 1).bit_length(), _BLOCK_LEAST), _BLOCK_MOST)


def _least_device_bytes(listed: List[Block], rest: Block) -> int:
    def size(block: Block, planes: Iterable[str]) -> int:
        rooms = (block.layout.room(plane) for plane in planes)
        return sum(dtype.itemsize * count for dtype, count in rooms)

    def arriving(block: Block, planes: Iterable[str]) -> int:
        # The whole of a rank's gradients, and its part of the sum.
        return size(block, planes) * (block.layout.ranks + 1) if block.layout.ranks > 1 else 0

    def gradients(block: Block) -> int:
        return sum(count * dtype.itemsize for dtype, count in block.layout.gradient_planes().values())

    def backward(block: Block) -> int:
        return (
            gradients(block)
            + size(block, (plane for plane in block.layout.planes() if seen(plane)))
            + arriving(block, [plane for plane in block.layout.planes() if plane in ("g", "sg")])
        )

    def whole(block: Block) -> int:
        return size(block, block.layout.planes()) + (gradients(block) if block.layout.passing else 0)

    stays = size(rest, rest.layout.planes()) + arriving(rest, [plane for plane in rest.layout.planes() if plane == "m"])
    update = max((whole(block) for block in listed), default=0)
    # A module's backward begins before that of the one after it has ended.
    pairs = [backward(one) + (whole if other.layout.passing else backward)(other) for one, other in zip(listed, listed[1:])]
    return stays + max([update, *pairs])


def _ram_share(every: List[Block], ram: int, block_bytes: int) -> Tuple[List[Tuple[Block, str]], int]:
    """What is kept in host memory: weights first, which are read twice a step, then gradients, then moments. And its bytes."""
    slot = -(-block_bytes // 4096) * 4096
    share, used = [], 0
    for names in (("w", "hi"), ("g", "sg"), ("m", "sm"), ("v", "sv"), ("lo",)):
        for block in every[1:]:
            for plane in block.layout.planes():
                if plane in names or (plane.startswith("frozen") and "w" in names):
                    bytes = -(-_unit_bytes(block, plane) // block_bytes) * slot
                    if used + bytes <= ram:
                        share.append((block, plane))
                        used += bytes
    return share, used
