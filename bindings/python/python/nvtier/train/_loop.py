"""The training: epochs of iterations (micro-batches), some of them an update, as aiDAPTIV's files describe it.

The loop knows the optimizer by the methods that ``_plain`` lists; ``nvtier.train.offload`` has the same.
"""

from __future__ import annotations

import base64
import math
import os
import sys
import time
import uuid
from typing import Any, Dict, List, Optional, Tuple

import torch

from .._errors import Error, InvalidArgument, NotSupported
from . import _schedule
from ._config import Config
from ._data import IGNORED, Data
from ._log import Log
from ._saver import human
from ._setup import Options, Prepared
from ._signals import Interrupted, Signals

#: Seconds between two commits where none are asked for by number.
_COMMIT_SECONDS = 600
#: Of statistics that are of one tier each.
_TIERS = ("vram", "ram", "nvme")


class Diverged(Error):
    """The loss is no number any more."""


def train(config: Config, options: Options, log: Log, signals: Signals) -> None:
    """Trains, or goes on. Returns when the training is complete."""
    _Training(config, options, log, signals).go()


class _Training(Prepared):
    def __init__(self, config: Config, options: Options, log: Log, signals: Signals) -> None:
        super().__init__(config, options, log, signals)
        run = config.run
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.schedule = _schedule.make(run.lr_scheduler.mode, self.optimizer)
        every = options.commit_every
        #: Of --plain; 0: by time.
        self.commit_every = every or 0
        self.updates = 0
        #: Of this epoch: losses summed, and how many.
        self.losses = [0.0, 0]
        #: Of early stopping: the best value, and epochs since.
        self.best: Tuple[Optional[float], int] = (None, 0)
        #: What the next commit is to hold; None where that is committed.
        self.pending: Optional[Dict[str, Any]] = None
        self.committed_at = time.monotonic()

    def _settings(self) -> Dict[str, Any]:
        """What changes the numbers: a run that is gone on with has the same."""
        run, options = self.config.run, self.options
        keep = ("per_device_train_batch_size", "per_update_total_batch_size", "max_iter", "max_seq_len", "precision_mode", "from_config")
        settings: Dict[str, Any] = {key: run[key] for key in keep}
        settings["lr_scheduler"] = dict(run.lr_scheduler)
        settings["optimizer"] = dict(run.optimizer)
        settings["lora"] = dict(run.lora) if run.lora.enable_lora else None
        settings.update(seed=options.seed, clip_grad_norm=options.clip_grad_norm, data=self.data.fingerprint)
        settings["model_name_or_path"] = os.path.realpath(self.source)
        return settings

    def _resume(self) -> None:
        extra = self.optimizer.resumed
        if not extra:
            # Nothing, or a run of which no update was made.
            self._begin()
            return
        before, now = extra["settings"], self._settings()
        changed = [f"{key} was {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            raise InvalidArgument(
                f"go on with the run {self.name}: " + "; ".join(changed) + ". Set it back, begin another run with --run NAME, "
                "or train anew with --fresh, which forgets this one"
            )
        self.saver.life = extra["life"]
        self.order.restore(extra["position"])
        self.updates, self.losses, self.best = extra["updates"], list(extra["losses"]), tuple(extra["best"])
        _schedule.restore(extra["schedule"], self.schedule, self.optimizer)
        _set_rng(extra["rng"])
        position = self.order.state()
        self.log.line(f"[INFO] going on with the run {self.name} after update {self.updates}, epoch {position['epoch']}, iteration {position['iteration']}")

    def _begin(self) -> None:
        paths, optimizer = self.config.paths, self.optimizer
        self.saver.life = uuid.uuid4().hex
        key, section = ("lora_optimizer", paths.lora) if self.config.run.lora.enable_lora else ("optimizer_path", paths)
        if section[key]:
            if not hasattr(optimizer, "load_state"):
                raise NotSupported(f"{section.where(key)}: with the offload, a run goes on from its pool (--run), not from a file; leave it empty")
            path = section[key]
            optimizer.load_state(os.path.join(path, "optimizer.pt") if os.path.isdir(path) else path)
        torch.manual_seed(self.options.seed)

    # Training

    def go(self) -> None:
        try:
            self._go()
            self.optimizer.close()
        except Interrupted:
            self._stop()
            raise
        except BaseException:
            self.optimizer.__exit__(*sys.exc_info())
            raise

    def _go(self) -> None:
        run, log = self.config.run, self.log
        if run.enable_save_optimizer_state and not hasattr(self.optimizer, "save_state"):
            log.line(f"[WARNING] {run.where('enable_save_optimizer_state')}: the pool holds it with every update (run {self.name}); it is not saved beside models")
        self._resume()
        order, accumulation = self.order, self.config.accumulation
        updates = -(-order.iterations // accumulation)
        log.stamped(f"[INFO] Enable Early-stopping: {run.early_stop.enable}")
        log.line(f"[INFO] The current training schedule consists of {run.num_train_epochs} epochs with {order.iterations} iterations each.")
        log.line(f"[INFO] The accumulated time is set to {accumulation} so the training will be updated {updates} times during each epoch.")
        log.event(
            "start", run=self.name, resumed=bool(self.optimizer.resumed), epochs=run.num_train_epochs, iterations=order.iterations,
            accumulation=accumulation, examples=len(self.data), updates=self.updates,
        )  # fmt: skip
        self.started, self.done = time.monotonic(), 0
        self.signals.soft = True
        try:
            self.signals.check()
            while order.epoch < run.num_train_epochs:
                if self._epoch():
                    break
                order.next_epoch()
                self.losses = [0.0, 0]
        finally:
            self.signals.soft = False
        log.line("training complete!")
        log.event("end", updates=self.updates, seconds=round(time.monotonic() - self.started, 3), stats=self.optimizer.stats())

    def _stop(self) -> None:
        """Makes the last update durable, where it is not."""
        if self.pending is not None:
            self.optimizer.zero_grad()
            self._commit()
        self.optimizer.close()
        if self.updates:
            self.log.line(f"[INFO] stopped; the run {self.name} can be gone on with after update {self.updates}")
        else:
            self.log.line(f"[INFO] stopped before the first update of the run {self.name}")

    def _epoch(self) -> bool:
        """The rest of an epoch. True when it was the last because nothing gets better."""
        order, run = self.order, self.config.run
        if order.iteration == 0:
            self.log.stamped(f"[INFO] Beginning of Epoch {order.epoch + 1}/{run.num_train_epochs}, Total Micro Batches {order.iterations}")
        elif not self.saver.is_there(order.epoch, order.iteration - 1) and self._saves_now(order.iteration) and order.iteration < order.iterations:
            # Killed between the commit and the save.
            self._save("iteration")
        self.model.train()
        while order.iteration < order.iterations:
            self._iteration()
            self.signals.check()
        # Also after a resume at the end of an epoch: it is not known whether this was done.
        stop = self._judge()
        if not self.saver.is_there(order.epoch, order.iteration - 1):
            self._save("epoch")
        return stop

    def _iteration(self) -> None:
        order, log = self.order, self.log
        accumulation = self.config.accumulation
        epoch, iteration = order.epoch, order.iteration
        # The last update of an epoch has the iterations that are left.
        first = iteration - iteration % accumulation
        together = min(accumulation, order.iterations - first)
        began = time.monotonic()
        batch = {key: tensor.to(self.device) for key, tensor in self.data.batch(order.take()).items()}
        tokens = int(batch["attention_mask"].sum())
        log.stamped(f"[PHISON START] Epoch: {epoch}, Iteration: {iteration}")
        log.stamped("[Forward][start]")
        with self._autocast():
            loss = self.model(**batch, use_cache=False).loss
        value = loss.item()
        forward = time.monotonic() - began
        log.stamped(f"[Forward][time spent]:{forward}")
        log.stamped(f"[Loss]:{value}")
        if not math.isfinite(value):
            raise Diverged(
                f"the loss of epoch {epoch}, iteration {iteration} is {value}: the training has diverged and is stopped. "
                f"{self._last()} A lower learning_rate, a --clip-grad-norm, or other data may help; the same settings give the same again"
            )
        log.stamped("[Backward][start]")
        at = time.monotonic()
        (loss / together).backward()
        del loss
        self._synchronize()
        backward = time.monotonic() - at
        log.stamped(f"[Backward][time spent]:{backward}")
        self.losses = [self.losses[0] + value, self.losses[1] + 1]
        spent: Dict[str, Any] = {"forward_s": forward, "backward_s": backward}
        if iteration + 1 == first + together:
            spent.update(self._update())
        seconds = time.monotonic() - began
        self.done += 1
        left = self._left()
        log.stamped(f"[PHISON END] Iteration: {iteration}")
        log.stamped(f"[INFO] Training efficiency: {tokens / seconds} (tokens/s)")
        stats = self.optimizer.stats()
        held = ", ".join(f"{_plainly(key)} {human(size)}" for key, size in stats.items() if key in _TIERS or key.endswith("_bytes"))
        log.stamped(f"[INFO] update {self.updates}, {_duration(left)} left, {held}")
        log.event(
            "iteration", epoch=epoch, iteration=iteration, update=self.updates, loss=value, tokens=tokens, tokens_per_s=tokens / seconds,
            seconds_left=round(left, 1), seconds=seconds, stats=stats, **spent,
        )  # fmt: skip
        if self._saves_now(iteration + 1) and iteration + 1 < order.iterations:
            self._save("iteration")

    def _update(self) -> Dict[str, Any]:
        log, options, optimizer = self.log, self.options, self.optimizer
        log.stamped("[Update][Start]")
        at = time.monotonic()
        spent: Dict[str, Any] = {"lr": optimizer.param_groups[0]["lr"]}
        if options.clip_grad_norm is not None:
            norm = optimizer.clip_grad_norm_(options.clip_grad_norm)
            if not math.isfinite(spent.setdefault("grad_norm", float(norm))):
                raise Diverged(f"the norm of the gradients is {float(norm)}: the training has diverged and is stopped. {self._last()}")
        optimizer.step()
        self.schedule.step()
        optimizer.zero_grad()
        self._synchronize()
        self.updates += 1
        spent["update_s"] = time.monotonic() - at
        log.stamped(f"[Update][time spent]:{spent['update_s']}")
        self.pending = self._extra()
        # What is saved, is to be gone on from.
        now = self.order.iteration == self.order.iterations or self._saves_now(self.order.iteration)
        if self.options.plain:
            waited = time.monotonic() - self.committed_at
            now |= self.updates % self.commit_every == 0 if self.commit_every else waited > _COMMIT_SECONDS
        # The offload counts itself, and has to be told of each.
        if now or not self.options.plain:
            spent["commit_s"] = self._commit(wait=now)
        return spent

    def _extra(self) -> Dict[str, Any]:
        """All that a resume needs besides what the optimizer holds."""
        return {
            "settings": self._settings(),
            "life": self.saver.life,
            "position": self.order.state(),
            "updates": self.updates,
            "losses": self.losses,
            "best": self.best,
            "schedule": _schedule.save(self.schedule, self.optimizer),
            "rng": _rng(),
        }

    def _commit(self, wait: bool = True) -> float:
        at = time.monotonic()
        self.optimizer.commit(self.pending, wait=wait)
        self.pending, self.committed_at = None, time.monotonic()
        spent = self.committed_at - at
        if wait:
            self.log.stamped(f"[Commit][time spent]:{spent}")
        return spent

    def _save(self, kind: str) -> None:
        saver, run = self.saver, self.config.run
        if saver.folder is None:
            return
        self.log.stamped("[Save Model_Checkpoint][Start]")
        at = time.monotonic()

        def write(folder: str) -> None:
            if run.lora.enable_lora:
                trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
                self.model.save_pretrained(folder, state_dict={name: tensor for name, tensor in self.optimizer.weights() if name in trained})
            else:
                self.optimizer.save_pretrained(folder)
            if run.enable_save_optimizer_state and hasattr(self.optimizer, "save_state"):
                self.optimizer.save_state(os.path.join(folder, "optimizer.pt"))

        path = saver.save(kind, self.order.epoch, self.order.iteration - 1, self.updates, write)
        spent = time.monotonic() - at
        self.log.stamped(f"[Save Model_Checkpoint][time spent]:{spent}")
        self.log.stamped(f"The model stored this time includes {self.updates} update cycles.")
        self.log.event("save", path=path, kind=kind, update=self.updates, seconds=spent)

    def _judge(self) -> bool:
        """Validation, and whether to stop early."""
        early, log = self.config.run.early_stop, self.log
        loss = self.losses[0] / max(self.losses[1], 1)
        event: Dict[str, Any] = {"epoch": self.order.epoch, "train_loss": loss}
        if self.validation is not None:
            loss = event["validation_loss"] = self._validate(self.validation)
            log.stamped(f"[Validation][Loss]:{loss}")
        log.event("epoch", **event)
        if not early.enable:
            return False
        best, since = self.best
        if best is None or loss < best - early.min_delta:
            best, since = loss, 0
        else:
            since += 1
        self.best = (best, since)
        if early.verbose:
            log.stamped(f"[INFO] Early-stopping: loss {loss}, best {best}, {since} of {early.patience} epochs without getting better")
        if since >= early.patience:
            log.stamped(f"[INFO] Early-stopping: no better by {early.min_delta} for {since} epochs")
            return True
        return False

    def _validate(self, data: Data) -> float:
        """The mean loss of all tokens that are learned."""
        size = self.config.run.per_device_train_batch_size
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(data), size):
                self.signals.check()
                indexes: List[int] = list(range(start, min(start + size, len(data))))
                batch = {key: tensor.to(self.device) for key, tensor in data.batch(indexes).items()}
                learned = int((batch["labels"][:, 1:] != IGNORED).sum())
                with self._autocast():
                    total += self.model(**batch, use_cache=False).loss.item() * learned
                count += learned
        self.model.train()
        return total / max(count, 1)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed)

    def _left(self) -> float:
        order = self.order
        remaining = (self.config.run.num_train_epochs - order.epoch) * order.iterations - order.iteration
        return (time.monotonic() - self.started) / self.done * remaining

    def _last(self) -> str:
        if not self.updates:
            return "No update was made."
        return f"Update {self.updates} was the last; if that one spoilt the weights, models that were saved before it are what is left, and --fresh."

    def _synchronize(self) -> None:
        # Times would be those of asking, not of doing.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _plainly(key: str) -> str:
    return (key[: -len("_bytes")] if key.endswith("_bytes") else key).replace("_", " ")


def _rng() -> Dict[str, Any]:
    states = {"cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    if torch.cuda.is_available():
        states["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return states


def _set_rng(states: Dict[str, Any]) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(tensor(states["cpu"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(states["cuda"]))


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
