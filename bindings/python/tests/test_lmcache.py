"""LMCache's second tier in a pool: LMCache's own adapter, factory and benchmark over `nvtier.lmcache.NvtierClient`, without a GPU.

LMCache is too heavy for the tests' environment: `cargo xtask test --suite vllm` gets it and runs this; elsewhere what needs it is skipped."""

import argparse
import hashlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys

import numpy as np
import pytest

import nvtier
from nvtier.lmcache import NvtierClient

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

SIZE = 128 << 10
LIMIT_S = 120


@pytest.fixture
def pool(tmp_path):
    nvtier.format(tmp_path / "pool")
    return str(tmp_path / "pool")


@pytest.fixture(scope="module")
def lmcache():
    try:
        import lmcache.v1.distributed.l2_adapters as adapters
        import lmcache.v1.distributed.l2_adapters.config  # noqa: F401
    except ImportError as error:
        # The suite that brings LMCache must not pass without it.
        if os.environ.get("NVTIER_SUITE") == "lmcache":
            raise
        pytest.skip(f"no LMCache here: {error}")
    return adapters


def client(pool, **options):
    return NvtierClient(pool, **{"budget": 256 << 20, "ram": 32 << 20, "fingerprint": "f", **options})


def key(n, salt=""):
    text = f"some/model@{n % 2:08x}@0@{hashlib.sha256(b'key %d' % n).hexdigest()}"
    return f"{text}@{salt}" if salt else text


def content(n, size=SIZE):
    """Unique for each block and within it."""
    row = np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8)
    row[:32] = np.frombuffer(hashlib.sha256(b"key %d" % n).digest(), dtype=np.uint8)
    return row


def wait(client, batch):
    """The result of a batch, as whoever polls its descriptor gets it."""
    poller = select.poll()
    poller.register(client.event_fd(), select.POLLIN)
    for _ in range(LIMIT_S):
        if not poller.poll(1000):
            continue
        for done, fine, why, good in client.drain_completions():
            if done == batch:
                return fine, why, good
    raise AssertionError(f"batch {batch} does not end")


def store(client, numbers, salt="", size=SIZE):
    views = [memoryview(content(n, size)) for n in numbers]
    return wait(client, client.submit_batch_set([key(n, salt) for n in numbers], views))


def load(client, numbers, salt="", size=SIZE):
    """Which blocks come; their bytes are compared, and memory of those that do not come is as it was."""
    memory = np.full((len(numbers), size), 0xA5, dtype=np.uint8)
    fine, _, good = wait(client, client.submit_batch_get([key(n, salt) for n in numbers], [memoryview(row) for row in memory]))
    assert fine == all(good)
    for n, row, there in zip(numbers, memory, good):
        assert (row == (content(n, size) if there else 0xA5)).all(), f"block {n} is not what was stored"
    return [n for n, there in zip(numbers, good) if there]


def there(client, numbers, salt=""):
    fine, _, good = wait(client, client.submit_batch_exists([key(n, salt) for n in numbers]))
    assert fine
    return [n for n, there in zip(numbers, good) if there]


def test_blocks_come_back_also_after_a_restart_and_to_others_sizes(pool):
    numbers = list(range(40))
    with_ = client(pool)
    assert there(with_, numbers) == []
    assert store(with_, numbers) == (True, "", [True] * 40)
    assert store(with_, [100, 101], size=SIZE // 2)[0] and store(with_, [102], size=5000)[0]
    assert there(with_, [*numbers, 50, 100, 101, 102]) == [*numbers, 100, 101, 102]
    assert load(with_, [*numbers, 50]) == numbers
    assert store(with_, numbers[:4])[0]
    stat = with_.stat()
    assert (stat["stored"], stat["present"], stat["loaded"], stat["lost"]) == (43, 4, 40, 1)
    with_.close()
    with_.close()
    again = client(pool)
    try:
        assert there(again, [3, 50, 101, 102]) == [3, 101, 102]
        assert load(again, numbers) == numbers
        assert load(again, [100, 101], size=SIZE // 2) == [100, 101] and load(again, [102], size=5000) == [102]
        assert load(again, [102], size=SIZE) == [], "of another size is of no use"
        fine, _, was = wait(again, again.submit_batch_delete([key(3), key(50), key(101)]))
        assert fine and was == [True, False, True]
        assert there(again, [2, 3, 101, 102]) == [2, 102]
        assert wait(again, again.submit_batch_exists([])) == (True, "", [])
    finally:
        again.close()


def test_salts_and_other_weights_never_meet(pool):
    first = client(pool)
    assert store(first, range(6), "alice")[0]
    assert there(first, range(6)) == there(first, range(6), "bob") == []
    assert load(first, range(6), "bob") == [] and load(first, range(6), "alice") == list(range(6))
    # One batch of both.
    keys = [key(0, "alice"), key(1, "bob"), key(2, "alice")]
    assert wait(first, first.submit_batch_exists(keys))[2] == [True, False, True]
    first.close()
    other = client(pool, fingerprint="of other weights")
    try:
        assert there(other, range(6), "alice") == []
    finally:
        other.close()


def where(pool, numbers):
    """File and place of each block."""
    places = {}
    for path in sorted(p for p in pathlib.Path(pool).rglob("*") if p.is_file()):
        raw = path.read_bytes()
        for n in numbers:
            at = raw.find(content(n).tobytes())
            if at >= 0:
                places[n] = (path, at)
    assert len(places) == len(numbers)
    return places


@pytest.mark.parametrize("damage", ["flip", "zero", "swap"])
def test_damage_is_a_miss_and_harms_no_neighbour(pool, damage):
    numbers = list(range(12))
    first = client(pool)
    assert store(first, numbers)[0]
    first.close()
    places = where(pool, numbers)
    for n in (3, 7):
        path, at = places[n]
        new = bytearray(content(n).tobytes())
        if damage == "flip":
            for i in range(64):
                new[SIZE // 2 + i] ^= 255
        elif damage == "zero":
            new = bytearray(SIZE)
        else:
            new = bytearray(content(n + 1).tobytes())
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(new)
    second = client(pool)
    try:
        good = [n for n in numbers if n not in (3, 7)]
        assert load(second, numbers) == good
        assert second.stat()["corrupt"] == 2
        assert there(second, numbers) == good, "what is bad is dropped"
        assert store(second, [3, 7])[0]
        assert load(second, numbers) == numbers, "a later store makes it whole"
    finally:
        second.close()


def test_a_file_that_was_cut_costs_its_own_blocks_only(pool):
    numbers = list(range(160))
    first = client(pool)
    assert store(first, numbers)[0]
    first.close()
    places = where(pool, numbers)
    files = sorted({path for path, _ in places.values()})
    assert len(files) > 1
    gone = [n for n in numbers if places[n][0] == files[0]]
    os.truncate(files[0], places[gone[len(gone) // 2]][1] + 4096)
    second = client(pool)
    try:
        found = load(second, numbers)
        assert set(numbers) - set(gone) <= set(found) and not set(gone) <= set(found)
        assert store(second, sorted(set(numbers) - set(found)))[0]
        assert load(second, numbers) == numbers
    finally:
        second.close()


def test_late_is_a_miss_and_a_refusal_is_told(pool):
    first = client(pool)
    assert store(first, range(8))[0]
    first.close()
    # Over before anything begins: all of them are late.
    late = client(pool, deadline=1e-9)
    assert there(late, range(8)) == list(range(8)) and load(late, range(8)) == []
    stat = late.stat()
    assert (stat["loaded"], stat["load_failed"], stat["lost"], stat["corrupt"]) == (0, 8, 0, 0)
    late.close()
    again = client(pool)
    assert load(again, range(8)) == list(range(8)), "late is not lost"
    again.close()
    picky = client(pool, store="picky", second_offer=1000)
    try:
        fine, why, good = store(picky, [1])
        assert not fine and "admission" in why and good == [False]
        assert store(picky, [1]) == (True, "", [True])
    finally:
        picky.close()


def test_a_salt_cannot_grow_beyond_its_quota(pool):
    first = client(pool, quotas={"alice": 4 * SIZE}, tenant_quota=f"{2 * SIZE}")
    try:
        for salt, most in (("alice", 4), ("bob", 2), ("", 8)):
            for n in range(8):
                assert store(first, [n], salt)[0]
            assert there(first, range(8), salt) == list(range(8 - most, 8))
    finally:
        first.close()
    # It is in the store.
    again = client(pool)
    try:
        for n in range(20, 28):
            assert store(again, [n], "alice")[0]
        assert there(again, [*range(8), *range(20, 28)], "alice") == list(range(24, 28))
    finally:
        again.close()


def test_what_makes_no_sense_is_refused(pool):
    for options, match in (({"threads": 0}, "threads"), ({"deadline": 0}, "deadline"), ({"fingerprint": 3}, "fingerprint")):
        with pytest.raises(nvtier.InvalidArgument, match=match):
            client(pool, **options)
    with pytest.raises(TypeError, match="budgget"):
        client(pool, budgget=1)
    one = client(pool)
    try:
        with pytest.raises(nvtier.InvalidArgument, match="model@rank"):
            one.submit_batch_exists(["nonsense"])
        with pytest.raises(nvtier.InvalidArgument, match="read-only"):
            one.submit_batch_get([key(1)], [memoryview(b"123")])
        with pytest.raises(nvtier.InvalidArgument, match="no bytes"):
            one.submit_batch_set([key(1)], [memoryview(b"")])
        with pytest.raises(nvtier.InvalidArgument, match="buffers"):
            one.submit_batch_set([key(1), key(2)], [memoryview(b"1")])
        with pytest.raises(nvtier.InvalidArgument, match="gaps"):
            one.submit_batch_set([key(1)], [memoryview(np.zeros(64, dtype=np.uint8)[::2])])
    finally:
        one.close()
    with pytest.raises(nvtier.Closed):
        one.submit_batch_exists([key(1)])


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import test_lmcache as t
one = t.client(sys.argv[1])
for start in range(0, 4000, 8):
    assert t.store(one, list(range(start, start + 8)))[0]
    if start == 64:
        one._store.namespace(one._print, t.SIZE).flush()
    print(start, flush=True)
"""


def test_a_kill_loses_nothing_that_was_flushed_and_serves_nothing_wrong(pool):
    child = subprocess.Popen([sys.executable, "-c", CHILD, pool, os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    try:
        for start in range(0, 96, 8):
            assert f"{start}\n" in child.stdout, f"the child ended before {start}"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    one = client(pool)
    try:
        assert set(range(72)) <= set(load(one, range(104)))
    finally:
        one.close()


def config(pool, **params):
    return {
        "type": "native_plugin",
        "module_path": "nvtier.lmcache",
        "class_name": "NvtierClient",
        "adapter_params": {"pool": pool, "budget": 256 << 20, "ram": 32 << 20, **params},
    }


def test_lmcaches_adapter_stores_finds_loads_and_deletes(lmcache, pool):
    import torch
    from lmcache.cli.commands.bench.l2_adapter_bench import data
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.platform import consume_fd

    parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(config(pool))]))
    adapter = lmcache.create_l2_adapter(parsed.adapters[0])
    try:
        keys = [ObjectKey(chunk_hash=bytes([n]) * 32, model_name="m", kv_rank=n % 2, cache_salt="alice" if n % 3 else "") for n in range(9)]
        stored, loaded = torch.empty(9 * SIZE, dtype=torch.uint8), torch.zeros(9 * SIZE, dtype=torch.uint8)
        objects = data.make_memory_objects(stored, 9, SIZE, 0)
        stored.random_(generator=torch.Generator().manual_seed(1))
        places = data.make_memory_objects(loaded, 9, SIZE, 0)
        loaded.zero_()

        def told(fd):
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            assert poller.poll(LIMIT_S * 1000), "the adapter says nothing"
            consume_fd(fd)

        task = adapter.submit_store_task(keys[:8], objects[:8])
        told(adapter.get_store_event_fd())
        assert adapter.pop_completed_store_tasks()[task].is_successful()
        task = adapter.submit_lookup_and_lock_task(keys, {})
        told(adapter.get_lookup_and_lock_event_fd())
        found = adapter.query_lookup_and_lock_result(task)
        assert [found.test(n) for n in range(9)] == [True] * 8 + [False]
        adapter.submit_unlock(keys)
        task = adapter.submit_load_task(keys, places)
        told(adapter.get_load_event_fd())
        came = adapter.query_load_result(task)
        assert [came.test(n) for n in range(9)] == [True] * 8 + [False]
        assert torch.equal(loaded[: 8 * SIZE], stored[: 8 * SIZE]) and not loaded[8 * SIZE :].any()
        adapter.delete(keys[:2])
        task = adapter.submit_lookup_and_lock_task(keys, {})
        told(adapter.get_lookup_and_lock_event_fd())
        found = adapter.query_lookup_and_lock_result(task)
        assert [found.test(n) for n in range(9)] == [False] * 2 + [True] * 6 + [False]
    finally:
        adapter.close()


@pytest.mark.parametrize("flight", [1, 4])
def test_lmcaches_benchmark_verifies_what_it_loads(lmcache, pool, flight):
    done = subprocess.run(
        [sys.executable, "-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", json.dumps(config(pool)), "--no-skip-verify",
         "--rounds", "3", "--in-flight", str(flight), "--l1-align-bytes", "4096"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S * 2, check=False,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    assert "keys data verified OK" in out, out
