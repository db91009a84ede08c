"""Mounts of pools: a path on one of them means the pool."""

from __future__ import annotations

import os
import re
from typing import Optional, Union


def pool_mounted_at(path: Union[str, "os.PathLike[str]"]) -> Optional[str]:
    """The pool whose mount a path lies on; None: it lies on none."""
    best, found = "", None
    real = os.path.realpath(path)
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields = line.split()
            place, kind, source = (_unescaped(fields[index]) for index in (4, fields.index("-") + 1, fields.index("-") + 2))
            inside = real == place or real.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(best):
                best, found = place, source if kind == "fuse.nvtier" else None
    return found


def _unescaped(text: str) -> str:
    """Of mountinfo, which writes blanks and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
