"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Optional, Union

from ._errors import InvalidArgument

#: A number of bytes, or text: ``"20GiB"`` (2**30), ``"20GB"`` (10**9), ``"1.5T"``.
Size = Union[int, str]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def size_of(what: str, value: Optional[Size]) -> Optional[int]:
    """Bytes. ``what``: the argument's name, for the error."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise InvalidArgument(f"{what}={value}: bytes, 0 or more")
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", value.lower()) if isinstance(value, str) else None
    if match is None:
        raise InvalidArgument(f"{what}={value!r}: a number of bytes, or text such as '20GiB' or '20GB'")
    return int(float(match[1]) * _UNITS[match[2] or ""])
