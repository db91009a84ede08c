"""Everyday programs on a mount: what people and scripts do with files."""

import hashlib
import json
import os
import shutil

import pytest

from conftest import in_child, run


def need(program):
    if not shutil.which(program):
        pytest.skip(f"no {program} on this machine")


def tree(root):
    """Relative path -> (kind, mode, size or target, digest) of everything below a folder."""
    found = {}
    for folder, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            entry = [oct(status.st_mode), int(status.st_mtime)]
            if os.path.islink(path):
                entry = ["link", os.readlink(path)]
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    entry += [status.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
            else:
                entry = [oct(status.st_mode)]
            found[os.path.relpath(path, root)] = entry
    return found


@pytest.fixture
def sample(native):
    """A small tree with everything a copy can get wrong."""
    root = native / "sample"
    (root / "deep/er/and deeper").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "zero").write_bytes(b"")
    (root / "deep/one").write_bytes(b"1")
    (root / "deep/er/odd").write_bytes(os.urandom(1_234_567))
    (root / "deep/er/and deeper/naïve name").write_bytes(b"x" * 4097)
    (root / ("n" * 255)).write_bytes(b"long name")
    (root / "run").write_text("#!/bin/sh\nexit 0\n")
    (root / "run").chmod(0o750)
    (root / "link").symlink_to("deep/one")
    (root / "dangling").symlink_to("nowhere")
    with open(root / "sparse", "wb") as file:
        file.seek(3_000_000)
        file.write(b"end")
    os.utime(root / "deep/one", ns=(10**18, 10**18 + 123_456_789))
    return root


def test_copy_there_and_back(mount, native, sample):
    run("cp", "-a", sample, mount / "copy")
    assert tree(mount / "copy") == tree(sample)
    run("cp", "-r", "--preserve=mode,timestamps,links", mount / "copy", native / "back")
    assert tree(native / "back") == tree(sample)


def test_checksums_of_a_model(model_on_mount, model):
    sums = run("sh", "-c", "find . -type f ! -name .ready -print0 | sort -z | xargs -0 sha256sum", cwd=model)
    assert sums.count("\n") >= 9
    listing = model_on_mount.parent / "SHA256SUMS"
    listing.write_text(sums)
    run("sha256sum", "--check", "--strict", "--quiet", listing, cwd=model_on_mount)
    listing.unlink()


def test_rsync_with_checksums(mount, sample):
    need("rsync")
    run("rsync", "-a", "--checksum", f"{sample}/", f"{mount}/copy/")
    assert tree(mount / "copy") == tree(sample)
    # A second run finds nothing to do; after a change it moves exactly that file.
    again = run("rsync", "-a", "--checksum", "--itemize-changes", f"{sample}/", f"{mount}/copy/")
    assert again == ""
    with open(sample / "deep/er/odd", "r+b") as file:
        file.seek(600_000)
        file.write(b"changed")
    changed = run("rsync", "-a", "--checksum", "--itemize-changes", "--inplace", f"{sample}/", f"{mount}/copy/")
    assert [line.split(" ", 1)[1] for line in changed.splitlines() if line.startswith(">f")] == ["deep/er/odd"]
    assert tree(mount / "copy") == tree(sample)


@pytest.mark.parametrize("flag", ["direct", "dsync", "direct,dsync"])
def test_dd(mount, native, flag):
    source = native / "source"
    source.write_bytes(os.urandom(24 << 20))
    run("dd", f"if={source}", f"of={mount}/copy", "bs=1M", f"oflag={flag}", "status=none")
    run("cmp", source, mount / "copy")
    run("dd", f"if={mount}/copy", f"of={native}/back", "bs=1M", "iflag=direct", "status=none")
    run("cmp", source, native / "back")
    # A part in the middle, in place.
    patch = os.urandom(8192)
    (native / "patch").write_bytes(patch)
    run("dd", f"if={native}/patch", f"of={mount}/copy", "bs=4096", "seek=100", "conv=notrunc", f"oflag={flag}", "status=none")
    with open(mount / "copy", "rb") as file:
        data = file.read()
    want = source.read_bytes()
    assert data == want[:409_600] + patch + want[409_600 + 8192 :]


@pytest.mark.parametrize(
    "engine,rw,direct",
    [(engine, rw, direct) for engine, rw in [("psync", "write"), ("psync", "randwrite"), ("io_uring", "randwrite")] for direct in [0, 1]]
    + [("mmap", "randwrite", 0)],
)
def test_fio_verify(mount, engine, rw, direct):
    need("fio")
    report = run(
        "fio", "--name=v", f"--filename={mount}/f", f"--rw={rw}", f"--ioengine={engine}", f"--direct={direct}", "--size=16m",
        "--bs=4k-64k", "--bs_unaligned=0", "--blockalign=4k", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        "--randseed=20261124", "--serialize_overlap=1", "--output-format=json", "--fallocate=none", cwd=mount.parent,
    )  # fmt: skip
    job = json.loads(report[report.index("{") :])["jobs"][0]
    assert job["error"] == 0 and job["write"]["total_ios"] > 0 and job["read"]["total_ios"] > 0


def test_tar(mount, sample):
    run("tar", "-cf", mount / "a.tar", "-C", sample.parent, sample.name)
    (mount / "out").mkdir()
    run("tar", "-xf", mount / "a.tar", "-C", mount / "out", "--same-permissions")
    assert tree(mount / "out" / sample.name) == tree(sample)
    run("tar", "--compare", "-f", mount / "a.tar", "-C", mount / "out")


def test_git(mount, sample):
    need("git")
    work = mount / "repo"
    quiet = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    git = ["git", "-C", work, "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.fsync=all"]
    run("git", "init", "--quiet", "-b", "main", work, env=quiet)
    run("cp", "-a", f"{sample}/.", work)
    run(*git, "add", "-A", env=quiet)
    run(*git, "commit", "--quiet", "-m", "first", env=quiet)
    (work / "deep/one").write_text("changed")
    run(*git, "commit", "--quiet", "-am", "second", env=quiet)
    run(*git, "checkout", "--quiet", "-b", "side", "HEAD~1", env=quiet)
    assert (work / "deep/one").read_text() == "1"
    (work / "side").write_text("side")
    run(*git, "add", "side", env=quiet)
    run(*git, "commit", "--quiet", "-m", "side", env=quiet)
    run(*git, "merge", "--quiet", "-m", "merge", "main", env=quiet)
    run(*git, "gc", "--quiet", "--prune=now", env=quiet)
    run(*git, "fsck", "--full", "--strict", "--no-dangling", env=quiet)
    assert run(*git, "status", "--porcelain", env=quiet) == ""
    run("git", "clone", "--quiet", "--no-hardlinks", work, mount / "clone", env=quiet)
    assert (mount / "clone/deep/one").read_text() == "changed"
    assert int(run("git", "-C", mount / "clone", "rev-list", "--count", "HEAD", env=quiet)) == 4


def test_database(mount, native):
    """SQLite: locks, journal, write-ahead log with its shared mapping."""

    def work(folder):
        import sqlite3

        result = []
        for mode in ["delete", "wal"]:
            first = sqlite3.connect(folder / f"{mode}.db", timeout=0)
            assert first.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
            first.execute("create table t (k integer primary key, v blob)")
            first.executemany("insert into t values (?, randomblob(1000))", [(i,) for i in range(500)])
            first.commit()
            first.execute("begin immediate")
            second = sqlite3.connect(folder / f"{mode}.db", timeout=0)
            try:
                second.execute("begin immediate")
                result.append("not locked")
            except sqlite3.OperationalError as error:
                result.append(str(error))
            first.execute("update t set v = zeroblob(5000) where k % 3 = 0")
            first.commit()
            result.append(second.execute("select sum(length(v)) from t").fetchone()[0])
            result.append(second.execute("pragma integrity_check").fetchone()[0])
        return result

    assert in_child(work, mount) == in_child(work, native)
