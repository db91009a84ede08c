"""What is needed before a training: folders and pool, tokenizer and examples, model and optimizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import torch

from .._errors import InvalidArgument, NoSpace, NotADirectory, NotFound, NotSupported, OutOfHostMemory
from .._mounts import pool_mounted_at
from . import _model
from ._config import Config, find
from ._data import Data, Order
from ._log import Log
from ._plain import plain
from ._plain import remove as remove_plain
from ._saver import Saver, free_bytes, human
from ._signals import Signals

#: The pool below a drive's mount point.
_POOL = "nvtier-pool"


@dataclass(frozen=True)
class Options:
    """What the command line adds to the files."""

    pool: Optional[str] = None
    run: Optional[str] = None
    vram: Optional[str] = None
    ram: Optional[str] = None
    plain: bool = False
    #: Whether the model is not to be loaded into memory, also where there is room for it.
    lazy: bool = False
    #: Must there be a run to go on with; is one that is there not to be gone on with.
    resume: bool = False
    fresh: bool = False
    seed: int = 42
    clip_grad_norm: Optional[float] = None
    #: Updates between two commits; 0: about every ten minutes.
    commit_every: Optional[int] = None


class Prepared:
    """Everything that a training needs, checked and loaded in the order of what it costs."""

    def __init__(self, config: Config, options: Options, log: Log, signals: Signals) -> None:
        self.config, self.options, self.log, self.signals = config, options, log, signals
        run, paths = config.run, config.paths
        self.source = find(paths.model_name_or_path, paths.file)
        _model.check(self.source, paths.where("model_name_or_path"))
        self.name = options.run or _run_name(self.source)
        self.pool = self._pool()
        lora = run.lora.enable_lora
        key, section = ("lora_output_dir", paths.lora) if lora and paths.lora.lora_output_dir else ("output_dir", paths)
        saver = run.model_saver
        self.saver = Saver(
            section[key], self.source, self.name, saver.max_num_of_saved_model_on_epoch_end, saver.max_num_of_saved_model_on_iteration,
            section.where(key),
        )  # fmt: skip
        self._say("[INITIALIZE Tokenizer]")
        self.tokenizer = _model.tokenizer(self.source)
        self._say("[INITIALIZE Dataloader]")
        self.data = self._data(config.train)
        self.validation = self._data(config.validation) if config.validation else None
        self.order = Order(len(self.data), run.per_device_train_batch_size, options.seed, run.max_iter)
        self.saver.check_names(self._is_saved)
        self._say("[INITIALIZE Model]")
        torch.manual_seed(options.seed)
        self.model, self.optimizer = self._model()

    def _say(self, text: str) -> None:
        self.log.line(f"#### ======== {text} ======== ####")

    def _pool(self) -> str:
        """The pool's path. aiDAPTIV's ``nvme_path`` is where a drive is mounted: the pool is a folder there."""
        paths = self.config.paths
        pool = self.options.pool or paths.nvme_path
        where = "--pool" if self.options.pool else paths.where("nvme_path")
        if not os.path.exists(pool):
            raise NotFound(f"{where}: there is no {pool}; it is where an NVMe drive is mounted, or a pool (`nvtier format`)")
        holds_pool = os.path.exists(os.path.join(pool, "superblock"))
        if self.options.plain:
            if not os.path.isdir(pool):
                raise NotADirectory(f"{where}: with --plain it must be a folder, {pool} is none")
            if holds_pool:
                raise InvalidArgument(f"{where}: {pool} is the folder of a pool, and --plain keeps ordinary files; name another with --pool")
            return pool
        mounted = pool_mounted_at(pool)
        if mounted is not None:
            return mounted
        if os.path.isdir(pool) and not holds_pool:
            import nvtier

            pool = os.path.join(pool, _POOL)
            if not os.path.exists(pool):
                nvtier.format(pool)
                self.log.line(f"[INFO] made the pool {pool}")
        return pool

    def _data(self, sets: Any) -> Data:
        for each in sets:
            self.log.line(f"[INFO] get dataset name:  {each.data_path}  training_strategy:  {each.strategy}")
        data = Data(sets, self.tokenizer, self.config.run.max_seq_len)
        self.log.line(f"[INFO] {len(data)} examples of {data.tokens} tokens")
        if data.cut or data.left_out:
            self.log.line(f"[WARNING] {data.cut} examples were cut to max_seq_len, {data.left_out} left out: nothing to learn was left of them")
        return data

    def _model(self) -> Tuple[torch.nn.Module, Any]:
        config, options, run = self.config, self.options, self.config.run
        self.mixed = run.precision_mode == 1
        self.lazy = self._check_room()
        self.log.line(f"[INFO] [create_hf_model] init from {'config' if run.from_config else 'pretrained'}")
        model = (_model.skeleton if self.lazy else _model.load)(self.source, run)
        name = type(model).__name__
        attention = getattr(model.config, "_attn_implementation", None) or "eager"
        self.log.line(f"[INFO] You are loading [{name}] with {attention} attention")
        self.log.line(f"[INFO] You are setting [{name}] with Gradient Checkpointing")
        longest = max(len(example.ids) for data in (self.data, self.validation) if data for example in data.examples)
        highest = max(data.highest for data in (self.data, self.validation) if data)
        _model.fits(model, highest, min(longest, run.max_seq_len), lambda text: self.log.line(f"[WARNING] {text}"))
        if run.lora.enable_lora:
            model = _model.adapters(model, config.paths, run)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in model.parameters())
        self.log.line(f"[INFO] {trained} of {total} parameters are trained on {'the GPU' if torch.cuda.is_available() else 'the CPU: there is no GPU'}")
        if run.lora.enable_lora:
            self.saver.check((4 if self.mixed else 2) * trained)
        self.log.line(f"[INFO] create current swap data path: {self.pool}, run {self.name}")
        settings = run.optimizer
        common: Dict[str, Any] = {
            "pool": self.pool,
            "run": self.name,
            "precision": "mixed" if self.mixed else "bf16",
            "resume": True if options.resume else False if options.fresh else "auto",
            "lr": run.lr_scheduler.learning_rate,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        return self._plain(model, common) if options.plain else self._offload(model, common)

    def _check_room(self) -> bool:
        """Refuses, before anything is loaded, what memory or the place of saved models has no room for. (The offload looks at the pool.) Returns whether the
        weights go from their files into the pool, without having been in memory together."""
        run, options = self.config.run, self.options
        outline = _model.outline(self.source, run)
        size = sum(parameter.numel() * parameter.element_size() for parameter in outline.parameters())
        free = _available()
        lazy = options.lazy or free < size and not options.plain
        why = _model.lazy(self.source, run) if lazy else None
        if options.lazy and why is not None:
            raise NotSupported(f"--lazy: {why}")
        if free < size and (options.plain or why is not None):
            text = f"load the model {self.source}: it takes {human(size)} of the host's memory while it is loaded, and {human(free)} are free"
            raise OutOfHostMemory(text if why is None else f"{text}; {why}")
        if not run.lora.enable_lora:
            self.saver.check(size)
        if lazy:
            self.log.line(f"[INFO] weights of {human(size)} go from their files into the pool, a layer at a time ({human(free)} of the host's memory are free)")
        return lazy

    def _plain(self, model: torch.nn.Module, common: Dict[str, Any]) -> Tuple[torch.nn.Module, Any]:
        if self.options.fresh:
            remove_plain(self.pool, self.name)
        model, optimizer = plain(model, **common)
        # Old and new for a moment; what is there already is old.
        free, needed = free_bytes(self.pool), 2 * optimizer.state_bytes() - optimizer.stats()["nvme"]
        if free < needed:
            raise NoSpace(f"{self.pool} has {human(free)} free and the state of the run needs {human(needed)} there, old and new")
        return model, optimizer

    def _offload(self, model: torch.nn.Module, common: Dict[str, Any]) -> Tuple[torch.nn.Module, Any]:
        options, accumulate = self.options, self.config.accumulation > 1
        try:
            from nvtier.train import offload, plan, remove
        except ImportError as error:
            raise NotSupported(f"this build of nvtier has no nvtier.train.offload ({error}); models that fit into memory train with --plain") from error
        if options.fresh:
            import nvtier

            with nvtier.Pool(self.pool) as opened:
                remove(opened, self.name)
        needs = plan(model, precision=common["precision"], accumulate=accumulate)
        vram, ram = options.vram, options.ram
        if vram is None and torch.cuda.is_available():
            # The other half is for activations, of which nobody knows before.
            free = torch.cuda.mem_get_info()[0]
            vram = str(max(free // 2, min(needs["least_vram"], free)))
        if ram is None:
            ram = str(_available() // 2)
        self.log.line(f"[INFO] state of {human(needs['state'])}, at least {human(needs['least_vram'])} of it on the device while it is used")
        self.log.line(f"[INFO] an update reads up to {human(needs['read'])} and writes up to {human(needs['written'])}, less what the host's memory keeps")
        return offload(
            model, torch.optim.AdamW, vram=vram, ram=ram, accumulate=accumulate, commit_every=options.commit_every or 1,
            weights=self.source if self.lazy else None, **common,
        )  # fmt: skip

    def _is_saved(self, epoch: int, iteration: int) -> bool:
        """Whether the model after an iteration is one that is saved."""
        iterations = iteration + 1
        return epoch < self.config.run.num_train_epochs and (iterations == self.order.iterations or self._saves_now(iterations) and iterations < self.order.iterations)

    def _saves_now(self, iterations: int) -> bool:
        saver = self.config.run.model_saver
        return saver.enable_save_model_on_iteration and iterations % saver.num_of_iteration_to_save_model == 0


def _run_name(source: str) -> str:
    name = os.path.basename(os.path.abspath(source))
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip("._-") or "run"


def _available() -> int:
    """Bytes of memory that may be taken."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
