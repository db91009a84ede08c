"""What the tests of the package share."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

MIB = 1 << 20
LIMIT_S = 240


def safetensors(tensors, metadata=None):
    """A safetensors file of {name: (dtype, shape, bytes)}."""
    header, data, end = {}, [], 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(raw)]}
        data.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def gguf(tensors):
    """A GGUF file of {name: (ggml type number, dimensions as GGUF has them, bytes)}."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0), b""
    for name, (kind, dimensions, raw) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def python(code, *args, env=None, fine=True):
    """Runs code in a Python of its own and gives its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if fine:
        assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_stopped(pid):
    """Waits until every thread of a process stands still: a signal takes its time."""
    end = time.monotonic() + LIMIT_S
    states = None
    while states != {"T"}:
        assert time.monotonic() < end, f"process {pid} does not stop: {states}"
        states = set()
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stat") as file:
                states.add(file.read().rpartition(")")[2].split()[0])


class StallingDrive:
    """A pool on a drive that can stop answering: an image on a file system of a process of ours, which is stopped and told to go on. What the kernel was
    asked for meanwhile is with the kernel, as it is with a drive that hangs.

    Nobody but this class may look at the path while it is stopped: that would wait, too."""

    def __init__(self, folder, size):
        outer, self._mount = folder / "outer", folder / "drive"
        self._mount.mkdir()
        self._program = os.environ.get("NVTIER_BIN") or shutil.which("nvtier")
        if not self._program:
            pytest.skip("no nvtier program: NVTIER_BIN is not set")
        self._call("format", outer, "--raw", "--size", str(2 * size))
        # Served by the daemon, as what lies in a raw pool is.
        self._daemon = subprocess.Popen([self._program, "mount", outer, self._mount, "--foreground"], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + LIMIT_S
        while not os.path.ismount(self._mount):
            if self._daemon.poll() is not None:
                pytest.skip(f"mounting is not possible here: {self._daemon.stderr.read()}")
            assert time.monotonic() < deadline, "the mount does not come"
            time.sleep(0.01)
        self.pool = self._mount / "pool"
        #: Whether it answers.
        self.answers = True
        try:
            self._call("format", self.pool, "--raw", "--size", str(size))
        except BaseException:
            self.close()
            raise

    def _call(self, *arguments):
        done = subprocess.run([self._program, *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr

    def stop(self):
        self._daemon.send_signal(signal.SIGSTOP)
        wait_stopped(self._daemon.pid)
        self.answers = False
        # Should something wait for it after all, the test fails and does not hang.
        self._rescue = threading.Timer(60, self.go_on)
        self._rescue.start()

    def go_on(self):
        """Where it answers already, nothing."""
        if self.answers:
            return
        self.answers = True
        self._daemon.send_signal(signal.SIGCONT)
        self._rescue.cancel()

    def close(self):
        """Ends it. What was asked for while it was stopped may keep its files open for as long as this process lives."""
        self.go_on()
        self._daemon.kill()
        self._daemon.wait(LIMIT_S)
        self._daemon.stderr.close()
        for command in (["umount", "-l"], ["fusermount3", "-u", "-z"]):
            with contextlib.suppress(FileNotFoundError):
                if subprocess.run([*command, self._mount], capture_output=True, timeout=LIMIT_S, check=False).returncode == 0:
                    break
        assert not os.path.ismount(self._mount)
