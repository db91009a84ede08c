"""What a training says: aiDAPTIV's lines on the terminal and in a log file, and the same as JSON lines in a second file."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime
from typing import Any, Optional

from .._errors import Error


class Log:
    """Lines for people on the terminal and in ``path``; events for programs in the file beside it that ends with ``.jsonl``."""

    def __init__(self, path: Optional[str], terminal: str = "text") -> None:
        #: "text", "json" or "none".
        self._terminal = terminal
        path = path or datetime.now().strftime("Phison_%Y-%m-%d-%H-%M-%S.log")
        self.path = path
        self.events_path = os.path.splitext(path)[0] + ".jsonl"
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._text = open(path, "a", encoding="utf-8", buffering=1)
            self._events = open(self.events_path, "a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise Error(f"open the log {path}: {error.strerror}; path_settings.log_name names it") from error

    def line(self, text: str) -> None:
        """A line as it is."""
        self._text.write(text + "\n")
        if self._terminal == "text":
            self._print(text)

    def stamped(self, text: str) -> None:
        """A line with the time before it, as aiDAPTIV writes those of the loop."""
        self.line(f"[{datetime.now()}] {text}")

    def event(self, name: str, **values: Any) -> None:
        """A line of JSON."""
        text = json.dumps({"event": name, "time": round(time.time(), 3), **values})
        self._events.write(text + "\n")
        if self._terminal == "json":
            self._print(text)

    def error(self, kind: str, text: str) -> None:
        """What ended the training, for the files; the terminal has it on standard error."""
        self._text.write(f"[ERROR] {text}\n")
        self._events.write(json.dumps({"event": "error", "time": round(time.time(), 3), "kind": kind, "message": text}) + "\n")

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # Who read along went away (`| head`): no reason to stop a training, and the file has everything.
            self._terminal = "none"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        self._text.close()
        self._events.close()
