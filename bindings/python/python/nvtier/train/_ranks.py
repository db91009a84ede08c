"""Several processes, each with a device: data parallel, and each has an equal part of all state.

A *rank* has micro-batches of its own. Of every plane of a block it keeps one part in its pool, reads and writes that, and updates that. The whole of what
modules see is gathered when a block is used; gradients are summed and scattered when a block's backward pass is over, times one over the number of ranks
before, as ``DistributedDataParallel`` does it. All of it by ``torch.distributed``, in an order that is the same on all ranks: that of the blocks.

What the processes tell each other besides (what they found, that a commit is durable) goes over a group of its own on the host, which waits for no device.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist

from .. import _errors, _nvtier
from .._errors import Corrupt, InvalidArgument, NotFound
from .._nvtier import Pool
from ._blocks import Block, Param, gradient_plane
from ._planes import SPLIT, Place, join, low_parts

if TYPE_CHECKING:
    from ._manager import Manager
    from ._optimizer import Optimizer

T = TypeVar("T")
#: Where a pool has its states.
_STATES = ".nvtier-kv"


class Found:
    """A run that is there."""

    def __init__(self, block_bytes: int, meta: Dict[str, Any], at: Optional[int]) -> None:
        self.block_bytes, self.meta, self.at = block_bytes, meta, at


class Alone:
    """One process."""

    rank, world = 0, 1

    def name(self, state: str) -> str:
        """What this rank's part of a state is called."""
        return state

    def together(self, work: Callable[[], T]) -> T:
        """Does something on all ranks; where one fails, all do."""
        return work()

    def tell(self, what: Any) -> List[Any]:
        """What each rank says."""
        return [what]

    def find(self, pool: Pool, state: str, run: str) -> Optional[Found]:
        """The run, where there is one."""
        look = _nvtier.State.look(pool, state)
        if look is not None:
            return Found(look[0], json.loads(look[1]), None)
        for part in parts_of(pool, state):
            for _, _, meta in _nvtier.State.commits(pool, part):
                raise InvalidArgument(f"the run {run!r} is of {json.loads(meta)['ranks'][1]} ranks, and this is one process: a run goes on with as many")
        return None


def parts_of(pool: Pool, state: str) -> List[str]:
    """Names of the parts of a state that ranks have in a pool."""
    if not pool.exists(_STATES):
        return []
    names = (entry.path.rsplit("/", 1)[-1] for entry in pool.ls(_STATES))
    return [name for name in names if re.fullmatch(re.escape(state) + r"\.rank[0-9]+", name)]


def ranks_of(group: Any, device: torch.device) -> Alone:
    """The ranks of a process group (None: of all processes that ``torch.distributed`` knows); one process where there is no other."""
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise InvalidArgument("group=...: torch.distributed is not initialised (init_process_group)")
        return Alone()
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise InvalidArgument("group=...: this process is not a member of it")
    return Ranks(group, device) if dist.get_world_size(group) > 1 else Alone()


class Ranks(Alone):
    """The ranks of a group of several."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        kinds = {one.type for one in group._device_types}
        if device.type not in kinds:
            raise InvalidArgument(
                f"the process group is for {', '.join(sorted(kinds))}, and the model runs on {device}: init_process_group('gloo') for cpu, 'nccl' for cuda"
            )
        # A member that is gone is noticed as soon as in the group itself.
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        members = dist.get_process_group_ranks(group)
        self.host = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=True)
        #: Tells a run from another one of that name; of the last commit, its number.
        self.life, self.commits = "", 0
        self._unsettled: Any = None
        #: Of what stays on the device: this rank's part of the gradients of the step that comes, and which parameters have one on any rank.
        self._rest: Optional[torch.Tensor] = None
        self._rest_graded: Optional[List[int]] = None

    # On the host

    def name(self, state: str) -> str:
        return f"{state}.rank{self.rank}"

    def tell(self, what: Any) -> List[Any]:
        told: List[Any] = [None] * self.world
        dist.all_gather_object(told, what, group=self.host)
        return told

    def together(self, work: Callable[[], T]) -> T:
        error: Optional[Exception] = None
        done: Optional[T] = None
        try:
            done = work()
        except Exception as failed:
            error = failed
        told = self.tell(None if error is None else (type(error).__name__, str(error)))
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                kind, text = failure
                raise getattr(_errors, kind, _errors.Error)(f"rank {rank}: {text}")
        return done  # type: ignore[return-value]

    def same(self, what: Dict[str, Any]) -> None:
        """Refuses what differs between ranks."""
        told = self.tell({key: json.dumps(value) for key, value in what.items()})
        for key in what:
            for rank, other in enumerate(told):
                if other[key] != told[0][key]:
                    raise InvalidArgument(f"{key} must be the same on all ranks, and rank {rank} has another than rank 0")

    def begin(self) -> None:
        """A new run."""
        self.life, self.commits = self.tell(uuid.uuid4().hex)[0], 0

    def find(self, pool: Pool, state: str, run: str) -> Optional[Found]:
        """The last commit that all ranks have: a crash may have left one more on some."""
        commits = self.together(lambda: _nvtier.State.commits(pool, self.name(state)))
        metas = [json.loads(meta) for _, _, meta in commits]
        single = self.together(lambda: _nvtier.State.look(pool, state)) is not None
        told = self.tell((single, [(meta["ranks"][1], meta["life"], meta["commit"]) for meta in metas]))
        if any(single for single, _ in told):
            raise InvalidArgument(f"the run {run!r} is of one process, and there are {self.world} ranks: a run goes on with as many")
        worlds = {world for _, heads in told for world, _, _ in heads}
        if worlds - {self.world}:
            raise InvalidArgument(f"the run {run!r} is of {max(worlds - {self.world})} ranks, and there are {self.world}: a run goes on with as many")
        last = [max((commit for _, _, commit in heads), default=0) for _, heads in told]
        if min(last) == 0:
            if max(last) > 1:
                raise NotFound(f"the run {run!r}: rank {last.index(0)} finds no part of it in its pool, and rank {last.index(max(last))} does")
            # It ended while it was begun.
            self.together(lambda: _nvtier.State.remove(pool, self.name(state)))
            return None
        agreed = min(last)
        found = [(at, size, meta) for (at, size, _), meta in zip(commits, metas) if meta["commit"] == agreed]
        lives = self.tell(found[0][2]["life"] if found else None)
        if None in lives or len(set(lives)) > 1:
            raise Corrupt(f"the run {run!r}: its parts do not belong together (commits {last}, of {len(set(lives))} runs of that name)")
        at, size, meta = found[0]
        self.life, self.commits = meta["life"], agreed
        return Found(size, meta, at)

    def describe(self) -> Dict[str, Any]:
        """What the next commit says of the ranks."""
        return {"ranks": [self.rank, self.world], "life": self.life, "commit": self.commits + 1}

    def committing(self, ticket: Any) -> None:
        """A commit is on its way."""
        self._unsettled = ticket
        self.commits += 1

    def settle(self, state: Any) -> None:
        """Waits until all ranks have made the last commit. The one before can go then, and the next one come."""
        if self._unsettled is not None:
            self._unsettled.wait()
            dist.barrier(group=self.host)
            state.settle()
            self._unsettled = None

    def leave(self) -> None:
        """Waits for the others: the pool's owner may be one of us."""
        dist.barrier(group=self.host)

    # Weights

    def _gather(self, whole: torch.Tensor) -> None:
        """Fills in the other ranks' parts of a tensor whose own part is there."""
        whole = whole.view(torch.uint8)
        share = whole.numel() // self.world
        dist.all_gather_into_tensor(whole, whole[self.rank * share : (self.rank + 1) * share], group=self.group)

    def whole(self, block: Block) -> None:
        """Has the whole of a block's weights, of which its own part is there."""
        for plane in block.weight_planes():
            if plane in block.planes and plane not in block.whole:
                self._gather(block.planes[plane])
                block.whole.add(plane)

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's weights are those that all begin with."""
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def full(self, block: Block, planes: Sequence[str]) -> Dict[str, torch.Tensor]:
        """Whole planes, of which the parts are there; ``master`` is the float32 weights of ``hi`` and ``lo``."""
        made: Dict[str, torch.Tensor] = {}
        for plane in planes:
            if plane == "master":
                share = block.layout.share(SPLIT)
                part = join(block.mine("hi"), *low_parts(block.planes["lo"], share, Place(0, share)))
            else:
                part = block.mine(plane)
            whole = torch.empty(part.numel() * self.world, dtype=part.dtype, device=part.device)
            whole[self.rank * part.numel() : (self.rank + 1) * part.numel()] = part
            self._gather(whole)
            made[plane] = whole
        return made

    def export(self, weights: Iterator[Any], write: Callable[[Iterator[Any]], None]) -> None:
        """Rank 0 writes, and all take part in all of the weights, also where it fails."""

        def work() -> None:
            try:
                if self.rank == 0:
                    write(weights)
            finally:
                for _ in weights:
                    pass

        self.together(work)

    # Gradients

    def take(self, manager: Manager, block: Block, index: int, gradient: torch.Tensor) -> None:
        """A gradient of this micro-batch, and this rank."""
        entry = block.params[index]
        plane = gradient_plane(entry)
        if plane not in block.incoming:
            block.incoming[plane] = self._zeros(manager, block, plane)
        place = entry.place
        into = block.incoming[plane][place.start : place.start + place.count]
        with torch.no_grad():
            if index in block.arrived:
                into.add_(gradient.view(-1))
            else:
                into.copy_(gradient.view(-1))
        block.graded.add(index)
        block.arrived.add(index)

    def _zeros(self, manager: Manager, block: Block, plane: str) -> torch.Tensor:
        dtype, share = block.layout.planes()[plane]
        return manager._empty(dtype, share * self.world).zero_()

    def _scatter(self, manager: Manager, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the mean over all ranks."""
        part = manager._empty(whole.dtype, whole.numel() // self.world)
        dist.reduce_scatter_tensor(part, whole.mul_(1 / self.world), group=self.group)
        manager._count(whole, -1)
        return part

    def reduce(self, manager: Manager, block: Block) -> None:
        """The gradients of a block are there, on all ranks. What a rank has none of counts as zero there."""
        with torch.no_grad():
            for plane in block.gradient_planes():
                whole = block.incoming.pop(plane, None)
                part = self._scatter(manager, self._zeros(manager, block, plane) if whole is None else whole)
                if plane in block.summed:
                    # Of the micro-batches before.
                    manager._bring(block, [plane])
                    block.planes[plane].add_(part)
                    manager._count(part, -1)
                else:
                    manager._drop(block, [plane])
                    block.planes[plane] = part
                    block.summed.add(plane)
            trainable = [(index, entry) for index, entry in enumerate(block.params) if entry.trainable]
            block.norms = self._norms(trainable, lambda entry: block.own(entry, gradient_plane(entry)))

    def _norms(self, entries: List[Tuple[int, Param]], of: Callable[[Param], torch.Tensor]) -> Dict[int, torch.Tensor]:
        """Norms of this rank's pieces."""
        pieces = [(index, piece) for index, piece in ((index, of(entry)) for index, entry in entries) if piece.numel()]
        norms = torch._foreach_norm([piece for _, piece in pieces], 2.0, torch.float32) if pieces else []
        return {index: norm for (index, _), norm in zip(pieces, norms)}

    def expected(self, block: Block) -> int:
        """Parameters that get a gradient in the backward pass that is under way."""
        node = torch.autograd.graph.get_gradient_edge
        return sum(torch._C._will_engine_execute_node(node(entry.param).node) for entry in block.trainable)  # type: ignore[attr-defined]

    # Steps

    def agree(self, optimizer: Optimizer) -> None:
        """Which parameters have a gradient, on any rank; and the mean of those that stay on the device. Once a step."""
        if self._rest_graded is not None:
            return
        manager, rest = optimizer._manager, optimizer._manager.rest
        here = [[index in block.graded for index in range(len(block.params))] for block in manager.blocks]
        here.append([entry.trainable and entry.param.grad is not None for entry in rest.params])
        bits = torch.tensor([bit for block in here for bit in block], dtype=torch.uint8)
        dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self.host)
        there = iter(bits.tolist())
        for block in manager.blocks:
            block.graded = {index for index in range(len(block.params)) if next(there)}
        self._rest_graded = [index for index in range(len(rest.params)) if next(there)]
        if self._rest_graded:
            dtype = rest.layout.gradient
            whole = manager._empty(dtype, rest.layout.share("full") * self.world).zero_()
            for entry in rest.params:
                if entry.trainable and entry.param.grad is not None:
                    whole[entry.place.start : entry.place.start + entry.place.count] = entry.param.grad.reshape(-1)
            self._rest = self._scatter(manager, whole)

    def rest_gradients(self, manager: Manager) -> Dict[int, torch.Tensor]:
        """Of what stays on the device, this rank's pieces of the gradients."""
        found = {}
        for index in self._rest_graded or []:
            assert self._rest is not None
            piece = manager.rest.piece(manager.rest.params[index])
            found[index] = self._rest[piece.start : piece.start + piece.length]
        return found

    def forget(self, manager: Manager) -> None:
        """The gradients were used, or are not wanted."""
        if self._rest is not None:
            manager._count(self._rest, -1)
        self._rest, self._rest_graded = None, None
        for block in manager.blocks:
            block.summed.clear()

    def norm(self, optimizer: Optimizer) -> Optional[torch.Tensor]:
        """The norm of all gradients, of the sums of the squares of the parts. None: there are no gradients."""
        self.agree(optimizer)
        manager = optimizer._manager
        norms: Dict[torch.Tensor, Optional[torch.Tensor]] = {}
        for block in manager.blocks:
            norms.update({block.params[index].param: block.norms.get(index) for index in block.graded})
        pieces = self.rest_gradients(manager)
        entries = [(index, manager.rest.params[index]) for index in pieces]
        of_rest = self._norms(entries, lambda entry: pieces[manager.rest.params.index(entry)])
        norms.update({entry.param: of_rest.get(index) for index, entry in entries})
        ordered = [norms[param] for param in optimizer._model.parameters() if param in norms]
        if not ordered:
            return None
        zero = torch.zeros((), dtype=torch.float32, device=manager.device)
        squares = torch.stack([zero if norm is None else norm for norm in ordered]).double().square()
        dist.all_reduce(squares, group=self.group)
        return torch.linalg.vector_norm(squares.sqrt().float(), 2.0)
