"""Saved models: folders in Hugging Face's layout that appear whole, of which the last few are kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import Any, Callable, Dict, List, Optional

from .._errors import InvalidArgument, NoSpace
from ._model import copy_beside

#: Says in a saved folder which run it is of; folders without it are never removed.
_MARK = "nvtier_train.json"
_OTHER = "move it away, or choose another output_dir"


class Saver:
    """Saves into ``folder``, or nowhere (None)."""

    def __init__(self, folder: Optional[str], source: str, run: str, epochs_kept: int, iterations_kept: int, where: str) -> None:
        self.folder, self._source, self._run, self._where = folder, source, run, where
        #: Tells a run from one of the same name that was forgotten.
        self.life = ""
        self._kept = {"epoch": epochs_kept, "iteration": iterations_kept}
        self._name = os.path.basename(os.path.abspath(source)).split("#")[-1]
        if folder is None:
            return
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(f"{where}: make {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InvalidArgument(f"{where}: {folder} cannot be written to")
        for name in os.listdir(folder):
            # Of a save that was killed.
            if name.endswith(self._part("")):
                shutil.rmtree(os.path.join(folder, name))

    def path(self, epoch: int, iteration: int) -> Optional[str]:
        """Where the model after an iteration goes."""
        return self.folder and os.path.join(self.folder, f"epoch_{epoch}_step_{iteration}_#{self._name}")

    def is_there(self, epoch: int, iteration: int) -> bool:
        """Whether this run saved that model already."""
        path = self.path(epoch, iteration)
        mark = None if path is None else self._mark(path)
        return mark is not None and mark.get("life") == self.life

    def check_names(self, will_be_saved: Callable[[int, int], bool]) -> None:
        """Refuses before anything is trained where a model that ``will_be_saved`` (of epoch and iteration) has the name of another's."""
        if self.folder is None:
            return
        for name in sorted(os.listdir(self.folder)):
            found = re.fullmatch(r"epoch_(\d+)_step_(\d+)_#(.*)", name)
            if not found or found[3] != self._name or self._mark(os.path.join(self.folder, name)) is not None:
                continue
            if will_be_saved(int(found[1]), int(found[2])):
                raise InvalidArgument(f"{self._where}: {os.path.join(self.folder, name)} is not of the run {self._run}, which would save a model there; {_OTHER}")

    def check(self, needed: int) -> None:
        """Refuses what would not fit, before anything is trained."""
        if self.folder is None:
            return
        free = free_bytes(self.folder)
        if free < needed:
            raise NoSpace(f"{self._where}: {self.folder} has {human(free)} free and a saved model needs about {human(needed)}")

    def save(self, kind: str, epoch: int, iteration: int, updates: int, write: Callable[[str], Any]) -> str:
        """Writes a model by ``write(folder)``, gives it its name when it is whole, and removes what is too old of that kind."""
        path = self.path(epoch, iteration)
        part = os.path.join(self.folder, self._part(f"epoch_{epoch}_step_{iteration}"))
        if os.path.exists(path) and self._mark(path) is None:
            raise InvalidArgument(f"save {path}: it is there already, and not of the run {self._run}; {_OTHER}")
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        try:
            write(part)
            copy_beside(self._source, part)
            mark = {"run": self._run, "life": self.life, "kind": kind, "epoch": epoch, "iteration": iteration, "updates": updates}
            with open(os.path.join(part, _MARK), "w") as file:
                json.dump(mark, file)
            _sync(part)
            if os.path.exists(path):
                shutil.rmtree(path)
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self._prune(kind)
        return path

    def _prune(self, kind: str) -> None:
        if self._kept[kind] < 0:
            return
        mine = []
        for name in os.listdir(self.folder):
            mark = self._mark(os.path.join(self.folder, name))
            if mark is not None and mark["kind"] == kind:
                # Those of a life before are the oldest, however long it was.
                mine.append((mark.get("life") == self.life, mark["updates"], os.path.join(self.folder, name)))
        for _, _, old in sorted(mine)[: -self._kept[kind]]:
            shutil.rmtree(old)

    def _part(self, name: str) -> str:
        return f".{name}.{self._run}.nvtier-part" if name else f".{self._run}.nvtier-part"

    def _mark(self, path: str) -> Optional[Dict[str, Any]]:
        try:
            with open(os.path.join(path, _MARK)) as file:
                mark = json.load(file)
            return mark if mark["run"] == self._run else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def human(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_bytes(folder: str) -> int:
    """What a file system still takes."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def _sync(folder: str) -> None:
    """All of a folder on the drive before it gets its name."""
    names: List[str] = [os.path.join(place, name) for place, _, files in os.walk(folder) for name in files]
    for name in (*names, folder):
        file = os.open(name, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
