"""Fixtures of the framework tests: real mounts made by the `nvtier` command, and the same acts on the native file system.

`cargo xtask test --suite frameworks` sets the environment:
NVTIER_BIN      the command
NVTIER_SCRATCH  a folder on a disk file system (the native side of every comparison)
NVTIER_MODEL    a folder with model.gguf and snapshot/ (SmolLM2-135M-Instruct)
NVTIER_QUICK    set: one kind of mount only
NVTIER_PLAIN    set: a plain folder instead of a mount, to work on the tests themselves
"""

import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import traceback

import pytest

LIMIT_S = 300
KINDS = {
    # Reads pass through the kernel where it allows that.
    "directory": ([], []),
    # An image file: every byte is served by the daemon.
    "raw": (["--raw", "--size", "4GiB"], []),
    # A directory, but every read goes through the daemon and is checked.
    "verified": ([], ["--verify", "always"]),
}


def run(*command, **options):
    """Runs a program to its end and returns its output; fails with everything it said."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT_S,
        **options,
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{text}"
    return text


def _child(pipe, function, args):
    try:
        pipe.send((True, function(*args)))
    except BaseException:  # whatever it was, the parent reports it
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def in_child(function, *args):
    """Calls a function in a child process and returns its result.

    Frameworks keep files mapped for as long as they like; a child gives everything back, so that the mount can be
    taken down, and a hang or crash hits only itself.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, function, args), daemon=False)
    child.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT_S), f"{function.__name__} did not end within {LIMIT_S} s"
        fine, result = ours.recv()
    except EOFError:
        child.join(LIMIT_S)
        pytest.fail(f"{function.__name__} died with exit code {child.exitcode}")
    finally:
        if child.is_alive() and not ours.closed:
            child.join(20)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        ours.close()
    if not fine:
        pytest.fail(f"{function.__name__}{args}:\n{result}", pytrace=False)
    return result


def same_act(mount, native, function, *args):
    """Does the same on the mount and on the native file system; returns the result if both agree."""
    expected = in_child(function, native, *args)
    got = in_child(function, mount, *args)
    assert got == expected
    return got


@pytest.fixture(scope="session")
def nvtier():
    """The command."""
    path = os.environ.get("NVTIER_BIN")
    if not path:
        pytest.skip("NVTIER_BIN is not set: run this through `cargo xtask test`")
    return path


@pytest.fixture(scope="session")
def scratch():
    """A folder on the native file system."""
    base = os.environ.get("NVTIER_SCRATCH")
    if base:
        os.makedirs(base, exist_ok=True)
    path = pathlib.Path(tempfile.mkdtemp(prefix="py-", dir=base))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def model():
    """Folder with model.gguf and snapshot/."""
    path = os.environ.get("NVTIER_MODEL")
    if not path:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    return pathlib.Path(path)


class Place:
    """A mount, and what made it."""

    def __init__(self, kind, root, pool):
        self.kind = kind
        self.root = root
        self.pool = pool


def _kinds():
    return ["directory"] if os.environ.get("NVTIER_QUICK") else list(KINDS)


@pytest.fixture(scope="session", params=_kinds())
def place(request, scratch):
    """A mounted pool of each kind. At the end it must come down cleanly and its bytes must fit their sums."""
    kind = request.param
    folder = scratch / kind
    root, pool = folder / "mnt", folder / "pool"
    root.mkdir(parents=True)
    if os.environ.get("NVTIER_PLAIN"):
        yield Place(kind, root, pool)
        return
    nvtier = request.getfixturevalue("nvtier")
    format_options, mount_options = KINDS[kind]
    run(nvtier, "format", pool, *format_options)
    run(nvtier, "mount", pool, root, "--ram", "256MiB", *mount_options)
    assert os.path.ismount(root)
    yield Place(kind, root, pool)
    run(nvtier, "umount", root)
    assert not os.path.ismount(root)
    run(nvtier, "verify", "--pool", pool)


@pytest.fixture
def mount(place, request):
    """A new folder on the mount for one test."""
    return _folder(place.root, request)


@pytest.fixture
def native(place, scratch, request):
    """A new folder on the native file system for one test."""
    return _folder(scratch / f"native-{place.kind}", request)


def _folder(base, request):
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    path = base / name
    path.mkdir(parents=True)
    request.addfinalizer(lambda: shutil.rmtree(path))
    return path


@pytest.fixture(scope="session")
def model_on_mount(place, model):
    """The model, copied into the mount as a person would."""
    target = place.root / "model"
    run("cp", "-r", model, target)
    return target
