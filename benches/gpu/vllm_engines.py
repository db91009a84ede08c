"""Engines of vLLM in processes of their own, for `vllm_serve.py`. The next process imports vLLM while the one before it works: importing takes
longer than most of what is measured."""

import contextlib
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
IMPORT_S = 120
CLOSE_S = 40
#: Lines of an engine's log that are kept.
TOLD = re.compile(
    r"Loading weights took|Model loading took|attention backend|FlashAttention version|Asynchronous scheduling|GPU KV cache size|"
    r"nvtier|cudaHostRegister|cannot store|init engine|Available KV cache memory",
)


class Failed(Exception):
    """An engine did not do what it was to do; the text says what it said last."""


class Worker:
    """A process that has imported vLLM, or is about to."""

    def __init__(self, log, env):
        self.log = log
        self.lines = queue.Queue()
        self._file = open(log, "w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "vllm_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file, text=True, env=env, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith(("READY", "RESULT ", "CLOSED")):
                self.lines.put(line.rstrip("\n"))
            else:
                self._file.write(line)
                self._file.flush()
        self.lines.put(None)

    def wait(self, word, limit):
        """The line that begins with the word."""
        by = time.monotonic() + limit
        while True:
            try:
                line = self.lines.get(timeout=max(by - time.monotonic(), 0.01))
            except queue.Empty:
                raise Failed(f"no {word} after {limit:.0f} s\n{self.tail()}") from None
            if line is None:
                raise Failed(f"ended with {self.process.wait()} before {word}\n{self.tail()}")
            if line.startswith(word):
                return line

    def tail(self, lines=40):
        self._file.flush()
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def told(self):
        """What of its log is kept."""
        self._file.flush()
        return [line[:400] for line in self.log.read_text(errors="replace").splitlines() if TOLD.search(line)][:200]

    def end(self):
        """Ends it and whatever it started."""
        # The engine is a process of its own, which may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)
        self._file.close()


class Engines:
    """One engine after the other."""

    def __init__(self, out, env):
        self.out = pathlib.Path(out)
        self.env = {**os.environ, **env}
        self.spare = None
        self.made = 0

    def _spawn(self):
        self.made += 1
        return Worker(self.out / f"log-{os.getpid()}-{self.made}.txt", self.env)

    def prepare(self):
        """Begins to import vLLM."""
        if self.spare is None:
            self.spare = self._spawn()

    def set(self, env):
        """Other settings for those to come."""
        self.drop()
        self.env.update(env)

    def run(self, order, limit, more=True):
        """What an engine does with an order; `more`: another one is to come."""
        worker, self.spare = self.spare or self._spawn(), None
        name = order["name"]
        try:
            worker.wait("READY", IMPORT_S)
            if more:
                self.prepare()
            worker.process.stdin.write(json.dumps(order) + "\n")
            worker.process.stdin.close()
            result = json.loads(worker.wait("RESULT ", limit)[7:])
            worker.wait("CLOSED", CLOSE_S)
            # Whoever comes next opens what it has open.
            result["exit"] = worker.process.wait(CLOSE_S)
            result["notes"] = worker.told()
        except subprocess.TimeoutExpired:
            raise Failed(f"it does not end after it was closed\n{worker.tail()}") from None
        except OSError as error:
            raise Failed(f"{error}\n{worker.tail()}") from None
        finally:
            worker.end()
            kept = self.out / f"log-{name}.txt"
            worker.log.replace(kept)
        return result

    def drop(self):
        """Ends the one that waits for work."""
        if self.spare is not None:
            self.spare.end()
            self.spare.log.unlink(missing_ok=True)
            self.spare = None
