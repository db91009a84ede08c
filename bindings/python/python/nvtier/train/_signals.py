"""SIGINT and SIGTERM: a clean stop at the next place where one can be made; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Optional


class Interrupted(BaseException):
    """A signal came. Not an ``Exception``, which libraries on the way would swallow."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """The handlers. ``soft`` while the training loop runs, which looks at ``number`` itself; otherwise a signal interrupts what is done."""

    def __init__(self) -> None:
        self.number: Optional[int] = None
        self.soft = False
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._came)

    def _came(self, number: int, frame: Optional[FrameType]) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if not self.soft:
            raise Interrupted(number)

    def check(self) -> None:
        """Raises when a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)
