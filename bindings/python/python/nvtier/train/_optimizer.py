"""The optimizer of a model whose parameters stream: ``torch.optim.AdamW``'s numbers, carried out when a block is used next."""

from __future__ import annotations

import base64
import json
import os
import random
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import torch

from .._errors import InvalidArgument, NotSupported
from ._blocks import Block, Param
from ._manager import Manager, Pending

_FORMAT = 1


class Optimizer(torch.optim.Optimizer):
    """What ``nvtier.train.offload`` returns beside the model. An ordinary optimizer for loops and schedulers; gradients are kept by nvtier, and
    ``parameter.grad`` is None for parameters that stream. For what touches gradients use :meth:`clip_grad_norm_`."""

    def __init__(self, model: torch.nn.Module, manager: Manager, groups: List[Dict[str, Any]], defaults: Dict[str, Any], slack: int, commit_every: int) -> None:
        super().__init__(groups, defaults)
        self._model, self._manager = model, manager
        self._slack, self._commit_every = slack, commit_every
        self._committed_step = -1
        self._clip: Optional[torch.Tensor] = None
        #: What the next commit says besides where each block is.
        self._base: Optional[Dict[str, Any]] = None
        self._uncommitted = False
        self._must_clear = False
        self._rest_changed = False
        self._last_commit: Any = None
        self._commits: List[Any] = []
        self._resumed: Optional[Dict[str, Any]] = None
        self._closed = False
        #: The run's name.
        self.run = ""
        #: A pool that is closed with it.
        self.closes: Any = None
        self._versions: Dict[torch.Tensor, Tuple[torch.Tensor, int]] = {}
        manager.on_use = self._before_use
        manager.on_store = self._after_store
        manager.begin_step = self._begin_step
        numbers = {param: number for number, group in enumerate(self.param_groups) for param in group["params"]}
        for block in self._all():
            for entry in block.trainable:
                if entry.param not in numbers:
                    raise InvalidArgument(f"{entry.name} is trainable and in no parameter group: freeze it (requires_grad_(False)) or list it")
                entry.group = numbers[entry.param]
        self._rest_hooks = [
            entry.param.register_post_accumulate_grad_hook(self._rest_arrived) for entry in manager.rest.trainable
        ]

    # What a training loop calls

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._open()
        if self._manager.carried is not None:
            raise InvalidArgument("zero_grad() between backward() and step(): backward() has updated weights already (step_in='backward'), and step() has to follow")
        super().zero_grad(set_to_none=set_to_none)
        self._versions.clear()
        self._forget_gradients()

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> None:  # type: ignore[override]
        """One step with the gradients that were gathered since ``zero_grad``. What stays on the device is updated now, each block when it is
        used next; nobody can see the difference. Learning rates and the rest of ``param_groups`` are those of now."""
        self._open()
        if closure is not None:
            raise NotSupported("nvtier.train: step(closure), which would need the gradients several times")
        manager = self._manager
        if manager.gathered == 0:
            return
        self._check_untouched()
        self._check_groups()
        manager.catch_up()
        pending = manager.carried or self._pending()
        if pending.groups != [_plain(group) for group in self.param_groups]:
            raise InvalidArgument("param_groups were changed between backward() and step(), and backward() has updated weights already (step_in='backward')")
        manager.step, manager.carried = pending.step, None
        rest = manager.rest
        if manager.ranks is not None:
            manager.ranks.agree(self)
            gradients = manager.ranks.rest_gradients(manager)
        else:
            gradients = {
                index: entry.param.grad.reshape(-1)
                for index, entry in enumerate(rest.params)
                if entry.trainable and entry.param.grad is not None
            }
        if gradients:
            manager.settle(rest)
            manager.update(rest, pending, gradients)
            if manager.ranks is not None:
                rest.whole.discard("w")
                manager.ranks.whole(rest)
        for block in manager.blocks:
            block.owed = set() if manager.steps_in_backward else set(block.graded)
        manager.pending = pending if any(block.owed for block in manager.blocks) else None
        manager.micro = manager.gathered
        self._forget_gradients()
        self._must_clear = True
        self._uncommitted = True
        self._base = None
        self._rest_changed |= bool(gradients)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> torch.Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over all parameters of the model: the same total norm, and the same factor for every gradient, with which
        it is multiplied in the step. Returns the norm. With several ranks: of the mean of their gradients, on all of them."""
        self._open()
        if self._manager.steps_in_backward:
            raise NotSupported("nvtier.train: clipping with step_in='backward', which updates weights before the norm of all gradients is known; use step_in='forward'")
        if norm_type != 2.0:
            raise NotSupported(f"nvtier.train: clipping by the {norm_type}-norm; the 2-norm is supported")
        self._check_untouched()
        ranks = self._manager.ranks
        total = self._norm() if ranks is None else ranks.norm(self)
        if total is None:
            return torch.tensor(0.0)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped.")
        self._clip = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
        return total

    def _norm(self) -> Optional[torch.Tensor]:
        norms: Dict[torch.Tensor, torch.Tensor] = {}
        for block in self._manager.blocks:
            for index, norm in block.norms.items():
                norms[block.params[index].param] = norm
        for entry in self._manager.rest.trainable:
            if entry.param.grad is not None:
                norms[entry.param] = torch._foreach_norm([entry.param.grad])[0]
        ordered = [norms[param] for param in self._model.parameters() if param in norms]
        return torch.linalg.vector_norm(torch.stack(ordered), 2.0) if ordered else None

    def commit(self, extra: Optional[Dict[str, Any]] = None, wait: bool = False) -> None:
        """Makes the last step the one that a crash goes back to, with the states of all random number generators and with ``extra`` (of what JSON has:
        position in the data, state of a scheduler). Call it after ``step()``, before anything of the next step; otherwise it is done at the next
        use of the model, without extra. It is written behind, every ``commit_every`` steps; with ``wait`` it is durable on return."""
        self._open()
        manager = self._manager
        if manager.gathered > 0 or manager._in_backward:
            raise InvalidArgument("commit() between backward() and step(): a commit is of whole steps")
        self._base = {"extra": extra, "rng": _random_states(manager.device)}
        self._uncommitted = False
        since = manager.step - self._committed_step
        if wait or since == 0 or since >= self._commit_every:
            ticket = self._commit()
            if wait:
                self._until_durable(ticket)

    @property
    def resumed(self) -> Optional[Dict[str, Any]]:
        """The ``extra`` of the commit that was resumed (an empty dict where it had none); None: this is a new run."""
        return self._resumed

    @property
    def steps(self) -> int:
        """Steps done, those before a resume included."""
        return self._manager.step

    def stats(self) -> Dict[str, Any]:
        """Bytes moved since the start, by tier, and what is on the device now and was at most."""
        manager = self._manager
        stats = dict(manager.state.moved())
        if manager.spill is not None:
            stats.update(manager.spill.stats())
        stats.update(device_bytes=manager.device_bytes, device_peak_bytes=manager.device_peak, steps=manager.step)
        return stats

    def flush(self) -> None:
        """Carries out what is pending, and makes it durable."""
        self._open()
        if self._base is None:
            self.commit(self._resumed if self._manager.step == 0 else None)
        self._manager.catch_up()
        self._until_durable(self._commit())

    def weights(self) -> Iterator[Tuple[str, torch.Tensor]]:
        """All parameters by name, as they are trained, on the host, a block at a time."""
        self._catch_up()
        for block in self._all():
            with self._resident(block):
                for entry in block.params:
                    yield entry.name, self._manager.master(block, entry)

    def moments(self) -> Iterator[Tuple[str, int, torch.Tensor, torch.Tensor]]:
        """Of all parameters that are trained: name, number of updates, ``exp_avg`` and ``exp_avg_sq``, on the host."""
        self._catch_up()
        for block in self._all():
            with self._resident(block, moments=True):
                for entry in block.trainable:
                    m, v = self._manager.moments(block, entry)
                    yield entry.name, entry.steps, m, v

    def save_pretrained(self, folder: Union[str, os.PathLike], max_shard_bytes: int = 5 << 30) -> None:
        """Writes the model as safetensors files of Hugging Face's layout, with its configuration, a block at a time: the model need not fit into memory.
        With several ranks: called on all of them, written by rank 0."""
        from ._export import save_pretrained

        ranks = self._manager.ranks
        if ranks is None:
            save_pretrained(self._model, self.weights(), folder, max_shard_bytes)
        else:
            ranks.export(self.weights(), lambda weights: save_pretrained(self._model, weights, folder, max_shard_bytes))

    def state_dict(self) -> Dict[str, Any]:
        """Groups as any optimizer's, and where the rest is: the state itself stays in the pool, where :meth:`commit` makes it durable."""
        groups = [{**_plain(group), "params": []} for group in self.param_groups]
        return {"state": {}, "param_groups": groups, "nvtier": {"run": self.run, "steps": self.steps}}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave at this very step, which changes nothing; anything else is in no file but in the pool."""
        if state_dict.get("nvtier") != {"run": self.run, "steps": self.steps}:
            raise NotSupported(
                f"nvtier.train: the state of step {self.steps} of the run {self.run!r} is in the pool, and this is none of it: offload(resume=True) goes on with a run"
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items() if key != "params"})

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        if hasattr(self, "_manager"):
            raise NotSupported("nvtier.train: a parameter group after offload(); pass all of them to it")
        super().add_param_group(param_group)

    def close(self) -> None:
        """Ends it: the last step becomes durable, and the model's parameters that stream are gone from memory. Once more is fine."""
        if self._closed:
            return
        if self._manager.carried is not None:
            self.__exit__(InvalidArgument)
            raise InvalidArgument(f"closed between backward() and step(): the run goes on after the last commit, of step {self._committed_step}")
        try:
            self._manager.drop_all()
            if self._uncommitted or self._committed_step != self._manager.step:
                self._forget_gradients()
                if self._uncommitted:
                    self.commit()
                if self._committed_step != self._manager.step:
                    self._commit()
            if self._last_commit is not None:
                self._until_durable(self._last_commit)
            if self._manager.ranks is not None:
                self._manager.ranks.leave()
        finally:
            self._closed = True
            self._manager.detach(closed=True)
            self._end()

    def _end(self) -> None:
        for hook in self._rest_hooks:
            hook.remove()
        if self._manager.spill is not None:
            self._manager.spill.close()
        self._manager.state.close()
        if self.closes is not None:
            self.closes.close()

    def __enter__(self) -> "Optimizer":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            # The last commit counts.
            self._closed = True
            self._manager.detach(closed=True)
            self._end()

    # Inside

    def _all(self) -> List[Block]:
        return [self._manager.rest, *self._manager.blocks]

    def _open(self) -> None:
        if self._closed:
            raise InvalidArgument("this optimizer is closed")

    def _resident(self, block: Block, moments: bool = False) -> Any:
        return self._manager.resident(block, moments)

    def _forget_gradients(self) -> None:
        self._manager.gathered = 0
        if self._manager.ranks is not None:
            self._manager.ranks.forget(self._manager)
        self._must_clear = False
        self._clip = None
        for block in self._manager.blocks:
            block.graded = set()
            block.norms.clear()

    def _rest_arrived(self, parameter: torch.Tensor) -> None:
        if self._must_clear:
            raise InvalidArgument("backward() after step() without zero_grad(): gradients of two steps would be added up")
        if parameter.grad is not None:
            self._versions[parameter] = (parameter.grad, parameter.grad._version)

    def _check_untouched(self) -> None:
        for parameter, (gradient, version) in self._versions.items():
            if parameter.grad is not gradient or gradient._version != version:
                raise InvalidArgument(
                    "gradients were changed after backward(), and those that stream were not there to be changed: clip with"
                    " optimizer.clip_grad_norm_(max_norm) instead of torch.nn.utils.clip_grad_norm_"
                )

    def _check_groups(self) -> None:
        for group in self.param_groups:
            if group.get("amsgrad"):
                raise NotSupported("nvtier.train: amsgrad=True")

    def _before_use(self) -> None:
        self._open()
        if self._uncommitted and self._manager.gathered == 0:
            self.commit()

    def _catch_up(self) -> None:
        """Carries out what is pending. A commit has to go before it: what it writes has room beside one."""
        self._before_use()
        self._manager.catch_up()

    def _after_store(self, stored: int) -> None:
        """Old versions go with a commit: between two of them there is room for so many new ones only."""
        if self._base is not None and stored >= self._slack and not self._manager.steps_in_backward:
            self._commit()

    def _pending(self) -> Pending:
        return Pending(self._manager.step + 1, [_plain(group) for group in self.param_groups], self._clip)

    def _begin_step(self) -> Pending:
        """A step that backward() carries out: what it writes is to be the second version in the pool, not the third."""
        if self._last_commit is not None:
            self._last_commit.wait()
        return self._pending()

    def _until_durable(self, ticket: Any) -> None:
        ranks = self._manager.ranks
        if ranks is None:
            ticket.wait()
        else:
            ranks.settle(self._manager.state)

    def _commit(self) -> Any:
        manager = self._manager
        if manager.ranks is not None:
            manager.ranks.settle(manager.state)
        elif self._last_commit is not None:
            # There is room for the versions of one commit that is under way, and for those that come after it.
            self._last_commit.wait()
        if self._rest_changed:
            manager.store_rest()
            self._rest_changed = False
        for ticket in self._commits:
            ticket.is_done()  # raises what it failed with
        self._commits = [ticket for ticket in self._commits if not ticket.is_done()]
        pending = manager.pending if any(block.owed for block in manager.blocks) else None
        meta = {
            "format": _FORMAT,
            "layout": describe(self._all(), manager),
            "step": manager.step,
            "groups": [_plain(group) for group in self.param_groups],
            "numbers": [entry.group for block in self._all() for entry in block.params],
            "steps": [entry.steps for block in self._all() for entry in block.params],
            "owed": [sorted(block.owed) for block in manager.blocks],
            "pending": None
            if pending is None
            else {
                "step": pending.step,
                "groups": pending.groups,
                "clip": None if pending.clip is None else float(pending.clip),
            },
            **(self._base or {}),
            **(manager.ranks.describe() if manager.ranks is not None else {}),
        }
        try:
            text = json.dumps(meta)
        except TypeError as error:
            raise InvalidArgument(f"commit(extra): {error}: what JSON has can be committed") from None
        self._last_commit = manager.state.commit(text.encode())
        if manager.ranks is not None:
            manager.ranks.committing(self._last_commit)
        self._commits.append(self._last_commit)
        self._committed_step = manager.step
        manager.stored_since_commit = 0
        return self._last_commit

    def restore(self, meta: Dict[str, Any]) -> None:
        """Goes on where a commit was made."""
        manager = self._manager
        if meta.get("format") != _FORMAT:
            raise NotSupported(f"this run was written in format {meta.get('format')}, and {_FORMAT} is read: use the version that wrote it")
        check_layout(meta["layout"], describe(self._all(), manager))
        if len(meta["groups"]) != len(self.param_groups):
            raise InvalidArgument(f"the run has {len(meta['groups'])} parameter groups, and {len(self.param_groups)} were passed")
        entries: List[Param] = [entry for block in self._all() for entry in block.params]
        if meta["numbers"] != [entry.group for entry in entries]:
            raise InvalidArgument("the run has its parameters in other groups")
        for entry, steps in zip(entries, meta["steps"]):
            entry.steps = steps
        for group, saved in zip(self.param_groups, meta["groups"]):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
        manager.step = meta["step"]
        for block, owed in zip(manager.blocks, meta["owed"]):
            block.owed = set(owed)
        if meta["pending"] is not None:
            pending = meta["pending"]
            clip = pending["clip"]
            tensor = None if clip is None else torch.tensor(clip, dtype=torch.float32, device=manager.device)
            manager.pending = Pending(pending["step"], pending["groups"], tensor)
        _set_random_states(meta.get("rng") or {}, manager.device)
        self._base = {"extra": meta.get("extra"), "rng": meta.get("rng")}
        self._committed_step = manager.step
        self._resumed = meta.get("extra") or {}


def _plain(group: Dict[str, Any]) -> Dict[str, Any]:
    """A parameter group without its parameters."""

    def value(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.item()
        return list(item) if isinstance(item, tuple) else item

    return {key: value(item) for key, item in group.items() if key != "params"}


def describe(blocks: List[Block], manager: Optional[Manager] = None) -> List[Any]:
    """What the units of a state are: compared when a run is resumed."""
    return [
        [
            block.name,
            [[entry.name, list(entry.param.shape), entry.key] for entry in block.params],
            {name: [str(dtype), count] for name, (dtype, count) in block.layout.planes().items()},
        ]
        for block in blocks
    ]


def check_layout(saved: List[Any], now: List[Any]) -> None:
    if json.loads(json.dumps(now)) == saved:
        return
    for old, new in zip(saved, json.loads(json.dumps(now))):
        if old != new:
            for one, other in zip(old[1], new[1]):
                if one != other:
                    raise InvalidArgument(f"the run in the pool is of another model or precision: it has {one} where this one has {other}")
            raise InvalidArgument(f"the run in the pool is of another model or precision: its block {old[0]!r} is another one than {new[0]!r}")
    raise InvalidArgument(f"the run in the pool is of another model: it has {len(saved)} blocks, and this one {len(now)}")


def _random_states(device: torch.device) -> Dict[str, Any]:
    states: Dict[str, Any] = {
        "torch": base64.b64encode(bytes(torch.get_rng_state().numpy())).decode(),
        "python": json.loads(json.dumps(random.getstate())),
    }
    if device.type == "cuda":
        states["cuda"] = base64.b64encode(bytes(torch.cuda.get_rng_state(device).numpy())).decode()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        states["numpy"] = [name, keys.tolist(), position, has_gauss, gauss]
    return states


def _set_random_states(states: Dict[str, Any], device: torch.device) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    if "torch" in states:
        torch.set_rng_state(tensor(states["torch"]))
    if "python" in states:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(tensor(states["cuda"]), device)
    if "numpy" in states and "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = states["numpy"]
        numpy = sys.modules["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
