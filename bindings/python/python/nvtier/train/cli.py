"""``python -m nvtier.train.cli``: what ``nvtier train`` runs. See docs/guides/train.md."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
import traceback
from typing import Any, List, Optional

from .. import _errors

#: Exit codes, those of the `nvtier` command.
FAILED, USAGE, NOT_FOUND, BUSY, CORRUPT, NO_SPACE, UNSUPPORTED = 1, 2, 3, 4, 5, 6, 7

_CODES = (
    (_errors.InvalidArgument, USAGE),
    (_errors.NotFound, NOT_FOUND),
    (_errors.NotAPool, NOT_FOUND),
    (_errors.PoolBusy, BUSY),
    (_errors.Corrupt, CORRUPT),
    (_errors.NoSpace, NO_SPACE),
    (_errors.OutOfMemory, NO_SPACE),
    (_errors.NotSupported, UNSUPPORTED),
    (_errors.NoDevice, UNSUPPORTED),
)

_EPILOG = """\
Exit codes: 0 complete, 1 failed (also a loss that is no number), 2 wrong usage or configuration, 3 not found, 4 busy, 5 corrupt data, 6 no
space, 7 not supported here, 130 and 143 stopped by SIGINT and SIGTERM (the same command goes on from the last update)."""


def _size(text: str) -> str:
    if not re.fullmatch(r"[0-9]+([KMGT]i?B?|B)?", text):
        raise argparse.ArgumentTypeError(f"`{text}` is no size: write 20GiB, 512M (powers of 1024) or 10GB (powers of 1000)")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"`{text}` is no name: letters, digits, `.`, `_` and `-`")
    return text


def _at_least(least: float, kind: Any) -> Any:
    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = least - 1
        if not number >= least or number == float("inf"):
            raise argparse.ArgumentTypeError(f"`{text}` is no number from {least:g}")
        return number

    return parse


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="nvtier train",
        description="Fine-tune a model as aiDAPTIV's YAML files say, on VRAM, RAM and NVMe.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--env_config", "--env-config", required=True, metavar="FILE", help="paths: model, data, pool, output")
    made.add_argument("--exp_config", "--exp-config", required=True, metavar="FILE", help="batch, epochs, learning rate, ...")
    made.add_argument("--pool", metavar="POOL", help="pool, or where it is mounted [default: nvme_path of the file]")
    made.add_argument("--run", type=_name, metavar="NAME", help="name of the run in the pool [default: the model's]")
    made.add_argument("--vram", type=_size, metavar="SIZE", help="memory of the GPU for weights, gradients and states [default: half of what is free]")
    made.add_argument("--ram", type=_size, metavar="SIZE", help="memory of the host that may be used [default: half of what is free]")
    made.add_argument("--plain", action="store_true", help="without tiers, by torch's own AdamW: for models that fit")
    made.add_argument("--lazy", action="store_true", help="do not load the model into memory [default: only where that has no room for it]")
    again = made.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="fail where there is no run to go on with [default: go on where there is one]")
    again.add_argument("--fresh", action="store_true", help="forget a run of that name and begin anew")
    made.add_argument("--seed", type=_at_least(0, int), default=42, metavar="N", help="of the order of examples, dropout, new weights [42]")
    made.add_argument("--clip-grad-norm", type=_at_least(0, float), metavar="NORM", help="scale gradients to this global norm at most")
    made.add_argument(
        "--commit-every", type=_at_least(1, int), metavar="N", help="make every Nth update durable [1; with --plain: one in ten minutes]"
    )
    made.add_argument("--check", action="store_true", help="read the files, say what is wrong with them, and do nothing")
    made.add_argument("--json", action="store_true", help="JSON lines on standard output, errors as JSON")
    made.add_argument("--quiet", action="store_true", help="nothing on standard output; the log file has it")
    made.add_argument("--debug", action="store_true", help="tracebacks of errors")
    return made


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command and gives its exit code."""
    from ._signals import Interrupted, Signals

    args = parser().parse_args(argv)
    signals = Signals()
    try:
        _run(args, signals)
        return 0
    except Interrupted as stopped:
        _report(args, 128 + stopped.number, "Interrupted", f"stopped by {stopped}")
        return 128 + stopped.number
    except BrokenPipeError:
        return FAILED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        code, text = _code(error), _text(error)
        _report(args, code, type(error).__name__, text)
        return code


def _run(args: argparse.Namespace, signals: Any) -> None:
    _packages(["yaml"])
    from . import _config

    config = _config.load(args.env_config, args.exp_config)
    gpus = config.process.specify_gpus
    if gpus is not None:
        # Before torch is imported.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.strip()
    if args.plain:
        for name in ("vram", "ram", "lazy"):
            if getattr(args, name):
                raise _errors.InvalidArgument(f"--{name} has no effect with --plain, which keeps everything on the device")
    if args.check:
        _check(args, config)
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Each would be a training of its own, and all of them of one run.
        raise _errors.NotSupported(
            f"nvtier train is one process, and WORLD_SIZE={os.environ['WORLD_SIZE']} is set, as torchrun does: run it without; "
            "several GPUs train by nvtier.train.offload in a loop of your own (docs/guides/training.md)"
        )
    _packages(["torch", "transformers"])
    from ._log import Log
    from ._loop import train
    from ._setup import Options

    log = Log(config.paths.log_name, "none" if args.quiet else "json" if args.json else "text")
    try:
        for text in config.warnings:
            log.line(f"[WARNING] {text}")
        names = ("pool", "run", "vram", "ram", "plain", "lazy", "resume", "fresh", "seed", "clip_grad_norm", "commit_every")
        options = Options(**{name: getattr(args, name) for name in names})
        try:
            train(config, options, log, signals)
        except Exception as error:
            log.error(type(error).__name__, _text(error))
            raise
    finally:
        log.close()


def _check(args: argparse.Namespace, config: Any) -> None:
    """Says what the files amount to."""
    from ._config import find

    if args.json:
        found = {"warnings": config.warnings, "paths": config.paths, "process": config.process, "run": config.run}
        print(json.dumps({**found, "train": config.train, "validation": config.validation, "accumulation": config.accumulation}, indent=2))
        return
    for text in config.warnings:
        print(f"[WARNING] {text}")
    model = find(config.paths.model_name_or_path, config.paths.file)
    print(f"model       {model}" + ("" if os.path.isdir(model) else " (not there)"))
    for each in (*config.train, *config.validation):
        print(f"{'validation' if each in config.validation else 'data':<10}  {each.name}: {each.data_path}, {each.strategy}")
    run = config.run
    print(f"iterations  of {run.per_device_train_batch_size} examples, {config.accumulation} an update, {run.num_train_epochs} epochs")


def _packages(names: List[str]) -> None:
    from importlib.util import find_spec

    missing = ["PyYAML" if name == "yaml" else name for name in names if find_spec(name) is None]
    if missing:
        install = "pip install 'nvtier[train]'" if missing == ["PyYAML"] else f"pip install {' '.join(missing)}"
        raise _errors.NotSupported(f"{sys.executable} has no {' and no '.join(missing)}: {install}")


def _code(error: Exception) -> int:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    # safetensors has an exception of its own for all.
    return NO_SPACE if f"(os error {errno.ENOSPC})" in str(error) else FAILED


def _text(error: Exception) -> str:
    if isinstance(error, _errors.Error):
        return str(error)
    name = type(error).__name__
    if name == "OutOfMemoryError":
        return f"out of memory of the GPU: {error}. Smaller per_device_train_batch_size or max_seq_len, or without --plain"
    return f"{name}: {error}"


def _report(args: argparse.Namespace, code: int, kind: str, text: str) -> None:
    if args.json:
        text = json.dumps({"error": {"code": code, "kind": kind, "message": text, "hint": None}})
    else:
        text = "nvtier: error: " + text.replace("\n", "\nnvtier: error: ")
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
