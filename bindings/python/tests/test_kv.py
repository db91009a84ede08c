"""nvtier.kv: blocks between a store and tensors, here and through another process; what is never a hit."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from common import python

import nvtier

torch = pytest.importorskip("torch")

BLOCK = 8192


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pool"
    nvtier.format(path)
    return path


def rows(count, seed=0):
    """Blocks that differ from each other and within."""
    rng = random.Random(seed)
    return torch.frombuffer(bytearray(rng.randbytes(count * BLOCK)), dtype=torch.uint8).reshape(count, BLOCK).clone()


def chain(count, seed=b"x"):
    return nvtier.kv.chain(seed, list(range(16 * count)), 16)


def options(**more):
    return {"budget": 64 << 20, "ram": 8 << 20, **more}


def test_put_and_get(path):
    blocks, keys = rows(50), chain(50)
    with nvtier.kv.Store(path, **options()) as store:
        space = store.namespace(b"print", BLOCK)
        assert not space.is_remote and space.block_bytes == BLOCK and store.name == "default"
        assert space.lookup(keys) == 0
        assert space.put(keys[:40], blocks[:40]) == ["new"] * 40
        assert space.put(keys, blocks) == ["present"] * 40 + ["new"] * 10
        assert space.lookup(keys) == 50 and space.contains([keys[3], b"n" * 32]) == [True, False]
        for source in ("memory", "drive"):
            out = torch.zeros(50, BLOCK, dtype=torch.uint8)
            assert space.get(keys, out) == [source] * 50
            assert torch.equal(out, blocks)
            space.forget(keys)
        out = torch.zeros(50, BLOCK, dtype=torch.uint8)
        assert space.get([keys[7], b"n" * 32, keys[1]], out, [4, 5, 6]) == ["drive", "absent", "drive"]
        assert torch.equal(out[4], blocks[7]) and torch.equal(out[6], blocks[1]) and not out[:4].any() and not out[5].any()
        assert space.remove(keys[:1]) == 1 and space.lookup(keys) == 0
        assert space.get(keys[:1], out) == ["absent"]
        assert space.pin(keys) == 49
        stat = space.stat()
        assert stat["blocks"] == 49 and stat["pinned"] == 49 and stat["budget_bytes"] == 64 << 20
        space.flush()
        assert store.memory()["budget_bytes"] == 8 << 20
    with pytest.raises(nvtier.Closed):
        space.lookup(keys)


def test_planes_with_strides(path):
    """A cache as a model has it: layers of [1, heads, room, dim], of which blocks take tokens."""
    make = lambda: [torch.randn(1, 3, 40, 10, dtype=torch.float32) for _ in range(4)]
    ours, block = make(), 8
    with nvtier.kv.Store(path, **options()) as store:
        planes = nvtier.kv.Planes(ours, block)
        assert planes.block_bytes == 4 * 3 * 8 * 10 * 4
        space = store.namespace(b"print", planes.block_bytes)
        keys = nvtier.kv.chain(b"", list(range(40)), block)
        assert len(keys) == 5 and space.put(keys, planes) == ["new"] * 5
        for order in (torch.Tensor.contiguous, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
            space.forget(keys)
            theirs = [order(torch.zeros_like(tensor)) for tensor in ours]
            assert space.get(keys[1:4], nvtier.kv.Planes(theirs, block), [1, 2, 3]) == ["drive"] * 3
            for mine, other in zip(ours, theirs):
                assert torch.equal(mine[:, :, 8:32], other[:, :, 8:32]) and not other[:, :, :8].any() and not other[:, :, 32:].any()
        with pytest.raises(nvtier.NotSupported):
            nvtier.kv.Planes([ours[0], ours[1].double()], block)
        with pytest.raises(nvtier.InvalidArgument, match="bytes"):
            space.get(keys, nvtier.kv.Planes(ours[:2], block))
        with pytest.raises(nvtier.InvalidArgument):
            space.get(keys, planes, [0, 1, 2, 3, 5])
        with pytest.raises(nvtier.InvalidArgument):
            space.get(keys, planes, [0])
        with pytest.raises(nvtier.InvalidArgument):
            space.get([b"short"], planes)


def test_fingerprints_sizes_and_tenants_never_meet(path):
    blocks, keys = rows(3), chain(3)
    out = torch.zeros(3, BLOCK, dtype=torch.uint8)
    with nvtier.kv.Store(path, **options()) as store:
        store.namespace(b"a", BLOCK, "x").put(keys, blocks)
        for print_, tenant in ((b"b", "x"), (b"a", "y"), (b"a", "")):
            other = store.namespace(print_, BLOCK, tenant)
            assert other.lookup(keys) == 0 and other.get(keys, out) == ["absent"] * 3 and not out.any()
        half = store.namespace(b"a", BLOCK // 2, "x")
        assert half.get(keys, torch.zeros(3, BLOCK // 2)[:, : BLOCK // 8].contiguous()) == ["absent"] * 3


def test_quota_and_budget(path):
    with nvtier.kv.Store(path, **options(write_bytes_per_day=10 * BLOCK)) as store:
        space = store.namespace(b"a", BLOCK, "x")
        done = space.put(chain(12), rows(12))
        assert done.count("new") == 10 and done.count("budget") == 2
    with nvtier.kv.Store(path, "other", **options()) as store:
        space = store.namespace(b"a", BLOCK, "x")
        space.set_quota(4 * BLOCK)
        space.put(chain(12), rows(12))
        assert sum(space.contains(chain(12))) == 4


def test_quotas_are_of_tenants_and_stay_in_the_store(path):
    quotas = {"alice": 4 * BLOCK, "bob": f"{6 * BLOCK}"}
    with nvtier.kv.Store(path, **options(quotas=quotas, tenant_quota=2 * BLOCK)) as store:
        for tenant, most in (("alice", 4), ("bob", 6), ("carol", 2), ("", 12)):
            space = store.namespace(b"a", BLOCK, tenant)
            for n in range(12):
                assert space.put(chain(12)[n : n + 1], rows(12), [n]) == ["new"]
            # The newest stay, and of other tenants all.
            assert space.contains(chain(12)) == [False] * (12 - most) + [True] * most
    # Who opens it without a word about quotas meets the same, and who says other ones changes them.
    with nvtier.kv.Store(path, **options()) as store:
        space = store.namespace(b"other", BLOCK, "alice")
        assert space.put(chain(3), rows(3)) == ["new"] * 3
        assert sum(store.namespace(b"a", BLOCK, "alice").contains(chain(12))) == 1
    with nvtier.kv.Store(path, **options(quotas={"alice": 0, "bob": BLOCK})) as store:
        assert store.namespace(b"a", BLOCK, "alice").put(chain(12), rows(12)).count("new") == 11, "one is there"
        assert sum(store.namespace(b"a", BLOCK, "bob").contains(chain(12))) == 1


def test_arguments_that_make_no_sense(path):
    with nvtier.Pool(path) as pool:
        for bad in ({"deadline": 0}, {"deadline": -1}, {"ram": 5}, {"quotas": 5}, {"quotas": {1: 2}}, {"tenant_quota": "much"}):
            with pytest.raises(nvtier.InvalidArgument):
                nvtier.kv.Store(pool, **bad)
        with pytest.raises(nvtier.InvalidArgument, match=r"quotas\['alice'\]='-1'"):
            nvtier.kv.Store(pool, quotas={"alice": "-1"})
        with pytest.raises(nvtier.Error, match="tenant's name"):
            nvtier.kv.Store(pool, **options(quotas={"x" * 5000: 1})).namespace(b"a", BLOCK)
        with pytest.raises(nvtier.InvalidArgument):
            nvtier.kv.Store(pool, "../x").namespace(b"a", BLOCK)
        store = nvtier.kv.Store(pool, **options())
        for size in (0, 1 << 30):
            with pytest.raises(nvtier.InvalidArgument):
                store.namespace(b"a", size)
    with nvtier.Pool(path, read_only=True) as pool:
        with pytest.raises(nvtier.ReadOnly):
            nvtier.kv.Store(pool, **options()).namespace(b"a", BLOCK)
    with pytest.raises(nvtier.NotFound):
        nvtier.kv.Store(path.parent / "nothing")


def test_a_deadline_that_is_over_is_a_miss(path):
    blocks, keys = rows(3), chain(3)
    with nvtier.kv.Store(path, **options(keep=False)) as store:
        space = store.namespace(b"a", BLOCK)
        space.put(keys, blocks)
        out = torch.zeros(3, BLOCK, dtype=torch.uint8)
        assert space.get(keys, out, deadline=0) == ["failed"] * 3 and "deadline" in space.trouble
        assert space.put(chain(3, b"y"), blocks, deadline=0) == ["failed"] * 3
        assert space.get(keys, out) == ["drive"] * 3 and space.trouble is None and torch.equal(out, blocks)


def slabs(path):
    """The files that blocks are in: those that hold the first bytes of one."""
    return [entry for entry in path.rglob("*") if entry.is_file() and entry.stat().st_size >= BLOCK]


def test_damage_is_a_miss_of_its_block_alone(path):
    blocks, keys = rows(8), chain(8)
    with nvtier.kv.Store(path, **options()) as store:
        store.namespace(b"a", BLOCK).put(keys, blocks)
    damage = {
        1: lambda file, at: file.seek(at + 4000) and file.write(b"\x55" * 64),
        3: lambda file, at: file.seek(at) >= 0 and file.write(bytes(BLOCK)),
        5: lambda file, at: file.seek(at) >= 0 and file.write(blocks[6].numpy().tobytes()),
    }
    found = 0
    for name in slabs(path):
        content = name.read_bytes()
        for index, act in damage.items():
            at = content.find(blocks[index].numpy().tobytes()[:512])
            if at >= 0:
                found += 1
                with open(name, "r+b") as file:
                    act(file, at)
    assert found == 3
    with nvtier.kv.Store(path, **options()) as store:
        space = store.namespace(b"a", BLOCK)
        out = torch.zeros(8, BLOCK, dtype=torch.uint8)
        got = space.get(keys, out)
        assert [one for one in got] == ["corrupt" if index in damage else "drive" for index in range(8)]
        for index in range(8):
            assert torch.equal(out[index], blocks[index]) if index not in damage else not out[index].any()
        assert space.stat()["corrupt"] == 3
        assert space.put(keys, blocks).count("new") == 3
        space.forget(keys)
        assert space.get(keys, out) == ["drive"] * 8 and torch.equal(out, blocks)


OWNER = """
import sys, nvtier
pool = nvtier.Pool(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
pool.close()
"""

USER = """
import sys, random, torch, nvtier
path, seed, act = sys.argv[1], int(sys.argv[2]), sys.argv[3]
BLOCK = 8192
rng = random.Random(seed)
blocks = torch.frombuffer(bytearray(rng.randbytes(40 * BLOCK)), dtype=torch.uint8).reshape(40, BLOCK).clone()
keys = nvtier.kv.chain(str(seed).encode(), list(range(16 * 40)), 16)
with nvtier.kv.Store(path, budget=64 << 20, ram=8 << 20, keep=False) as store:
    space = store.namespace(b"print", BLOCK, "t")
    assert space.is_remote
    if act == "put":
        assert space.put(keys, blocks) == ["new"] * 40, space.trouble
        assert space.put(keys, blocks) == ["present"] * 40
    out = torch.zeros_like(blocks)
    assert space.lookup(keys) == 40
    assert space.get(keys, out) == ["drive"] * 40, space.trouble
    assert torch.equal(out, blocks)
    assert space.contains([b"n" * 16]) == [False] and space.get([b"n" * 16], out) == ["absent"]
    assert space.pin(keys[:2]) == 2
    space.flush()
    print(space.stat()["blocks"])
"""


@pytest.fixture
def owner(path):
    """Another process that owns the pool."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_processes_share_a_store_through_the_owner(path, owner):
    users = [
        subprocess.Popen([sys.executable, "-c", USER, str(path), str(seed), "put"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in (1, 2)
    ]
    outputs = [user.communicate(timeout=240)[0] for user in users]
    assert [user.returncode for user in users] == [0, 0], outputs
    # Another process than the one that put them.
    assert python(USER, path, 1, "get").split() == ["80"]
    # A block of 5 MB is more than a frame holds.
    with nvtier.kv.Store(path, ram=64 << 20) as store:
        space = store.namespace(b"large", 5 << 20)
        large = torch.arange(2 * (5 << 20) // 8, dtype=torch.int64).reshape(2, -1)
        assert space.is_remote and space.put(chain(2), large) == ["new"] * 2
        out = torch.zeros_like(large)
        space.forget(chain(2))
        assert space.get(chain(2), out) == ["drive"] * 2 and torch.equal(out, large)
        owner.stdin.write("\n")
        owner.stdin.flush()
    assert owner.wait(timeout=60) == 0
    with nvtier.kv.Store(path) as store:
        assert store.namespace(b"print", BLOCK, "t").stat()["blocks"] == 82


def test_an_owner_that_is_killed_is_a_miss_and_loses_nothing_that_was_flushed(path, owner):
    blocks, keys = rows(20), chain(20)
    with nvtier.kv.Store(path, **options(keep=False)) as store:
        space = store.namespace(b"a", BLOCK)
        assert space.put(keys, blocks) == ["new"] * 20
        space.flush()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        out = torch.zeros_like(blocks)
        assert space.get(keys, out) == ["failed"] * 20 and space.trouble and not out.any()
        assert space.put(keys, blocks) == ["failed"] * 20
        with pytest.raises(nvtier.Error):
            space.lookup(keys)
    with nvtier.kv.Store(path, **options(keep=False)) as store:
        space = store.namespace(b"a", BLOCK)
        assert not space.is_remote and space.get(keys, out) == ["drive"] * 20 and torch.equal(out, blocks)


def test_digests_know_every_byte():
    tensors = {"a": torch.arange(100_000, dtype=torch.float32), "b": torch.ones(3, 5)}
    digest = nvtier.kv.digest_tensors(tensors)
    assert digest == nvtier.kv.digest_tensors(dict(reversed(tensors.items()))) and len(digest) == 32
    others = [{**tensors, "c": torch.ones(1)}, {"a": tensors["a"], "b": torch.ones(5, 3)}, {"a": tensors["a"].to(torch.int32), "b": tensors["b"]}]
    changed = tensors["a"].clone()
    changed[77_777] += 1
    others.append({**tensors, "a": changed})
    assert len({digest, *map(nvtier.kv.digest_tensors, others)}) == 5


def test_keys_are_of_all_that_is_before():
    keys = nvtier.kv.chain(b"s", [1, 2, 3, 4, 5, 6, 7], 2)
    assert len(keys) == 3 and len(set(keys)) == 3
    assert nvtier.kv.chain(b"s", [1, 2, 3, 4], 2) == keys[:2]
    # What stands in the place of tokens makes its block another one, and all behind it.
    other = nvtier.kv.chain(b"s", [1, 2, 3, 4, 5, 6, 7], 2, [b"", b"cat", b""])
    assert other[0] == keys[0] and not set(other[1:]) & set(keys)
    assert nvtier.kv.chain(b"s", [1, 2, 3, 4, 5, 6, 7], 2, [b"", b"dog", b""])[1:] != other[1:]
    with pytest.raises(nvtier.InvalidArgument, match="2 extras for 3 blocks"):
        nvtier.kv.chain(b"s", [1, 2, 3, 4, 5, 6, 7], 2, [b"", b""])
    assert nvtier.kv.chain(b"s", [9, 2, 3, 4], 2)[1] != keys[1] and nvtier.kv.chain(b"t", [1, 2], 2)[0] != keys[0]
    assert nvtier.kv.fingerprint(a=1, b=b"x") == nvtier.kv.fingerprint(b=b"x", a=1) != nvtier.kv.fingerprint(a=1, b="x")
    with pytest.raises(nvtier.InvalidArgument):
        nvtier.kv.chain(b"", [1], 0)


def test_a_child_cannot_use_the_parents_store(path):
    with nvtier.kv.Store(path, **options()) as store:
        space = store.namespace(b"a", BLOCK)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                space.lookup(chain(1))
                told = "no error"
            except nvtier.Forked:
                told = "Forked"
            except BaseException as error:
                told = repr(error)
            os.write(write, json.dumps(told).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            assert json.load(pipe) == "Forked"
        os.waitpid(child, 0)
